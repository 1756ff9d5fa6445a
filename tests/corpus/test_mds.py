"""Shards of MosaicML Streaming are read sample by sample, raw or compressed; what contradicts itself is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.corpus.answers import Answered, Document
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_corpus, find_files, read_documents
from tokenbound.errors import InputError

TEXTS = ["héllo\nworld", "", "日本語 🙂", "a" * 3000]
COLUMNS = {"n": ("int", 8), "text": ("str", None), "tokens": ("bytes", None)}


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def config(*paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source="mds", paths=tuple(str(path) for path in paths), **tree)


def texts(setting: CorpusConfig) -> list[Document]:
    return [text for file in find_files(setting) for text in read_documents(setting, file)]


def sample(values: dict[str, bytes], columns: dict[str, tuple[str, int | None]]) -> bytes:
    """The sizes of the free columns, and all columns in the order of their names."""
    sizes = [len(values[name]) for name, (_, size) in sorted(columns.items()) if size is None]
    return np.array(sizes, "<u4").tobytes() + b"".join(values[name] for name in sorted(columns))


def shard(rows: list[bytes], columns: dict[str, tuple[str, int | None]] = COLUMNS) -> bytes:
    """A shard as the writer of MosaicML Streaming lays it out."""
    names = sorted(columns)
    tree = {"column_names": names, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26}
    tree |= {f"column_{key}s": [columns[name][at] for name in names] for at, key in enumerate(("encoding", "size"))}
    described = json.dumps(tree, sort_keys=True).encode()
    offsets = np.cumsum([0, *map(len, rows)]) + 4 + 4 * (len(rows) + 1) + len(described)
    return struct.pack("<I", len(rows)) + offsets.astype("<u4").tobytes() + described + b"".join(rows)


def rows(values: list[str]) -> list[bytes]:
    made = enumerate(value.encode() for value in values)
    return [sample({"n": struct.pack("<q", at), "text": text, "tokens": b"\1\0" * at}, COLUMNS) for at, text in made]


def write_index(folder: Path, forms: list[tuple[str | None, str | None]], **changes: Any) -> None:
    """List shards, each with the names of its raw and its compressed form."""
    named = [
        {"raw_data": raw and {"basename": raw}, "zip_data": packed and {"basename": packed}} for raw, packed in forms
    ]
    shards = [{"format": "mds", **each, **changes} for each in named]
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def write(folder: Path, parts: list[list[str]], suffix: str = "", pack: Callable[[bytes], bytes] = bytes) -> None:
    forms: list[tuple[str | None, str | None]] = []
    for at, values in enumerate(parts):
        name = f"shard.{at:05d}.mds"
        (folder / f"{name}{suffix}").write_bytes(pack(shard(rows(values))))
        forms.append((name, f"{name}{suffix}" if suffix else None))
    write_index(folder, forms)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".zstd", zstd), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_samples_come_back_as_they_were_written(tmp_path, suffix, pack):
    write(tmp_path, [TEXTS, [], ["last"]], suffix, pack)
    setting = config(tmp_path)
    assert texts(setting) == [*TEXTS, "last"]
    assert find_corpus(setting).skipped == {"other suffix": 1}
    assert texts(config(tmp_path / f"shard.00002.mds{suffix}")) == ["last"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=9))
def test_every_text_survives(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("mds")
    write(folder, [values])
    assert texts(config(folder)) == values


def test_two_columns_are_a_prompt_and_its_answer(tmp_path):
    columns = {"answer": ("str", None), "n": ("int", 8), "question": ("bytes", None)}
    values = [{"answer": b"4", "n": bytes(8), "question": b"2 + 2 ="}, {"answer": b"", "n": bytes(8), "question": b"?"}]
    (tmp_path / "a.mds").write_bytes(shard([sample(each, columns) for each in values], columns))
    write_index(tmp_path, [("a.mds", None)])
    assert texts(config(tmp_path, prompt_field="question", completion_field="answer")) == [
        Answered.of("2 + 2 =", "4"),
        Answered.of("?", ""),
    ]
    with pytest.raises(InputError, match=r"column 'n' is 'int', not text; set `corpus.completion_field`"):
        texts(config(tmp_path, prompt_field="question", completion_field="n"))


def test_a_shard_in_two_forms_is_read_once(tmp_path):
    write(tmp_path, [["a"], ["b"]], ".zstd", zstd)
    (tmp_path / "shard.00000.mds").write_bytes(shard(rows(["a"])))
    setting = config(tmp_path)
    assert [file.name for file in find_files(setting)] == ["shard.00000.mds", "shard.00001.mds.zstd"]
    assert texts(setting) == ["a", "b"]
    assert find_corpus(setting).skipped == {"other form of a file": 1, "other suffix": 1}


def test_the_index_and_the_shards_must_agree(tmp_path):
    write(tmp_path, [["a"], ["b"]])
    (tmp_path / "shard.00001.mds").rename(tmp_path / "shard.00002.mds")
    with pytest.raises(InputError, match=r"shard\.00001\.mds' is listed in index\.json but is not there; restore it"):
        find_files(config(tmp_path))
    write_index(tmp_path, [("shard.00000.mds", None)])
    with pytest.raises(InputError, match=r"shard\.00002\.mds' is not a shard of the 'index\.json' beside it"):
        find_files(config(tmp_path))
    (tmp_path / "index.json").unlink()
    with pytest.raises(InputError, match=r"has MDS shards but no 'index\.json'; restore it"):
        find_files(config(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"shards": [1]}', '{"shards": [{"format": "mds"}]}', "[" * 100_000, '{"shards": null}'],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    write(tmp_path, [["a"]])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json' does not list shards of MDS; restore it"):
        find_files(config(tmp_path))


def test_names_outside_the_folder_and_other_formats_are_refused(tmp_path):
    write(tmp_path, [["a"]])
    for forms, changes in (([("../shard.00000.mds", None)], {}), ([("shard.00000.mds", None)], {"format": "jsonl"})):
        write_index(tmp_path, forms, **changes)
        with pytest.raises(InputError, match="does not list shards of MDS"):
            find_files(config(tmp_path))


def test_columns_must_hold_text(tmp_path):
    write(tmp_path, [["a"]])
    with pytest.raises(InputError, match="column 'n' is 'int', not text"):
        texts(config(tmp_path, text_field="n"))
    with pytest.raises(InputError, match=r"no column 'body' \(there are: n, text, tokens\)"):
        texts(config(tmp_path, text_field="body"))
    with pytest.raises(InputError, match=r"column 'text\.a' is 'str', not text"):
        texts(config(tmp_path, text_field="text.a"))


def test_bytes_must_be_utf8(tmp_path):
    columns = {"text": ("bytes", None)}
    whole = shard([sample({"text": value}, columns) for value in (b"d\xc3\xa9j", b"d\xe9j")], columns)
    (tmp_path / "a.mds").write_bytes(whole)
    write_index(tmp_path, [("a.mds", None)])
    with pytest.raises(InputError, match=r"a\.mds, sample 1: field 'text' is not UTF-8"):
        texts(config(tmp_path))


WHOLE = shard(rows(["abc", "de"]))
DESCRIBED = 4 + 4 * 3


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (WHOLE[:-1], "ends before its samples do"),
        (WHOLE + b"x", "something follows its last sample"),
        (WHOLE[:10], "ends before its samples do"),
        (b"", "ends before its samples do"),
        (struct.pack("<I", (1 << 32) - 1) + WHOLE[4:], "would hold 4,294,967,295 samples"),
        (struct.pack("<I", 1 << 24) + WHOLE[4:], "ends before its samples do"),
        (WHOLE[:4] + struct.pack("<I", 3) + WHOLE[8:], "do not begin one after another"),
        (WHOLE[:4] + struct.pack("<I", 1 << 31) + WHOLE[8:], "do not begin one after another"),
        (WHOLE[:8] + struct.pack("<I", 5) + WHOLE[12:], "do not begin one after another"),
        (WHOLE.replace(b'"format": "mds"', b'"format": "csv"'), "does not describe its columns"),
        (WHOLE.replace(b'"column_sizes": [8, ', b'"column_sizes": [-8,'), "does not describe its columns"),
        (WHOLE.replace(b'"column_sizes": [8, ', b'"column_sizes": [9, '), "columns of a sample do not fill it"),
        (WHOLE.replace(b"{", b"[", 1), "does not describe its columns"),
        (WHOLE.replace(struct.pack("<2I", 3, 0), struct.pack("<2I", 2, 1)), ""),
        (WHOLE.replace(struct.pack("<2I", 3, 0), struct.pack("<2I", 3, 1)), "columns of a sample do not fill it"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(tmp_path, data, problem):
    (tmp_path / "a.mds").write_bytes(data)
    write_index(tmp_path, [("a.mds", None)])
    if not problem:
        assert texts(config(tmp_path)) == ["ab", "de"], "sizes alone say where a column ends"
        return
    with pytest.raises(InputError, match=rf"a\.mds' is not a readable MDS shard: .*{problem}.*; restore"):
        texts(config(tmp_path))


def test_a_compressed_shard_is_not_unpacked_beyond_a_sample(tmp_path):
    (tmp_path / "a.mds.zstd").write_bytes(zstd(shard(rows(["x" * (1 << 24)]))))
    write_index(tmp_path, [("a.mds", "a.mds.zstd")])
    with pytest.raises(InputError, match="more than 10,000 bytes"):
        texts(config(tmp_path, max_document_bytes=10_000))
    (tmp_path / "a.mds.zstd").write_bytes(zstd(WHOLE)[:-3])
    with pytest.raises(InputError, match="not a readable MDS shard"):
        texts(config(tmp_path))


def test_compressions_that_are_not_undone_are_named(tmp_path):
    (tmp_path / "a.mds.br").write_bytes(b"x")
    write_index(tmp_path, [("a.mds", "a.mds.br")])
    with pytest.raises(InputError, match="its compression is not supported; use gzip, bzip2, xz, zstd"):
        texts(config(tmp_path))
