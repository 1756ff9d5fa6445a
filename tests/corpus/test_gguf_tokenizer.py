"""The tokenizer inside a GGUF file gives the ids of the one that was converted, or is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf_support import LLAMA, llama_tensors, write_gguf
from gguf_support import llama as random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenbound.corpus.tokenizers import load_tokenizer, tokenizer_from_bytes
from tokenbound.errors import InputError

SENTENCES = ["the cat sat on 12 mats  12", "the dog sat on the log 1234", "  3 cats and a dog's"] * 5
TEXTS = ["the cat sat  1234", "don't\n\n  12x", "<|end|> dog", "héllo 日本", ""]
NORMAL, CONTROL = 1, 3


def trained(*, digits_apart: bool = False) -> Tokenizer:
    pipeline = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if digits_apart else []
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(SENTENCES, trainer)
    return pipeline


def keys_of(pipeline: Tokenizer, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    vocab = sorted(pipeline.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(pipeline.to_str())["model"]["merges"]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [CONTROL if token == "<|end|>" else NORMAL for token, _ in vocab],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return {key: value for key, value in found.items() if value is not None}


def written(path: Path, tokenizer: dict[str, Any]) -> str:
    return str(write_gguf(path, "llama", LLAMA, llama_tensors(random_llama()), tokenizer))


@pytest.mark.parametrize(("cut", "digits_apart"), [("gpt-2", False), ("smollm", True)])
def test_ids_are_those_of_the_tokenizer_that_was_converted(cut: str, digits_apart: bool, tmp_path: Path) -> None:
    """transformers cuts as GPT-2 does where it does not know the way: `smollm` sets digits apart."""
    pipeline = trained(digits_apart=digits_apart)
    tokenizer = load_tokenizer(written(tmp_path / "m.gguf", keys_of(pipeline, pre=cut)))
    pipeline.encode_special_tokens = True
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == pipeline.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    assert tokenizer.special_texts == ("<|end|>",)
    assert tokenizer.vocab_size == len(pipeline.get_vocab())
    assert tokenizer_from_bytes(tokenizer.files()).digest == tokenizer.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "of-tomorrow"}, r"cuts text in a way that is not known here \(tokenizer\.ggml\.pre: 'of-tomorrow'\)"),
        ({"model": None}, r"holds no tokenizer"),
        ({"tokens": None}, r"holds no tokenizer"),
        ({"model": "none"}, r"cannot be converted"),
        ({"bos_token_id": 1 << 20}, r"cannot be converted"),
        ({"merges": ["a b c", "q"]}, r"cannot be converted"),
        ({"model": "llama", "add_space_prefix": False}, r"add_space_prefix: false"),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load_tokenizer(written(tmp_path / "m.gguf", keys_of(trained(), **changes)))
    assert "\n" not in str(refused.value)


def test_a_revision_of_a_tokenizer_on_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    trained().save(str(tmp_path / "tokenizer.json"))

    def hf_hub_download(repository: str, name: str, *, revision: str | None = None) -> str:
        asked[name] = (repository, revision)
        return str(tmp_path / "tokenizer.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with suppress(InputError):  # its settings are not there; what matters is what was asked for
        load_tokenizer("org/pinned@v1/2")
    assert asked["tokenizer.json"] == ("org/pinned", "v1/2")
