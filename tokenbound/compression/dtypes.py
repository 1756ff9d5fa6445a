"""Tensors as bytes and back: one wire number for every dtype that a checkpoint may hold."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.container import ArtifactError
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "uint16",
    "uint32",
    "uint64",
    "complex64",
)
"""Position = wire number. Append only."""


def dtype_code(dtype: torch.dtype, name: str) -> int:
    """Wire number of a dtype.

    Raises:
        InputError: the format has none; the message names the tensor.
    """
    label = str(dtype).removeprefix("torch.")
    if label not in DTYPE_NAMES:
        raise InputError(f"tensor {name!r} has dtype {label}, which the artifact format cannot hold")
    return DTYPE_NAMES.index(label)


def dtype_of(code: int) -> torch.dtype:
    """Inverse of `dtype_code`."""
    import torch

    if code >= len(DTYPE_NAMES) or not hasattr(torch, DTYPE_NAMES[code]):
        raise ArtifactError(f"artifact: dtype number {code} is unknown here; a newer torch or package may know it")
    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[code])
    return dtype


def dtype_label(code: int) -> str:
    """The dtype's name, without torch."""
    if code >= len(DTYPE_NAMES):
        raise ArtifactError(f"artifact: dtype number {code} is unknown")
    return DTYPE_NAMES[code]


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The elements' little-endian bytes [elements, element size], without a copy where it can be avoided."""
    import torch

    _require_little_endian()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw.reshape(flat.numel(), flat.element_size())


def bytes_tensor(data: NDArray[np.uint8] | bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `tensor_bytes`; an array that can be written to becomes the tensor, another one is copied."""
    import torch

    _require_little_endian()
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
    owned = array if array.flags.writeable else array.copy()
    flat = torch.from_numpy(owned) if len(owned) else torch.zeros(0, dtype=torch.uint8)
    if dtype == torch.bool and len(flat) and int(flat.max()) > 1:
        raise ArtifactError("artifact: a boolean tensor holds something other than 0 and 1")
    return flat.view(dtype).reshape(shape)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise InputError("artifacts are read and written on little-endian machines only")
