"""Round to nearest: one step per tensor, a fixed part of its standard deviation, entropy coded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.integers import MAX_BITS
from tokenbound.compression.methods.uniform import Grid, matrix_shape, step_exponent, steps_of

if TYPE_CHECKING:
    import torch

VECTOR_EXPONENT = -10
"""Step of norm gains, biases and other vectors: 1/32, which costs nothing in loss where values are near one."""
VECTOR_STEP = 0.125
"""A vector of small values gets a step of this part of their root mean square instead."""


def float_values(tensor: torch.Tensor) -> NDArray[np.float32]:
    """A float tensor's values in float32 on the CPU, in its own shape."""
    import torch

    values: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def round_to_grid(values: NDArray[np.float32], exponent: int) -> Grid | None:
    """Nearest integers for one step; None where they would not fit the coder."""
    step = float(steps_of(np.array([exponent]))[0])
    if not values.size or float(np.abs(values).max()) / step >= 1 << (MAX_BITS - 1):
        return None
    integers = np.rint(values.astype(np.float64) / step).astype(np.int32)
    shape = (values.size,) if values.ndim < 2 else matrix_shape(values.shape)
    return Grid(integers.reshape(shape), exponent)


def vector_grid(values: NDArray[np.float32]) -> Grid | None:
    """Norm gains and biases on a fine grid; None for a constant."""
    if not values.size or values.min() == values.max():
        return None
    size = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
    return round_to_grid(values, min(VECTOR_EXPONENT, step_exponent(VECTOR_STEP * size)))


def quantize(tensor: torch.Tensor, step: float) -> Grid | None:
    """Quantize a float tensor.

    Args:
        tensor: Any shape.
        step: In units of the tensor's standard deviation.

    Returns:
        The grid, or None where exact storage is the right answer (empty and constant tensors).
    """
    values = float_values(tensor)
    if values.ndim < 2:
        return vector_grid(values)
    spread = float(values.astype(np.float64).std()) if values.size else 0.0
    return round_to_grid(values, step_exponent(step * spread)) if spread else None
