"""Integers times known steps: the wire form that `rtn` and `kfac` share.

    value[i, j] = sign(q) * (|q| - shrink/64) * sqrt(2)^(base + row[i] + column[j])

Steps are powers of sqrt(2), so that a step is a small integer. Odd powers use one fixed float32 for sqrt(2), the
rest is exact scaling, and each value is a single float32 product: the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import floor, log2
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import Ints
from tokenbound.compression.container import ArtifactError, Reader, block, varint, zigzag
from tokenbound.compression.integers import decode_vector, encode_vector, vector_parts
from tokenbound.compression.matrices import encode_matrix, matrix_parts
from tokenbound.compression.symbols import MAX_BITS, Cut

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

SHRINK_UNIT = 64
MIN_EXPONENT, MAX_EXPONENT = -240, 200
"""Half octaves: float32 holds 2^-120 to 2^100 without subnormals or overflow of any value that a weight has."""
_ROOT_TWO = np.float32(1.41421356)
_ROWS, _COLUMNS = 1, 2
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Integers and the exponents of their steps.

    Attributes:
        integers: Below 2^31 in magnitude [rows, columns], or [n] for a vector.
        base: Half-octave exponent of the tensor's step.
        rows: Added per row [rows], or None.
        columns: Added per column [columns], or None.
        shrink: How far nonzero values are drawn towards zero, in 64ths of a step.
    """

    integers: NDArray[np.signedinteger[Any]]
    base: int
    rows: Ints | None = field(default=None)
    columns: Ints | None = field(default=None)
    shrink: int = 0


def step_exponent(step: float) -> int:
    """The exponent e whose sqrt(2)^e is nearest to a positive step on a log scale.

    >>> step_exponent(0.03125)
    -10
    """
    return min(max(floor(2 * log2(step) + 0.5), MIN_EXPONENT), MAX_EXPONENT)


def steps_of(exponents: Ints) -> Floats:
    """sqrt(2)^exponents in float32."""
    odd = (exponents & 1).astype(bool)
    return np.ldexp(np.where(odd, _ROOT_TWO, np.float32(1)), (exponents >> 1).astype(np.int32)).astype(np.float32)


def encode_grid(grid: Grid) -> bytes:
    """Wire form of a grid; its shape travels with the tensor."""
    if grid.integers.ndim == 1:
        return _head(grid) + encode_vector(grid.integers)
    exponents = [encode_vector(part) for part in (grid.rows, grid.columns) if part is not None]
    return (
        _head(grid)
        + b"".join(block(part) for part in exponents)
        + encode_matrix(grid.integers, grid.rows, grid.columns)
    )


def _head(grid: Grid) -> bytes:
    flags = (_ROWS if grid.rows is not None else 0) | (_COLUMNS if grid.columns is not None else 0)
    return bytes([flags | grid.shrink << 2]) + varint(zigzag(grid.base))


@dataclass(frozen=True)
class Steps:
    """What a wire form says of the steps, before the integers."""

    base: int
    rows: Ints | None
    columns: Ints | None
    shrink: int


def read_form(payload: memoryview, shape: tuple[int, ...]) -> tuple[Steps, memoryview]:
    """The steps of a tensor of this shape, and the code of its integers."""
    reader = Reader(payload, "a quantized tensor")
    flags = reader.byte()
    base = reader.signed(MAX_EXPONENT - MIN_EXPONENT)
    if len(shape) < 2:
        if flags & (_ROWS | _COLUMNS):
            raise ArtifactError("artifact: a vector has exponents of rows or columns")
        return Steps(base, None, None, flags >> 2), reader.take(reader.remaining)
    rows, columns = matrix_shape(shape)
    row = decode_vector(reader.block(), rows) if flags & _ROWS else None
    column = decode_vector(reader.block(), columns) if flags & _COLUMNS else None
    _check_exponents(base, row, column)
    return Steps(base, row, column, flags >> 2), reader.take(reader.remaining)


def integer_parts(coded: memoryview, shape: tuple[int, ...], steps: Steps) -> Iterator[tuple[Cut, Ints]]:
    """The integers in parts; of a vector as one row."""
    if len(shape) < 2:
        for cut, part in vector_parts(coded, _count(shape)):
            if max(-int(part.min()), int(part.max())) >> MAX_BITS:
                raise ArtifactError("artifact: a quantized vector holds integers beyond 31 bits")
            yield (slice(0, 1), cut), part[None, :]
    else:
        yield from matrix_parts(coded, matrix_shape(shape), steps.rows, steps.columns)


