"""Paths and atomic writes, on local disk and on a store without rename."""

from __future__ import annotations

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
