"""Tokenizers give text ids only, and are the same after a round trip."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenbound.corpus import tokenizers
from tokenbound.corpus.tokenizers import (
    CUTTABLE_PATTERNS,
    BytesTokenizer,
    load_tokenizer,
    pieces,
    tokenizer_from_bytes,
)
from tokenbound.errors import InputError

SENTENCES = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "日本語 text"] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level_bpe() -> Tokenizer:
    """A GPT-2 shaped tokenizer whose template adds BOS and EOS, which cuts and pads, as some on the hub do."""
    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(SENTENCES, trainer)
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pipeline.enable_truncation(8)
    pipeline.enable_padding(length=8)
    return pipeline


def unigram() -> Tokenizer:
    """A SentencePiece-like model that knows its control symbols as pieces."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/▁"]
    pipeline = Tokenizer(models.Unigram([*((piece, 0.0) for piece in SPECIAL), *letters, ("cat", -1.0)], unk_id=0))
    pipeline.normalizer = normalizers.Replace(" ", "▁")
    pipeline.add_special_tokens(SPECIAL)
    pipeline.add_tokens([AddedToken("<tool>", special=False)])
    return pipeline


def word_level() -> Tokenizer:
    pipeline = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "cat": 3}, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pipeline.add_special_tokens(SPECIAL)
    return pipeline


def save(pipeline: Tokenizer, folder: Path, **settings: object) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    pipeline.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return str(folder)


# --- bytes -----------------------------------------------------------------------------------------------------


def test_bytes_tokenizer_is_the_identity_on_bytes():
    tokenizer = load_tokenizer("bytes")
    everything = bytes(range(256))
    (ids,) = tokenizer.encode_batch([everything])
    assert ids.tolist() == list(everything)
    assert (tokenizer.vocab_size, tokenizer.max_id, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256, 256)


@given(st.text())
def test_bytes_tokenizer_round_trip(text):
    tokenizer = BytesTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode([256, *ids, 256]) == text


# --- fast tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level_bpe, unigram, word_level])
@pytest.mark.parametrize("text", ["<s>", "</s>", "a <s> b", "cat</s><s>cat", "x<unk>"])
def test_text_that_looks_special_is_plain_text(tmp_path, make, text):
    tokenizer = load_tokenizer(save(make(), tmp_path))
    (ids,) = tokenizer.encode_batch([text])
    assert not {1, 2} & set(ids.tolist())


def test_plain_text_of_special_tokens_decodes_to_itself(tmp_path):
    tokenizer = load_tokenizer(save(byte_level_bpe(), tmp_path))
    (ids,) = tokenizer.encode_batch(["a <s> b</s><unk>"])
    assert tokenizer.decode(ids) == "a <s> b</s><unk>"


def test_other_ids_are_those_of_the_unchanged_model(tmp_path):
    pipeline = unigram()
    tokenizer = load_tokenizer(save(pipeline, tmp_path))
    text = "a cat ate <tool> the zebra 9"
    assert tokenizer.encode_batch([text])[0].tolist() == pipeline.encode(text).ids
    assert pipeline.token_to_id("<tool>") in tokenizer.encode_batch([text])[0]


def test_unknown_text_is_still_unknown(tmp_path):
    tokenizer = load_tokenizer(save(word_level(), tmp_path))
    assert tokenizer.encode_batch(["cat dog <s>"])[0].tolist() == [3, 0, 0]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_documents_are_whole_and_unframed(bpe, text):
    (ids,) = bpe.encode_batch([text])
    assert bpe.decode(ids) == text


def split_bpe(pattern: str) -> Tokenizer:
    """A tokenizer with a pattern of its own before the bytes, as Llama 3 and Qwen 2 have."""
    pipeline = byte_level_bpe()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return pipeline


WORDS = st.sampled_from(
    ["the", " cat", "sat ", " ", "  ", "\n", "'s", " 's", "12", " 3", "-", "日本", "é", "\u0301", "</s>", "\t"]
)


@pytest.mark.parametrize("pattern", [None, *CUTTABLE_PATTERNS], ids=["gpt2", "llama3", "qwen2"])
@pytest.mark.parametrize("parse_special", [False, True])
def test_a_long_document_is_encoded_in_pieces_with_the_same_ids(tmp_path_factory, pattern, parse_special):
    pipeline = byte_level_bpe() if pattern is None else split_bpe(pattern)
    tokenizer = load_tokenizer(save(pipeline, tmp_path_factory.mktemp("pieces")))
    assert tokenizer._has_cuts

    @settings(max_examples=150, deadline=None)
    @given(st.lists(WORDS, max_size=40).map("".join), st.integers(1, 8))
    def agree(text: str, characters: int) -> None:
        whole = tokenizer.encode_batch([text], parse_special=parse_special)[0].tolist()
        parts = tokenizer.encode_batch(pieces(text, characters), parse_special=parse_special)
        assert [index for part in parts for index in part.tolist()] == whole

    agree()
    text = "the cat sat on the mat, and 's " * 20_000
    assert len(pieces(text)) > 2
    whole = tokenizer._ids(tokenizer._pipeline(parse_special), [text])[0]
    assert np.array_equal(tokenizer.encode_batch([text, "a"], parse_special=parse_special)[0], whole)


