"""Token ids with an index beside them: documents end where the index says, and an index that contradicts is refused."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_corpus, find_files, list_files
from tokenbound.corpus.prepare import Sizes, prepare_corpus
from tokenbound.errors import InputError

DOCUMENTS = [[5, 6, 7], [], [8], [9, 9], []]
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def config(source: str, *paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer_is": "given", "add_bos": False, "add_eos": False, "vocab_size": 300} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def megatron(stem: Path, documents: list[list[int]], dtype: str = "uint16", *, cut: int = 0) -> None:
    """Write ids and index as Megatron-LM lays them out; ``cut`` sequences per document, 0 for one each."""
    sequences, bounds = list[list[int]](), [0]
    for ids in documents:
        sequences += [ids[at : at + cut] for at in range(0, len(ids), cut)] if cut else [ids]
        bounds.append(len(sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    flat = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    stem.with_suffix(".bin").write_bytes(flat.tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(bounds))
    tables = [np.array(lengths, "<i4"), pointers.astype("<i8"), np.array(bounds, "<i8")]
    stem.with_suffix(".idx").write_bytes(header + b"".join(table.tobytes() for table in tables))


def datatrove(stem: Path, documents: list[list[int]], width: int | None = 2, *, metadata: bool = True) -> None:
    """Write ids, index and metadata as datatrove lays them out; without a width, as older versions do."""
    flat = np.array([token for ids in documents for token in ids], dtype=f"<u{width or 2}")
    Path(f"{stem}.ds").write_bytes(flat.tobytes())
    ends = np.cumsum([len(ids) for ids in documents]).astype("<u8")
    Path(f"{stem}.ds.index").write_bytes(ends.tobytes())
    if metadata:
        bar = f"|{width}" if width else ""
        Path(f"{stem}.ds.metadata").write_text(f"gpt2{bar}\n{len(flat)}\n{len(flat)} T")


def read(setting: CorpusConfig, out: Path, **sizes: int) -> list[list[int]]:
    """The documents of the prepared corpus."""
    corpus = prepare_corpus(setting, str(out), sizes=Sizes(**sizes))
    offsets, ids = corpus.document_offsets(0), corpus.read_ids(0, 0, corpus.manifest.tokens)
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]


# --- Megatron ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("block", [8, 1 << 20])
def test_documents_of_megatron_end_where_the_index_says(tmp_path, dtype, block):
    megatron(tmp_path / "a", DOCUMENTS, dtype)
    assert read(config("megatron", tmp_path), tmp_path / "out", block_bytes=block) == DOCUMENTS


def test_a_document_of_megatron_is_its_sequences(tmp_path):
    documents = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    megatron(tmp_path / "a", documents, cut=2)
    assert read(config("megatron", tmp_path), tmp_path / "out") == documents


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9).filter(any),
    st.integers(0, 3),
    st.integers(2, 20),
)
def test_any_documents_survive_in_any_blocks(tmp_path_factory, documents, cut, block):
    folder = tmp_path_factory.mktemp("indexed")
    megatron(folder / "a", documents, "int32", cut=cut)
    assert read(config("megatron", folder / "a.bin"), folder / "out", block_bytes=block) == documents
    datatrove(folder / "b", documents)
    assert read(config("datatrove", folder / "b.ds"), folder / "out2", block_bytes=block) == documents


@pytest.mark.parametrize("named", ["", "a.bin", "a.idx", "*", "*.bin", "a.*"])
def test_ids_and_index_are_both_files_of_the_corpus(tmp_path, named):
    megatron(tmp_path / "a", DOCUMENTS)
    files = list_files(config("megatron", tmp_path / named))
    assert [file.name for file in files] == ["a.bin", "a.idx"]
    assert [file.bytes for file in files] == [(tmp_path / name).stat().st_size for name in ("a.bin", "a.idx")]
    assert all(file.sha256 for file in files)


def test_another_index_is_another_corpus(tmp_path):
    digests = set()
    for documents in ([[1, 2], [3]], [[1], [2, 3]]):
        megatron(tmp_path / "a", documents)
        out = tmp_path / f"out{len(digests)}"
        digests.add(prepare_corpus(config("megatron", tmp_path / "a.bin"), str(out)).manifest.corpus_sha256)
    assert len(digests) == 2


def test_ids_or_an_index_alone_are_refused(tmp_path):
    megatron(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").rename(tmp_path / "b.idx")
    with pytest.raises(InputError, match=r"a\.bin' has no 'a\.idx' beside it; restore it"):
        find_files(config("megatron", tmp_path))
    with pytest.raises(InputError, match=r"b\.idx' has no 'b\.bin' beside it"):
        find_files(config("megatron", tmp_path / "b.idx"))
    (tmp_path / "c.bin.gz").touch()
    with pytest.raises(InputError, match=r"c\.bin\.gz' is none of source `megatron`, whose files end in \.bin, \.idx"):
        find_files(config("megatron", tmp_path))


HEADER = 34


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (0, b"X", "does not begin like one"),
        (9, struct.pack("<Q", 2), "has version 2"),
        (17, b"\x07", "type 7 of ids"),
        (18, struct.pack("<Q", 6), "bytes, not the"),
        (18, struct.pack("<Q", (1 << 64) - 1), "bytes, not the"),
        (26, struct.pack("<Q", 1 << 60), "bytes, not the"),
        (HEADER, struct.pack("<i", -3), "negative length"),
        (HEADER, struct.pack("<i", 4), "one after another"),
        (HEADER + 16, struct.pack("<i", 1 << 30), "bytes of ids; the .bin has"),
        (HEADER + 20, struct.pack("<q", 2), "one after another"),
        (HEADER + 28, struct.pack("<q", -2), "one after another"),
        (HEADER + 60, struct.pack("<q", 1), "divide its sequences into documents"),
        (HEADER + 68, struct.pack("<q", 5), "divide its sequences into documents"),
        (HEADER + 76, struct.pack("<q", -1), "divide its sequences into documents"),
        (HEADER + 100, struct.pack("<q", 4), "divide its sequences into documents"),
    ],
)
def test_an_index_of_megatron_that_contradicts_is_refused(tmp_path, place, value, problem):
    megatron(tmp_path / "a", DOCUMENTS)
    data = bytearray((tmp_path / "a.idx").read_bytes())
    assert len(data) == HEADER + 12 * 5 + 8 * 6
    data[place : place + len(value)] = value
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.idx' is not a readable index: it .*{problem}"):
        read(config("megatron", tmp_path), tmp_path / "out")


def test_an_index_of_megatron_of_another_length_is_refused(tmp_path):
    megatron(tmp_path / "a", DOCUMENTS)
    whole = (tmp_path / "a.idx").read_bytes()
    problems = {whole[:-1]: "bytes, not the", whole[:20]: "does not begin like", whole + bytes(5): "multimodal"}
    for data, problem in problems.items():
        (tmp_path / "a.idx").write_bytes(data)
        with pytest.raises(InputError, match=problem):
            read(config("megatron", tmp_path), tmp_path / "out")


def test_ids_of_megatron_are_checked(tmp_path):
    megatron(tmp_path / "a", [[1, 299], [300]])
    with pytest.raises(InputError, match=r"a\.bin' holds id 300 at index 2, outside `corpus.vocab_size` 300"):
        read(config("megatron", tmp_path), tmp_path / "out")
    megatron(tmp_path / "a", [[1, -1]], "int32")
    with pytest.raises(InputError, match="holds id -1 at index 1"):
        read(config("megatron", tmp_path), tmp_path / "out")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    with pytest.raises(InputError, match=r"is for 8 bytes of ids; the \.bin has 4"):
        read(config("megatron", tmp_path), tmp_path / "out")


# --- datatrove ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_documents_of_datatrove_end_where_the_index_says(tmp_path, width, block):
    datatrove(tmp_path / "00000_shuffled", DOCUMENTS, width)
    (tmp_path / "00000_shuffled.ds.loss").write_bytes(b"x")
    setting = config("datatrove", tmp_path)
    listing = find_corpus(setting)
    ends = [file.name.removeprefix("00000_shuffled") for file in listing.files]
    assert ends == [".ds", ".ds.index", ".ds.metadata"]
    assert listing.skipped == {"other suffix": 1}
    assert read(setting, tmp_path / "out", block_bytes=block) == DOCUMENTS


def test_metadata_of_datatrove_may_be_old_or_absent(tmp_path):
    for metadata in (True, False):
        datatrove(tmp_path / "a", DOCUMENTS, None, metadata=metadata)
        with pytest.raises(InputError, match=r"no 'a\.ds\.metadata' says how wide its ids are; set `corpus.dtype`"):
            read(config("datatrove", tmp_path / "a.ds"), tmp_path / "none")
        setting = config("datatrove", tmp_path / "a.ds", dtype="uint16")
        assert read(setting, tmp_path / f"out{metadata}") == DOCUMENTS
        (tmp_path / "a.ds.metadata").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpt2|3\n6\n6 T", "says that ids have 3 bytes, not 2 or 4"),
        ("gpt2|4\n6\n6 T", "has 12 bytes, not the 6 ids of 4 bytes"),
        ("gpt2|2\n5\n5 T", "has 12 bytes, not the 5 ids of 2 bytes"),
        ("gpt2|2", "does not say how many ids there are"),
        ("", "does not say how many ids there are"),
        ("gpt2|2\n-6\n", "does not say how many ids there are"),
        ("a\n" * 4000, "does not say how many ids there are"),
    ],
)
def test_metadata_of_datatrove_that_contradict_are_refused(tmp_path, text, problem):
    datatrove(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.ds.metadata").write_text(text)
    with pytest.raises(InputError, match=problem):
        read(config("datatrove", tmp_path), tmp_path / "out")


def test_a_width_that_contradicts_the_metadata_is_refused(tmp_path):
    datatrove(tmp_path / "a", DOCUMENTS)
    with pytest.raises(InputError, match=r"has ids of 2 bytes by its metadata, but `corpus.dtype` is uint32"):
        read(config("datatrove", tmp_path, dtype="uint32"), tmp_path / "out")


@pytest.mark.parametrize(
    ("ends", "problem"),
    [([3, 3, 4, 6], ""), ([3, 7], "last document"), ([4, 3, 6], "last document"), ([], "last document"), ([5], "last")],
)
def test_an_index_of_datatrove_that_contradicts_is_refused(tmp_path, ends, problem):
    datatrove(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.ds.index").write_bytes(np.array(ends, "<u8").tobytes())
    setting = config("datatrove", tmp_path)
    if not problem:
        assert len(read(setting, tmp_path / "out")) == len(ends)
        return
    with pytest.raises(InputError, match=rf"a\.ds\.index' is not a readable index: it .*{problem}"):
        read(setting, tmp_path / "out")
    (tmp_path / "a.ds.index").write_bytes(b"x" * 9)
    with pytest.raises(InputError, match="has 9 bytes, no multiple of 8"):
        read(setting, tmp_path / "out")


# --- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["megatron", "datatrove"])
def test_a_vocabulary_must_be_given(source):
    with pytest.raises(ValueError, match=f"source `{source}` needs `vocab_size`"):
        config(source, "x", vocab_size=None)
    with pytest.raises(ValueError, match=f"`eos_id: 1` does not apply to source `{source}`"):
        config(source, "x", eos_id=1)


def test_two_data_sets_are_one_after_another(tmp_path):
    for name, documents in (("b", [[1], [2, 2]]), ("a", [[3]])):
        (tmp_path / name).mkdir()
        datatrove(tmp_path / name / "x", documents)
    assert read(config("datatrove", tmp_path), tmp_path / "out") == [[3], [1], [2, 2]]
