"""An artifact as a file: header and index are read when it is opened, tensors one by one when they are asked for.

The file is mapped into memory, so the processes of a machine share its pages, and what has been decoded is given back.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from tokenbound.compression.artifact import ParsedArtifact, parse_artifact
from tokenbound.compression.container import DIGEST_BYTES, ArtifactError
from tokenbound.compression.decode_pool import FilePart, decode_each, num_processes, run_in_processes
from tokenbound.compression.dtypes import dtype_of
from tokenbound.compression.tensor import CodedTensor, decode_tensor
from tokenbound.compression.tensor_map import Header, TensorMap
from tokenbound.errors import MismatchError
from tokenbound.store.local_folder import discard, fetch_artifact
from tokenbound.store.uri import is_uri

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

HASHED_BYTES = 1 << 22
"""Read at once for the digest."""


class ArtifactFile:
    """An artifact that is open for reading.

    Example:
        >>> from tokenbound.demo import demo_artifact
        >>> artifact = ArtifactFile(demo_artifact())
        >>> artifact.architecture["model_type"], artifact.tensor("model.norm.weight").shape
        ('llama', torch.Size([128]))
    """

    def __init__(self, source: bytes | str | Path) -> None:
        """Hash the file, and read its header and index.

        Args:
            source: Path of the file, or the bytes of a small one.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: not an artifact, damaged, forged, or of another version.
        """
        self.path = None if isinstance(source, bytes) else Path(source)
        if isinstance(source, bytes):
            self._data: bytes | mmap.mmap = source
            body, whole = _digests(iter([source]), len(source))
        else:
            with Path(source).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                body, whole = _digests(_pieces(file), size)
                # The file that was hashed is the one that is mapped, whatever its name stands for by now.
                self._data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        self.sha256 = whole
        """Hex digest of all bytes: the artifact's identity."""
        self.num_bytes = len(self._data)
        """What the code length is made of."""
        self.parsed: ParsedArtifact = parse_artifact(self._data, body)
        self._coded = {item.name: item for item in self.parsed.coded}

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process opens again: the file by its path."""
        if self.path is None:
            return ArtifactFile, (self._data,)
        return _reopened, (str(self.path.absolute()), self.sha256)

    @property
    def architecture(self) -> dict[str, Any]:
        """The Hugging Face config as JSON data."""
        return self.parsed.architecture

    @property
    def settings(self) -> dict[str, Any]:
        """The quantizer's settings."""
        return self.parsed.settings

    @property
    def tokenizer(self) -> bytes | None:
        """The tokenizer's canonical bytes, where it is counted."""
        return self.parsed.tokenizer

    @property
    def base(self) -> dict[str, Any] | None:
        """Of a delta: its kind and the digest of its base."""
        return self.parsed.base

    @property
    def decoded_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(item.decoded_bytes for item in self.parsed.coded)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in order."""
        return list(self._coded)

    def coded(self, name: str) -> CodedTensor:
        """A tensor's code, a view of the file."""
        return self._coded[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, decoded.

        Raises:
            KeyError: there is none of this name.
            ArtifactError: its code is not what its codec writes.
        """
        item = self._coded[name]
        try:
            return decode_tensor(item)
        finally:
            self.release(item)

    @property
    def tensors(self) -> DecodedTensors:
        """All tensors by name, each decoded when it is asked for and kept by nobody."""
        return DecodedTensors(self)

    def decoded(self, workers: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one after the other, in an order of their own.

        Args:
            workers: Processes that share the work, where there is enough of it.
        """
        for item, tensor in decode_each(self.parsed.coded, workers, self._portable):
            self.release(item)
            yield item.name, tensor

    def each(self, work: Callable[[CodedTensor], R], workers: int = 1) -> Iterator[tuple[CodedTensor, R]]:
        """What some work gives for each tensor, one after the other, in an order of their own.

        Args:
            work: A function of a module, whose results can be sent between processes.
            workers: Processes that share the work, where there is enough of it.
        """
        coded = self.parsed.coded
        is_alone = num_processes(coded, workers) == 1
        here = ((item, work(item)) for item in coded)
        for item, result in here if is_alone else run_in_processes(work, coded, workers, self._portable):
            self.release(item)
            yield item, result

    def read(self) -> bytes:
        """All bytes, of a small one."""
        return bytes(self._data)

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The file, open for copying.

        Raises:
            MismatchError: when it has been read, if it is no longer what was opened.
        """
        assert self.path is not None, "it is in memory"
        with self.path.open("rb") as file:
            yield file
            file.seek(0)
            size = os.fstat(file.fileno()).st_size
            changed = _digests(_pieces(file), size)[1] != self.sha256
        if changed:
            raise MismatchError(f"{self.path} changed while it was copied; run the command again")

    def move_to(self, path: Path) -> None:
        """Give the file another name on the same disk."""
        assert self.path is not None, "it is in memory"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path.replace(path)
        self.path = path

    def release(self, item: CodedTensor) -> None:
        """Give the pages of a code back; they are read again where they are needed again."""
        if isinstance(self._data, mmap.mmap) and len(item.payload):
            first = _address(item.payload) - _address(self._data)
            start = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, start, first + len(item.payload) - start)

    def _portable(self, item: CodedTensor) -> CodedTensor | FilePart:
        """What another process decodes a tensor from: of a file the place, else the code itself."""
        if self.path is None or not isinstance(self._data, mmap.mmap):
            return replace(item, payload=bytes(item.payload))
        first = _address(item.payload) - _address(self._data) if len(item.payload) else 0
        return FilePart(str(self.path), first, len(item.payload), replace(item, payload=b""))


class DecodedTensors(TensorMap):
    """The tensors of an artifact by name."""

    def __init__(self, artifact: ArtifactFile) -> None:
        self.artifact = artifact

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, decoded."""
        return self.artifact.tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self.artifact.names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.artifact.parsed.coded)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of this name; nothing is decoded."""
        return name in self.artifact._coded

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor, as the index says them."""
        item = self.artifact.coded(name)
        return dtype_of(item.dtype), item.shape


