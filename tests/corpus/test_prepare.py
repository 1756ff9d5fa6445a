"""From files on disk to ids read back: exact, done once, append-only, and tamper-evident."""

from __future__ import annotations

import errno
import json
import pickle
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.documents import list_files
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.prepare import (
    Sizes,
    cache_name,
    corpus_rule,
    partition_files,
    piece_bytes,
    prepare_corpus,
    tokenise_part,
)
from tokenbound.corpus.prepared import (
    Manifest,
    PartRecord,
    PreparedCorpus,
    append_segment,
    load_manifest,
    pending_files,
    segment_name,
)
from tokenbound.corpus.windows import gather, plan_corpus
from tokenbound.errors import IncompleteError, InputError, MismatchError

TEXTS = ["héllo", "", "日本語", "x"]


def config(source: str, *paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def tokens_config(*paths: object, **fields: object) -> CorpusConfig:
    return config("tokens", *paths, **({"tokenizer": None, "dtype": "uint16", "vocab_size": 1000} | fields))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(corpus: PreparedCorpus, segment: int = 0) -> list[list[int]]:
    offsets = corpus.document_offsets(segment)
    stream = corpus.read_ids(segment, 0, int(offsets[-1]))
    return [stream[start:stop].tolist() for start, stop in pairwise(offsets)]


SMALL = Sizes(part_bytes=30)
"""Many parts of a few bytes each."""


# --- ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_documents_are_framed_as_the_config_says(tmp_path, bos, eos):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = prepare_corpus(config("jsonl", path, add_bos=bos, add_eos=eos), str(tmp_path / "out"))
    assert documents(corpus) == [[256] * bos + list(text.encode()) + [256] * eos for text in TEXTS]
    assert corpus.manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert corpus.manifest.documents == len(TEXTS)
    assert corpus.manifest.tokens == corpus.manifest.text_bytes + (bos + eos) * len(TEXTS)
    assert corpus.read_ids(0, 0, 1).dtype == np.uint16


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.text(max_size=8), max_size=5), min_size=1, max_size=3),
    st.integers(20, 200),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_ids_do_not_depend_on_how_the_work_is_cut(tmp_path_factory, files, part_bytes, batch_bytes, batch_documents):
    folder = tmp_path_factory.mktemp("cuts")
    for index, texts in enumerate(files):
        write_jsonl(folder / f"in/{index}.jsonl", texts)
    setting = config("jsonl", folder / "in", add_bos=True)
    sizes = Sizes(part_bytes, batch_bytes, batch_documents)
    if not any(files):
        with pytest.raises(InputError, match="corpus is empty"):
            prepare_corpus(setting, str(folder / "out"), sizes=sizes)
        return
    corpus = prepare_corpus(setting, str(folder / "out"), sizes=sizes)
    expected = [[256, *text.encode()] for texts in files for text in texts]
    assert documents(corpus) == expected
    stream = [token for document in expected for token in document]
    bounds = np.cumsum([0, *(len(document) for document in expected)])
    for start in range(len(stream)):
        stop = min(start + 7, len(stream))
        assert corpus.read_ids(0, start, stop).tolist() == stream[start:stop]
        first, offsets = corpus.documents_between(0, start, stop)
        assert offsets[0] <= start < offsets[1]
        assert offsets[-2] < stop <= offsets[-1]
        assert offsets.tolist() == bounds[first : first + len(offsets)].tolist()


def test_parts_of_empty_documents_keep_their_numbers(tmp_path):
    for name, texts in {"a": ["abcdefgh" * 3], "b": ["", ""], "c": ["xyz"]}.items():
        write_jsonl(tmp_path / f"in/{name}.jsonl", texts)
    corpus = prepare_corpus(config("jsonl", tmp_path / "in"), str(tmp_path / "out"), sizes=SMALL)
    assert [part.documents for part in corpus.manifest.segments[0].parts][:1] == [1]
    plan = plan_corpus([corpus.document_offsets(0)], length=64, context="packed")
    batch = gather(corpus, plan.windows([0]), 64)
    scored = list(zip(batch.document[batch.mask].tolist(), batch.position[batch.mask].tolist(), strict=True))
    assert scored == [(0, position) for position in range(1, 24)] + [(3, 0), (3, 1), (3, 2)]


