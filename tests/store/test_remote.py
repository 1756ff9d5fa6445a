"""Object stores, on servers that also fail: every operation is tried again, and only so often."""

from __future__ import annotations

import gzip
import io
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from losses_support import make_losses
from pyarrow.fs import FileSystem
from store_support import Fault, Rule, Store, faulty

from tokenbound.errors import IncompleteError
from tokenbound.store import filesystem as files
from tokenbound.store import retry
from tokenbound.store.patterns import matching_places
from tokenbound.store.remote import RemoteFile
from tokenbound.store.run import RunDirectory

LARGE = bytes(range(256)) * 50_000
"""12.8 MB: more than one part of an upload."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Short waits, and the names of the operations that were tried again."""
    seen: list[str] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20)))
    retry.observers.append(seen.append)
    yield seen
    retry.observers.remove(seen.append)


def use_everything(uri: str) -> None:
    """Every operation of the store once."""
    filesystem, root = files.resolve(uri)
    assert files.list_paths(filesystem, root) == []
    for name, data in (("a b.json", b"{}"), ("large", LARGE), ("empty", b""), ("a b.json", b"[1]")):
        files.write_bytes(filesystem, f"{root}/{name}", data)
        assert files.read_bytes(filesystem, f"{root}/{name}") == data
    with files.open_atomic(filesystem, f"{root}/deep/er") as stream:
        stream.write(LARGE)
    names = ["a b.json", "deep/er", "empty", "large"]
    assert files.list_paths(filesystem, root, recursive=True) == [f"{root}/{name}" for name in names]
    assert files.read_range(filesystem, f"{root}/deep/er", 7_000_000, 300) == LARGE[7_000_000:7_000_300]
    with files.open_input(filesystem, f"{root}/deep/er") as stream:
        assert b"".join(iter(lambda: stream.read(5_000_000), b"")) == LARGE
    assert files.exists(filesystem, f"{root}/deep")
    for _ in range(2):
        files.delete(filesystem, f"{root}/large")
        assert not files.exists(filesystem, f"{root}/large")
    for read in (files.read_bytes, files.open_input, files.open_random):
        with pytest.raises(FileNotFoundError):
            read(filesystem, f"{root}/large")
    for _ in range(2):
        files.delete_folder(filesystem, f"{root}/deep")
    assert files.list_paths(filesystem, root, recursive=True) == [f"{root}/a b.json", f"{root}/empty"]


def each_in_turn(every: int) -> Rule:
    kinds = itertools.cycle(["500", "503", "slow", "drop", "cut"])
    return lambda number, method, path: next(kinds) if number % every == 1 else None


def test_every_operation(store: Store, quick: list[str]) -> None:
    use_everything(store.place("bucket/plain"))
    assert quick == []


@pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_every_operation_on_a_failing_store(store: Store, quick: list[str]) -> None:
    """Google's client waits for more than a second before it says that a request failed."""
    with faulty(store, each_in_turn(3), slow_s=0.05) as (failing, faults):
        use_everything(failing.place("bucket/failing"))
    assert set(faults.made) == {"500", "503", "slow", "drop", "cut"}
    assert set(quick) >= {"upload", "file_infos", "open_file"}
    assert {"read_at", "download"} & set(quick)
    assert len(quick) <= faults.made.total()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["429", "500", "503", "slow", "drop", "cut"])
def test_every_request_to_google_may_fail_once(fault: Fault, gs_store: Store, quick: list[str]) -> None:
    """Reads of all, of a range and in order, and an upload in parts, each with every one of its requests lost."""
    seen: set[tuple[str, str, int]] = set()

    def first_of_its_kind(number: int, method: str, path: str) -> Fault:
        kind = (method, path.partition("&upload_id")[0], path.count("upload_id"))
        return None if kind in seen else seen.add(kind) or fault

    def check(filesystem: FileSystem, path: str) -> None:
        files.write_bytes(filesystem, path, LARGE)
        assert files.read_bytes(filesystem, path) == LARGE
        assert files.read_range(filesystem, path, 300, 4) == LARGE[300:304]
        with files.open_input(filesystem, path) as stream:
            assert stream.read() == LARGE
        files.delete(filesystem, path)
        assert not files.exists(filesystem, path)

    with faulty(gs_store, first_of_its_kind, slow_s=0.05) as (failing, faults):
        check(*files.resolve(failing.place(f"bucket/once-{fault}")))
    assert faults.made[fault or ""] >= 6
    assert bool(quick) == (fault != "slow")


def test_a_folder_is_there_though_listing_it_failed(store: Store, quick: list[str]) -> None:
    filesystem, path = files.resolve(store.place("bucket/folder"))
    files.write_bytes(filesystem, f"{path}/deep/file", b"x")
    first: Iterator[Fault] = iter(["503"])

    def first_listing(number: int, method: str, path: str) -> Fault:
        return next(first, None) if "prefix=" in path else None

    with faulty(store, first_listing) as (failing, faults):
        unlisted, _ = files.resolve(failing.place("bucket/folder"))
        assert files.exists(unlisted, path)
        assert not files.exists(unlisted, f"{path}er")
    assert faults.made["503"] == 1


def test_half_of_an_object_is_not_taken_for_all(gs_store: Store, quick: list[str]) -> None:
    """Where what lies before the server sends half of the bytes and says that this is what was asked for."""
    filesystem, path = files.resolve(gs_store.place("bucket/halved"))
    files.write_bytes(filesystem, path, LARGE)
    halved = itertools.cycle(["short", None])

    def every_second_download(number: int, method: str, path: str) -> Fault:
        return next(halved) if "alt=media" in path else None

    with faulty(gs_store, every_second_download) as (failing, faults):
        short, _ = files.resolve(failing.place("bucket/halved"))
        assert files.read_bytes(short, path) == LARGE
        assert files.read_range(short, path, 0, len(LARGE)) == LARGE
        assert files.read_range(short, path, 1, len(LARGE) - 1) == LARGE[1:]
    assert faults.made["short"] >= 2
    assert set(quick) == {"download", "read_at"}


