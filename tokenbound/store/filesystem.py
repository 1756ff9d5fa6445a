"""One place for paths: local files, ``s3://`` and ``gs://`` URIs look the same to the rest of the package.

Local writes go to a temporary file beside the target, are synced and renamed, so that a reader sees the old
bytes or the new ones. Object stores publish an object when its upload ends; no rename is assumed anywhere, and
operations that fail for the moment are tried again (`store/retry.py`).
"""

from __future__ import annotations

import io
import logging
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from tokenbound.errors import InputError
from tokenbound.limits import require_regular
from tokenbound.store.remote import (
    READ_BYTES,
    SCHEMES,
    RemoteFile,
    delete_file,
    delete_tree,
    file_infos,
    open_store,
    read_object,
    upload,
)
from tokenbound.store.uri import is_uri, refuse_credentials

logger = logging.getLogger(__name__)

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Kinds of filesystem without directories."""
COPY_BYTES = 1 << 23
"""Read at once where a file is copied."""
BUCKETS = tuple(f"{scheme}://" for scheme in SCHEMES)


def anchored(name: str) -> str:
    """What a config names, for processes that run in another directory: a local path that exists becomes absolute.

    URIs, ids of a hub and names of built-in things stay as they are.

    >>> anchored("no-such-organisation/model")
    'no-such-organisation/model'
    """
    return os.path.abspath(name) if not is_uri(name) and os.path.exists(name) else name  # noqa: PTH100, PTH110


def resolve(uri: str) -> tuple[FileSystem, str]:
    """Split a path or URI into a pyarrow filesystem and the path inside it.

    Local paths become absolute (symbolic links are kept); options such as ``?region=`` stay with the filesystem.

    Raises:
        InputError: the URI's scheme or syntax is not understood, or it holds credentials.
    """
    refuse_credentials(uri)
    if not is_uri(uri):
        return LocalFileSystem(), Path(os.path.abspath(os.path.expanduser(uri))).as_posix()  # noqa: PTH100, PTH111
    try:
        filesystem, path = open_store(uri) if uri.startswith(BUCKETS) else FileSystem.from_uri(uri)
    except (ArrowInvalid, NotImplementedError, OSError, TypeError) as error:
        raise InputError(f"cannot open {uri!r}: {error}; give a local path or an s3://, gs:// or hf:// URI") from None
    return filesystem, str(path)


def is_local(filesystem: FileSystem) -> bool:
    """Whether paths of this filesystem can be opened and memory-mapped by this process."""
    return isinstance(filesystem, LocalFileSystem)


def exists(filesystem: FileSystem, path: str) -> bool:
    """Whether a file or directory is there."""
    return bool(file_infos(filesystem, path).type != FileType.NotFound)


def list_paths(filesystem: FileSystem, directory: str, *, recursive: bool = False) -> list[str]:
    """Sorted paths of the files below a directory; an absent directory is empty.

    Names that begin with a dot are left out: a killed writer may have left a temporary file.
    """
    selector = FileSelector(directory, recursive=recursive, allow_not_found=True)
    found = (info for info in file_infos(filesystem, selector) if info.type == FileType.File)
    return sorted(str(info.path) for info in found if not info.base_name.startswith("."))


def open_input(filesystem: FileSystem, path: str) -> BinaryIO:
    """Open a file's stored bytes as a stream.

    pyarrow would silently decompress by the file's extension, which is wrong for digests: that is switched off.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a pipe or a device stands there.
    """
    if is_local(filesystem):
        require_regular(path)
        return cast(BinaryIO, filesystem.open_input_stream(path, compression=None))
    return io.BufferedReader(RemoteFile(filesystem, path), READ_BYTES)


def open_random(filesystem: FileSystem, path: str) -> BinaryIO:
    """Open a file's stored bytes to read ranges; on object stores each read is one request.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_local(filesystem):
        require_regular(path)
        return cast(BinaryIO, filesystem.open_input_file(path))
    return cast(BinaryIO, RemoteFile(filesystem, path))


