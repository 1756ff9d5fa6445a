"""The corpus section of a certificate: what was read and how, and the bytes by which bits per byte are divided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenbound.config import CorpusConfig
from tokenbound.corpus.prepare import corpus_rule, prepare_corpus
from tokenbound.corpus.prepared import Manifest, load_manifest, save_manifest
from tokenbound.corpus.summary import bytes_per_token, corpus_section
from tokenbound.corpus.tokenizers import load_tokenizer
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import InputError, MismatchError
from tokenbound.report.words import corpus_sentences

TEXTS = ["héllo wörld, this is a text", "", "日本 is another", "x", "hello " * 40]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return str(folder)


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(path: Path, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source="jsonl", paths=(str(path),), **tree)


def plan_of(corpus, context: str):
    segments = range(len(corpus.manifest.segments))
    return plan_corpus([corpus.document_offsets(index) for index in segments], length=8, context=context)


# --- bits per byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("context", ["document", "packed"])
def test_only_bytes_of_predicted_tokens_are_counted(tmp_path, context, bos, eos):
    corpus = prepare_corpus(config(write(tmp_path, TEXTS), add_bos=bos, add_eos=eos), str(tmp_path / "out"))
    texts = [text for text in TEXTS if text] if context == "document" else ["the stream"]
    unpredicted = 0 if bos else len(texts)  # bytes are tokens
    total = sum(len(text.encode()) for text in TEXTS)
    assert corpus.manifest.predicted_bytes(context) == total - unpredicted
    plan = plan_of(corpus, context)
    assert bytes_per_token(corpus.manifest, plan, context) == (total - unpredicted) / plan.num_tokens
    if not bos and not eos:  # then every token is a byte, and so is every predicted one
        assert bytes_per_token(corpus.manifest, plan, context) == 1


def test_a_stream_that_begins_with_an_empty_document_begins_with_its_end(tmp_path):
    corpus = prepare_corpus(config(write(tmp_path, ["", "text"]), add_eos=True), str(tmp_path / "out"))
    assert corpus.manifest.predicted_bytes("packed") == 4
    corpus = prepare_corpus(config(write(tmp_path / "b", ["", "text"])), str(tmp_path / "out2"))
    assert corpus.manifest.predicted_bytes("packed") == 3


@pytest.mark.parametrize("context", ["document", "packed"])
def test_first_tokens_of_a_tokenizer_are_not_counted(tmp_path, bpe, context):
    corpus = prepare_corpus(config(write(tmp_path, TEXTS), tokenizer=bpe), str(tmp_path / "out"))
    pipeline = Tokenizer.from_file(f"{bpe}/tokenizer.json")
    first = [len(text[: pipeline.encode(text).offsets[0][1]].encode()) for text in TEXTS if text]
    expected = sum(first) if context == "document" else first[0]
    assert expected > len(first) - 1
    total = sum(len(text.encode()) for text in TEXTS)
    assert corpus.manifest.predicted_bytes(context) == total - expected


def test_a_first_token_of_any_length_is_found(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for text, expected in (("é" * 500 + " a", 1000), ("  a " + "b" * 500, 3), ("a", 1), ("   ", 0)):
        [ids] = loaded.encode_batch([text])
        assert loaded.first_token_bytes(text, ids) == expected


def test_text_whose_every_token_is_first_has_no_bits_per_byte(tmp_path):
    corpus = prepare_corpus(config(write(tmp_path, ["a", "b"]), add_eos=True), str(tmp_path / "out"))
    plan = plan_of(corpus, "document")
    assert corpus.manifest.predicted_bytes("document") is None
    section = corpus_section(config(tmp_path), corpus.manifest, plan, context="document", skipped={})
    assert section["bytes_per_token"] is section["scored_text_bytes"] is None


# --- earlier manifests -----------------------------------------------------------------------------------------


def as_version_1(root: Path) -> Manifest:
    manifest = load_manifest(str(root))
    parts = [[replace(p, first_token_bytes=None, first_tokens_bytes=None) for p in s.parts] for s in manifest.segments]
    segments = [replace(s, parts=tuple(p)) for s, p in zip(manifest.segments, parts, strict=True)]
    old = replace(manifest, segments=tuple(segments), version=1)
    save_manifest(old, str(root))
    return old


def test_a_corpus_of_an_earlier_version_is_prepared_anew_in_its_segments(tmp_path):
    folder, out = tmp_path / "text", tmp_path / "out"
    write(folder, TEXTS)
    setting = config(folder)
    prepare_corpus(setting, str(out))
    (folder / "b.jsonl").write_text('{"text": "grown"}\n')
    grown = prepare_corpus(setting, str(out)).manifest
    old = as_version_1(out)
    assert load_manifest(str(out)).predicted_bytes("document") is None
    (folder / "c.jsonl").write_text('{"text": "again"}\n')
    anew = prepare_corpus(setting, str(out)).manifest
    assert len(anew.segments) == 3
    assert next(iter(anew.prefixes())).tokens_sha256 == next(iter(old.prefixes())).tokens_sha256
    assert replace(anew, segments=anew.segments[:2]) == grown


def test_what_an_earlier_version_read_differently_is_refused(tmp_path):
    out = tmp_path / "out"
    setting = config(write(tmp_path / "text", TEXTS))
    prepare_corpus(setting, str(out))
    old = as_version_1(out)
    [segment] = old.segments
    part = replace(segment.parts[0], ids_sha256="0" * 64)
    save_manifest(replace(old, segments=(replace(segment, parts=(part,)),)), str(out))
    with pytest.raises(MismatchError, match="earlier version that read some of its files differently"):
        prepare_corpus(setting, str(out))


# --- special tokens --------------------------------------------------------------------------------------------

SPELLED = ["hello<|endoftext|>world", "plain <s> text"]


def test_spelled_special_tokens_are_text_parsed_or_refused(tmp_path, bpe):
    path = write(tmp_path, SPELLED)
    loaded = load_tokenizer(bpe)
    special = {loaded.eos_id, loaded.bos_id}
    ids = {
        mode: prepare_corpus(config(path, tokenizer=bpe, special_tokens=mode), str(tmp_path / mode)).read_ids
        for mode in ("text", "parse")
    }
    lengths = {mode: load_manifest(str(tmp_path / mode)).tokens for mode in ids}
    assert not special & set(ids["text"](0, 0, lengths["text"]).tolist())
    assert special <= set(ids["parse"](0, 0, lengths["parse"]).tolist())
    with pytest.raises(
        InputError, match=r"document 1: its text holds the special token '<\|endoftext\|>' at character 5"
    ):
        prepare_corpus(config(path, tokenizer=bpe, special_tokens="refuse"), str(tmp_path / "refuse"))


def test_the_choice_is_part_of_the_digest(tmp_path, bpe):
    path = write(tmp_path, TEXTS)
    settings = [config(path, tokenizer=bpe, special_tokens=mode) for mode in ("text", "parse", "refuse")]
    assert len({corpus_rule(setting).digest for setting in settings}) == 3
    corpora = [prepare_corpus(setting, str(tmp_path / setting.special_tokens)).manifest for setting in settings]
    assert len({manifest.corpus_sha256 for manifest in corpora}) == 3
    assert len({manifest.tokens_sha256 for manifest in corpora}) == 1


# --- the section -----------------------------------------------------------------------------------------------


def test_it_says_how_the_corpus_was_read(tmp_path, bpe):
    folder = tmp_path / "text"
    write(folder, TEXTS)
    (folder / "README.md").write_text("x")
    setting = config(folder, tokenizer=bpe, errors="replace", special_tokens="parse")
    corpus = prepare_corpus(setting, str(tmp_path / "out"))
    section = corpus_section(
        setting, corpus.manifest, plan_of(corpus, "document"), context="document", skipped=corpus.skipped
    )
    expected = {"skipped": {"other suffix": 1}, "encoding": "utf-8", "errors": "replace", "special_tokens": "parse"}
    assert expected.items() <= section.items()
    assert (section["text_field"], section["documents_with_replacements"]) == ("text", 0)
    sentences = " ".join(corpus_sentences(section))
    for part in ("files with another suffix (1)", "replaced by U+FFFD", "read as that token"):
        assert part in sentences


def test_it_names_all_of_a_dataset():
    setting = CorpusConfig(
        source="hf",
        name="you/data",
        subset="en",
        split="train[:1]",
        revision="v1",
        paths=("a.jsonl",),
        tokenizer="bytes",
        tokenizer_is="given",
        add_bos=False,
        add_eos=True,
    )
    manifest = Manifest(corpus_rule(setting))
    section = corpus_section(setting, manifest, SimpleNamespace(num_tokens=1), context="packed", skipped={})
    named = {"name": "you/data", "subset": "en", "split": "train[:1]", "revision": "v1", "paths": ["a.jsonl"]}
    assert named.items() <= section.items()