def open_artifact(place: str | Path, *, sha256: str | None = None, folder: str | Path | None = None) -> ArtifactFile:
    """Open an artifact at a path or URI; one on a store is first copied to this machine, once for all its processes.

    Args:
        place: Path or URI.
        sha256: The digest that it must have, where that is known.
        folder: Where copies are kept on this machine; default `store.local_folder.default_folder`.

    Raises:
        FileNotFoundError: there is nothing at this place.
        InputError: there is no room for a copy, or no folder that can be written.
        MismatchError: it has another digest.
        ArtifactError: not an artifact, damaged or truncated, or of another version.
    """
    if not is_uri(str(place)):
        return _expect(ArtifactFile(Path(place).expanduser()), str(place), sha256)
    path = fetch_artifact(str(place), sha256=sha256, folder=folder)
    try:
        return _expect(ArtifactFile(path), str(place), sha256)
    except (ArtifactError, MismatchError) as error:
        discard(path)
        raise type(error)(f"{place}: {error}") from None


def _expect(artifact: ArtifactFile, place: str, sha256: str | None) -> ArtifactFile:
    if sha256 not in (None, artifact.sha256):
        raise MismatchError(f"{place} has the digest {artifact.sha256}, not {sha256}; put the artifact back there")
    return artifact


@lru_cache(maxsize=2)
def _reopened(path: str, sha256: str) -> ArtifactFile:
    """An artifact that another process has open, kept for what this one is asked next."""
    return _expect(ArtifactFile(path), path, sha256)


def as_artifact(artifact: ArtifactFile | bytes) -> ArtifactFile:
    """An open artifact, from itself or from the bytes of a small one."""
    return artifact if isinstance(artifact, ArtifactFile) else ArtifactFile(artifact)


def file_sha256(path: str | Path) -> str:
    """Hex digest of any file, read a part at a time."""
    with Path(path).open("rb") as file:
        return _digests(_pieces(file), 0)[1]


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(HASHED_BYTES), b"")


def _digests(parts: Iterator[bytes], size: int) -> tuple[bytes, str]:
    """SHA-256 of all but the last bytes of a container, and the hex digest of all."""
    digest, left = hashlib.sha256(), max(0, size - DIGEST_BYTES)
    body = digest.copy()
    for part in parts:
        if 0 < left <= len(part):
            body = digest.copy()
            body.update(part[:left])
        left -= len(part)
        digest.update(part)
    return body.digest(), digest.hexdigest()


def _address(data: bytes | memoryview | mmap.mmap) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)