def test_huggingface_tokenizer_end_to_end(tmp_path):
    pipeline = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 70_000}, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pipeline.add_special_tokens(["<s>", "<unk>"])
    pipeline.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": null}')
    (tmp_path / "a.txt").write_bytes(b"a <s> b\nb")
    setting = config("text", tmp_path / "a.txt", tokenizer=str(tmp_path), add_bos=True)
    corpus = prepare_corpus(setting, str(tmp_path / "out"))
    assert documents(corpus) == [[1, 2, 0, 70_000, 70_000]]
    assert corpus.read_ids(0, 0, 1).dtype == np.uint32
    assert (corpus.manifest.vocab_size, corpus.manifest.text_bytes) == (4, 9)
    with pytest.raises(InputError, match=r"no EOS token; set `corpus\.add_eos: false`"):
        corpus_rule(setting.model_copy(update={"add_eos": True}))


def test_missing_bos_names_the_cure(tmp_path):
    pipeline = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    pipeline.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(InputError, match=r"no BOS token; set `corpus\.add_bos: false`"):
        prepare_corpus(config("jsonl", tmp_path / "a.jsonl", tokenizer=str(tmp_path), add_bos=True), str(tmp_path))


# --- tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 8, 1 << 22])
@pytest.mark.parametrize(
    ("ids", "eos", "expected"),
    [
        ([5, 6, 0, 7, 0], 0, [[5, 6, 0], [7, 0]]),
        ([5, 0, 7], 0, [[5, 0], [7]]),
        ([0, 0], 0, [[0], [0]]),
        ([5, 0, 7], None, [[5, 0, 7]]),
        ([5, 7, 8, 9, 1], 0, [[5, 7, 8, 9, 1]]),
    ],
)
def test_token_documents_end_with_their_eos(tmp_path, block, ids, eos, expected):
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "a.bin")
    np.array([9], dtype=np.uint16).tofile(tmp_path / "b.bin")
    paths = (tmp_path / "a.bin", tmp_path / "b.bin")
    corpus = prepare_corpus(tokens_config(*paths, eos_id=eos), str(tmp_path / "out"), sizes=Sizes(block_bytes=block))
    assert documents(corpus) == [*expected, [9]]
    assert corpus.manifest.text_bytes == 0


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", "<i4", "<i8", "u1"])
def test_npy_of_any_integer_type(tmp_path, dtype):
    ids = np.arange(200).astype(dtype)
    np.save(tmp_path / "a.npy", ids)
    corpus = prepare_corpus(tokens_config(tmp_path / "a.npy", dtype=None, vocab_size=200), str(tmp_path / "out"))
    assert documents(corpus) == [ids.tolist()]


