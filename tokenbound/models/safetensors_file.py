"""Safetensors files tensor by tensor: the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.tensor_map import Header

_LABELS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
"""What the format calls them."""
DTYPES: Mapping[str, torch.dtype] = {label: dtype for dtype, label in _LABELS.items()}
_ALIGNMENT = 8
_LENGTH_BYTES = 8
"""Of the number in front of the header, which says how long it is."""
_METADATA = "__metadata__"
PAGE_BYTES = 1 << 12
"""Multiples at which groups of tensors begin, so that each can be mapped, and given back, by itself."""
_ENTRY_BYTES, _GROUP_ENTRIES = 128, 12
"""Of a tensor in the header besides its name, and how many of them a group may have."""


def write_safetensors(
    path: Path,
    headers: Mapping[str, Header],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of tensors that come one at a time.

    Args:
        path: Of the file, which is replaced.
        headers: Dtype and shape of every tensor.
        tensors: The same tensors, in any order.
        metadata: Texts for the file's header.

    Raises:
        ValueError: the format has no such dtype, or the tensors are not those of the headers.
        OSError: the file cannot be written.
    """
    # As the library orders them, so that each begins at a multiple of the size of its elements.
    order = sorted(headers, key=lambda name: (-headers[name][0].itemsize, name))
    tree: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in order:
        dtype, shape = headers[name]
        if dtype not in _LABELS:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which a safetensors file cannot hold")
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": _LABELS[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    left = dict(headers)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(_LENGTH_BYTES + len(text) + end)
        for name, tensor in tensors:
            if left.pop(name, None) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"tensor {name!r} is not what was announced")
            file.seek(_LENGTH_BYTES + len(text) + starts[name])
            file.write(tensor_bytes(tensor).data)
        file.flush()
        os.fsync(file.fileno())
    if left:
        raise ValueError(f"tensor {min(left)!r} was announced and did not come")


class GroupWriter:
    """Writes a file of groups of tensors whose sizes nobody knows before they come; for the header it leaves room.

    A tensor's name is its group's, a slash and its own. The format allows no gaps between tensors, so bytes without a
    meaning, named by the group and the slash alone, fill them up to the next page.

    Example::

        with GroupWriter(path, ["w"]) as writer:
            writer.add("w", {"words": words, "scales": scales})
            writer.finish({"facts": "{}"})
    """

    def __init__(self, path: Path, groups: Iterable[str]) -> None:
        """Begin the file.

        Args:
            path: Of the file, which is replaced.
            groups: Names of all that will come.
        """
        names = [len(json.dumps(group)) for group in groups]
        # Metadata of a group takes about as much as an entry; of none of them is there none.
        room = PAGE_BYTES + sum((_GROUP_ENTRIES + 1) * (name + _ENTRY_BYTES) for name in names)
        self._header_bytes = -(-(_LENGTH_BYTES + room) // PAGE_BYTES) * PAGE_BYTES - _LENGTH_BYTES
        self._tree: dict[str, object] = {}
        self._end = 0
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self._file.close()

    def add(self, group: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors of a group, those of wide elements first, so that each begins at a multiple of its own.

        Raises:
            ValueError: the format has no such dtype.
            OSError: the file cannot be written.
        """
        self._append(f"{group}/", torch.zeros(-self._end % PAGE_BYTES, dtype=torch.uint8))
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            self._append(f"{group}/{name}", tensor)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _LABELS:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold")
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        self._tree[name] = {"dtype": _LABELS[tensor.dtype], "shape": shape, "data_offsets": [start, self._end]}
        self._file.seek(_LENGTH_BYTES + self._header_bytes + start)
        self._file.write(tensor_bytes(tensor).data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and see that all is on the disk.

        Raises:
            ValueError: the header is longer than the room that was left for it.
            OSError: the file cannot be written.
        """
        text = json.dumps({_METADATA: dict(metadata), **self._tree}, separators=(",", ":")).encode()
        if len(text) > self._header_bytes:
            raise ValueError(f"a header of {len(text):,} bytes where there is room for {self._header_bytes:,}")
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(_LENGTH_BYTES, "little") + text.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    stop: int


def read_groups(path: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """What a file that `GroupWriter` wrote holds: its tensors by group and name, without fillers, and its metadata.

    Args:
        path: Of the file, which this package wrote: nothing is checked.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        tree = json.loads(file.read(length))
    first, metadata = _LENGTH_BYTES + length, tree.pop(_METADATA)
    groups: dict[str, dict[str, StoredTensor]] = {}
    for key, entry in tree.items():
        group, _, name = key.rpartition("/")
        if name:
            start, stop = (first + offset for offset in entry["data_offsets"])
            stored = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
            groups.setdefault(group, {})[name] = stored
    return groups, metadata
