"""What a certificate says of its corpus: a pure function of the config, the manifest and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.prepared import Manifest
from tokenbound.corpus.sources.fields import (
    ANSWER_KEYS,
    EVERYWHERE,
    LimitFields,
    PartFields,
    SpecialTokenFields,
)
from tokenbound.corpus.windows import CorpusPlan

FACTS = ("python",)
"""Facts of sources that have a key of their own; others stand among the options."""

ELSEWHERE = ("vocab_size",)
"""Keys whose value the certificate gives under another name, whatever the source."""


@dataclass(frozen=True)
class CorpusDecisions:
    """How many binary decisions the windows of a corpus have along a tree."""

    num_decisions: int
    """Of all windows together."""
    max_window_decisions: int
    """Of the window that has most of them."""


def corpus_section(
    config: CorpusConfig,
    manifest: Manifest,
    plan: CorpusPlan,
    *,
    context: str,
    skipped: Mapping[str, int],
    num_documents: int | None = None,
    decisions: CorpusDecisions | None = None,
) -> dict[str, Any]:
    """The `corpus` section of a certificate; everything in it can be recomputed where the corpus is at hand.

    Args:
        config: the corpus.
        manifest: of its prepared form.
        plan: its windows.
        context: `document` or `packed`.
        skipped: files of the places named that are not part of it, by the name of the rule.
        num_documents: documents with a scored token, where the claim has a line for documents.
        decisions: of all windows, where a sample has a line for them.
    """
    source = config.reader()
    scored_bytes = manifest.predicted_bytes(context)
    facts = source.facts()
    options = {key: value for key, value in source.fields.model_dump(mode="json").items() if _is_own(key)}
    options |= {key: value for key, value in facts.items() if key not in FACTS}
    return {
        "source": config.source,
        **{key: getattr(config, key) for key in source.located_by if not _is_own(key)},
        "paths": list(config.paths),
        **{key: getattr(config, key) for key in _keys_shown(config)},
        **({"options": options} if options else {}),
        "tokenizer": config.tokenizer,
        "files": sum(len(segment.files) for segment in manifest.segments),
        "skipped": dict(skipped),
        **({"empty_files": manifest.empty_files} if source.has_files and manifest.empty_files else {}),
        "segments": len(manifest.segments),
        "documents": manifest.documents,
        **({"documents_with_replacements": manifest.replaced_documents} if config.errors == "replace" else {}),
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes or None,
        "scored_text_bytes": scored_bytes,
        "bytes_per_token": bytes_per_token(manifest, plan, context),
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        **{key: facts[key] for key in FACTS if key in facts},
        **({} if num_documents is None else {"scored_documents": num_documents}),
        **({} if decisions is None else asdict(decisions)),
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


def _keys_shown(config: CorpusConfig) -> list[str]:
    """Shared keys that decide what is read, in the order of the config, where they apply."""
    source = config.reader()
    hidden = {*source.located_by, *ELSEWHERE, *LimitFields.model_fields}
    shown = source.keys() - EVERYWHERE - source.ignored().keys() - hidden
    if config.tokenizer == "bytes":
        shown -= SpecialTokenFields.model_fields.keys()
    if config.part is None:
        shown -= PartFields.model_fields.keys()
    shown -= {key for key in ANSWER_KEYS if getattr(config, key) == CorpusConfig.model_fields[key].default}
    return [key for key in CorpusConfig.model_fields if key in shown]


def _is_own(key: str) -> bool:
    """Whether only one source has a key."""
    return key not in CorpusConfig.model_fields