@pytest.mark.parametrize(("scheme", "said"), [("s3", "SLOW_DOWN"), ("gs", "UNAVAILABLE")])
def test_a_store_that_never_answers_ends_the_run(
    scheme: str, said: str, quick: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "3")
    store = request.getfixturevalue(f"{scheme}_store")
    with faulty(store, lambda number, method, path: "503") as (failing, faults):
        filesystem, path = files.resolve(failing.place("bucket/never"))
        with pytest.raises(IncompleteError, match=rf"failed 3 times: .*{said}"):
            files.write_bytes(filesystem, path, b"x")
    assert faults.requests == 3, "the client retries by itself as well"
    assert quick == ["upload"] * 2


def test_an_upload_that_fails_half_way_leaves_the_old_object(
    store: Store, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "2")
    parts = itertools.count(1)

    def second_part(number: int, method: str, path: str) -> Fault:
        return "500" if "partNumber=2" in path or ("upload_id" in path and next(parts) >= 2) else None

    filesystem, path = files.resolve(store.place("bucket/half"))
    files.write_bytes(filesystem, path, b"old")
    with faulty(store, second_part) as (failing, faults):
        half, _ = files.resolve(failing.place("bucket/half"))
        with pytest.raises(IncompleteError):
            files.write_bytes(half, path, LARGE * 2)
    assert faults.made["500"] == 2
    assert files.read_bytes(filesystem, path) == b"old"


def test_what_will_not_pass_is_not_tried_again(store: Store, quick: list[str]) -> None:
    filesystem, path = files.resolve(store.place("no-such-bucket/x"))
    with pytest.raises(OSError, match=r"NO_SUCH_BUCKET|NOT_FOUND"):
        files.write_bytes(filesystem, path, b"x")
    assert quick == []


def test_waits_grow_and_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first, fourth and last wait of many operations: each is drawn from nothing up to its limit."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)

    def fail() -> None:
        raise OSError("AWS Error SLOW_DOWN")

    for _ in range(200):
        with pytest.raises(IncompleteError, match="failed 10 times"):
            retry.patiently(fail)
    waits_of = [waits[number :: retry.ATTEMPTS - 1] for number in range(retry.ATTEMPTS - 1)]
    for number, limit in ((0, retry.FIRST_WAIT_S), (3, 8 * retry.FIRST_WAIT_S), (8, retry.LONGEST_WAIT_S)):
        assert len(waits_of[number]) == 200
        assert 0 <= min(waits_of[number]) < limit / 4
        assert limit * 3 / 4 < max(waits_of[number]) <= limit


def test_an_answer_that_does_not_come_is_asked_for_again(
    s3_store: Store, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENBOUND_STORE_ANSWER_S", "3")
    filesystem, path = files.resolve(s3_store.place("bucket/late"))
    files.write_bytes(filesystem, path, b"late")
    first: Iterator[Fault] = iter(["slow"])

    def first_read(number: int, method: str, path: str) -> Fault:
        return next(first, None) if method == "GET" else None

    with faulty(s3_store, first_read, slow_s=20.0) as (failing, faults):
        slow, _ = files.resolve(failing.place("bucket/late"))
        assert files.read_bytes(slow, path) == b"late"
    assert faults.made["slow"] == 1
    assert "read_at" in quick


def test_remote_files_read_as_files_do(store: Store) -> None:
    filesystem, path = files.resolve(store.place("bucket/some.gz"))
    files.write_bytes(filesystem, path, gzip.compress(LARGE))
    with files.open_input(filesystem, path) as stream:
        assert gzip.decompress(stream.read()) == LARGE
    files.write_bytes(filesystem, path, LARGE)
    with RemoteFile(filesystem, path) as file:
        assert file.seek(-5, io.SEEK_END) == len(LARGE) - 5
        assert file.read(10) == LARGE[-5:]
        assert file.read(10) == b""
        file.seek(256)
        assert file.read(3) == LARGE[:3]
        assert file.seek(2, io.SEEK_CUR) == 261
        assert file.readall() == LARGE[261:]


def test_globs_in_uris(store: Store) -> None:
    filesystem, _ = files.resolve(store.place("bucket"))
    for name in ("step 1.tokenbound", "step-2.tokenbound", "step-3.txt"):
        files.write_bytes(filesystem, f"bucket/models/{name}", b"")
    found = matching_places(store.place("bucket/models/step*.tokenbound"))
    assert found == [store.place(f"bucket/models/step{name}.tokenbound") for name in ("%201", "-2")]
    assert files.read_bytes(*files.resolve(found[0])) == b""


def test_shards_are_spread_over_prefixes_and_found_again(store: Store, tmp_path: Path) -> None:
    run = RunDirectory(store.place("bucket/spread"))
    records = {shard: run.commit(shard, make_losses([4, 4]), {}, "f") for shard in range(40)}
    assert len({record.file.split("/")[1] for record in records.values()}) > 30, "the numbers share prefixes"
    assert run.committed() == records
    assert run.committed([3, 50]) == {3: records[3]}
    with pytest.raises(IncompleteError, match="does not exist"):
        run.record(50)
    for path in files.list_paths(run.filesystem, run.root, recursive=True):
        copied = tmp_path / path.removeprefix(f"{run.root}/")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(files.read_bytes(run.filesystem, path))
    local = RunDirectory(str(tmp_path))
    assert local.committed() == records, "a copy on a disk cannot be read"
    local.check_committed(records.values())
