"""GPTQ at 2, 3 or 4 bits with group scales: the practice that others report, for comparison.

Codes are integers of b bits; each group of consecutive columns of a row has an asymmetric float16 scale and an integer
zero point, found by a search for the least squared error; rounding uses error feedback (Frantar et al. 2022, arXiv
2210.17323). Embeddings, head and vectors stay in float16, as is usual. Codes, zero points and the scales' byte planes
are coded by what is shortest.

    value = float16 scale * (code - zero)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.container import ArtifactError, Reader, block, varint
from tokenbound.compression.integers import decode_matrix, encode_matrix, matrix_parts
from tokenbound.compression.methods.feedback import inverse_factor, round_with_feedback
from tokenbound.compression.methods.lossless import decode_exact, encode_exact
from tokenbound.compression.methods.rtn import float_values
from tokenbound.compression.methods.uniform import matrix_shape

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Curvature

MIN_GROUP, MAX_GROUP = 4, 1 << 20
"""Columns of a group: with fewer, scales would take more memory than what they scale."""
_SHRINKS = np.linspace(1.0, 0.5, 21)
"""Parts of a group's range that the search for its scale tries."""


@dataclass(frozen=True)
class GroupCodes:
    """Codes [rows, columns], scales (float16) and zero points [rows, groups], and the columns of one group."""

    codes: NDArray[np.int32]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int32]
    group: int


def quantize_groups(weights: torch.Tensor, bits: int, group: int, moment: torch.Tensor | None) -> GroupCodes:
    """Quantize a matrix.

    Args:
        weights: [rows, columns] float32.
        bits: 2 to 8.
        group: Columns that share a scale, at least `MIN_GROUP`; 0 for whole rows.
        moment: Second moment of the layer's input for feedback, or None to round to nearest [columns, columns].
    """
    import torch

    rows, columns = weights.shape
    group = min(group or columns, columns)
    top = (1 << bits) - 1
    codes = np.zeros((rows, columns), np.int32)
    scales, zeros = np.zeros((2, rows, -(-columns // group)))
    work = weights.double()
    factor = torch.eye(columns, dtype=torch.float64) if moment is None else inverse_factor(moment)

    def rounder(column: torch.Tensor, start: int) -> torch.Tensor:
        index = start // group
        values = column.numpy()
        if start % group == 0:
            scales[:, index], zeros[:, index] = _fit(work[:, start : start + group].numpy(), top)
        scale, zero = scales[:, index, None], zeros[:, index, None]
        code = np.clip(np.rint(values / scale) + zero, 0, top)
        codes[:, start : start + 1] = code
        return torch.from_numpy((code - zero) * scale)

    round_with_feedback(weights, factor, rounder)
    return GroupCodes(codes, scales.astype(np.float16), zeros.astype(np.int32), group)


def _fit(values: NDArray[np.float64], top: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales (exact in float16) and zero points with the least squared error [rows]."""
    high, low = np.maximum(values.max(axis=1), 0), np.minimum(values.min(axis=1), 0)
    best = np.full(len(values), np.inf)
    scale, zero = np.ones(len(values)), np.zeros(len(values))
    for part in _SHRINKS:
        trial = np.maximum((high - low) * part / top, 2.0**-24).astype(np.float16).astype(np.float64)
        middle = np.clip(np.rint(-low * part / trial), 0, top)
        codes = np.clip(np.rint(values / trial[:, None]) + middle[:, None], 0, top)
        error = np.square((codes - middle[:, None]) * trial[:, None] - values).sum(axis=1)
        better = error < best
        best[better], scale[better], zero[better] = error[better], trial[better], middle[better]
    return scale, zero


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
class _Form:
    """A wire form, read up to its codes."""

    transposed: bool
    shape: tuple[int, int]
    group: int
    scales: NDArray[np.float16]
    zeros: memoryview
    codes: memoryview

    @staticmethod
    def read(payload: memoryview, shape: tuple[int, ...]) -> _Form:
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
        return _Form(transposed, (rows, columns), group, scales, reader.block(), reader.take(reader.remaining))


def decode_groups(payload: memoryview, shape: tuple[int, ...]) -> tuple[GroupCodes, bool]:
    """Inverse of `encode_groups` for a tensor of this shape, and whether it is stored transposed.

    Raises:
        ArtifactError: the payload is not such a form.
    """
    form = _Form.read(payload, shape)
    zeros = decode_matrix(form.zeros, form.scales.shape)
    centred = decode_matrix(form.codes, form.shape)
    codes = centred + zeros[:, np.arange(form.shape[1]) // form.group]
    return GroupCodes(codes, form.scales, zeros, form.group), form.transposed


def quantize_layer(tensor: torch.Tensor, curvature: Curvature, bits: int, group: int) -> bytes:
    """Quantize and code a linear layer's weight."""
    import torch

    values = torch.from_numpy(float_values(tensor))
    weights = values.T.contiguous() if curvature.transposed else values
    return encode_groups(quantize_groups(weights, bits, group, curvature.moment), transposed=curvature.transposed)


def decode_layer(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Decode a layer's weight part by part: the coded integers are codes less zero points already."""
    import torch

    if dtype.itemsize < 2:
        raise ArtifactError(f"artifact: a tensor in groups cannot have dtype {dtype}")
    form = _Form.read(payload, shape)
    for _ in matrix_parts(form.zeros, form.scales.shape):  # not needed here, but they must be what they should
        pass
    tensor = torch.empty(matrix_shape(shape), dtype=dtype)
    target = tensor.T if form.transposed else tensor
    for (rows, columns), centred in matrix_parts(form.codes, form.shape):
        owner = np.arange(columns.start, columns.stop) // form.group
        values = centred.astype(np.float32) * form.scales[rows][:, owner].astype(np.float32)
        target[rows, columns] = torch.from_numpy(values).to(dtype)
    return tensor.reshape(shape)


def plain_codes(payload: memoryview, shape: tuple[int, ...]) -> bytes:
    """Codes as bytes, zero points as bytes and scales: what a general codec would be given."""
    codes, _ = decode_groups(payload, shape)
    return codes.codes.astype(np.uint8).tobytes() + codes.zeros.astype(np.uint8).tobytes() + codes.scales.tobytes()
