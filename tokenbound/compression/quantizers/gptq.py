"""GPTQ at 2, 3 or 4 bits with group scales: the practice that others report, for comparison.

Codes are integers of b bits; each group of consecutive columns of a row has an asymmetric float16 scale and an integer
zero point, found by a search for the least squared error; rounding uses error feedback (Frantar et al. 2022, arXiv
2210.17323).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.codecs.groups import GroupCodes, encode_groups
from tokenbound.compression.quantizers.feedback import inverse_factor, round_with_feedback
from tokenbound.compression.quantizers.nearest import float_values

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Curvature

_SHRINKS = np.linspace(1.0, 0.5, 21)
"""Parts of a group's range that the search for its scale tries."""


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


def quantize_layer(tensor: torch.Tensor, curvature: Curvature, bits: int, group: int) -> bytes:
    """Quantize and code a linear layer's weight."""
    import torch

    values = torch.from_numpy(float_values(tensor))
    weights = values.T.contiguous() if curvature.transposed else values
    return encode_groups(quantize_groups(weights, bits, group, curvature.moment), transposed=curvature.transposed)
