"""Every source reads exactly its documents, and every unusable one says why."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.documents import digest_file, find_corpus, find_files, list_files, read_documents
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.sources.hf import row_ranges
from tokenbound.corpus.sources.jsonl import Jsonl
from tokenbound.corpus.sources.stdlib import modules_below
from tokenbound.errors import InputError

TEXTS = ["héllo\nworld", "", "日本語 🙂", "<s> is text </s>", 'tab\tquote" slash\\']


def config(source: str, *paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def documents(setting: CorpusConfig) -> list[bytes | str]:
    return [text for file in find_files(setting) for text in read_documents(setting, file)]


def jsonl(texts: list[str], **fields: object) -> bytes:
    return "".join(json.dumps({"text": text, **fields}, ensure_ascii=False) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


# --- finding ---------------------------------------------------------------------------------------------------


def test_directory_is_sorted_by_relative_path_and_skips_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = list_files(config("text", tmp_path))
    assert [file.name for file in files] == ["a.txt", "a/z.txt", "b.txt"]
    assert [file.bytes for file in files] == [5, 7, 5]
    assert files[0].sha256 == hashlib.sha256(b"a.txt").hexdigest()


def test_directory_takes_only_files_of_the_source(tmp_path):
    for name in ("a.jsonl", "b.json.gz", "c.txt", "d.parquet"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(config("jsonl", tmp_path))] == ["a.jsonl", "b.json.gz"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b1.txt"]),
        ("b[0-9].txt", ["b1.txt"]),
        ("[!a].txt", []),
        ("?.txt", ["a.txt"]),
        ("d*/x.txt", ["d1/x.txt"]),
        ("**/x.txt", ["d1/e/x.txt", "d1/x.txt"]),
        ("d1/**", ["d1/e/x.txt", "d1/x.txt"]),
    ],
)
def test_globs(tmp_path, pattern, expected):
    for name in ("a.txt", "b1.txt", "d1/x.txt", "d1/e/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    setting = config("text", tmp_path / pattern)
    if not expected:
        with pytest.raises(InputError, match="contains no file"):
            find_files(setting)
        return
    assert [file.name.rpartition("d1/")[2] for file in find_files(setting)] == [
        name.rpartition("d1/")[2] for name in expected
    ]


def test_names_do_not_depend_on_where_the_corpus_lies_or_on_other_files(tmp_path):
    for place in ("here", "there/deeper"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.txt").write_text("x")
    here = list_files(config("text", tmp_path / "here"))
    (tmp_path / "there/deeper/a.txt").write_text("new")
    there = list_files(config("text", tmp_path / "there/deeper"))
    assert (here[0].name, here[0].bytes, here[0].sha256) == (there[1].name, there[1].bytes, there[1].sha256)


def test_paths_keep_their_order(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(config("text", tmp_path / "b.txt", tmp_path / "a.txt"))] == [
        "b.txt",
        "a.txt",
    ]


@pytest.mark.parametrize("alias", ["./a.txt", "link.txt", "sub/../a.txt", "*.txt"])
def test_file_listed_twice_is_refused_however_it_is_spelled(tmp_path, monkeypatch, alias):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("x")
    if alias == "link.txt":
        (tmp_path / alias).symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="listed twice"):
        find_files(config("text", "a.txt", alias))


def test_equal_contents_are_allowed(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    assert len(list_files(config("text", tmp_path))) == 2


def test_two_files_of_one_name_are_refused_with_the_cure(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    with pytest.raises(InputError, match="common parent directory"):
        find_files(config("text", tmp_path / "one/x.txt", tmp_path / "two/x.txt"))
    assert [file.name for file in find_files(config("text", tmp_path / "*/x.txt"))] == ["one/x.txt", "two/x.txt"]


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.txt"])
def test_missing_paths_are_named(tmp_path, path):
    with pytest.raises(InputError, match="nowhere"):
        find_files(config("text", tmp_path / path))


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="contains no file for source `jsonl`"):
        find_files(config("jsonl", tmp_path))


def test_file_uris_are_paths(tmp_path):
    (tmp_path / "a b.txt").write_text("x")
    assert documents(config("text", (tmp_path / "a b.txt").as_uri())) == ["x"]


def test_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="nosuch"):
        find_files(config("text", "nosuch://bucket/key"))


# --- text and the standard library -----------------------------------------------------------------------------


def test_text_is_one_document_per_file_byte_for_byte(tmp_path):
    data = {"a.txt": b"\xef\xbb\xbfline\r\nline\xc3\xa9\x0c", "b.txt": b""}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    assert [text.encode() for text in documents(config("text", tmp_path))] == list(data.values())


def test_python_stdlib_is_every_module_and_nothing_installed():
    setting = config("python-stdlib")
    files = find_files(setting)
    names = [file.name for file in files]
    root = Path(sysconfig.get_path("stdlib"))
    assert names == sorted(set(names))
    assert {"ast.py", "json/__init__.py"} <= set(names)
    assert not any({"site-packages", "dist-packages", "__pycache__"} & set(name.split("/")) for name in names)
    assert all(name.endswith(".py") for name in names)
    ast = next(file for file in files if file.name == "ast.py")
    assert list(read_documents(setting, ast)) == [(root / "ast.py").read_bytes()]
    assert digest_file(setting, ast).bytes == (root / "ast.py").stat().st_size


def test_python_stdlib_takes_an_alias_once(tmp_path):
    (tmp_path / "b.py").write_text("x")
    (tmp_path / "a.py").symlink_to("b.py")
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/c.py").write_text("y")
    skipped = Skipped()
    assert [file.name for file in modules_below(tmp_path, skipped)] == ["a.py"]
    assert skipped.counts == {"link to a listed file": 1, "broken link": 1}


def test_python_stdlib_takes_no_paths():
    with pytest.raises(InputError, match="remove `paths`"):
        find_files(config("python-stdlib", "x"))


# --- JSON lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
        (".gz", lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:])),
        (".zst", lambda data: zstd(data[:40]) + zstd(data[40:])),
    ],
)
def test_jsonl_round_trip(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(jsonl(TEXTS, other=1)))
    setting = config("jsonl", path)
    assert documents(setting) == TEXTS
    assert list_files(setting)[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_truncated_archive_is_refused(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(jsonl(TEXTS * 50))[:-9])
    with pytest.raises(InputError, match=r"a\.jsonl.* is damaged"):
        documents(config("jsonl", path))


def test_jsonl_accepts_crlf_blank_lines_bom_and_no_final_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\u2028c"}')
    assert documents(config("jsonl", path)) == ["a", "b\u2028c"]


def test_jsonl_lone_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b\\ud83d\\ude42"}\n')
    assert documents(config("jsonl", path)) == ["a\ufffdb🙂"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": ', "not a JSON object"),
        (b"[1]", "JSON list, not an object"),
        (b'{"body": "x"}', "no field 'text'.*body.*text_field"),
        (b'{"text": null}', "field 'text' is null; .*`corpus.missing: skip`"),
        (b'{"text": 3}', "field 'text' is int, not text"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl', line 3: .*{message}"):
        documents(config("jsonl", path))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=12), st.integers(1, 60), st.booleans(), st.integers(1, 50))
def test_spans_partition_the_lines_of_a_file(tmp_path_factory, texts, size, final_newline, block):
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    data = jsonl(texts) if final_newline else jsonl(texts).removesuffix(b"\n")
    path.write_bytes(data)
    setting = config("jsonl", path)
    cuts = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    spans = [SourceFile("a.jsonl", str(path), len(data), splittable=True, span=cut) for cut in cuts]
    source = setting.reader()
    assert isinstance(source, Jsonl)
    assert [text for span in spans for text in source.documents(span, block_bytes=block)] == texts


def test_line_numbers_count_from_the_start_of_the_file_in_a_span(tmp_path):
    path = tmp_path / "a.jsonl"
    data = jsonl(["one", "two"]) + b"{broken\n"
    path.write_bytes(data)
    span = SourceFile("a.jsonl", str(path), len(data), splittable=True, span=(20, len(data)))
    with pytest.raises(InputError, match="line 3"):
        list(read_documents(config("jsonl", path), span))


def test_file_that_disappeared_is_named(tmp_path):
    gone = SourceFile("a.jsonl", str(tmp_path / "a.jsonl"), 10)
    with pytest.raises(InputError, match=r"cannot read corpus file .*a\.jsonl"):
        list(read_documents(config("jsonl", tmp_path), gone))


# --- Parquet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_round_trip(tmp_path, kind):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": pa.array(TEXTS * 700, pa.string()).cast(kind), "n": list(range(len(TEXTS) * 700))})
    pq.write_table(table, path, row_group_size=999)
    assert documents(config("parquet", path, text_field="body")) == TEXTS * 700


def test_parquet_without_the_column_names_the_others(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column 'text' \(there are: body\)"):
        documents(config("parquet", tmp_path))


@pytest.mark.parametrize(
    ("column", "kind"),
    [(["x", None], "row 1: field 'text' is null; .*`corpus.missing: skip`"), ([1, 2], "column 'text' is int64")],
)
def test_parquet_rows_without_text_are_named(tmp_path, column, kind):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=kind):
        documents(config("parquet", tmp_path))


def test_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable Parquet"):
        documents(config("parquet", tmp_path))


# --- Hugging Face datasets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The library, with its cache in a temporary place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield datasets


def test_builder_with_data_files(tmp_path, datasets):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    assert documents(config("hf", tmp_path / "a.jsonl", name="json")) == TEXTS


def test_local_directory(tmp_path, datasets):
    (tmp_path / "train.jsonl").write_bytes(jsonl(TEXTS))
    assert documents(config("hf", name=str(tmp_path))) == TEXTS


def test_saved_dataset_in_ranges(tmp_path, datasets):
    rows = datasets.Dataset.from_dict({"text": ["skipped", *TEXTS], "n": list(range(6))})
    rows.select(range(1, 6)).save_to_disk(tmp_path / "saved")
    setting = config("hf", name=str(tmp_path / "saved"))
    assert [file.name for file in find_files(setting)] == [f"train/{0:012d}-{5:012d}"]
    files = [digest_file(setting, file) for file in row_ranges(5, "train", setting.name, file_rows=2)]
    assert [file.name for file in files] == [f"train/{a:012d}-{b:012d}" for a, b in ((0, 2), (2, 4), (4, 5))]
    assert sum(file.bytes for file in files) == sum(len(text.encode()) for text in TEXTS)
    framed = b"".join(len(text.encode()).to_bytes(8, "big") + text.encode() for text in TEXTS[:2])
    assert files[0].sha256 == hashlib.sha256(framed).hexdigest()
    assert [text for file in files for text in read_documents(setting, file)] == documents(setting) == TEXTS


def test_saved_splits(tmp_path, datasets):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert documents(config("hf", name=str(tmp_path / "saved"), split="test")) == ["test"]
    with pytest.raises(InputError, match="'absent'"):
        documents(config("hf", name=str(tmp_path / "saved"), split="absent"))


def test_dataset_without_the_column_or_at_all_is_refused(tmp_path, datasets):
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"no column 'text' \(there are: body\)"):
        find_files(config("hf", name=str(tmp_path / "saved")))
    with pytest.raises(InputError, match="cannot be loaded"):
        find_files(config("hf", name=str(tmp_path / os.urandom(4).hex())))


def test_cause_of_a_failed_load_is_told(tmp_path, datasets):
    (tmp_path / "a.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(InputError, match="JSON"):
        find_files(config("hf", tmp_path / "a.jsonl", name="json"))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:1]", ["a"]),
        ("train[1:]", ["b", "c", "d"]),
        ("train[:50%]", ["a", "b"]),
        ("train[-1:]+train[:1]", ["d", "a"]),
    ],
)
@pytest.mark.parametrize("kind", ["dataset", "splits", "directory", "builder"])
def test_slices_apply_to_every_kind_of_dataset(tmp_path, datasets, split, expected, kind):
    place, rows = tmp_path / "data", datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"]})
    if kind == "dataset":
        rows.save_to_disk(place)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(place)
    else:
        place.mkdir()
        (place / "train.jsonl").write_bytes(jsonl(["a", "b", "c", "d"]))
    if kind == "builder":
        assert documents(config("hf", place / "train.jsonl", name="json", split=split)) == expected
    else:
        assert documents(config("hf", name=str(place), split=split)) == expected


def test_a_dataset_saved_alone_is_taken_for_no_other_split(tmp_path, datasets):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    for split in ("test", "test[:1]", "train+test", "nonsense[["):
        with pytest.raises(InputError, match=r"split .* cannot be loaded"):
            find_files(config("hf", name=str(tmp_path / "saved"), split=split))


def test_the_slice_that_was_saved_is_its_own_split(tmp_path, datasets):
    (tmp_path / "train.jsonl").write_bytes(jsonl(["a", "b"]))
    datasets.load_dataset(str(tmp_path), split="train[:1]").save_to_disk(tmp_path / "saved")
    assert documents(config("hf", name=str(tmp_path / "saved"), split="train[:1]")) == ["a"]
    with pytest.raises(InputError, match="cannot be loaded"):
        find_files(config("hf", name=str(tmp_path / "saved"), split="train"))


@pytest.mark.parametrize("key", ["subset", "revision", "paths"])
@pytest.mark.parametrize("kind", ["dataset", "splits", "directory", "builder"])
def test_keys_of_a_dataset_apply_or_are_refused(tmp_path, datasets, key, kind):
    place, rows = tmp_path / "data", datasets.Dataset.from_dict({"text": ["a"]})
    if kind == "dataset":
        rows.save_to_disk(place)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(place)
    else:
        place.mkdir()
        (place / "train.jsonl").write_bytes(jsonl(["a"]))
        (place / "other.jsonl").write_bytes(jsonl(["b"]))
    name = "json" if kind == "builder" else str(place)
    fields = {"paths": (str(place / "other.jsonl"),)} if key == "paths" or kind == "builder" else {}
    if key == "paths" and kind in ("directory", "builder"):
        assert documents(CorpusConfig(**CONFIG, name=name, **fields)) == ["b"]
        return
    fields |= {} if key == "paths" else {key: "v1"}
    applies = kind == "directory" and key == "subset"  # the library looks for it, and finds none
    with pytest.raises(
        InputError, match="'v1' not found" if applies else rf"corpus\.{key}: .* does not apply to .*remove"
    ):
        find_files(CorpusConfig(**CONFIG, name=name, **fields))


CONFIG = {"source": "hf", "tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}


def test_files_that_the_library_does_not_take_are_counted(tmp_path, datasets):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(jsonl(["a"]))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    assert find_corpus(config("hf", name=str(tmp_path))).skipped == {"not read by datasets": 2}
