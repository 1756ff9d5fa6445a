"""A folder on each machine for what its processes map into memory: artifacts fetched from a store, decoded weights.

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
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenbound.errors import InputError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.remote import file_infos

logger = logging.getLogger(__name__)

ARTIFACT_SUFFIX, WEIGHTS_SUFFIX, PARTIAL_SUFFIX = ".tokenbound", ".safetensors", ".partial"
"""Of an artifact, of decoded weights, and of either while it is written."""

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
        if path.name.endswith((ARTIFACT_SUFFIX, WEIGHTS_SUFFIX, PARTIAL_SUFFIX)):
            _remove_unheld(path)
    place = os.statvfs(folder)
    free = place.f_bavail * place.f_frsize
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"has {free:,} bytes free where {num_bytes:,} are needed", str(folder))


def _remove_unheld(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    os.close(descriptor)


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
    try:
        place = open_folder(folder)
        with alone_in(place):
            if sha256 is not None and (found := place / f"{sha256}{ARTIFACT_SUFFIX}").exists():
                hold(found)
                return found
            info = file_infos(filesystem, path)
            if not info.is_file:
                raise FileNotFoundError(errno.ENOENT, "does not exist", uri)
            make_room(place, info.size)
            logger.info("fetching %s: %d bytes", uri, info.size)
            partial = place / f"fetched-{os.getpid()}{ARTIFACT_SUFFIX}{PARTIAL_SUFFIX}"
            try:
                found_sha256 = _copy(uri, partial, info.size)
                if sha256 not in (None, found_sha256):
                    raise MismatchError(
                        f"{uri} has the digest {found_sha256}, not {sha256}; put the artifact of this run back there"
                    )
                found = place / f"{found_sha256}{ARTIFACT_SUFFIX}"
                partial.replace(found)
            finally:
                partial.unlink(missing_ok=True)
            hold(found)
            return found
    except FileNotFoundError as error:
        if error.filename == uri:
            raise
        raise _unusable(folder, error) from None
    except OSError as error:
        raise _unusable(folder, error) from None


def _copy(uri: str, target: Path, size: int) -> str:
    """Copy a file of a store to this machine; its digest."""
    digest, copied = hashlib.sha256(), 0
    with files.open_input(*files.resolve(uri)) as source, target.open("xb") as sink:
        while part := source.read(CHUNK_BYTES):
            digest.update(part)
            sink.write(part)
            copied += len(part)
    if copied != size:
        raise InputError(f"{uri}: the store gave {copied:,} of {size:,} bytes; run the command again")
    return digest.hexdigest()


def _unusable(folder: str | Path | None, error: OSError) -> InputError:
    place = folder or default_folder()
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        reason = "cannot be made: the folder that it is in does not exist"
    return InputError(f"how.local_folder {place} on {socket.gethostname()}: {reason}; {CURE}")
