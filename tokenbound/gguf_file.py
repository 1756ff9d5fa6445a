"""GGUF files: a strict reader of their headers, which trusts no length, count or offset before it is checked.

A header is metadata (names to numbers, strings and arrays) and a table of tensors. Whatever it says is held against
the size of the file and against fixed limits first, so that no file can ask for more memory than a few times its own
header. Tensors are read one by one, each from its place (`GgufFile.read`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenbound.errors import InputError

P = TypeVar("P", bound=PurePath)
Value = int | float | bool | str | list[int] | list[float] | list[str]
"""A value of the metadata."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 26
"""Metadata and table of tensors; the largest vocabularies in use take a tenth of it."""
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 21
"""Strings of all arrays together: tokens and merges."""
MAX_NAME_BYTES = 1 << 10
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 16
ALIGNMENT = 32
"""Of a file that does not say."""
MAX_SHARDS = 1 << 10

ENDING = ".gguf"
IN_REPOSITORY = "#"
"""Between a directory or hub id (with `@revision`) and the name of a file in it."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class BlockType:
    """How ggml stores a tensor: each row is a run of blocks.

    Attributes:
        name: As ggml spells it.
        elements: Weights of a block.
        size: Bytes of a block.
    """

    name: str
    elements: int
    size: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
"""By ggml's number. The types that are absent are internal to llama.cpp's kernels, or no weights."""
PLAIN = ("F32", "F16", "BF16")
"""Types of one weight per block."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file.

    Attributes:
        name: In ggml's naming.
        shape: As NumPy and torch have it: the last axis is contiguous.
        type: How it is stored.
        path: Of the file that holds it.
        offset: Where it begins there.
        num_bytes: How much of the file is its.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    path: Path
    offset: int
    num_bytes: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of its bytes: the last axis counted in bytes."""
        return (*self.shape[:-1], self.shape[-1] // self.type.elements * self.type.size)

    def read(self) -> NDArray[np.uint8]:
        """Its bytes [*shape[:-1], bytes of a row].

        Raises:
            InputError: the file ends before.
        """
        data = np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.offset)
        if len(data) != self.num_bytes:
            raise InputError(f"{self.path} was cut off at tensor {self.name!r}; fetch it again")
        return data.reshape(self.stored_shape)


@dataclass(frozen=True)
class GgufFile:
    """A model in one GGUF file, or in the parts of a split one."""

    path: Path
    """The file, or the first of the parts."""
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """Which architecture the file says that it holds.

        Raises:
            InputError: it does not say.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise InputError(f"{self.path} does not name its architecture (general.architecture); convert it again")
        return found


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file; of a split one give the first part.

    Raises:
        InputError: it is not a GGUF file, is damaged, or asks for more than any real file does; parts are missing.
    """
    first = Path(path).expanduser()
    header = _read_part(first)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    match = _SHARD.fullmatch(first.name)
    if match is None or int(match["count"]) != count or count > MAX_SHARDS:
        raise InputError(
            f"{first} is a part of {count} (split.count), but is not named like one; keep the parts' names"
        )
    if int(match["index"]) != 1:
        raise InputError(f"{first} is not the first part; give {match['stem']}-00001-of-{match['count']}.gguf")
    tensors = dict(header.tensors)
    for index in range(2, count + 1):
        part = _read_part(first.with_name(f"{match['stem']}-{index:05}-of-{match['count']}.gguf"))
        if part.metadata.get("split.count") != count or part.metadata.get("split.no") != index - 1:
            raise InputError(f"{part.path} is not part {index} of {count} (split.no, split.count); fetch it again")
        if twice := tensors.keys() & part.tensors.keys():
            raise InputError(f"{part.path} repeats tensor {min(twice)!r} of another part; fetch it again")
        tensors |= part.tensors
    total = header.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise InputError(f"{first} and its parts hold {len(tensors)} tensors, not {total} (split.tensors.count)")
    return GgufFile(first, header.metadata, tensors)


def parts_of(path: P) -> list[P]:
    """The files of a model, by the name of the first: it alone, or all parts of a split one.

    >>> [part.name for part in parts_of(Path("m-00001-of-00002.gguf"))]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 <= int(match["count"]) <= MAX_SHARDS:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{index:05}-of-{match['count']}.gguf") for index in range(1, count + 1)]


