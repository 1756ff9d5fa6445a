"""Object stores through pyarrow: one client for each bucket, reads and uploads that are tried again."""

from __future__ import annotations

import io
import shutil
from functools import lru_cache
from typing import IO, Any
from urllib.parse import parse_qsl, unquote

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

from tokenbound.store.retry import patient, patiently
from tokenbound.store.uri import URI

COPY_BYTES = 1 << 23
"""Block size of uploads."""
READ_BYTES = 1 << 20
"""Least that a sequential reader asks for: a request costs as much as some hundred kilobytes."""
ANSWER_S = 60.0
"""Seconds without a byte after which a request counts as failed."""
CONNECT_S = 10.0
SCHEMES = ("s3", "gs", "gcs")
"""Schemes whose clients are kept and whose paths begin with a bucket."""
_TRUTH = {"true": True, "false": False}


def open_store(uri: str) -> tuple[FileSystem, str]:
    """The client of an object store and the path inside it.

    Raises:
        ArrowInvalid, OSError: the URI or its options are not understood, or its bucket's region cannot be found.
    """
    match = URI.fullmatch(uri)
    assert match is not None
    scheme, authority, path, options = match.groups()
    bucket = authority.rpartition("@")[2]
    return _client(f"{scheme}://{authority}{options}"), f"{bucket}{unquote(path)}".rstrip("/")


@lru_cache(maxsize=64)
def _client(uri: str) -> FileSystem:
    """The client of a bucket, made once in a process: it may ask for the bucket's region, and keeps connections."""
    filesystem, _ = patiently(FileSystem.from_uri, uri)
    if not isinstance(filesystem, S3FileSystem):
        return filesystem
    options: dict[str, Any] = {
        name: _TRUTH.get(value.lower(), value) for name, value in parse_qsl(uri.partition("?")[2])
    }
    # From a URI, the client would retry by itself 30 times, every fifth of a second.
    return S3FileSystem(
        **{"allow_delayed_open": True} | options | {"region": filesystem.region},
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        request_timeout=ANSWER_S,
        connect_timeout=CONNECT_S,
    )


class RemoteFile(io.RawIOBase):
    """A stored object to read from anywhere; each range is one request, tried again by itself."""

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        """Open the object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        super().__init__()
        self._file = patiently(filesystem.open_input_file, path)
        self._size, self._at = int(patiently(self._file.size)), 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; costs nothing."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the object goes."""
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """What is left, in one request."""
        return self._read(self._size - self._at)

    def close(self) -> None:
        """Let go of the object."""
        if not self.closed:
            self._file.close()
        super().close()

    def _read(self, size: int) -> bytes:
        size = min(size, self._size - self._at)
        if size <= 0:
            return b""
        data: bytes = patiently(self._file.read_at, size, self._at)
        self._at += len(data)
        return data


@patient
def upload(filesystem: FileSystem, path: str, source: IO[bytes]) -> None:
    """Store what a file holds, from its beginning; the object appears when all of it is there.

    A failed part fails the closing, so that nothing appears.
    """
    source.seek(0)
    with filesystem.open_output_stream(path, compression=None) as sink:
        shutil.copyfileobj(source, sink, COPY_BYTES)


@patient
def file_infos(filesystem: FileSystem, what: Any) -> Any:
    """Pyarrow's `get_file_info`."""
    return filesystem.get_file_info(what)


@patient
def delete_file(filesystem: FileSystem, path: str) -> None:
    """Pyarrow's `delete_file`."""
    filesystem.delete_file(path)


@patient
def delete_tree(filesystem: FileSystem, path: str) -> None:
    """Pyarrow's `delete_dir`."""
    filesystem.delete_dir(path)
