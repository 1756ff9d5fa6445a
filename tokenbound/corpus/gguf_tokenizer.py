"""The tokenizer inside a GGUF file, as transformers converts it.

A GGUF file stores vocabulary and merges, and names how text is cut before merges apply (`tokenizer.ggml.pre`). Where
transformers does not know that name it cuts as GPT-2 does, which gives other ids; a name that is not known here either
is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbound.errors import InputError
from tokenbound.gguf_file import GgufFile, read_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

_LIKE_GPT2 = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"})
"""Cut as GPT-2 cuts, which is what transformers does unless it knows better."""
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Cut as GPT-2 cuts, after every digit was set apart."""


def read_gguf_tokenizer(path: Path) -> tuple[dict[str, Any], int | None, int | None]:
    """The tokenizer of a GGUF file.

    Returns:
        Its ``tokenizer.json`` as JSON data, and the ids of BOS and EOS.

    Raises:
        InputError: the file is not sound, has no tokenizer, or one that cannot be converted.
    """
    file = read_gguf(path)
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if kind is None or not isinstance(tokens, list):
        raise InputError(f"what.corpus.tokenizer: {path} holds no tokenizer (tokenizer.ggml.tokens); name another one")
    cut = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind == "gpt2":
        _require_known(path, cut)
    elif file.metadata.get("tokenizer.ggml.add_space_prefix") is False and not file.architecture.startswith("gemma"):
        raise InputError(
            f"what.corpus.tokenizer: {path} says add_space_prefix: false, which transformers does not convert; give "
            "the model's own tokenizer.json"
        )
    definition, size = _converted(path), len(tokens)
    # Its classes bring special tokens of their own, behind the vocabulary: the model has no logits for them.
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < size]
    if cut in _DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    return definition, _id(file, "bos_token_id"), _id(file, "eos_token_id")


def _require_known(path: Path, cut: object) -> None:
    if cut in _LIKE_GPT2 | _DIGITS_APART | _converted_cuts():
        return
    raise InputError(
        f"what.corpus.tokenizer: {path} cuts text in a way that is not known here (tokenizer.ggml.pre: "
        f"{str(cut)[:40]!r}); give the model's own tokenizer.json"
    )


def _converted_cuts() -> frozenset[str]:
    """The names of what transformers converts beside GPT-2's way."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # before transformers 5.2x: it converted by the model's architecture
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _converted(path: Path) -> dict[str, Any]:
    """What transformers makes of it."""
    try:
        definition: dict[str, Any] = json.loads(_pipeline(path).to_str())
    except Exception as error:  # transformers raises many kinds here; each means that this tokenizer cannot be used
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"what.corpus.tokenizer: the tokenizer of {path} cannot be converted ({reason}); give the model's own "
            "tokenizer.json"
        ) from None
    return definition


def _pipeline(path: Path) -> Pipeline:
    try:  # what AutoTokenizer does, without reading the whole metadata twice more in Python
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
    except ImportError:
        from transformers import AutoTokenizer

        pipeline: Pipeline = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
        return pipeline
    architecture, stored, _ = get_gguf_tokenizer(str(path))
    return convert_gguf_tokenizer(architecture, stored)[0]


def _id(file: GgufFile, name: str) -> int | None:
    """A special token's id, if it is one."""
    tokens, value = file.metadata["tokenizer.ggml.tokens"], file.metadata.get(f"tokenizer.ggml.{name}")
    is_id = isinstance(value, int) and isinstance(tokens, list) and 0 <= value < len(tokens)
    return value if is_id and isinstance(value, int) else None
