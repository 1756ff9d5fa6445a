"""What a file holds is told from its bytes: every compressor under every name, every kind of binary, every encoding."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from itertools import count, product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_support import Fault, faulty

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus import contents
from tokenbound.corpus.documents import digest_file, find_files, read_documents
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.prepare import cache_name, corpus_rule, partition_files, prepare_corpus
from tokenbound.corpus.sources import sources_with
from tokenbound.errors import IncompleteError, InputError
from tokenbound.store.filesystem import resolve, write_bytes

TEXT = "déjà vu, d\u00e9j\u00e0 lu\n"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACK = {"plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}
NAMED = {"": None, ".gz": "gzip", ".GZ": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}


def config(source: str, *paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def documents(setting: CorpusConfig) -> list[bytes | str]:
    return [text for file in find_files(setting) for text in read_documents(setting, file)]


def content(source: str) -> bytes:
    return TEXT.encode() if source == "text" else json.dumps({"text": TEXT}, ensure_ascii=False).encode() + b"\n"


# --- compression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "made_by", "source"), list(product(NAMED, PACK, ["text", "jsonl"])))
def test_content_decides_and_a_name_that_contradicts_it_is_refused(tmp_path, suffix, made_by, source):
    path = tmp_path / f"a.{source}{suffix}"
    path.write_bytes(PACK[made_by](content(source)))
    if NAMED[suffix] in (None, made_by):
        assert documents(config(source, tmp_path)) == [TEXT]
    else:
        with pytest.raises(InputError, match=rf"is named {suffix.lower()} but its content is not {NAMED[suffix]}"):
            documents(config(source, tmp_path))


@pytest.mark.parametrize("suffix", contents.UNREAD_COMPRESSORS)
def test_other_compressors_are_named(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"is named {suffix}, a compression that is not supported; decompress it"):
        documents(config("jsonl", tmp_path))


@pytest.mark.parametrize(("inner", "outer"), list(product(list(PACK)[1:], repeat=2)))
def test_what_is_compressed_twice_is_refused(tmp_path, inner, outer):
    (tmp_path / "a.txt").write_bytes(PACK[outer](PACK[inner](TEXT.encode())))
    with pytest.raises(InputError, match=f"compressed twice, by {inner} and {outer}"):
        documents(config("text", tmp_path))


@pytest.mark.parametrize("made_by", list(PACK)[1:])
@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data + b"rest of another file"])
def test_what_ends_early_or_goes_on_is_damaged(tmp_path, made_by, damage):
    (tmp_path / "a.txt").write_bytes(damage(PACK[made_by](TEXT.encode() * 99)))
    with pytest.raises(InputError, match="is damaged"):
        documents(config("text", tmp_path))


def test_decompression_is_piecewise():
    packed = [gzip.compress(bytes(20 << 20)), bz2.compress(bytes(20 << 20)), lzma.compress(bytes(20 << 20))]
    for compressor, data in zip(("gzip", "bzip2", "xz"), packed, strict=True):
        pieces = [len(piece) for piece in contents.decompressed(compressor, [data])]
        assert sum(pieces) == 20 << 20
        assert max(pieces) <= contents.OUTPUT_BYTES


@pytest.mark.parametrize("made_by", PACK)
def test_only_plain_lines_are_read_in_parts(tmp_path, made_by):
    (tmp_path / "a.jsonl").write_bytes(PACK[made_by](content("jsonl") * 50))
    setting = config("jsonl", tmp_path)
    files = [digest_file(setting, file) for file in find_files(setting)]
    pieces = [piece for part in partition_files(files, 100) for piece in part]
    assert (len(pieces) > 1) == (made_by == "plain")
    assert [text for piece in pieces for text in read_documents(setting, piece)] == [TEXT] * 50


# --- binaries --------------------------------------------------------------------------------------------------


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as pack:
            pack.writestr("a.txt", TEXT)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [TEXT]}), buffer)
    elif kind == "npy":
        np.save(buffer, np.arange(9))
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as pack:
            pack.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


BINARIES = {
    "zip": (archive("zip"), "a zip archive.*extract it"),
    "tar": (archive("w"), "a tar archive.*extract it"),
    "tar.gz": (archive("w:gz"), "a tar archive.*extract it"),
    "tar.xz": (archive("w:xz"), "a tar archive.*extract it"),
    "7z": (b"7z\xbc\xaf\x27\x1c....", "a 7z archive"),
    "parquet": (archive("parquet"), "a Parquet file.*`corpus.source: parquet`"),
    "npy": (archive("npy"), "a NumPy array.*`corpus.source: tokens`"),
    "pdf": (b"%PDF-1.4\n%\xe2\xe3\n", "a PDF document"),
    "png": (b"\x89PNG\r\n\x1a\n", "an image"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git-lfs pointer.*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s5--ab.txt\n", "git-annex pointer.*git annex get"),
    "dvc": (b"outs:\n- md5: ab\n  path: a.txt\n", "DVC pointer.*dvc pull"),
}


@pytest.mark.parametrize(("kind", "source"), list(product(BINARIES, ["text", "jsonl"])))
def test_binaries_are_refused_with_the_cure(tmp_path, kind, source):
    data, message = BINARIES[kind]
    (tmp_path / f"a.{source}").write_bytes(data)
    with pytest.raises(InputError, match=message):
        documents(config(source, tmp_path))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_an_archive_of_lines_in_a_folder_is_refused_not_left_out(tmp_path, kind):
    (tmp_path / "a.jsonl").write_bytes(content("jsonl"))
    (tmp_path / f"b.jsonl.{kind}").write_bytes(BINARIES[kind][0])
    with pytest.raises(InputError, match=r"archive.*extract it"):
        documents(config("jsonl", tmp_path))


@pytest.mark.parametrize("data", [b"text\0text and more of it", bytes(200), b"\x05\0\x07" * 40])
def test_whatever_holds_a_zero_byte_is_no_text(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    for errors in ("strict", "replace"):
        with pytest.raises(InputError, match=r"binary|not UTF-8"):
            documents(config("text", tmp_path, errors=errors))


@pytest.mark.parametrize("kind", ["lfs", "zip", "npy"])
def test_a_parquet_source_names_what_is_none(tmp_path, kind):
    (tmp_path / "a.parquet").write_bytes(BINARIES[kind][0])
    with pytest.raises(InputError, match="git lfs pull" if kind == "lfs" else "it is a"):
        documents(config("parquet", tmp_path))
    (tmp_path / "a.parquet").write_bytes(gzip.compress(archive("parquet")))
    with pytest.raises(InputError, match="compressed by gzip"):
        documents(config("parquet", tmp_path))


# --- encodings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "missing-one"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", "looks like Latin-1 or Windows-1252; set `corpus.encoding: latin-1`"),
        ("utf-16", "looks like UTF-16; set `corpus.encoding: utf-16`"),
        ("utf-16-le", "looks like UTF-16-LE; set `corpus.encoding: utf-16-le`"),
        ("utf-16-be", "looks like UTF-16-BE; set `corpus.encoding: utf-16-be`"),
        ("utf-32", "looks like UTF-32; set `corpus.encoding: utf-32`"),
    ],
)
def test_other_encodings_are_named_and_read_when_they_are_set(tmp_path, tokenizer, encoding, message):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    with pytest.raises(InputError, match=message):
        documents(config("text", tmp_path, tokenizer=tokenizer))
    assert documents(config("text", tmp_path, tokenizer=tokenizer, encoding=encoding)) == [TEXT]
    (tmp_path / "b.jsonl").write_bytes((content("jsonl") * 3).decode().encode(encoding))
    with pytest.raises(InputError, match=message.partition(";")[0]):
        documents(config("jsonl", tmp_path / "b.jsonl"))
    assert documents(config("jsonl", tmp_path / "b.jsonl", encoding=encoding)) == [TEXT] * 3


def test_utf16_needs_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-16-be"))
    with pytest.raises(InputError, match=r"no byte order mark; set `corpus.encoding: utf-16-le` or `utf-16-be`"):
        documents(config("text", tmp_path, encoding="utf-16"))


def test_a_byte_order_mark_is_text_unless_the_encoding_says_otherwise(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-8-sig"))
    assert documents(config("text", tmp_path)) == [f"\ufeff{TEXT}"]
    assert documents(config("text", tmp_path, encoding="utf-8-sig")) == [TEXT]


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_replacement_is_chosen_counted_and_part_of_the_rule(tmp_path, source):
    for name, data in (("a", content(source)), ("b", content(source).replace("é".encode(), b"\xff"))):
        (tmp_path / f"{name}.{source}").write_bytes(data)
    with pytest.raises(InputError, match=r"corpus\.errors: replace"):
        documents(config(source, tmp_path))
    setting = config(source, tmp_path, errors="replace")
    manifest = prepare_corpus(setting, str(tmp_path / "out")).manifest
    assert manifest.replaced_documents == 1
    # Two characters of two bytes became one byte each, and count as that.
    assert manifest.text_bytes == 2 * len(TEXT.encode()) - 2
    assert corpus_rule(setting).digest != corpus_rule(config(source, tmp_path)).digest


def test_defaults_change_no_digest_and_no_cache(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    plain = config("text", tmp_path / "a.txt")
    spelled = config("text", tmp_path / "a.txt", encoding="UTF8", errors="strict", special_tokens="text")
    assert corpus_rule(plain).digest == corpus_rule(spelled).digest
    assert not {"encoding", "errors", "special_tokens"} & corpus_rule(plain).to_dict().keys()
    assert cache_name(plain) == cache_name(spelled)
    assert cache_name(plain) != cache_name(config("text", tmp_path / "a.txt", encoding="latin1"))


@pytest.mark.parametrize("encoding", ["no-such", "rot13", "hex", "undefined"])
def test_unknown_encodings_are_refused(encoding):
    with pytest.raises(ValueError, match="is not a text encoding"):
        config("text", "x", encoding=encoding)


def test_the_library_goes_to_the_bytes_tokenizer_as_it_is_and_strictly_to_others(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = '\xff\0'")
    module = SourceFile("a.py", str(tmp_path / "a.py"), 8)

    def read(**fields: object) -> list[bytes | str]:
        return list(read_documents(config("python-stdlib", **fields), module))

    assert read() == [b"x = '\xff\0'"]
    with pytest.raises(InputError, match=r"a\.py.*not UTF-8.*errors: replace"):
        read(tokenizer="some")
    assert read(tokenizer="some", errors="replace") == ["x = '\ufffd\0'"]


# --- keys ------------------------------------------------------------------------------------------------------

VALUES = {
    "text_field": "body",
    "missing": "skip",
    "delimiter": ";",
    "quoting": "none",
    "exclude": ("x",),
    "encoding": "cp1252",
    "errors": "replace",
    "special_tokens": "refuse",
    "max_document_bytes": 1000,
    "dtype": "uint32",
    "eos_id": 1,
    "vocab_size": 9,
    "name": "x",
    "subset": "x",
    "split": "test",
    "revision": "x",
    "part": {"from": 0.0, "to": 0.5, "salt": ""},
    "prompt_field": "question",
    "completion_field": "answer",
    "messages_field": "messages",
    "targets": "answers",
}
BESIDE = {
    "prompt_field": {"completion_field": "answer"},
    "completion_field": {"prompt_field": "question"},
    "targets": {"prompt_field": "question", "completion_field": "answer"},
}
"""What a key needs beside it."""
SOURCES = ("python-stdlib", "text", "jsonl", "csv", "parquet", "arrow", "mds", "tokens", "megatron", "datatrove", "hf")


def setting(source: str, **fields: object) -> CorpusConfig:
    ids = {name: {"vocab_size": 9, "tokenizer": None} for name in ("tokens", "megatron", "datatrove")}
    needs = {**ids, "hf": {"name": "x"}}.get(source, {})
    paths = () if source in ("python-stdlib", "hf") else ("x",)
    return config(source, *paths, **({"tokenizer": "some"} | needs | fields))


@pytest.mark.parametrize(("key", "source"), list(product(VALUES, SOURCES)))
def test_a_key_that_a_source_cannot_apply_is_refused(key, source):
    if source in sources_with(key):
        assert getattr(setting(source, **{key: VALUES[key]}, **BESIDE.get(key, {})), key)
    else:
        shown = re.escape(f"`{key}: {VALUES[key]}` does not apply to source `{source}`; remove it")
        with pytest.raises(ValueError, match=shown):
            setting(source, **{key: VALUES[key]})


def test_every_key_is_known_to_apply_somewhere():
    everywhere = {"source", "paths", "tokenizer", "tokenizer_is", "add_bos", "add_eos"}
    assert set(CorpusConfig.model_fields) - everywhere == set(VALUES)
    assert all(sources_with(key) for key in VALUES)


def test_keys_that_a_tokenizer_cannot_apply_are_refused():
    with pytest.raises(ValueError, match="special_tokens: parse` does not apply to tokenizer `bytes`"):
        config("text", "x", special_tokens="parse")
    for key, value in {"encoding": "latin-1", "errors": "replace"}.items():
        with pytest.raises(ValueError, match=f"`{key}: .*takes the bytes of `python-stdlib` as they are"):
            config("python-stdlib", **{key: value})


@pytest.mark.parametrize("source", SOURCES)
def test_a_resolved_config_is_valid_again(source):
    resolved = setting(source)
    assert CorpusConfig.model_validate(resolved.model_dump(mode="json")) == resolved


@pytest.mark.parametrize(("source", "lucky"), [("jsonl", 1), ("mds", 0)])
def test_a_store_that_fails_is_no_damaged_file(s3_store, monkeypatch, source, lucky):
    """Whoever runs the command again may be lucky; whoever restores the file is not."""
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "1")
    name = f"bucket/unlucky/a.{source}"
    index = b'{"shards": [{"format": "mds", "raw_data": {"basename": "a.mds"}}]}'
    for place, data in ((name, content("jsonl") * 150_000), ("bucket/unlucky/index.json", index)):
        write_bytes(*resolve(s3_store.place(place)), data)

    reads = count()

    def no_content(number: int, method: str, path: str) -> Fault:
        return "503" if method == "GET" and path.startswith(f"/{name}") and next(reads) >= lucky else None

    with faulty(s3_store, no_content) as (failing, _):
        setting = config(source, failing.place(name))
        [file] = find_files(setting)
        with pytest.raises(IncompleteError, match="the store failed 1 times"):
            list(read_documents(setting, file))


# --- columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_binary_columns_hold_utf8(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([TEXT.encode(), b""], pa.binary()).cast(kind)}), path)
    assert documents(config("parquet", path)) == [TEXT, ""]
    pq.write_table(pa.table({"text": pa.array([b"", b"d\xe9j"], pa.binary()).cast(kind)}), path)
    with pytest.raises(InputError, match="row 1: field 'text' is not UTF-8"):
        documents(config("parquet", path))


@pytest.mark.parametrize("values", [[[1]], [[["a"]]], [{"a": "b"}], [1.5], [True], []])
def test_columns_of_another_type_are_refused_by_it(tmp_path, values):
    column = pa.array(values) if values else pa.array([], pa.list_(pa.int8()))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    kind = str(column.type).partition("<")[0]
    with pytest.raises(InputError, match=f"column 'text' is {kind}.*not text"):
        documents(config("parquet", tmp_path))


def test_a_name_that_stands_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.pq")
    with pytest.raises(InputError, match="2 columns are named 'text'"):
        documents(config("parquet", tmp_path))
    (tmp_path / "a.jsonl").write_text('{"n": {"text": 1}, "text": "a"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(InputError, match=r"line 2: field 'text' is there more than once"):
        documents(config("jsonl", tmp_path))
