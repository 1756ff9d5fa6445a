"""Arrow files and streams, and folders that the `datasets` library saved, are read row by row; damaged ones are not."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc

from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_corpus, find_files, read_documents
from tokenbound.errors import InputError

TEXTS = ["héllo\nworld", "", "日本語 🙂", "a" * 3000]


def config(*paths: object, source: str = "arrow", **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def texts(setting: CorpusConfig) -> list[bytes | str]:
    return [text for file in find_files(setting) for text in read_documents(setting, file)]


def write(path: Path, table: pa.Table, form: str = "stream", *, rows: int = 100, **options: object) -> Path:
    opener = ipc.new_file if form == "file" else ipc.new_stream
    with opener(path, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_rows_come_back_as_they_were_written(tmp_path, form, compression, kind):
    column = pa.array(TEXTS * 300, pa.string()).cast(kind)
    table = pa.table({"n": range(1200), "body": column, "text": ["other"] * 1200})
    write(tmp_path / "a.arrow", table, form, compression=compression)
    assert texts(config(tmp_path, text_field="body")) == TEXTS * 300


def test_a_batch_of_many_rows_is_read_in_slices(tmp_path):
    values = [str(index) for index in range(5000)]
    write(tmp_path / "a.feather", pa.table({"text": values}), "file", rows=5000)
    assert texts(config(tmp_path)) == values


@pytest.fixture(scope="module")
def datasets():
    """The library, which asks no hub for anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets

        yield datasets


def test_a_saved_dataset_is_its_rows_and_no_cache(tmp_path, datasets, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "saved").glob("cache-*.arrow")), "the library keeps what it computed beside the rows"
    setting = config(tmp_path / "saved")
    assert texts(setting) == TEXTS
    assert find_corpus(setting).skipped == {"not read by datasets": 1, "other suffix": 2}
    assert texts(config(tmp_path / "saved/*.arrow")) == TEXTS
    [cached] = (tmp_path / "saved").glob("cache-*.arrow")
    monkeypatch.chdir(tmp_path)
    for named in (cached, cached.relative_to(tmp_path)):
        assert texts(config(named)) == [text.upper() for text in TEXTS], "who names a file means it"


def test_the_splits_of_a_saved_dataset_are_folders(tmp_path, datasets):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(config(tmp_path / "saved/train")) == ["train"]
    assert texts(config(tmp_path / "saved")) == ["test", "train"]


def test_a_cached_dataset_is_its_rows(tmp_path):
    write(tmp_path / "json-train.arrow", pa.table({"text": ["a"]}))
    write(tmp_path / "cache-0123456789abcdef.arrow", pa.table({"text": ["b"]}))
    assert texts(config(tmp_path)) == ["b", "a"]
    (tmp_path / "dataset_info.json").write_text("{}")
    assert texts(config(tmp_path)) == ["a"]


def test_a_saved_dataset_must_be_whole(tmp_path, datasets):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow' is listed in state\.json but is not there"):
        find_files(config(tmp_path / "saved"))
    for state in ("[]", "{", '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": [{}]}', "[" * 100_000):
        (tmp_path / "saved/state.json").write_text(state)
        with pytest.raises(InputError, match=r"state\.json' does not list the files of a dataset; save it again"):
            find_files(config(tmp_path / "saved"))


def test_a_stream_that_was_cut_or_continued_is_refused(tmp_path):
    whole = write(tmp_path / "a.arrow", pa.table({"text": ["a", "b"]}), rows=1).read_bytes()
    message = {
        whole[:-8]: "it does not say that it ends",
        whole + whole: f"{len(whole)} bytes follow its end",
        whole + b"x": "1 bytes follow its end",
        whole[:-20]: "not a readable Arrow file",
        whole[:40]: "not a readable Arrow file",
    }
    for content, problem in message.items():
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.arrow' .*{problem}"):
            texts(config(tmp_path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b'{"text": "x"}', "it is JSON or text"),
        (b"PAR1\x15\x04", "it is a Parquet file"),
        (gzip.compress(b"x"), "compressed by gzip"),
        (b"ARROW1\0\0" + b"x" * 64, "not a readable Arrow file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 64, "not a readable Arrow file"),
    ],
)
def test_what_is_no_arrow_file_is_refused(tmp_path, content, problem):
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        texts(config(tmp_path))


def test_offsets_that_point_elsewhere_are_refused(tmp_path):
    """Arrow would read whatever lies there in memory."""
    path = write(tmp_path / "a.arrow", pa.table({"text": ["abcd", "efgh"]}))
    data = bytearray(path.read_bytes())
    honest = struct.pack("<3i", 0, 4, 8)
    assert data.count(honest) == 1
    place = data.index(honest)
    for offsets in ((0, 4, 1 << 30), (0, -4, 8), (0, 9, 8)):
        data[place : place + 12] = struct.pack("<3i", *offsets)
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable Arrow file"):
            texts(config(tmp_path))


def test_text_must_be_utf8(tmp_path):
    path = write(tmp_path / "a.arrow", pa.table({"text": ["abcd"]}))
    path.write_bytes(path.read_bytes().replace(b"abcd", b"ab\xffd"))
    with pytest.raises(InputError, match=r"not a readable Arrow file: .*UTF8"):
        texts(config(tmp_path))


def test_columns_must_hold_text(tmp_path):
    write(tmp_path / "a.arrow", pa.table({"text": [1]}))
    with pytest.raises(InputError, match="column 'text' is int64, not text"):
        texts(config(tmp_path))
    with pytest.raises(InputError, match=r"no column 'body' \(there are: text\)"):
        texts(config(tmp_path, text_field="body"))


def test_other_sources_name_this_one(tmp_path):
    write(tmp_path / "a.txt", pa.table({"text": ["a"]}), "file")
    with pytest.raises(InputError, match=r"is an Arrow file, which .*; set `corpus.source: arrow`"):
        texts(config(tmp_path, source="text"))


def test_state_of_a_folder_that_is_none_is_not_looked_for(tmp_path):
    write(tmp_path / "cache-a.arrow", pa.table({"text": ["a"]}))
    (tmp_path / "other.json").write_text(json.dumps({}))
    assert texts(config(tmp_path)) == ["a"]
