"""Paths and atomic writes, on local disk and on a store without rename."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from tokenbound.errors import InputError
from tokenbound.store import filesystem as files

LOCAL = LocalFileSystem()


@pytest.fixture(params=["local", "store"])
def place(request, tmp_path):
    """A filesystem and a folder in it; the second is no `LocalFileSystem`, as an object store is not."""
    if request.param == "local":
        return LOCAL, str(tmp_path)
    return SubTreeFileSystem(str(tmp_path), LOCAL), "inside"


def test_round_trip_creates_directories_and_replaces(place):
    filesystem, root = place
    path = f"{root}/a/b.json"
    assert not files.exists(filesystem, path)
    for data in (b"first", b"", b"second"):
        files.write_bytes(filesystem, path, data)
        assert files.read_bytes(filesystem, path) == data
    assert files.exists(filesystem, path)


def test_failed_write_publishes_nothing(place):
    filesystem, root = place
    path = f"{root}/a.bin"
    files.write_bytes(filesystem, path, b"old")

    def fail():
        with files.open_atomic(filesystem, path) as stream:
            stream.write(b"new, but half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert files.read_bytes(filesystem, path) == b"old"
    assert [Path(name).name for name in files.list_paths(filesystem, root)] == ["a.bin"]


def test_list_is_sorted_skips_hidden_and_absent(place):
    filesystem, root = place
    for name in ("b", "a", "c/d", ".a.tmp"):
        files.write_bytes(filesystem, f"{root}/{name}", b"")
    assert files.list_paths(filesystem, root) == [f"{root}/a", f"{root}/b"]
    assert files.list_paths(filesystem, root, recursive=True) == [f"{root}/a", f"{root}/b", f"{root}/c/d"]
    assert files.list_paths(filesystem, f"{root}/absent") == []


def test_stored_bytes_are_read_as_stored(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"not gzip at all")
    assert files.read_bytes(LOCAL, str(tmp_path / "a.gz")) == b"not gzip at all"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(LOCAL, str(tmp_path / "absent"))


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filesystem, path = files.resolve("runs/../x y")
    assert files.is_local(filesystem)
    assert path == f"{tmp_path}/x y"
    assert files.resolve((tmp_path / "x y").as_uri())[1] == f"{tmp_path}/x y"
    filesystem, path = files.resolve("s3://bucket/key?region=eu-west-1")
    assert not files.is_local(filesystem)
    assert path == "bucket/key"


def test_unknown_uris_are_refused():
    with pytest.raises(InputError, match="cannot open"):
        files.resolve("nosuch://a/b")


def test_temporary_files_go_when_their_lease_is_over(tmp_path):
    old, young = tmp_path / "shards" / f".00001.json.{'a' * 32}.tmp", tmp_path / f".plan.json.{'b' * 32}.tmp"
    others = [tmp_path / "shards" / name for name in ("00001.json", ".hidden.tmp", "x.tmp", f"{'a' * 32}.tmp")]
    for path in (old, young, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (old, *others):
        os.utime(path, (0, 0))
    assert files.remove_abandoned(str(tmp_path), recursive=False) == 0
    assert files.remove_abandoned(str(tmp_path)) == 1
    assert not old.exists()
    assert all(path.exists() for path in (young, *others))
    assert files.remove_abandoned(str(tmp_path), lease_s=-1) == 1
    assert not young.exists()
    assert files.remove_abandoned(str(tmp_path / "absent")) == 0
    assert files.remove_abandoned("s3://bucket/run") == 0


def test_what_a_killed_writer_leaves_is_recognised(tmp_path):
    written = files.open_atomic(LOCAL, str(tmp_path / "a.bin"))
    written.__enter__()
    assert len(list(tmp_path.iterdir())) == 1
    assert files.remove_abandoned(str(tmp_path)) == 0
    assert files.remove_abandoned(str(tmp_path), lease_s=-1) == 1
    written.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []
