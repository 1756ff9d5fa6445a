"""A machine fetches an artifact once, into a folder of its own, and keeps nothing of a fetch that failed."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileInfo, FileType

from tokenbound.compression.artifact_file import open_artifact
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.copies import _fetched
from tokenbound.store.local_folder import default_folder, fetch_artifact, release_files, shared_copy

DATA = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release_files()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.tokenbound").write_bytes(DATA)
    return (tmp_path / "store" / "a.tokenbound").as_uri()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder, of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"tokenbound-weights-{os.getuid()}"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock") if folder.exists() else []


def test_it_lies_under_its_digest_and_is_found_again(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    found = fetch_artifact(uri, sha256=SHA256, folder=folder)
    assert found == folder / f"{SHA256}.tokenbound"
    assert found.read_bytes() == DATA
    (tmp_path / "store" / "a.tokenbound").unlink()
    assert fetch_artifact(uri, sha256=SHA256, folder=folder) == found, "the store is not asked again"
    with pytest.raises(FileNotFoundError):
        fetch_artifact(uri, folder=folder)


def test_without_a_known_digest_the_store_is_asked_again(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    first = fetch_artifact(uri, folder=folder)
    (tmp_path / "store" / "a.tokenbound").write_bytes(b"another")
    assert fetch_artifact(uri, folder=folder).read_bytes() == b"another"
    assert first.exists(), "this process still uses it"
    release_files()
    (tmp_path / "store" / "a.tokenbound").write_bytes(b"a third")
    fetch_artifact(uri, folder=folder)
    assert kept(folder) == [hashlib.sha256(b"a third").hexdigest() + ".tokenbound"]


def test_what_others_put_there_stays(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    theirs = ["model.safetensors", "mine.tokenbound", "x.safetensors.partial"]
    for name in theirs:
        (folder / name).write_bytes(b"")
    (folder / "fetched-1.tokenbound.partial").write_bytes(b"of a process that was killed")
    fetch_artifact(uri, folder=folder)
    assert kept(folder) == sorted([*theirs, f"{SHA256}.tokenbound"])


def fetch_counted(uri: str, folder: str, counter: Any) -> None:
    class Counted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with counter.get_lock():
                counter.value += record.getMessage().startswith("fetching ")

    logger = logging.getLogger("tokenbound.store.local_folder")
    logger.setLevel(logging.INFO)
    logger.addHandler(Counted())
    fetch_artifact(uri, sha256=SHA256, folder=folder)


def test_of_processes_that_ask_together_one_fetches(uri: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=fetch_counted, args=(uri, str(tmp_path / "node"), counter)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert counter.value == 1


def test_a_full_disk_is_said_before_anything_is_copied(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Full", (), {"f_bavail": 1, "f_frsize": 4096})()
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    message = r"^how\.local_folder \S+ on \S+: has 4,096 bytes free where 1,280,000 are needed; name another folder"
    with pytest.raises(InputError, match=message):
        fetch_artifact(uri, sha256=SHA256, folder=tmp_path / "node")
    assert kept(tmp_path / "node") == []


class _Filling:
    """A file on a disk that is full after its first bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> _Filling:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_copying_leaves_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def filling(self: Path, *mode: str, **options: Any) -> Any:
        file = opened(self, *mode, **options)
        return _Filling(file) if self.name.endswith(".partial") else file

    monkeypatch.setattr(Path, "open", filling)
    with pytest.raises(InputError, match=r"how\.local_folder .* No space left on device; name another folder"):
        fetch_artifact(uri, sha256=SHA256, folder=tmp_path / "node")
    assert kept(tmp_path / "node") == []


def test_another_digest_leaves_nothing(uri: str, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=rf"has the digest {SHA256}, not {'0' * 64}; put the artifact of this run"):
        fetch_artifact(uri, sha256="0" * 64, folder=tmp_path / "node")
    assert kept(tmp_path / "node") == []


def test_a_file_that_the_store_cut_short_leaves_nothing(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{uri}: artifact: ")) as caught:
        open_artifact(uri, folder=tmp_path / "node")
    assert "\n" not in str(caught.value)
    assert kept(tmp_path / "node") == []


def test_an_answer_that_breaks_off_leaves_nothing(uri: str, tmp_path: Path, home: Path) -> None:
    path = tmp_path / "store" / "a.tokenbound"
    longer = FileInfo(str(path), FileType.File, size=len(DATA) + 1, mtime_ns=0)
    with pytest.raises(InputError, match=r"the store gave 1,280,000 of 1,280,001 bytes; run the command again"):
        shared_copy(uri, "key", {"good.json": FileInfo(str(path), FileType.File, size=len(DATA)), "cut.json": longer})
    assert kept(home) == []


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("not mounted", "cannot be made: the folder that it is in does not exist"),
        ("open to others", "can be written by other users"),
        ("a link", "can be written by other users"),
        ("a file", "File exists"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_cure(
    uri: str, tmp_path: Path, obstacle: str, reason: str
) -> None:
    folder = tmp_path / "node"
    if obstacle == "not mounted":
        folder = tmp_path / "disk" / "node"
    elif obstacle == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif obstacle == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.write_bytes(b"")
    with pytest.raises(InputError, match=rf"^how\.local_folder {folder} on \S+: {reason}; name another folder in how"):
        fetch_artifact(uri, folder=folder)


def test_a_folder_of_somebody_else_or_closed_to_us_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node").mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(InputError, match="is not writable"):
            fetch_artifact(uri, folder=tmp_path / "node")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match="can be written by other users"):
        fetch_artifact(uri, folder=tmp_path / "node")


def test_what_is_not_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fetch_artifact((tmp_path / "absent").as_uri(), folder=tmp_path / "node")


def test_the_default_is_a_place_of_this_user() -> None:
    assert default_folder().name == f"tokenbound-weights-{os.getuid()}"


def test_a_store_that_refuses_is_not_taken_for_this_machine(tmp_path: Path, home: Path) -> None:
    gone = FileInfo(str(tmp_path / "gone"), FileType.File, size=1)
    with pytest.raises(InputError, match="gone cannot be read"):
        shared_copy(tmp_path.as_uri(), "key", {"gone": gone})
    assert kept(home) == []


def test_a_checkpoint_is_copied_once_until_it_changes(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "store" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("not of the model")
    found = Path(_fetched.__wrapped__(folder.as_uri()))
    assert found.name == "model"
    assert [path.name for path in found.iterdir()] == ["config.json"]
    assert Path(_fetched.__wrapped__(folder.as_uri())) == found
    (folder / "config.json").write_text('{"a": 1}')
    newer = Path(_fetched.__wrapped__(folder.as_uri()))
    assert newer != found
    assert (newer / "config.json").read_text() == '{"a": 1}'
    assert len(kept(home)) == 2, "the older one is in use"
    release_files()
    (folder / "config.json").write_text("{}  ")
    _fetched.__wrapped__(folder.as_uri())
    assert len(kept(home)) == 1
