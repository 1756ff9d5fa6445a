"""Parts of a corpus: disjoint, complete, the same for equal texts, and in the digest."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.parts import DocumentPart
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.summary import corpus_section
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import InputError
from tokenbound.report.words import corpus_sentences

DOCUMENTS = [f"document {number % 70} of some" for number in range(100)]
RULE = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in DOCUMENTS))
    return path


def config(file: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(source="jsonl", paths=(str(file),), **{**RULE, **changes})


def texts(file: Path, cache: Path, **changes: Any) -> list[str]:
    setting = config(file, **changes)
    corpus = prepare_corpus(setting, str(cache / cache_name(setting)))
    ids, ends = corpus.read_ids(0, 0, corpus.manifest.tokens), corpus.document_offsets(0)
    return [bytes(ids[a : b - 1].astype(np.uint8)).decode() for a, b in pairwise(ends)]


def test_parts_divide_the_documents(file: Path, tmp_path: Path) -> None:
    first = texts(file, tmp_path, part={"from": 0.0, "to": 0.5})
    second = texts(file, tmp_path, part={"from": 0.5, "to": 1.0})
    assert sorted(first + second) == sorted(DOCUMENTS)
    assert not {*first} & {*second}, "equal texts are in one part"
    assert 20 <= len({*first}) <= 50
    assert first == [text for text in DOCUMENTS if text in {*first}], "in their order"
    salted = texts(file, tmp_path, part={"from": 0.0, "to": 0.5, "salt": "other"})
    assert {*salted} not in ({*first}, {*second})


def test_the_part_is_in_the_digest_and_on_the_certificate(file: Path, tmp_path: Path) -> None:
    whole, part = config(file), config(file, part={"to": 0.5})
    assert "part" not in corpus_rule(whole).to_dict(), "digests of whole corpora stay what they were"
    assert corpus_rule(part).to_dict()["part"] == {"from": 0.0, "to": 0.5, "salt": ""}
    assert cache_name(whole) != cache_name(part)
    assert cache_name(part) == cache_name(config(file, part={"from": 0, "to": 0.5, "salt": ""}))
    corpora = [prepare_corpus(each, str(tmp_path / cache_name(each))) for each in (whole, part)]
    assert corpora[0].manifest.corpus_sha256 != corpora[1].manifest.corpus_sha256
    sections = []
    for each, corpus in zip((whole, part), corpora, strict=True):
        plan = plan_corpus([corpus.document_offsets(0)], length=16, context="document")
        sections.append(corpus_section(each, corpus.manifest, plan, context="document", skipped={}))
    assert "part" not in sections[0]
    assert sections[1]["part"] == {"from": 0.0, "to": 0.5, "salt": ""}
    assert "documents hash into [0, 0.5)" in " ".join(corpus_sentences(sections[1]))


def test_the_whole_range_leaves_nothing_out() -> None:
    part = DocumentPart.of({"from": 0.0, "to": 1.0, "salt": "x"})
    assert all(part.holds(text) for text in DOCUMENTS)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"from": 0.5, "to": 0.5}, "0 <= from < to <= 1"),
        ({"from": -0.1}, "0 <= from < to <= 1"),
        ({"to": 1.5}, "0 <= from < to <= 1"),
        ({"upto": 0.5}, "unknown key 'upto'"),
        ({"salt": 3}, "must be text"),
    ],
)
def test_what_is_no_part_is_refused(file: Path, part: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(file, part=part)


def test_sources_of_ids_have_no_parts(tmp_path: Path) -> None:
    keys = yaml.safe_load("{tokenizer_is: given, add_bos: false, add_eos: false, dtype: uint16, vocab_size: 10}")
    with pytest.raises(ValidationError, match="does not apply to source `tokens`"):
        CorpusConfig(source="tokens", paths=(str(tmp_path),), part={"to": 0.5}, **keys)


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="corpus is empty"):
        texts(tmp_path / "one.jsonl", tmp_path, part={"from": 0.0, "to": 0.5})
