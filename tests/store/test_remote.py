"""Object stores, on a real S3 server that also fails: every operation is tried again, and only so often."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from losses_support import make_losses
from s3_support import Fault, faulty, place

from tokenbound.errors import IncompleteError
from tokenbound.store import filesystem as files
from tokenbound.store import remote, retry
from tokenbound.store.patterns import matching_places
from tokenbound.store.remote import RemoteFile
from tokenbound.store.run import RunDirectory

LARGE = bytes(range(256)) * 50_000
"""12.8 MB: more than one part of an upload."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short waits, and the names of the operations that were tried again."""
    seen: list[str] = []
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "observers", [seen.append])
    return seen


def use_everything(address: str, folder: str) -> None:
    """Every operation of the store once."""
    filesystem, root = files.resolve(place(address, f"bucket/{folder}"))
    assert files.list_paths(filesystem, root) == []
    for name, data in (("a b.json", b"{}"), ("large", LARGE), ("empty", b""), ("a b.json", b"[1]")):
        files.write_bytes(filesystem, f"{root}/{name}", data)
        assert files.read_bytes(filesystem, f"{root}/{name}") == data
    with files.open_atomic(filesystem, f"{root}/deep/er") as stream:
        stream.write(LARGE)
    names = ["a b.json", "deep/er", "empty", "large"]
    assert files.list_paths(filesystem, root, recursive=True) == [f"{root}/{name}" for name in names]
    assert files.read_range(filesystem, f"{root}/deep/er", 7_000_000, 300) == LARGE[7_000_000:7_000_300]
    assert files.exists(filesystem, f"{root}/deep")
    files.delete(filesystem, f"{root}/large")
    assert not files.exists(filesystem, f"{root}/large")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(filesystem, f"{root}/large")


def test_every_operation(s3_address: str, quick: list[str]) -> None:
    use_everything(s3_address, "plain")
    assert quick == []


def test_every_operation_on_a_failing_store(s3_address: str, quick: list[str]) -> None:
    kinds: Iterator[Fault] = iter(["500", "503", "slow", "drop", "cut"] * 1000)

    def every_fourth(number: int, method: str, path: str) -> Fault:
        return next(kinds) if number % 4 == 1 else None

    with faulty(s3_address, every_fourth, slow_s=0.05) as (address, faults):
        use_everything(address, "failing")
    assert set(faults.made) == {"500", "503", "slow", "drop", "cut"}
    assert set(quick) >= {"upload", "file_infos", "read_at", "open_input_file"}
    assert len(quick) <= sum(faults.made.values())


def test_a_store_that_never_answers_ends_the_run(
    s3_address: str, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "4")
    with faulty(s3_address, lambda number, method, path: "503") as (address, faults):
        filesystem, path = files.resolve(place(address, "bucket/never"))
        with pytest.raises(IncompleteError, match=r"failed 4 times: .*SLOW_DOWN"):
            files.write_bytes(filesystem, path, b"x")
    assert faults.requests == 4, "the client retries by itself as well"
    assert quick == ["upload"] * 3


def test_an_upload_that_fails_half_way_leaves_the_old_object(
    s3_address: str, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "2")

    def second_part(number: int, method: str, path: str) -> Fault:
        return "500" if "partNumber=2" in path else None

    filesystem, path = files.resolve(place(s3_address, "bucket/half"))
    files.write_bytes(filesystem, path, b"old")
    with faulty(s3_address, second_part) as (address, faults):
        failing, _ = files.resolve(place(address, "bucket/half"))
        with pytest.raises(IncompleteError):
            files.write_bytes(failing, path, LARGE * 2)
    assert faults.made["500"] == 2
    assert files.read_bytes(filesystem, path) == b"old"


def test_what_will_not_pass_is_not_tried_again(s3_address: str, quick: list[str]) -> None:
    filesystem, path = files.resolve(place(s3_address, "no-such-bucket/x"))
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
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
    s3_address: str, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 3.0)
    filesystem, path = files.resolve(place(s3_address, "bucket/late"))
    files.write_bytes(filesystem, path, b"late")

    def first_read(number: int, method: str, path: str) -> Fault:
        return "slow" if method == "GET" and not faults.made else None

    with faulty(s3_address, first_read, slow_s=20.0) as (address, faults):
        slow, _ = files.resolve(place(address, "bucket/late"))
        assert files.read_bytes(slow, path) == b"late"
    assert faults.made["slow"] == 1
    assert "read_at" in quick


def test_remote_files_read_as_files_do(s3_address: str) -> None:
    filesystem, path = files.resolve(place(s3_address, "bucket/some.gz"))
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


def test_globs_in_uris(s3_address: str) -> None:
    filesystem, _ = files.resolve(place(s3_address, "bucket"))
    for name in ("step 1.tokenbound", "step-2.tokenbound", "step-3.txt"):
        files.write_bytes(filesystem, f"bucket/models/{name}", b"")
    found = matching_places(place(s3_address, "bucket/models/step*.tokenbound"))
    assert found == [place(s3_address, f"bucket/models/step{name}.tokenbound") for name in ("%201", "-2")]
    assert files.read_bytes(*files.resolve(found[0])) == b""


def test_shards_are_spread_over_prefixes_and_found_again(s3_address: str, tmp_path: Path) -> None:
    run = RunDirectory(place(s3_address, "bucket/spread"))
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
