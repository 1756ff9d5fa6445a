"""Codes of few bits with a scale and a zero point for each group of columns: what GPTQ writes.

Codes, zero points and the scales' byte planes are coded by what is shortest.

    value = float16 scale * (code - zero)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.codecs.exact import decode_exact, encode_exact
from tokenbound.compression.codecs.uniform import matrix_shape
from tokenbound.compression.container import ArtifactError, Reader, block, varint
from tokenbound.compression.matrices import decode_matrix, encode_matrix, matrix_parts

if TYPE_CHECKING:
    import torch


MIN_GROUP, MAX_GROUP = 4, 1 << 20
"""Columns of a group: with fewer, scales would take more memory than what they scale."""


@dataclass(frozen=True)
class GroupCodes:
    """Codes [rows, columns], scales (float16) and zero points [rows, groups], and the columns of one group."""

    codes: NDArray[np.int32]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int32]
    group: int


def group_values(codes: GroupCodes) -> NDArray[np.float32]:
    """float32 values of the codes."""
    owner = np.arange(codes.codes.shape[1]) // codes.group
    offsets = (codes.codes - codes.zeros[:, owner]).astype(np.float32)
    values: NDArray[np.float32] = offsets * codes.scales.astype(np.float32)[:, owner]
    return values


def encode_groups(codes: GroupCodes, *, transposed: bool) -> bytes:
    """Wire form."""
    import torch

    centred = codes.codes - codes.zeros[:, np.arange(codes.codes.shape[1]) // codes.group]
    parts = [
        block(encode_exact(torch.from_numpy(codes.scales))),
        block(encode_matrix(codes.zeros)),
        encode_matrix(centred),
    ]
    return bytes([transposed]) + varint(codes.group) + b"".join(parts)


@dataclass(frozen=True)
class GroupForm:
    """A wire form, read up to its codes."""

    transposed: bool
    shape: tuple[int, int]
    group: int
    scales: NDArray[np.float16]
    zeros: memoryview
    codes: memoryview

    @staticmethod
    def read(payload: memoryview, shape: tuple[int, ...]) -> GroupForm:
        """Read the form of a tensor of this shape.

        Raises:
            ArtifactError: the payload is not such a form.
        """
        import torch

        if len(shape) < 2:
            raise ArtifactError("artifact: group codes need a matrix")
        reader = Reader(payload, "a tensor in groups")
        transposed = bool(reader.byte())
        rows, columns = matrix_shape(shape)[:: -1 if transposed else 1]
        group = reader.varint(MAX_GROUP)
        if not MIN_GROUP <= group <= columns:
            raise ArtifactError(f"artifact: groups of {group} columns in a matrix of {columns}")
        scales: NDArray[Any] = decode_exact(reader.block(), (rows, -(-columns // group)), torch.float16).numpy()
        if not np.isfinite(scales).all():
            raise ArtifactError("artifact: a scale of a group is not finite")
        return GroupForm(transposed, (rows, columns), group, scales, reader.block(), reader.take(reader.remaining))


def decode_groups(payload: memoryview, shape: tuple[int, ...]) -> tuple[GroupCodes, bool]:
    """Inverse of `encode_groups` for a tensor of this shape, and whether it is stored transposed.

    Raises:
        ArtifactError: the payload is not such a form.
    """
    form = GroupForm.read(payload, shape)
    zeros = decode_matrix(form.zeros, form.scales.shape)
    centred = decode_matrix(form.codes, form.shape)
    codes = centred + zeros[:, np.arange(form.shape[1]) // form.group]
    return GroupCodes(codes, form.scales, zeros, form.group), form.transposed


def decode_layer(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Decode a layer's weight part by part: the coded integers are codes less zero points already."""
    import torch

    if dtype.itemsize < 2:
        raise ArtifactError(f"artifact: a tensor in groups cannot have dtype {dtype}")
    form = GroupForm.read(payload, shape)
    for _ in matrix_parts(form.zeros, form.scales.shape):  # not needed here, but they must be what they should
        pass
    tensor = torch.empty(matrix_shape(shape), dtype=dtype)
    target = tensor.T if form.transposed else tensor
    for (rows, columns), centred in matrix_parts(form.codes, form.shape):
        owner = np.arange(columns.start, columns.stop) // form.group
        values = centred.astype(np.float32) * form.scales[rows][:, owner].astype(np.float32)
        target[rows, columns] = torch.from_numpy(values).to(dtype)
    return tensor.reshape(shape)


def plain_codes(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Codes as bytes, zero points as bytes and scales: what a general codec would be given."""
    codes, _ = decode_groups(payload, shape)
    return codes.codes.astype(np.uint8).tobytes() + codes.zeros.astype(np.uint8).tobytes() + codes.scales.tobytes()