def test_uint32_tokens(tmp_path):
    ids = np.array([0, 99_999, 70_000], dtype=np.uint32)
    ids.tofile(tmp_path / "a.bin")
    setting = tokens_config(tmp_path / "a.bin", dtype="uint32", vocab_size=100_000)
    assert documents(prepare_corpus(setting, str(tmp_path / "out"))) == [ids.tolist()]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (b"\1\0\2", {}, r"has 3 bytes, no multiple of the 2"),
        (b"\1\0\xe8\3", {}, r"a\.bin' holds id 1000 at index 1, outside `corpus.vocab_size` 1000; correct"),
        (b"\1\0", {"dtype": None}, r"set `corpus.dtype`"),
        (b"", {"eos_id": 0}, "corpus is empty"),
    ],
)
def test_unusable_token_files_are_refused(tmp_path, content, fields, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_corpus(tokens_config(tmp_path / "a.bin", **fields), str(tmp_path / "out"))
    assert load_manifest(str(tmp_path / "out")) is None


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.uint16), "one-dimensional"),
        (np.zeros(2, np.float32), "one-dimensional integer"),
        (np.array([3, -1], np.int32), "holds id -1 at index 1"),
        (np.array([{}], object), "one-dimensional integer"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        prepare_corpus(tokens_config(tmp_path / "a.npy", dtype=None), str(tmp_path / "out"))


def test_truncated_and_foreign_npy_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    whole = (tmp_path / "a.npy").read_bytes()
    for content, message in ((whole[:-3], "does not hold as many ids"), (b"no array", "not a readable .npy")):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(InputError, match=message):
            prepare_corpus(tokens_config(tmp_path / "a.npy"), str(tmp_path / "out"))


# --- partition -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12), st.integers(1, 30))
def test_partition_keeps_every_byte_in_order(sizes, target):
    files = [SourceFile(str(index), "", size, splittable=cut) for index, (size, cut) in enumerate(sizes)]
    parts = partition_files(files, target)
    assert all(parts)
    flat = [file for part in parts for file in part]
    seen = [(file.name, *(file.span or (0, file.bytes))) for file in flat]
    assert [name for name, *_ in seen] == sorted((name for name, *_ in seen), key=int)
    for file in files:
        mine = [(start, stop) for name, start, stop in seen if name == file.name]
        assert mine[0][0] == 0
        assert mine[-1][1] == file.bytes
        assert [stop for _, stop in mine[:-1]] == [start for start, _ in mine[1:]]
    for part in parts:
        size = sum(piece_bytes(file) for file in part)
        assert size <= target or len([file for file in part if piece_bytes(file)]) == 1


# --- the manifest ----------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(tmp_path):
    write_jsonl(tmp_path / "in/a.jsonl", ["abc"])
    setting, root = config("jsonl", tmp_path / "in"), str(tmp_path / "out")
    mapped: list[str] = []

    def run(function, items):
        mapped.append(function.func.__name__)
        return map(function, items)

    prepare_corpus(setting, root, run=run)
    assert mapped == ["_digest_files", "_tokenise_job"]
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*")}
    prepare_corpus(setting, root, run=run)
    assert mapped == ["_digest_files", "_tokenise_job", "_digest_files"]
    assert {path: path.stat().st_mtime_ns for path in Path(root).rglob("*")} == before


def test_growth_appends_a_segment_and_keeps_the_plan(tmp_path):
    setting, root = config("jsonl", tmp_path / "in", add_bos=True), str(tmp_path / "out")
    write_jsonl(tmp_path / "in/m.jsonl", ["abcdefg", "hij"])
    old = prepare_corpus(setting, root)
    write_jsonl(tmp_path / "in/a.jsonl", ["new first by name"])
    new = prepare_corpus(setting, root)
    assert new.manifest.segments[0] == old.manifest.segments[0]
    assert [file.name for file in new.manifest.segments[1].files] == ["a.jsonl"]
    assert new.manifest.corpus_sha256 != old.manifest.corpus_sha256
    assert new.manifest.tokens_sha256 != old.manifest.tokens_sha256
    assert new.first_document(1) == 2
    plans = [
        plan_corpus(
            [corpus.document_offsets(index) for index in range(len(corpus.manifest.segments))],
            length=4,
            context="document",
        )
        for corpus in (old, new)
    ]
    ids = np.arange(plans[0].num_windows)
    before, after = gather(old, plans[0].windows(ids), 4), gather(new, plans[1].windows(ids), 4)
    np.testing.assert_array_equal(before.inputs, after.inputs)
    np.testing.assert_array_equal(before.document, after.document)
    last = gather(new, plans[1].windows([plans[1].num_windows - 1]), 4)
    assert last.document[0, 0] == 2


def test_changed_file_is_a_mismatch(tmp_path):
    setting, root = config("jsonl", tmp_path / "in"), str(tmp_path / "out")
    write_jsonl(tmp_path / "in/a.jsonl", ["abc"])
    prepare_corpus(setting, root)
    write_jsonl(tmp_path / "in/a.jsonl", ["abd"])
    with pytest.raises(MismatchError, match=r"a\.jsonl.*changed after it was prepared"):
        prepare_corpus(setting, root)


def test_removed_file_is_a_mismatch(tmp_path):
    setting, root = config("jsonl", tmp_path / "in"), str(tmp_path / "out")
    write_jsonl(tmp_path / "in/a.jsonl", ["abc"])
    write_jsonl(tmp_path / "in/b.jsonl", ["abc"])
    prepare_corpus(setting, root)
    (tmp_path / "in/a.jsonl").unlink()
    with pytest.raises(MismatchError, match=r"'a\.jsonl' was prepared but is no longer listed"):
        prepare_corpus(setting, root)


def test_another_rule_is_a_mismatch(tmp_path):
    path, root = write_jsonl(tmp_path / "a.jsonl", ["abc"]), str(tmp_path / "out")
    prepare_corpus(config("jsonl", path), root)
    with pytest.raises(MismatchError, match="bos_id None -> 256"):
        prepare_corpus(config("jsonl", path, add_bos=True), root)


def test_pending_files_is_pure(tmp_path):
    one, two = SourceFile("a", "/x/a", 3, "aa"), SourceFile("b", "/x/b", 3, "bb")
    assert pending_files(None, [one, two]) == [one, two]
    rule = corpus_rule(config("text", "x"))
    part = PartRecord("part-00000", 3, 1, 3, "i", "o", rule.digest)
    manifest = append_segment(Manifest(rule), "s", [one], [part])
    assert pending_files(manifest, [two, replace(one, path="/elsewhere/a")]) == [two]
    assert pending_files(manifest, [one]) == []


def test_parts_of_another_tokenizer_are_refused():
    rule = corpus_rule(config("text", "x"))
    part = PartRecord("part-00000", 3, 1, 3, "i", "o", "another rule")
    with pytest.raises(MismatchError, match="same tokenizer on every machine"):
        append_segment(Manifest(rule), "s", [], [part])


def test_identity_covers_what_decides_the_ids_and_nothing_else(tmp_path):
    here = write_jsonl(tmp_path / "here/a.jsonl", TEXTS)
    there = write_jsonl(tmp_path / "there/a.jsonl", TEXTS)
    manifests = [
        prepare_corpus(setting, str(tmp_path / f"out{index}")).manifest
        for index, setting in enumerate(
            [config("jsonl", here), config("jsonl", there.parent), config("jsonl", here, add_eos=True)]
        )
    ]
    assert manifests[0].corpus_sha256 == manifests[1].corpus_sha256
    assert manifests[0].tokens_sha256 == manifests[1].tokens_sha256
    assert manifests[0].corpus_sha256 != manifests[2].corpus_sha256
    assert manifests[0].tokens_sha256 != manifests[2].tokens_sha256


def test_document_boundaries_are_part_of_tokens_sha256(tmp_path):
    digests = set()
    for index, texts in enumerate((["ab"], ["a", "b"])):
        path = write_jsonl(tmp_path / f"{index}/a.jsonl", texts)
        digests.add(prepare_corpus(config("jsonl", path), str(tmp_path / f"out{index}")).manifest.tokens_sha256)
    assert len(digests) == 2


def test_manifest_round_trip_and_tampering(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare_corpus(config("jsonl", path), str(tmp_path / "out")).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    sha256 = manifest.segments[0].parts[0].ids_sha256
    with pytest.raises(MismatchError, match="altered"):
        Manifest.from_json(manifest.to_json().replace(sha256.encode(), b"0" * 64))
    with pytest.raises(InputError, match="version 3"):
        Manifest.from_json(manifest.to_json().replace(b'"schema_version": 2', b'"schema_version": 3'))
    for damaged in (b"", b"[]", manifest.to_json()[:-5], b"{}"):
        with pytest.raises(InputError, match="damaged"):
            Manifest.from_json(damaged)


def test_segment_names_differ_with_their_files():
    file = SourceFile("a", "a", 1, "x")
    assert segment_name(0, [file]) != segment_name(0, [replace(file, sha256="y")])
    assert segment_name(7, [file]).startswith("00007-")


def test_cache_name_is_stable_and_specific(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = cache_name(config("jsonl", "a.jsonl"))
    assert name == cache_name(config("jsonl", tmp_path / "a.jsonl", tokenizer_is="counted"))
    others = [config("jsonl", "b.jsonl"), config("jsonl", "a.jsonl", add_bos=True), config("text", "a.jsonl")]
    assert len({name, *map(cache_name, others)}) == 4
    monkeypatch.chdir("/")
    assert cache_name(config("jsonl", "a.jsonl")) != name


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    for index in range(4):
        write_jsonl(tmp_path / f"in/{index}.jsonl", [f"text {index}", "more"])
    return prepare_corpus(config("jsonl", tmp_path / "in"), str(tmp_path / "out"), sizes=SMALL)


def part_file(corpus: PreparedCorpus, suffix: str) -> Path:
    return next(Path(corpus.root).rglob(f"part-00000{suffix}"))


def test_unprepared_root_is_incomplete(tmp_path):
    with pytest.raises(IncompleteError, match="no prepared corpus"):
        PreparedCorpus(str(tmp_path))


def test_corpus_pickles_by_place(corpus):
    expected = documents(corpus)
    assert documents(pickle.loads(pickle.dumps(corpus))) == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**6)])
