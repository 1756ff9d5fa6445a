"""Packed weights in a file that processes map: entropy codes are read once, and weights are made of words ever after.

The file is in safetensors format, with a group of tensors for each tensor of the artifact: its words, outliers and
steps (`compression.packed_weights`).

Pages are read when a weight is made, and shared by all processes that map the file. Those of a weight can be given back
behind it, so that a model larger than memory streams through a few of them.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.dtypes import bytes_tensor, dtype_code, dtype_of, tensor_bytes
from tokenbound.compression.packed_weights import (
    PackedWeight,
    described,
    pack_weight,
    restored_weight,
)
from tokenbound.compression.tensor import CodedTensor
from tokenbound.models.safetensors_file import GroupWriter, StoredTensor, read_groups

_FACTS = "facts"


class PackedFile:
    """The packed weights of an artifact, mapped."""

    def __init__(self, path: Path) -> None:
        """Map a file that `write_packed` wrote."""
        self._groups, metadata = read_groups(path)
        self._facts: dict[str, dict[str, Any]] = json.loads(metadata[_FACTS])
        with path.open("rb") as file:
            # Read-only: the system promises memory for a private mapping that could be written to, and may refuse one
            # that is larger than there is.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @contextmanager
    def reading(self, name: str, *, releases: bool = True) -> Iterator[PackedWeight]:
        """Within, a packed weight whose tensors are pages of the file: not to be changed.

        Args:
            name: of the artifact's tensor.
            releases: whether its pages are given back behind it. Nothing that is still used may then be one of them.
        """
        tensors = self._groups[name]
        first = min(tensor.start for tensor in tensors.values()) // mmap.PAGESIZE * mmap.PAGESIZE
        num_bytes = max(tensor.stop for tensor in tensors.values()) - first
        self._map.madvise(mmap.MADV_WILLNEED, first, num_bytes)
        try:
            yield restored_weight(self._facts[name], {part: self._view(stored) for part, stored in tensors.items()})
        finally:
            if releases:
                self._map.madvise(mmap.MADV_DONTNEED, first, num_bytes)

    def _view(self, stored: StoredTensor) -> torch.Tensor:
        return self._bytes[stored.start : stored.stop].view(stored.dtype).reshape(stored.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's elements are pages of the file."""
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._bytes.data_ptr()


def write_packed(path: Path, artifact: ArtifactFile, workers: int = 1) -> None:
    """Pack all tensors of an artifact into a file.

    Args:
        path: of the file, which is replaced.
        artifact: a whole model.
        workers: processes that share the work, where there is enough of it.

    Raises:
        ArtifactError: a payload is not what its codec writes.
        OSError: the file cannot be written.
    """
    facts = {}
    try:
        with GroupWriter(path, artifact.names) as writer:
            for item, (about, parts) in artifact.each(_packed_parts, workers):
                facts[item.name] = about
                writer.add(item.name, {part: _unsent(sent) for part, sent in parts.items()})
            writer.finish({_FACTS: json.dumps(facts, separators=(",", ":"))})
    except ValueError as error:
        raise OSError(f"{path} could not be written: {error}") from error


_Sent = tuple[NDArray[np.uint8], tuple[int, ...], int]
"""A tensor on its way between processes: bytes, shape, and number of its dtype."""


def _packed_parts(item: CodedTensor) -> tuple[dict[str, Any], Mapping[str, _Sent]]:
    """What a file holds of a tensor: facts, and tensors."""
    weight = pack_weight(item)
    return described(weight), {name: _sendable(tensor, item.name) for name, tensor in weight.tensors.items()}


def _sendable(tensor: torch.Tensor, name: str) -> _Sent:
    return tensor_bytes(tensor), tuple(tensor.shape), dtype_code(tensor.dtype, name)


def _unsent(sent: _Sent) -> torch.Tensor:
    data, shape, dtype = sent
    return bytes_tensor(data, shape, dtype_of(dtype))
