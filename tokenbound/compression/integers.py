"""Integer arrays as self-contained coded streams.

A signed integer becomes a token and raw low bits (see `tokens`). A matrix is coded step by step along its shorter
side, all lanes of the longer side at once, so that NumPy and the range coder see long vectors. The context of an
element is the magnitude expected of it: the running mean of its lane, scaled by what is known of its step (a given
exponent, and what earlier lanes showed). A vector is coded in blocks that grow as its models learn.

Beside its argument, coding holds one byte for each element; decoding the same beside its result, which can be had in
parts (`matrix_parts`, `vector_parts`) by those who want other values than integers.

Contexts and priors are integer arithmetic and Python integers throughout (see `coder`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import (
    COUNT_UNIT,
    Contexts,
    Ints,
    Pass,
    ReadingPass,
    WritingPass,
)
from tokenbound.compression.container import ArtifactError, Reader, block, varint, zigzag
from tokenbound.compression.symbols import (
    MAX_BITS,
    Cut,
    TokenBytes,
    Values,
    alphabet_size,
    blocks,
    join_integers,
    low_bit_counts,
    split_integers,
    tokenize,
    values_of,
)

FRACTION_BITS = 8
"""Expected magnitudes are integers in units of 2^-8."""
BUCKETS = 28
"""Contexts: expected magnitudes in half octaves from 2^-8 to 2^6."""
MAX_MEAN_CODE = BUCKETS
"""Half octaves: mean magnitudes beyond 2^6 count as this."""
PRIOR_WEIGHT = 24
"""Observations that a context's prior table is worth."""
TILE = 4096
"""Lanes coded together: long vectors, yet small enough for the cache."""
FIRST_TILE = 512
"""Lanes of the first tile; later ones know from it how large each step's values are."""
LANE_WEIGHT = 6
"""Observations that the tensor's mean magnitude is worth in a lane's running mean."""
STEP_WEIGHT = 16
"""Observations of average size that a step's scale of 1 is worth."""
ROOT_BITS = 12
"""Fraction bits of the table of powers of sqrt(2)."""
MAX_EXPONENT = 16
"""Half octaves; exponents beyond this count as this when contexts are chosen."""
MAX_SEEN = 1 << 10
"""Magnitudes beyond this count as this when contexts are chosen."""

_ROOTS: Ints = np.array(
    [isqrt(1 << (2 * ROOT_BITS + exponent)) for exponent in range(-MAX_EXPONENT, MAX_EXPONENT + 1)], dtype=np.int64
)


# Priors and contexts