def decode_grid(payload: memoryview, shape: tuple[int, ...]) -> Grid:
    """Inverse of `encode_grid` for a tensor of this shape.

    Raises:
        ArtifactError: the payload is not such a form.
    """
    steps, coded = read_form(payload, shape)
    integers = np.empty(_flat_shape(shape), np.int32)
    for cut, part in integer_parts(coded, shape, steps):
        integers[cut] = part
    return Grid(
        integers.reshape(-1) if len(shape) < 2 else integers, steps.base, steps.rows, steps.columns, steps.shrink
    )


def decode_tensor(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The values of a wire form, in no more memory than the tensor and one byte for each element.

    Raises:
        ArtifactError: the payload is not such a form, or the dtype is no float.
    """
    import torch

    if not dtype.is_floating_point:
        raise ArtifactError(f"artifact: a quantized tensor cannot have dtype {dtype}")
    steps, coded = read_form(payload, shape)
    tensor = torch.empty(_flat_shape(shape), dtype=dtype)
    for (rows, columns), part in integer_parts(coded, shape, steps):
        row = None if steps.rows is None else steps.rows[rows]
        column = None if steps.columns is None else steps.columns[columns]
        values = grid_values(Grid(part, steps.base, row, column, steps.shrink))
        tensor[rows, columns] = torch.from_numpy(values).to(dtype)
    return tensor.reshape(shape)


def _flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return matrix_shape(shape) if len(shape) > 1 else (1, _count(shape))


def _check_exponents(base: int, rows: Ints | None, columns: Ints | None) -> None:
    low = high = base
    for part in (rows, columns):
        if part is not None and len(part):
            low, high = low + int(part.min()), high + int(part.max())
    if low < MIN_EXPONENT or high > MAX_EXPONENT:
        raise ArtifactError(f"artifact: step exponents {low} to {high} are outside {MIN_EXPONENT} to {MAX_EXPONENT}")


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor of two or more axes as a matrix: the first axis, and all others.

    >>> matrix_shape((8, 3, 5))
    (8, 15)
    """
    return shape[0], _count(shape[1:])


def grid_values(grid: Grid) -> Floats:
    """The float32 values of a grid, in its own shape."""
    integers = np.atleast_2d(grid.integers)
    base = grid.base - 2 * SHRINK_UNIT.bit_length() + 2
    out = np.empty(integers.shape, np.float32)
    height = max(1, _BLOCK_ELEMENTS // max(1, integers.shape[1]))
    for start in range(0, len(integers), height):
        part = slice(start, start + height)
        rows = None if grid.rows is None else grid.rows[part]
        np.multiply(_shrunk(integers[part], grid.shrink), _steps(base, rows, grid.columns), out=out[part])
    return out.reshape(grid.integers.shape)


def _steps(base: int, rows: Ints | None, columns: Ints | None) -> Floats:
    """Steps of a matrix, in a shape that broadcasts to it; each exponent's is worked out once."""
    if rows is None or columns is None or not (len(rows) and len(columns)):
        row = np.zeros(1, np.int64) if rows is None else rows
        column = np.zeros(1, np.int64) if columns is None else columns
        return steps_of(base + row[:, None] + column[None, :])
    least = rows.min() + columns.min()
    table = steps_of(base + np.arange(least, rows.max() + columns.max() + 1))
    steps: Floats = np.take(table, (rows - least)[:, None] + columns[None, :])
    return steps


def _shrunk(integers: NDArray[np.signedinteger[Any]], shrink: int) -> Floats:
    """64 times the integers, less the shrinkage, rounded once; whatever float32 holds is not rounded at all."""
    if integers.itemsize > 2:
        scaled = integers.astype(np.int64) * SHRINK_UNIT
        return (scaled - np.sign(scaled) * shrink).astype(np.float32) if shrink else scaled.astype(np.float32)
    floats = integers.astype(np.float32)
    signs = np.sign(floats) if shrink else floats
    floats *= np.float32(SHRINK_UNIT)
    return floats - signs * np.float32(shrink) if shrink else floats


def plain_integers(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The integers in the narrowest whole bytes: what a general codec would be given."""
    grid = decode_grid(payload, shape)
    largest = max(int(grid.integers.max(initial=0)), -int(grid.integers.min(initial=0)))
    narrow = np.int8 if largest < 128 else np.int16 if largest < 32768 else np.int32
    return grid.integers.astype(narrow).tobytes()