def test_what_might_reach_over_a_cut_is_encoded_whole(tmp_path):
    for number, change in enumerate(
        [
            lambda pipeline: setattr(pipeline, "normalizer", normalizers.Lowercase()),
            lambda pipeline: setattr(pipeline, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            lambda pipeline: setattr(pipeline, "pre_tokenizer", pre_tokenizers.Whitespace()),
            lambda pipeline: pipeline.add_tokens(["cat sat"]),
            lambda pipeline: pipeline.add_special_tokens([AddedToken("<x y>", special=True)]),
            lambda pipeline: pipeline.add_special_tokens([AddedToken("<x>", special=True, rstrip=True)]),
        ]
    ):
        pipeline = byte_level_bpe()
        change(pipeline)
        assert not load_tokenizer(save(pipeline, tmp_path / str(number)))._has_cuts
    assert not load_tokenizer(save(split_bpe(r"\S+|\s+"), tmp_path / "other"))._has_cuts
    assert not load_tokenizer(save(unigram(), tmp_path / "unigram"))._has_cuts


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> tokenizers.Tokenizer:
    return load_tokenizer(save(byte_level_bpe(), tmp_path_factory.mktemp("bpe")))


def test_fast_tokenizer_facts(bpe):
    assert (bpe.vocab_size, bpe.max_id, bpe.bos_id, bpe.eos_id) == (280, 279, 1, 2)
    assert bpe.encode_batch(["the cat"])[0].dtype == np.uint16
    assert bpe.digest == hashlib.sha256(bpe.files()).hexdigest()


def test_bytes_are_decoded_with_replacement(bpe):
    assert bpe.decode(bpe.encode_batch([b"caf\xc3\xa9 \xff"])[0]) == "café \ufffd"


def test_files_restore_the_tokenizer(bpe):
    again = tokenizer_from_bytes(bpe.files())
    assert again.digest == bpe.digest
    assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, 280)
    np.testing.assert_array_equal(again.encode_batch(["the <s> dog"])[0], bpe.encode_batch(["the <s> dog"])[0])


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"tokenizer": {}, "bos_id": null, "eos_id": null}', b"\xff"])
def test_hostile_bytes_are_no_tokenizer(data):
    with pytest.raises(InputError):
        tokenizer_from_bytes(data)


def test_digest_ignores_layout_and_sees_content(tmp_path):
    one = load_tokenizer(save(byte_level_bpe(), tmp_path / "one"))
    path = Path(save(byte_level_bpe(), tmp_path / "two")) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert load_tokenizer(str(tmp_path / "two")).digest == one.digest
    other = load_tokenizer(save(byte_level_bpe(), tmp_path / "three", eos_token="<s>"))
    assert other.digest != one.digest


def test_merge_dropout_is_off(tmp_path):
    pipeline = byte_level_bpe()
    pipeline.model.dropout = 0.9
    tokenizer = load_tokenizer(save(pipeline, tmp_path))
    first, *others = tokenizer.encode_batch(["the cat sat on the mat"] * 20)
    assert all(np.array_equal(first, other) for other in others)


def test_wide_vocabularies_get_wide_ids(tmp_path):
    vocab = {f"w{index}": index for index in range(70_000)}
    pipeline = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(save(pipeline, tmp_path, bos_token=None, eos_token=None))
    (ids,) = tokenizer.encode_batch(["w1 w69999"])
    assert (ids.tolist(), ids.dtype) == ([1, 69_999], np.uint32)


# --- BOS and EOS -----------------------------------------------------------------------------------------------


def test_bos_may_be_an_object_or_absent(tmp_path):
    folder = save(byte_level_bpe(), tmp_path, bos_token={"content": "<s>", "lstrip": False}, eos_token=None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, None)


def test_bos_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="bos_token '<none>' is not in its vocabulary"):
        load_tokenizer(save(byte_level_bpe(), tmp_path, bos_token="<none>"))


def test_tokenizer_json_alone_has_neither(tmp_path):
    folder = save(byte_level_bpe(), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_tokenizer_json_may_be_named_itself(tmp_path):
    folder = save(byte_level_bpe(), tmp_path)
    assert load_tokenizer(f"{folder}/tokenizer.json").digest == load_tokenizer(folder).digest


# --- what cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["/nowhere/tokenizer", "./nowhere"])
def test_missing_tokenizers_are_refused(spec):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(spec)


def test_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        load_tokenizer(str(tmp_path))


def test_definition_that_builds_nothing_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "NoSuchModel"}}')
    with pytest.raises(InputError, match="cannot be used"):
        load_tokenizer(str(tmp_path))


def test_slow_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(InputError, match="slow"):
        load_tokenizer(str(tmp_path))


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_ids_agree_with_transformers(tmp_path):
    from transformers import AutoTokenizer

    pipeline = byte_level_bpe()
    pipeline.no_truncation()
    pipeline.no_padding()
    folder = save(pipeline, tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in SENTENCES:
        assert ours.encode_batch([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


# --- through transformers --------------------------------------------------------------------------------------


def gpt2_files(folder: Path) -> Tokenizer:
    """The files of an old GPT-2 style tokenizer: no tokenizer.json, BOS and EOS known to the Python class only."""
    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(SENTENCES, trainer)
    pipeline.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return pipeline


@pytest.mark.parametrize("with_definition", [False, True])
def test_old_files_are_converted_and_class_defaults_known(tmp_path, with_definition):
    pipeline = gpt2_files(tmp_path)
    if with_definition:
        pipeline.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 0, 280)
    text = "the cat <|endoftext|> sat"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == pipeline.encode("the cat").ids