def read_range(filesystem: FileSystem, path: str, start: int, size: int) -> bytes:
    """Some bytes of a file; fewer where it ends.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open_random(filesystem, path) as file:
        file.seek(start)
        return file.read(size)


def read_bytes(filesystem: FileSystem, path: str) -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a pipe or a device stands there.
    """
    if not is_local(filesystem):
        return read_object(filesystem, path)
    with open_input(filesystem, path) as stream:
        return stream.read()


def size(filesystem: FileSystem, path: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    info = file_infos(filesystem, path)
    if info.type == FileType.NotFound:
        raise FileNotFoundError(path)
    return int(info.size or 0)


def write_bytes(filesystem: FileSystem, path: str, data: bytes) -> None:
    """Write a whole file atomically, creating its directory; an existing file is replaced."""
    if is_local(filesystem):
        with _open_renamed(Path(path)) as stream:
            stream.write(data)
    else:
        _store(filesystem, path, io.BytesIO(data))


def write_stream(filesystem: FileSystem, path: str, source: IO[bytes]) -> None:
    """Write a whole file atomically from an open local one, a part at a time; an existing file is replaced."""
    source.seek(0)
    if is_local(filesystem):
        with _open_renamed(Path(path)) as stream:
            shutil.copyfileobj(source, stream, COPY_BYTES)
    else:
        _store(filesystem, path, source)


def delete(filesystem: FileSystem, path: str) -> None:
    """Delete a file, if it is there."""
    with suppress(FileNotFoundError):  # also where the first attempt did it and its answer was lost
        delete_file(filesystem, path)


def require_writable(uri: str, *, field: str) -> None:
    """Make a local folder and see that files can be written there; object stores show it at the first write.

    Args:
        uri: path or URI.
        field: of the config, for the message.

    Raises:
        InputError: the folder cannot be made or written.
    """
    filesystem, path = resolve(uri)
    if not is_local(filesystem):
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{field} {uri} cannot be written ({error.strerror or error}); choose a folder that you may write to"
        ) from None


TEMPORARY_LEASE_S = 3600.0
"""How long after its last byte a temporary file may still be someone's: no writer is silent for so long."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def remove_abandoned(uri: str, *, recursive: bool = True, lease_s: float = TEMPORARY_LEASE_S) -> int:
    """Delete the temporary files that killed writers left, once their lease is over; returns how many.

    Object stores have none.

    Args:
        uri: local folder of which every file was written through this module; a folder that is not there has none.
        recursive: whether its subfolders are looked through too.
        lease_s: seconds since the last write.
    """
    if uri.startswith(BUCKETS):
        return 0
    path = resolve(uri)[1]
    removed, oldest = 0, time.time() - lease_s
    for folder, below, names in os.walk(path):
        for name in filter(_TEMPORARY.fullmatch, names):
            with suppress(OSError):  # gone meanwhile, or of someone else
                if os.lstat(f"{folder}/{name}").st_mtime < oldest:
                    os.unlink(f"{folder}/{name}")  # noqa: PTH108
                    removed += 1
        if not recursive:
            below.clear()
    if removed:
        logger.info("removed %d temporary files that an interrupted run left in %s", removed, uri)
    return removed


def delete_folder(filesystem: FileSystem, path: str) -> None:
    """Delete a folder and what it holds, if it is there."""
    with suppress(FileNotFoundError):  # of Google's, pyarrow also deletes a marker, which only its own folders have
        delete_tree(filesystem, path)


@contextmanager
def open_atomic(filesystem: FileSystem, path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when the block ends without an exception.

    Disk use is the file's size (on object stores: of the local spool, uploaded at the end); memory use is constant.
    """
    if is_local(filesystem):
        with _open_renamed(Path(path)) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as spool:
        yield spool
        _store(filesystem, path, spool)


def _store(filesystem: FileSystem, path: str, source: IO[bytes]) -> None:
    if filesystem.type_name not in OBJECT_STORES:
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
    upload(filesystem, path, source)


@contextmanager
def _open_renamed(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; filesystems that cannot open or sync a directory are left alone."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
