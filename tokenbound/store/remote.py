"""Object stores through pyarrow: one client for each bucket, reads and uploads that are tried again."""

from __future__ import annotations

import io
import os
import shutil
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from pyarrow.fs import AwsStandardS3RetryStrategy, FileInfo, FileSelector, FileSystem, FileType, S3FileSystem

from tokenbound.store.retry import patient, patiently
from tokenbound.store.uri import URI

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COPY_BYTES = 1 << 23
"""Block size of uploads."""
READ_BYTES = 1 << 20
"""Least that a sequential reader asks for: a request costs as much as some hundred kilobytes."""
ANSWER_S = 60.0
"""Seconds without a byte after which a request to S3 counts as failed; Google's client has 120 of its own.
TOKENBOUND_STORE_ANSWER_S in the environment of a process changes them."""
CONNECT_S = 10.0
SCHEMES = ("s3", "gs", "gcs")
"""Schemes whose clients are kept and whose paths begin with a bucket."""
GOOGLE_RETRY_S = 1
"""For how long Google's client retries by itself, at least; a `retry_limit_seconds` in the URI replaces it."""
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
    filesystem, _ = patiently(FileSystem.from_uri, uri if uri.startswith("s3:") else impatient(uri))
    if not isinstance(filesystem, S3FileSystem):
        return filesystem
    options: dict[str, Any] = {
        name: _TRUTH.get(value.lower(), value) for name, value in parse_qsl(uri.partition("?")[2])
    }
    # From a URI, the client would retry by itself 30 times, every fifth of a second.
    return S3FileSystem(
        **{"allow_delayed_open": True} | options | {"region": filesystem.region},
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        request_timeout=float(os.environ.get("TOKENBOUND_STORE_ANSWER_S", ANSWER_S)),
        connect_timeout=CONNECT_S,
    )


def impatient(uri: str) -> str:
    """A URI of Google's store whose client leaves retries to ours: by itself it goes on for a quarter of an hour.

    >>> impatient("gs://bucket"), impatient("gs://bucket?retry_limit_seconds=30")
    ('gs://bucket?retry_limit_seconds=1', 'gs://bucket?retry_limit_seconds=30')
    """
    _, question, options = uri.partition("?")
    if "retry_limit_seconds" in dict(parse_qsl(options)):
        return uri
    return f"{uri}{'&' if question else '?'}retry_limit_seconds={GOOGLE_RETRY_S}"


class RemoteFile(io.RawIOBase):
    """A stored object to read from anywhere; each range is asked for again by itself.

    On S3 a range is one request. Google's client asks for all that follows a place, so there the request goes on where
    ranges follow each other.
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        """Open the object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        super().__init__()
        self._filesystem, self._path = filesystem, path
        self._file: Any = None
        self._next = self._at = 0
        self._size = patiently(self.open_file)

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

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the object goes."""
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """What is left, in one request."""
        return self._read(self._size - self._at)

    def open_file(self) -> int:
        """Open the object anew, in one attempt.

        Returns:
            Its size in bytes.

        Raises:
            FileNotFoundError: there is no such object.
            ConnectionError: its first bytes did not come; Google's client does not tell why.
        """
        file = self._filesystem.open_input_file(self._path)
        if file.closed:  # asked that, Google's client begins to read, and says yes where it failed
            raise ConnectionError(f"{self._path}: its first bytes did not come")
        size = int(file.size())
        self._file, self._next = file, 0
        return size

    def read_at(self, size: int, start: int) -> bytes:
        """A range that lies within the object, in one attempt.

        Raises:
            ConnectionError: less of it came; nobody compares a range with a checksum.
        """
        if self._file is None:
            self.open_file()
        file, self._file = self._file, None  # what fails is opened anew: Google's client has closed it
        if start != self._next:
            file.seek(start)
        data = bytes(file.read(size))
        if len(data) != size:
            raise ConnectionError(f"{self._path}: {len(data)} of {size} bytes came")
        self._file, self._next = file, start + size
        return data

    def close(self) -> None:
        """Let go of the object."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _read(self, size: int) -> bytes:
        size = min(size, self._size - self._at)
        if size <= 0:
            return b""
        data = patiently(self.read_at, size, self._at)
        self._at += len(data)
        return data


def read_object(filesystem: FileSystem, path: str) -> bytes:
    """All bytes of a stored object.

    Raises:
        FileNotFoundError: there is no such object.
    """
    if filesystem.type_name == "gcs":
        return download(filesystem, path)
    with RemoteFile(filesystem, path) as file:
        return file.readall()


@patient
def download(filesystem: FileSystem, path: str) -> bytes:
    """All bytes of an object of Google's in one request: of one version of it, and compared with its checksum.

    A file that can be read from anywhere would take three and hold the interpreter during one of them.
    """
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


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
    return look(filesystem, what)


def look(filesystem: FileSystem, what: Any) -> Any:
    """The same in one attempt.

    That Google's client failed to ask what lies below a path, it tells as if there were nothing: a selector does not.
    """
    found = filesystem.get_file_info(what)
    if filesystem.type_name == "gcs" and isinstance(what, str) and found.type == FileType.NotFound:
        below = filesystem.get_file_info(FileSelector(what, recursive=True, allow_not_found=True))
        return FileInfo(what, FileType.Directory) if below else found
    return found


@patient
def delete_file(filesystem: FileSystem, path: str) -> None:
    """Pyarrow's `delete_file`."""
    filesystem.delete_file(path)


@patient
def delete_tree(filesystem: FileSystem, path: str) -> None:
    """Pyarrow's `delete_dir`, of a folder that may be gone: an attempt may delete it and its answer be lost."""
    if look(filesystem, path).type != FileType.NotFound:
        filesystem.delete_dir(path)
