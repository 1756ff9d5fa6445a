"""Round to nearest: one step per tensor, a fixed part of its standard deviation, entropy coded."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, fsum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.codecs.uniform import Grid, matrix_shape, step_exponent, steps_of
from tokenbound.compression.symbols import BLOCK_ELEMENTS, MAX_BITS

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


def round_to_grid(values: torch.Tensor, exponent: int) -> Grid | None:
    """Nearest integers for one step; None where they would not fit the coder.

    Args:
        values: Float tensor of any shape and dtype; looked at in parts, so that nothing else of its size is held but
            the integers, in the narrowest dtype that holds them.
        exponent: The step's, in half octaves.
    """
    step = float(steps_of(np.array([exponent]))[0])
    largest = largest_magnitude(values) / step
    if not values.numel() or largest >= 1 << (MAX_BITS - 1):
        return None
    integers = np.empty(values.numel(), np.min_scalar_type(-1 - ceil(largest)))
    for start, part in flat_parts(values):
        integers[start : start + len(part)] = np.rint(part.astype(np.float64) / step)
    shape = (values.numel(),) if values.ndim < 2 else matrix_shape(tuple(values.shape))
    return Grid(integers.reshape(shape), exponent)


def flat_parts(values: torch.Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Consecutive parts of a tensor's elements in float32, and where each begins."""
    flat = values.detach().reshape(-1)
    for start in range(0, len(flat), BLOCK_ELEMENTS):
        yield start, float_values(flat[start : start + BLOCK_ELEMENTS])


def largest_magnitude(values: torch.Tensor) -> float:
    """Of a float tensor; 0 of an empty one."""
    return max((float(np.abs(part).max()) for _, part in flat_parts(values)), default=0.0)


def is_constant(values: torch.Tensor) -> bool:
    """Whether there are not two different values."""
    lows, highs = [], []
    for _, part in flat_parts(values):
        lows.append(float(part.min()))
        highs.append(float(part.max()))
    return min(lows, default=0.0) == max(highs, default=0.0)


def mean_square(values: torch.Tensor, centre: float = 0.0) -> float:
    """Mean of (value - centre)^2 in float64."""
    return (
        fsum(float(np.square(part - centre, dtype=np.float64).sum()) for _, part in flat_parts(values)) / values.numel()
    )


def vector_grid(values: torch.Tensor) -> Grid | None:
    """Norm gains and biases on a fine grid; None for a constant."""
    if is_constant(values):
        return None
    return round_to_grid(values, min(VECTOR_EXPONENT, step_exponent(VECTOR_STEP * mean_square(values) ** 0.5)))


def quantize(tensor: torch.Tensor, step: float) -> Grid | None:
    """Quantize a float tensor.

    Args:
        tensor: Any shape.
        step: In units of the tensor's standard deviation.

    Returns:
        The grid, or None where exact storage is the right answer (empty and constant tensors).
    """
    if tensor.ndim < 2:
        return vector_grid(tensor)
    if is_constant(tensor):
        return None
    mean = fsum(float(part.sum(dtype=np.float64)) for _, part in flat_parts(tensor)) / tensor.numel()
    spread = mean_square(tensor, mean) ** 0.5
    return round_to_grid(tensor, step_exponent(step * spread)) if spread else None