def _read_part(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a split GGUF file needs all of its parts beside each other") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from None


class _Header:
    """One pass over the header of one file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.left = min(self.size, MAX_HEADER_BYTES)
        self.strings_left = MAX_STRINGS

    def fail(self, what: str) -> InputError:
        """The error that says what is wrong with the file."""
        return InputError(f"{self.path} is not a sound GGUF file: {what}; fetch it again")

    def read(self) -> GgufFile:
        """Metadata and tensors."""
        if self.take(4) != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file (it does not begin with {MAGIC.decode()})")
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            big = struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS
            found = "big-endian" if big else f"version {version}"
            raise InputError(f"{self.path} is a GGUF file of a kind ({found}) that is not read; convert it again")
        num_tensors, num_keys = self.unpack("QQ")
        if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
            raise self.fail(f"it declares {num_keys} metadata keys and {num_tensors} tensors")
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self.name()
            if key in metadata:
                raise self.fail(f"the metadata key {key!r} occurs twice")
            metadata[key] = self.value(key)
        rows = [self.entry() for _ in range(num_tensors)]
        start = self.aligned(self.file.tell(), metadata)
        return GgufFile(self.path, metadata, self.placed(rows, start, metadata))

    # --- Primitives

    def take(self, count: int) -> bytes:
        """So many bytes."""
        if count > self.left:
            raise self.fail("its header is cut off, or declares more than it holds")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail("its header is cut off")
        return data

    def unpack(self, form: str) -> tuple[int, ...]:
        """Little-endian numbers."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self, limit: int) -> str:
        """A string of at most so many bytes."""
        (length,) = self.unpack("Q")
        if length > min(limit, self.left):
            raise self.fail(f"a string of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None

    def name(self) -> str:
        """Name of a key or a tensor."""
        text = self.string(MAX_NAME_BYTES)
        if not text or not text.isprintable():
            raise self.fail(f"a name that is empty or holds control characters ({text[:40]!r})")
        return text

    def value(self, key: str) -> Value:
        """A value of the metadata with its type before it."""
        (kind,) = self.unpack("I")
        if kind == _STRING:
            return self.string(self.left)
        if kind in _SCALARS:
            (found,) = self.unpack(_SCALARS[kind])
            return found
        if kind == _ARRAY:
            return self.array(key)
        raise self.fail(f"the metadata key {key!r} has a value of unknown type {kind}")

    def array(self, key: str) -> Value:
        """An array of numbers or strings."""
        kind, count = self.unpack("IQ")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            if count * width > self.left:
                raise self.fail(f"the metadata key {key!r} declares {count} numbers")
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            numbers: list[int] | list[float] = np.frombuffer(self.take(count * width), dtype).tolist()
            return numbers
        if kind != _STRING:
            raise self.fail(f"the metadata key {key!r} is an array of type {kind}")
        if count > min(self.strings_left, self.left // 8):
            raise self.fail(f"the metadata key {key!r} declares {count} strings")
        self.strings_left -= count
        return [self.string(self.left) for _ in range(count)]

    # --- Tensors

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type number and offset of a tensor."""
        name = self.name()
        (axes,) = self.unpack("I")
        if not 1 <= axes <= MAX_AXES:
            raise self.fail(f"tensor {name!r} has {axes} axes")
        sizes = self.unpack(f"{axes}Q")
        kind, offset = self.unpack("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def aligned(self, place: int, metadata: Mapping[str, Value]) -> int:
        """The next place where data may begin."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}")
        return -(-place // alignment) * alignment

    def placed(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], start: int, metadata: Mapping[str, Value]
    ) -> dict[str, TensorEntry]:
        """Tensors by name, each inside the file and none over another."""
        found: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in rows:
            if kind not in TYPES:
                raise InputError(f"{self.path}: tensor {name!r} is of ggml type {kind}, which cannot be read here")
            if name in found:
                raise self.fail(f"tensor {name!r} occurs twice")
            found[name] = self.checked(name, shape, TYPES[kind], start, offset, metadata)
        last = start
        for entry in sorted(found.values(), key=lambda entry: entry.offset):
            if entry.offset < last:
                raise self.fail(f"tensor {entry.name!r} overlaps another")
            last = entry.offset + entry.num_bytes
        return found

    def checked(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: BlockType,
        start: int,
        offset: int,
        metadata: Mapping[str, Value],
    ) -> TensorEntry:
        """A tensor whose sizes and place are sound."""
        count = 1
        for size in shape:
            count *= size
        if not count or shape[-1] % kind.elements:
            raise self.fail(f"tensor {name!r} has the shape {shape}, which {kind.name} does not hold")
        num_bytes = count // kind.elements * kind.size
        if offset + num_bytes > self.size - start:
            raise self.fail(f"tensor {name!r} does not end within the file")
        if self.aligned(offset, metadata) != offset:
            raise self.fail(f"tensor {name!r} is not aligned")
        return TensorEntry(name, shape, kind, self.path, start + offset, num_bytes)


# --- Places --------------------------------------------------------------------------------------------------


def locate_gguf(path_or_id: str | Path) -> Path | None:
    """The local path of the GGUF file that a checkpoint is; None if it is another kind of checkpoint.

    Of a file on the hub all parts are fetched.

    Raises:
        InputError: there is no such file.
    """
    place, mark, name = str(path_or_id).partition(IN_REPOSITORY)
    if not mark or not name.endswith(ENDING):
        path = Path(path_or_id).expanduser()
        if path.suffix != ENDING or path.is_dir():
            return None
        if not path.is_file():
            raise InputError(f"checkpoint {path} does not exist; give the path of a GGUF file")
        return path
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return _download(place, name)
    if not (folder / name).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob(f"*{ENDING}"))[:5]) or "none"
        raise InputError(f"what.model.file: {folder} holds no {name} (GGUF files there: {found})")
    return folder / name


def _download(hub_id: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        found = [
            Path(hf_hub_download(repository, part.as_posix(), revision=revision or None))
            for part in parts_of(Path(name))
        ]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"checkpoint {hub_id}: {name} could not be fetched from the hub ({reason}); check `checkpoint`, `file` and "
            "`revision`, the network and, for a gated model, `hf auth login`"
        ) from None
    return found[0]
