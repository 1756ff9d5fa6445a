"""A folder on each machine for what its processes share: weights, decoded or packed, and what was fetched from a store.

Files are named by digests, written under another name and renamed, so a file under its own name is whole. A process
holds a shared lock on each file that it uses while it lives; files that nobody holds are removed before another is
written, so a machine keeps what is in use and one artifact besides.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow.fs import FileInfo, FileSystem

from tokenbound.errors import InputError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.remote import file_infos

logger = logging.getLogger(__name__)

ARTIFACT_SUFFIX, WEIGHTS_SUFFIX, PACKED_SUFFIX, COPY_SUFFIX = ".tokenbound", ".safetensors", ".packed", ".copy"
"""Of an artifact, of decoded weights, of packed ones, and of a folder of fetched files."""
PARTIAL_SUFFIX = ".partial"
"""Of each of them while it is written."""

_OURS = re.compile(r"([0-9a-f]{64}(-\d+)?|fetched-\d+)\.(tokenbound|safetensors|packed|copy)(\.partial)?")
"""Names of what is kept here; whatever else somebody puts into the folder is never removed."""

CURE = "name another folder in how.local_folder, or set TMPDIR"
CHUNK_BYTES = 1 << 23

_held: dict[Path, int] = {}
"""Locks on files in use; the system gives them back when the process ends."""


def default_folder() -> Path:
    """A place on this machine that belongs to this user alone."""
    return Path(tempfile.gettempdir()) / f"tokenbound-weights-{os.getuid()}"


def open_folder(folder: str | Path | None = None) -> Path:
    """The folder, made where it is missing and closed to other users: what lies in it is scored in place of the model.

    Args:
        folder: Its path; what it lies in must be there, so that a disk that is not mounted shows. Default
            `default_folder`.

    Raises:
        PermissionError: it belongs to somebody else, or others may write into it.
        OSError: it cannot be made or written.
    """
    path = Path(os.path.abspath(folder)) if folder else default_folder()  # noqa: PTH100  a link must stay one
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or path.is_symlink():
        raise PermissionError(errno.EPERM, "can be written by other users", str(path))
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "is not writable", str(path))
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process of the machine at a time; the lock of one that dies is free."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_room(folder: Path, num_bytes: int) -> None:
    """Remove files that nobody holds, and see that there is room; inside `alone_in`.

    Raises:
        OSError: there is none.
    """
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            _remove_unheld(path)
    place = os.statvfs(folder)
    free = place.f_bavail * place.f_frsize
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"has {free:,} bytes free where {num_bytes:,} are needed", str(folder))


def _remove_unheld(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, or a folder and what it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hold(path: Path) -> None:
    """Keep a file in the folder as long as this process lives; inside `alone_in`."""
    if path not in _held:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held[path] = descriptor


def release_files() -> None:
    """Give up the files that this process holds: from now on others may remove them. Mapped pages stay readable.

    Done by the system when a process ends.
    """
    while _held:
        os.close(_held.popitem()[1])


def shared_file(folder: str | Path | None, name: str, num_bytes: int, write: Callable[[Path], None]) -> Path:
    """A file that the processes of this machine share: the first that asks writes it, and the others wait for it.

    It stays as long as this process lives.

    Args:
        folder: Where such files are kept; default `default_folder`.
        name: Of the file: a digest and a format say what lies in it.
        num_bytes: Room that it takes; an estimate will do.
        write: Makes it at another path, from where it is renamed once it is whole.

    Raises:
        OSError: there is no place of one's own, no room, or it could not be written.
    """
    place = open_folder(folder)
    path = place / name
    with alone_in(place):
        if not path.exists():
            make_room(place, num_bytes)
            partial = path.with_name(path.name + PARTIAL_SUFFIX)
            try:
                write(partial)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        hold(path)
    return path


def is_in_memory(folder: str | Path | None = None) -> bool:
    """Whether files in a folder take this machine's memory: `/tmp` does on many. False where the system does not tell.

    Args:
        folder: Its path; default `default_folder`.
    """
    place = Path(folder or default_folder()).absolute()
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    around = [(len(mount[1]), mount[2]) for mount in mounts if place.is_relative_to(mount[1])]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def discard(path: Path) -> None:
    """Remove a file that turned out to be damaged, so that nobody uses it again."""
    if path in _held:
        os.close(_held.pop(path))
    path.unlink(missing_ok=True)


def fetch_artifact(uri: str, *, sha256: str | None = None, folder: str | Path | None = None) -> Path:
    """A local copy of an artifact on a store, which all processes of this machine share.

    Its digest and length are checked while it is copied. Where the digest is known, the first process copies and the
    others find the file; where it is not, the artifact is fetched again.

    Args:
        uri: Where it is.
        sha256: Its digest, where it is known.
        folder: Where copies are kept on this machine; default `default_folder`.

    Raises:
        FileNotFoundError: there is nothing at the URI.
        InputError: the folder cannot be used, has no room, or the copy broke off.
        MismatchError: the file has another digest.
    """
    filesystem, path = files.resolve(uri)
    with _usable(folder) as place, alone_in(place):
        if sha256 is not None and (found := place / f"{sha256}{ARTIFACT_SUFFIX}").exists():
            hold(found)
            return found
        info = file_infos(filesystem, path)
        if not info.is_file:
            raise _Absent(uri)
        make_room(place, info.size)
        logger.info("fetching %s: %d bytes", uri, info.size)
        partial = place / f"fetched-{os.getpid()}{ARTIFACT_SUFFIX}{PARTIAL_SUFFIX}"
        try:
            found_sha256 = _copy(filesystem, path, partial, info.size)
            if sha256 not in (None, found_sha256):
                raise MismatchError(
                    f"{uri} has the digest {found_sha256}, not {sha256}; put the artifact of this run back there"
                )
            found = place / f"{found_sha256}{ARTIFACT_SUFFIX}"
            partial.replace(found)
        finally:
            _remove(partial)
        hold(found)
        return found


def shared_copy(uri: str, key: str, named: Mapping[str, FileInfo]) -> Path:
    """A folder with copies of some files of a store, which all processes of this machine share.

    Args:
        uri: Where they are, for messages.
        key: Names the copy: whoever asks for the same key wants the same bytes.
        named: The files, by their names in the folder.

    Raises:
        InputError: the default folder cannot be used or has no room, or a copy broke off.
    """
    filesystem, size = files.resolve(uri)[0], sum(info.size for info in named.values())
    with _usable(None) as place, alone_in(place):
        found = place / f"{key}{COPY_SUFFIX}"
        if not found.exists():
            make_room(place, size)
            logger.info("fetching %s: %d files, %d bytes", uri, len(named), size)
            partial = found.with_name(found.name + PARTIAL_SUFFIX)
            try:
                for name, info in named.items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    _copy(filesystem, info.path, partial / name, info.size)
                partial.replace(found)
            finally:
                _remove(partial)
        hold(found)
        return found


class _Absent(Exception):
    """There is nothing at a URI."""


@contextmanager
def _usable(folder: str | Path | None) -> Iterator[Path]:
    """The folder, open; what the system says against it comes out with the cure.

    Raises:
        InputError: it cannot be made or written, belongs to somebody else, or is full.
    """
    try:
        yield open_folder(folder)
    except _Absent as error:
        raise FileNotFoundError(errno.ENOENT, "does not exist", str(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOENT:
            reason = "cannot be made: the folder that it is in does not exist"
        place = folder or default_folder()
        raise InputError(f"how.local_folder {place} on {socket.gethostname()}: {reason}; {CURE}") from None


def _copy(filesystem: FileSystem, path: str, target: Path, size: int) -> str:
    """Copy a file of a store to this machine; its digest."""
    digest, copied = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for part in _stored(filesystem, path):
            digest.update(part)
            sink.write(part)
            copied += len(part)
    if copied != size:
        raise InputError(f"{path}: the store gave {copied:,} of {size:,} bytes; run the command again")
    return digest.hexdigest()


def _stored(filesystem: FileSystem, path: str) -> Iterator[bytes]:
    """A file of a store, a part at a time.

    Raises:
        InputError: the store does not give it; what this machine's disk says is another matter.
    """
    try:
        with files.open_input(filesystem, path) as source:
            while part := source.read(CHUNK_BYTES):
                yield part
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or str(error).splitlines()[0]}") from None
