"""The artifact's outer form: magic, version, sections, digest; read with every length checked.

    "tkb" version | (section id, length, payload)* | 0 | first 8 bytes of SHA-256 over all that precedes

Lengths and other unsigned integers are LEB128 varints in their shortest form, so that a file has one parse
and says itself where it ends. The digest is there to notice damage; an artifact's identity is the SHA-256 of
all its bytes. Nothing is ever executed, and nothing is allocated on the word of a length field alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap

from tokenbound.errors import InputError

Buffer = bytes | memoryview | mmap
"""Bytes in memory, or those of a file that is mapped."""

MAGIC = b"tkb"
VERSION = 1
DIGEST_BYTES = 8
MAX_VARINT_BYTES = 9
"""63 bits: every length that a machine can hold, and no shift that grows without bound."""


class ArtifactError(InputError):
    """Bytes that are not an artifact of this version, or were damaged or forged."""


SECTION_IDS: Mapping[str, int] = {
    "architecture": 1,
    "settings": 2,
    "tokenizer": 3,
    "base": 4,
    "index": 5,
    "tensors": 6,
}
_SECTION_NAMES = {code: name for name, code in SECTION_IDS.items()}


def varint(value: int) -> bytes:
    """LEB128 of a non-negative integer below 2^63.

    >>> varint(300).hex()
    'ac02'
    """
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{value} does not fit a varint")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """Signed to unsigned: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    """Inverse of `zigzag`."""
    return (value >> 1) ^ -(value & 1)


class Reader:
    """A cursor over bytes that refuses to read past the end.

    Every method raises `ArtifactError` naming `what` was being read.
    """

    def __init__(self, data: Buffer, what: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self.what = what

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._at

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, without copying."""
        if count > self.remaining:
            raise ArtifactError(f"artifact: {self.what} wants {count} bytes where {self.remaining} are left")
        view = self._data[self._at : self._at + count]
        self._at += count
        return view

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self, limit: int = (1 << 63) - 1) -> int:
        """The next varint, at most `limit`; only the shortest form is accepted."""
        value = 0
        for index in range(MAX_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index:
                    raise ArtifactError(f"artifact: {self.what} has an integer in a longer form than it needs")
                if value > limit:
                    raise ArtifactError(f"artifact: {self.what} has {value} where at most {limit} is allowed")
                return value
        raise ArtifactError(f"artifact: {self.what} has an integer of more than 63 bits")

    def signed(self, limit: int = (1 << 62) - 1) -> int:
        """The next zigzag varint, at most `limit` in magnitude."""
        return unzigzag(self.varint(2 * limit))

    def block(self) -> memoryview:
        """A varint length and that many bytes."""
        return self.take(self.varint())

    def finish(self) -> None:
        """Require that everything was read."""
        if self.remaining:
            raise ArtifactError(f"artifact: {self.what} has {self.remaining} bytes that mean nothing")


def block(payload: bytes) -> bytes:
    """A varint length and the payload; what `Reader.block` reads."""
    return varint(len(payload)) + payload


@dataclass(frozen=True)
class Section:
    """What a section of a container holds, in parts that need not be in memory together."""

    num_bytes: int
    """Of all parts."""
    parts: Iterable[bytes | memoryview]
    """Read once."""

    @staticmethod
    def of(payload: bytes) -> Section:
        """A section of one part."""
        return Section(len(payload), [payload])


def container_size(sections: Mapping[str, Section]) -> int:
    """Bytes of the container of these sections."""
    heads = sum(1 + len(varint(section.num_bytes)) + section.num_bytes for section in sections.values())
    return len(MAGIC) + 2 + heads + DIGEST_BYTES


def write_container(sections: Mapping[str, Section]) -> Iterator[bytes | memoryview]:
    """The bytes of an artifact with these sections, part after part, in the fixed order of their ids.

    Args:
        sections: By name. Of each the next part is asked for when the last one has been taken.
    """
    digest = hashlib.sha256()

    def hashed(part: bytes | memoryview) -> bytes | memoryview:
        digest.update(part)
        return part

    yield hashed(MAGIC + bytes([VERSION]))
    for name, section in sorted(sections.items(), key=lambda item: SECTION_IDS[item[0]]):
        yield hashed(bytes([SECTION_IDS[name]]) + varint(section.num_bytes))
        yield from map(hashed, section.parts)
    yield hashed(b"\0")
    yield digest.digest()[:DIGEST_BYTES]


def read_container(data: Buffer, body_sha256: bytes | None = None) -> dict[str, memoryview]:
    """Split an artifact into its sections, which are views of it.

    Args:
        data: Its bytes, in memory or mapped.
        body_sha256: SHA-256 of all but the last `DIGEST_BYTES` bytes, where it is known.

    Raises:
        ArtifactError: not an artifact, another version, damaged, truncated, or with bytes after its end.
    """
    reader = Reader(data, "the header")
    _read_header(reader)
    sections = _read_sections(reader)
    body_bytes = reader.position
    reader.what = "the digest"
    digest = bytes(reader.take(DIGEST_BYTES))
    reader.what = "the end of the file"
    reader.finish()
    found = body_sha256 or hashlib.sha256(memoryview(data)[:body_bytes]).digest()
    if found[:DIGEST_BYTES] != digest:
        raise ArtifactError("artifact: the digest does not match; the file was damaged or edited")
    return sections


def container_bytes(data: bytes | memoryview) -> int:
    """Length of the artifact that the bytes begin with: artifacts say themselves where they end.

    Raises:
        ArtifactError: they do not begin with one, or it is not whole; its digest is not looked at.
    """
    reader = Reader(data, "the header")
    _read_header(reader)
    _read_sections(reader)
    reader.take(DIGEST_BYTES)
    return reader.position


def _read_header(reader: Reader) -> None:
    if bytes(reader.take(min(len(MAGIC), reader.remaining))) != MAGIC:
        raise ArtifactError("artifact: these bytes do not start as a tokenbound artifact does")
    if (version := reader.byte()) != VERSION:
        raise ArtifactError(f"artifact: format version {version}; this package reads version {VERSION}")


def _read_sections(reader: Reader) -> dict[str, memoryview]:
    sections: dict[str, memoryview] = {}
    last = 0
    while code := reader.byte():
        if code not in _SECTION_NAMES or code <= last:
            raise ArtifactError(f"artifact: section id {code} is unknown or out of order")
        last = code
        reader.what = f"section {_SECTION_NAMES[code]}"
        sections[_SECTION_NAMES[code]] = reader.block()
    return sections