def test_ranges_outside_the_stream_are_refused(corpus, start, stop):
    with pytest.raises(IndexError):
        corpus.read_ids(0, start, stop)


@pytest.mark.parametrize("suffix", [".ids.bin", ".offsets.npy"])
def test_verify_names_the_altered_file(corpus, suffix):
    corpus.verify()
    path = part_file(corpus, suffix)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=rf"part-00000\{suffix}' was altered"):
        corpus.verify()
    path.unlink()
    with pytest.raises(MismatchError, match=rf"part-00000\{suffix}' is missing"):
        corpus.verify()


def test_reading_truncated_or_altered_parts_is_a_mismatch(corpus):
    path = part_file(corpus, ".ids.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(MismatchError, match="truncated"):
        corpus.read_ids(0, 0, corpus.manifest.tokens)
    path = part_file(corpus, ".offsets.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(MismatchError, match="altered"):
        corpus.document_offsets(0)


def test_few_parts_stay_open(corpus):
    expected = documents(corpus)
    again = PreparedCorpus(corpus.root, open_parts=2)
    assert documents(again) == expected
    assert len(again._ids) == len(again._offsets) == 2


def test_remote_reads_give_the_same_ids(corpus):
    remote = PreparedCorpus(corpus.root)
    remote._filesystem, remote._path = SubTreeFileSystem(corpus.root, LocalFileSystem()), ""
    assert documents(remote) == documents(corpus)
    assert not remote._ids


def test_failed_part_leaves_nothing_under_its_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": 1}\n')
    setting = config("jsonl", path)
    with pytest.raises(InputError, match="line 2"):
        tokenise_part(setting, list_files(setting), str(tmp_path / "out/part-00000"), LocalFileSystem())
    assert list((tmp_path / "out").iterdir()) == []


def test_repeated_parts_are_identical(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    setting = config("jsonl", path)
    records = [
        tokenise_part(setting, list_files(setting), str(tmp_path / "out/part-00000"), LocalFileSystem())
        for _ in range(2)
    ]
    assert records[0] == records[1]


def test_a_place_that_cannot_be_written_is_refused_only_where_something_is_to_be_prepared(tmp_path, monkeypatch):
    text = config("jsonl", write_jsonl(tmp_path / "a.jsonl", TEXTS))
    first = prepare_corpus(text, str(tmp_path / "prepared"))

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert prepare_corpus(text, str(tmp_path / "prepared")).manifest == first.manifest
    with pytest.raises(InputError, match=r"how\.cache .*other cannot be written \(Read-only file system\)"):
        prepare_corpus(text, str(tmp_path / "other"))