@lru_cache(maxsize=64)
def prior_counts(max_bits: int) -> Ints:
    """Starting counts [BUCKETS, A]: for each expected magnitude a two-sided geometric law with that mean."""
    table = np.ones((BUCKETS, alphabet_size(max_bits)), np.int64)
    for bucket in range(BUCKETS):
        masses = _geometric(bucket)
        magnitudes = np.arange(min(len(masses), 1 << max_bits))
        both = np.concatenate([magnitudes, -magnitudes[1:]])
        tokens, _, _ = split_integers(both, max_bits)
        weights = masses[np.abs(both)]
        np.add.at(table[bucket], tokens, weights * (PRIOR_WEIGHT * COUNT_UNIT) // int(weights.sum()))
    return table


def _geometric(bucket: int) -> Ints:
    """Masses (in units of 2^-30) of one sign at 0, 1, 2, ... with E|q| in the middle of the bucket."""
    one = 1 << 24
    mean = (isqrt(1 << (bucket + 32)) + isqrt(1 << (bucket + 33))) // 2  # 8 + 16 fraction bits
    ratio = (isqrt(one * one + mean * mean) - one) * one // mean  # r, where E|q| = 2 r / (1 - r^2)
    masses: list[int] = []
    mass = (1 << 30) * (one - ratio) // (one + ratio)
    while mass and len(masses) < 1 << 11:
        masses.append(mass)
        mass = mass * ratio >> 24
    return np.array(masses, np.int64)


_BUCKET_OF = np.array([0, *((v * v).bit_length() - 1 for v in range(1, 1 << (BUCKETS // 2)))], dtype=np.uint8)
"""floor(2 log2 v)."""


def _roots(exponents: Ints) -> Ints:
    """sqrt(2)^exponent in units of 2^-ROOT_BITS."""
    return _ROOTS[np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT) + MAX_EXPONENT]


class MagnitudeContexts:
    """What magnitude to expect of each lane at each step, from the lanes and steps coded before.

    Values are thought of as multiples of a known grid step 2^((lane + step exponent)/2); magnitudes are compared in
    units of the grid step where both exponents are zero.

    Args:
        mean: Mean magnitude over the matrix in that unit, times 2^8.
        lane_exponents: [lanes].
        step_exponents: [steps].
    """

    def __init__(self, mean: int, lane_exponents: Ints, step_exponents: Ints) -> None:
        self._start = mean * _roots(-lane_exponents)
        self._shrink = _roots(-step_exponents).tolist()
        self._grow = _roots(step_exponents).tolist()
        self._expected = [1 + (STEP_WEIGHT * mean * shrink >> ROOT_BITS) for shrink in self._shrink]
        self._found = list(self._expected)

    def tile(self, lanes: slice) -> None:
        """Begin a tile of lanes."""
        self._sums = self._start[lanes] * LANE_WEIGHT

    def expect(self, step: int) -> Contexts:
        """Contexts of the tile's lanes at this step."""
        scale = min((self._found[step] << 8) // self._expected[step], 1 << 16)
        factor = (self._shrink[step] * scale << 8) // (LANE_WEIGHT + step)
        level = (self._sums >> 8) * factor
        level >>= 2 * ROOT_BITS + 8
        np.clip(level, 0, len(_BUCKET_OF) - 1, out=level)  # extreme exponents may have wrapped it around
        self._level = int(level.sum()) * self._expected[step] // self._found[step]
        contexts: Contexts = _BUCKET_OF[level]
        return contexts

    def see(self, step: int, magnitudes: Ints) -> None:
        """Learn what the lanes held, in units of 2^-8."""
        self._expected[step] += self._level
        self._found[step] += int(magnitudes.sum())
        self._sums += magnitudes * self._grow[step]


# Streams


@dataclass(frozen=True)
class _Header:
    max_bits: int
    mean_code: int
    across: bool
    """Whether the steps run along the first axis instead of the second."""

    def to_bytes(self) -> bytes:
        return bytes([self.max_bits | self.across << 7, self.mean_code])

    @staticmethod
    def read(reader: Reader) -> _Header:
        first, mean_code = reader.take(2)
        header = _Header(first & 0x7F, mean_code, bool(first >> 7))
        if header.max_bits > MAX_BITS or mean_code > MAX_MEAN_CODE:
            raise ArtifactError("artifact: an integer stream has a header that the encoder does not write")
        return header

    @property
    def mean(self) -> int:
        """The mean magnitude in units of 2^-8, to half an octave."""
        return isqrt(1 << self.mean_code)


def _prior(header: _Header) -> Ints:
    return prior_counts(max(1, header.max_bits))


def _tiles(lanes: int) -> list[slice]:
    edges = [0, min(FIRST_TILE, lanes)] if lanes > 2 * FIRST_TILE else [0]
    while edges[-1] < lanes:
        edges.append(min(edges[-1] + TILE, lanes))
    return [slice(a, b) for a, b in pairwise(edges)]


def _code_matrix(run: Pass, tokens: TokenBytes, contexts: MagnitudeContexts, max_bits: int, *, reading: bool) -> None:
    """Code tokens [steps, lanes] in place; where all values are zero there is nothing to code."""
    if not max_bits:
        return
    magnitudes = _token_magnitudes(max_bits)
    for lanes in _tiles(tokens.shape[1]):
        contexts.tile(lanes)
        for step in range(len(tokens)):
            expected = contexts.expect(step)
            got = run.code(None if reading else tokens[step, lanes].astype(np.int32), expected)
            if reading:
                tokens[step, lanes] = got
            contexts.see(step, magnitudes[got])


@lru_cache(maxsize=64)
def _token_magnitudes(max_bits: int) -> Ints:
    """Magnitude of each token in units of 2^-8, as contexts see it: of a large value the least it can be."""
    tokens = np.arange(alphabet_size(max_bits), dtype=np.int32)
    least = join_integers(tokens, max_bits, np.zeros(len(low_bit_counts(tokens, max_bits)), np.int64))
    return np.minimum(np.abs(least), MAX_SEEN) << FRACTION_BITS


def encode_matrix(
    values: NDArray[Any], row_exponents: Ints | None = None, column_exponents: Ints | None = None
) -> bytes:
    """Code a matrix of integers below 2^31 in magnitude.

    Args:
        values: [rows, columns].
        row_exponents: Where known to the decoder too: half-octave exponents of each row's grid step, so that values
            of a row with a larger exponent are expected to be smaller [rows].
        column_exponents: The same of each column [columns].

    >>> decode_matrix(encode_matrix(np.array([[1, -2], [300, 0]])), (2, 2)).tolist()
    [[1, -2], [300, 0]]
    """
    rows, columns = _exponents(values.shape, row_exponents, column_exponents)
    across = values.shape[1] >= values.shape[0]
    ways = (across,) if values.size > BOTH_WAYS_LIMIT else (across, not across)
    allowed = [way for way in ways if _steps_allowed(values.shape, way)]
    return min((_encode_oriented(values, rows, columns, way) for way in allowed), key=len)


def _steps_allowed(shape: tuple[int, ...], across: bool) -> bool:
    """Steps are slow: more of them than lanes only where they are few, so that no forged shape can take for ever."""
    steps, lanes = shape if across else shape[::-1]
    return steps <= max(lanes, MAX_STEPS)


MAX_STEPS = 1 << 12
"""Steps that a matrix with fewer lanes than steps may have."""


BOTH_WAYS_LIMIT = 1 << 18
"""Matrices of up to this many elements are coded along both sides and the shorter code is kept."""


def _exponents(shape: tuple[int, ...], rows: Ints | None, columns: Ints | None) -> tuple[Ints, Ints]:
    return (
        np.zeros(shape[0], np.int64) if rows is None else rows.astype(np.int64),
        np.zeros(shape[1], np.int64) if columns is None else columns.astype(np.int64),
    )


def _encode_oriented(values: NDArray[Any], rows: Ints, columns: Ints, across: bool) -> bytes:
    lanes_of, steps_of = (columns, rows) if across else (rows, columns)
    grid = values if across else values.T
    header = _Header(bit_length(grid), _mean_code(grid, lanes_of, steps_of), across)
    coded, raw = _encode_grid(grid, header, MagnitudeContexts(header.mean, lanes_of, steps_of))
    return b"".join((header.to_bytes(), varint(len(raw)), raw, coded))


def _encode_grid(grid: NDArray[Any], header: _Header, contexts: MagnitudeContexts) -> tuple[bytes, bytes]:
    """Code of the tokens and raw bits; what is held for them goes before the two are joined."""
    tokens, raw = tokenize(grid, header.max_bits)
    run = WritingPass(_prior(header))
    _code_matrix(run, tokens, contexts, header.max_bits, reading=False)
    return run.finish(), raw


def bit_length(values: NDArray[Any]) -> int:
    """Of the largest magnitude.

    Raises:
        ValueError: it is longer than `MAX_BITS`.
    """
    largest = max(int(values.max(initial=0)), -int(values.min(initial=0)))
    if largest >> MAX_BITS:
        raise ValueError(f"{largest} is too large to code")
    return largest.bit_length()


def decode_matrix(
    data: bytes | memoryview,
    shape: tuple[int, int],
    row_exponents: Ints | None = None,
    column_exponents: Ints | None = None,
) -> Values:
    """Inverse of `encode_matrix` with the same exponents.

    Raises:
        ArtifactError: the bytes are not such a stream of this shape.
    """
    return assembled(matrix_parts(data, shape, row_exponents, column_exponents), shape)


def assembled(parts: Iterable[tuple[Cut, NDArray[np.signedinteger[Any]]]], shape: tuple[int, int]) -> Values:
    """The int32 matrix of this shape that parts cover."""
    values = np.empty(shape, np.int32)
    for cut, part in parts:
        values[cut] = part
    return values


def matrix_parts(
    data: bytes | memoryview,
    shape: tuple[int, int],
    row_exponents: Ints | None = None,
    column_exponents: Ints | None = None,
) -> Iterator[tuple[Cut, Ints]]:
    """As `decode_matrix`, in parts that cover the matrix: rows and columns, and their values."""
    rows, columns = _exponents(shape, row_exponents, column_exponents)
    reader = Reader(data, "an integer stream")
    header = _Header.read(reader)
    if not _steps_allowed(shape, header.across):
        raise ArtifactError("artifact: an integer stream runs along the long side of its matrix")
    raw = reader.block()
    lanes_of, steps_of = (columns, rows) if header.across else (rows, columns)
    tokens = np.zeros((len(steps_of), len(lanes_of)), np.uint8)
    run = ReadingPass(_prior(header), reader.take(reader.remaining))
    contexts = MagnitudeContexts(header.mean, lanes_of, steps_of)
    _code_matrix(run, tokens, contexts, header.max_bits, reading=True)
    for cut, part in values_of(tokens, raw, header.max_bits):
        yield (cut, part) if header.across else (cut[::-1], part.T)


def _mean_code(grid: NDArray[Any], lanes_of: Ints, steps_of: Ints) -> int:
    """floor(2 log2) of the mean of |value| sqrt(2)^(exponents), in units of 2^-8."""
    if not grid.size:
        return 0
    lane_roots, step_roots = _roots(lanes_of), _roots(steps_of)
    weighted = 0
    for steps, lanes in blocks(grid.shape):  # type: ignore[arg-type]
        sizes = np.minimum(np.abs(grid[steps, lanes].astype(np.int64)), MAX_SEEN) @ lane_roots[lanes]
        weighted += sum(size * root for size, root in zip(sizes.tolist(), step_roots[steps].tolist(), strict=True))
    mean: int = (weighted << FRACTION_BITS) // (grid.size << 2 * ROOT_BITS)
    return max(0, min((mean * mean).bit_length() - 1, MAX_MEAN_CODE))


def encode_vector(values: NDArray[Any]) -> bytes:
    """Code a vector of integers below 2^30 in magnitude, relative to its median.

    >>> decode_vector(encode_vector(np.array([7, 7, -9])), 3).tolist()
    [7, 7, -9]
    """
    values = values.astype(np.int64)
    offset = int(np.sort(values)[len(values) // 2]) if len(values) else 0
    centred = values[None, :] - offset
    mean_code = _mean_code(centred, np.zeros(len(values), np.int64), np.zeros(1, np.int64))
    header = _Header(bit_length(centred), mean_code, False)
    tokens, raw = tokenize(centred, header.max_bits)
    run = WritingPass(_prior(header))
    _code_vector(run, tokens[0], header, reading=False)
    return varint(zigzag(offset)) + header.to_bytes() + block(raw) + run.finish()


def decode_vector(data: bytes | memoryview, length: int) -> Ints:
    """Inverse of `encode_vector`.

    Raises:
        ArtifactError: the bytes are not such a stream of this length.
    """
    values = np.empty(length, np.int64)
    for cut, part in vector_parts(data, length):
        values[cut] = part
    return values


def vector_parts(data: bytes | memoryview, length: int) -> Iterator[tuple[slice, Ints]]:
    """As `decode_vector`, in parts that cover the vector."""
    reader = Reader(data, "an integer vector")
    offset = reader.signed(1 << MAX_BITS)
    header = _Header.read(reader)
    raw = reader.block()
    tokens = np.zeros((1, length), np.uint8)
    run = ReadingPass(_prior(header), reader.take(reader.remaining))
    _code_vector(run, tokens[0], header, reading=True)
    for (_, cut), part in values_of(tokens, raw, header.max_bits):
        yield cut, part[0] + offset


def _code_vector(run: Pass, tokens: TokenBytes, header: _Header, *, reading: bool) -> None:
    """Code a vector in place: one context, the tensor's mean magnitude, in blocks that grow by a quarter."""
    context = int(_BUCKET_OF[min(header.mean, len(_BUCKET_OF) - 1)])
    start = 0 if header.max_bits else len(tokens)
    while start < len(tokens):
        stop = min(len(tokens), start + max(4, start // 4))
        known = None if reading else tokens[start:stop].astype(np.int32)
        got = run.code(known, np.full(stop - start, context, np.uint8))
        if reading:
            tokens[start:stop] = got
        start = stop
