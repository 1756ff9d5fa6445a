"""What a certificate says of its corpus: a pure function of the config, the manifest and the plan."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from tokenbound.config import APPLIES_TO, CorpusConfig
from tokenbound.corpus.prepared import Manifest
from tokenbound.corpus.windows import CorpusPlan

KEYS_SHOWN = ("text_field", "encoding", "errors", "special_tokens", "dtype", "eos_id")
"""Keys of the config that decide what is read, shown where they apply."""

DATASET_KEYS = ("name", "subset", "split", "revision")
"""Keys of `hf`, all of them shown there."""


def corpus_section(
    config: CorpusConfig,
    manifest: Manifest,
    plan: CorpusPlan,
    *,
    context: str,
    skipped: Mapping[str, int],
    num_documents: int | None = None,
) -> dict[str, Any]:
    """The `corpus` section of a certificate; everything in it can be recomputed where the corpus is at hand.

    Args:
        config: the corpus.
        manifest: of its prepared form.
        plan: its windows.
        context: `document` or `packed`.
        skipped: files of the places named that are not part of it, by the name of the rule.
        num_documents: documents with a scored token, where the claim has a line for documents.
    """
    scored_bytes = manifest.predicted_bytes(context)
    return {
        "source": config.source,
        **({key: getattr(config, key) for key in DATASET_KEYS} if config.source == "hf" else {}),
        "paths": list(config.paths),
        **{key: getattr(config, key) for key in KEYS_SHOWN if _applies(key, config)},
        "tokenizer": config.tokenizer,
        "files": sum(len(segment.files) for segment in manifest.segments),
        "skipped": dict(skipped),
        **({"empty_files": manifest.empty_files} if config.source != "hf" and manifest.empty_files else {}),
        "segments": len(manifest.segments),
        "documents": manifest.documents,
        **({"documents_with_replacements": manifest.replaced_documents} if config.errors == "replace" else {}),
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes or None,
        "scored_text_bytes": scored_bytes,
        "bytes_per_token": bytes_per_token(manifest, plan, context),
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        **({"python": _python()} if config.source == "python-stdlib" else {}),
        **({} if num_documents is None else {"scored_documents": num_documents}),
    }


def bytes_per_token(manifest: Manifest, plan: CorpusPlan, context: str) -> float | None:
    """Bytes of text per predicted token, counting the bytes of predicted tokens alone; None where there are none.

    A document's first token has no context and is predicted by no window (packed: that of a stream), so its bytes are
    not counted, except behind BOS. Where a token's bytes are not known exactly, too few are counted: bits per byte are
    then at most too large.

    Args:
        manifest: of the prepared corpus.
        plan: its windows.
        context: `document` or `packed`.
    """
    scored_bytes = manifest.predicted_bytes(context)
    return None if scored_bytes is None else scored_bytes / plan.num_tokens


def _applies(key: str, config: CorpusConfig) -> bool:
    if config.source not in APPLIES_TO[key]:
        return False
    if key == "special_tokens":
        return config.tokenizer != "bytes"
    return not (key in ("encoding", "errors") and config.keeps_bytes)


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} ({' '.join(platform.python_build())})"
