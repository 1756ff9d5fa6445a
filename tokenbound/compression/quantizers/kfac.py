"""Entropy-coded uniform quantization with loss-aware steps: the method to use.

At a given entropy the expected rise of the loss is least when every weight's error costs the same, so the step of
weight (i, j) is c / sqrt(g_i d_j): g_i the mean squared gradient of the layer's output i, d_j the cost of column j
after feedback (see `calibration`, `feedback`; the water-filling argument is WaterSIC's, arXiv 2603.04956). The one
constant c, the rate, trades bytes for loss over the whole model, embeddings, head and norms included. Steps are snapped
to powers of sqrt(2) and coded as small exponents of rows and columns.
"""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.calibration import Calibration, Curvature
from tokenbound.compression.codecs.uniform import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    SHRINK_UNIT,
    Grid,
    step_exponent,
    steps_of,
)
from tokenbound.compression.coder import Ints
from tokenbound.compression.quantizers.feedback import conditional_variances, inverse_factor, round_with_feedback
from tokenbound.compression.quantizers.nearest import (
    float_values,
    is_constant,
    largest_magnitude,
    quantize,
    round_to_grid,
)

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.methods.kfac import KfacSettings

FINER, COARSER = 16, 10
"""How many half octaves the step of a row or column may lie below and above that of the mean weight. The upper end
keeps what calibration never saw, a rare token say, from being rounded away altogether."""
UNKNOWN_STEP = 0.125
"""Step, in standard deviations, of a parameter that calibration never saw in use."""
LIMIT = 1 << 20
"""Largest integer; a step that would need more is widened."""


def quantize_calibrated(
    name: str, tensor: torch.Tensor, settings: KfacSettings, calibration: Calibration
) -> Grid | None:
    """Quantize one float tensor; None where exact storage is the right answer."""
    curvature = calibration.curvature(name)
    if curvature is not None and tensor.ndim == 2 and tensor.numel():
        return _quantize_matrix(tensor, curvature, settings)
    square = calibration.square(name)
    if square is None or square <= 0:
        return quantize(tensor, UNKNOWN_STEP)
    if is_constant(tensor):
        return None
    return round_to_grid(tensor, max(step_exponent(settings.rate / square**0.5), _least_exponent(tensor)))


def _least_exponent(values: torch.Tensor) -> int:
    """Of the finest step at which no integer exceeds `LIMIT`."""
    largest = largest_magnitude(values)
    return step_exponent(largest / LIMIT) if largest else MIN_EXPONENT


def _quantize_matrix(tensor: torch.Tensor, curvature: Curvature, settings: KfacSettings) -> Grid | None:
    import torch

    values = torch.from_numpy(float_values(tensor))
    weights = values.T if curvature.transposed else values
    factor = inverse_factor(curvature.moment, settings.damping)
    steps = _Steps.choose(curvature, conditional_variances(factor).numpy(), settings)
    grid = _round(weights, factor, steps, settings)
    if grid is None or not curvature.transposed:
        return grid
    return Grid(np.ascontiguousarray(grid.integers.T), grid.base, grid.columns, grid.rows, grid.shrink)


class _Steps:
    """Exponents of a matrix's steps: base + rows[i] + columns[j]."""

    def __init__(self, base: int, rows: Ints | None, columns: Ints | None) -> None:
        self.base, self.rows, self.columns = base, rows, columns

    @staticmethod
    def choose(curvature: Curvature, variances: NDArray[np.float64], settings: KfacSettings) -> _Steps:
        """Steps c / sqrt(g_i d_j), or with one average for all rows or columns where the settings say so."""
        base_row, rows = _log_steps(curvature.rows.numpy(), spread=settings.row_steps)
        base_column, columns = _log_steps(variances, spread=settings.column_steps)
        base = round(2 * log2(settings.rate) + base_row + base_column)
        return _Steps(min(max(base, MIN_EXPONENT + 2 * FINER), MAX_EXPONENT - 2 * COARSER), rows, columns)

    def of_rows(self) -> torch.Tensor | float:
        """Row factors of the steps, the base included [rows, 1]."""
        import torch

        if self.rows is None:
            return float(steps_of(np.array([self.base]))[0])
        return torch.from_numpy(steps_of(self.base + self.rows)).double()[:, None]


def _log_steps(weights: NDArray[np.float64], *, spread: bool) -> tuple[float, Ints | None]:
    """-log2(weight), which is the step's exponent in half octaves: of the mean weight, and deviations from it."""
    mean = float(weights.mean())
    if not mean > 0:
        return 0.0, None
    if not spread:
        return -log2(mean), None
    logs = -np.log2(np.maximum(weights / mean, 2.0 ** -(COARSER + 1)))
    return -log2(mean), np.clip(np.rint(logs), -FINER, COARSER).astype(np.int64)


def _round(weights: torch.Tensor, factor: torch.Tensor, steps: _Steps, settings: KfacSettings) -> Grid | None:
    """Round once to see what rounding does, and again with nonzero values drawn to where their mean lies."""
    integers, target = _round_once(weights, factor, steps, settings.deadzone, 0)
    if settings.centroids:
        shrink = _best_shrink(integers, target)
        if shrink:
            integers, target = _round_once(weights, factor, steps, settings.deadzone, shrink)
    else:
        shrink = 0
    if np.abs(integers).max(initial=0) > LIMIT:
        wider = _Steps(steps.base + 2, steps.rows, steps.columns)
        return _round(weights, factor, wider, settings)
    return Grid(integers.astype(np.int32), steps.base, steps.rows, steps.columns, shrink)


def _round_once(
    weights: torch.Tensor, factor: torch.Tensor, steps: _Steps, deadzone: float, shrink: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    import torch

    row_steps = steps.of_rows()
    column_exponents = np.zeros(weights.shape[1], np.int64) if steps.columns is None else steps.columns
    column_steps = torch.from_numpy(steps_of(column_exponents)).double()
    chosen = torch.zeros(weights.shape, dtype=torch.float64)
    seen = torch.zeros(weights.shape, dtype=torch.float64)
    drawn = shrink / SHRINK_UNIT

    def rounder(columns: torch.Tensor, start: int) -> torch.Tensor:
        step = row_steps * column_steps[start : start + columns.shape[1]]
        scaled = columns / step
        size = scaled.abs()
        integers = scaled.sign() * torch.floor(size + 0.5 + drawn - deadzone * (size < 1.5)).clamp(min=0)
        chosen[:, start : start + columns.shape[1]] = integers
        seen[:, start : start + columns.shape[1]] = scaled
        return (integers - integers.sign() * drawn) * step

    round_with_feedback(weights, factor, rounder)
    return chosen.numpy().astype(np.int64), seen.numpy()


def _best_shrink(integers: NDArray[np.int64], target: NDArray[np.float64]) -> int:
    """How far below the integers' magnitudes the values lie that were rounded to them, in 64ths of a step."""
    nonzero = integers != 0
    if not nonzero.any():
        return 0
    gap = float((np.abs(integers[nonzero]) - np.abs(target[nonzero])).mean())
    return min(max(round(gap * SHRINK_UNIT), 0), SHRINK_UNIT // 2)
