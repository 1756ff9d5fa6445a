"""Integer arrays as self-contained coded streams.

A signed integer becomes a token (small values themselves; of a large one its sign, bit length and two leading
bits) and raw low bits. A matrix is coded step by step along its shorter side, all lanes of the longer side at
once, so that NumPy and the range coder see long vectors. The context of an element is the magnitude expected
of it: the running mean of its lane, scaled by what is known of its step (a given exponent, and what earlier
lanes showed). A vector is coded in blocks that grow as its models learn.

Contexts and priors are integer arithmetic and Python integers throughout (see `coder`).
"""

from __future__ import annotations

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
    Tokens,
    WritingPass,
)
from tokenbound.compression.container import ArtifactError, Reader, block, varint, zigzag

Values = NDArray[np.int32]

DIRECT_BITS = 4
DIRECT = (1 << DIRECT_BITS) - 1
"""Integers up to this magnitude are tokens of their own."""
MAX_BITS = 31
"""Bit length of the largest magnitude that can be coded."""
FRACTION_BITS = 8
"""Expected magnitudes are integers in units of 2^-8."""
BUCKETS = 28
"""Contexts: expected magnitudes in half octaves from 2^-8 to 2^6."""
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


# Tokens


def alphabet_size(max_bits: int) -> int:
    """Tokens needed for magnitudes below 2^max_bits."""
    return 2 * ((1 << min(max_bits, DIRECT_BITS)) - 1) + 1 + 8 * max(0, max_bits - DIRECT_BITS)


def split_integers(values: NDArray[Any], max_bits: int) -> tuple[Tokens, Ints, Ints]:
    """Tokens of signed integers below 2^max_bits, and the raw low bits of the large ones.

    Returns:
        Tokens, then for the large values in order their low bits and how many bits those are.
    """
    direct = (1 << min(max_bits, DIRECT_BITS)) - 1
    tokens = values.astype(np.int32) + np.int32(direct)
    if max_bits <= DIRECT_BITS:
        return tokens, np.zeros(0, np.int64), np.zeros(0, np.int64)
    large = np.flatnonzero(np.abs(tokens.astype(np.int64) - direct) > direct)
    magnitude = np.abs(values[large].astype(np.int64))
    lengths = np.frexp(magnitude.astype(np.float64))[1].astype(np.int64)
    lead = (magnitude >> (lengths - 3)) & 3
    classes = 4 * (lengths - DIRECT_BITS - 1) + lead
    tokens[large] = 2 * direct + 1 + 2 * classes + (values[large] < 0)
    return tokens, magnitude & ((np.int64(1) << (lengths - 3)) - 1), lengths - 3


def join_integers(tokens: Tokens, max_bits: int, low: Ints) -> Ints:
    """Inverse of `split_integers` given the low bits."""
    direct = (1 << min(max_bits, DIRECT_BITS)) - 1
    values = tokens.astype(np.int64) - direct
    large = np.flatnonzero(tokens > 2 * direct)
    classes, negative = np.divmod(tokens[large].astype(np.int64) - 2 * direct - 1, 2)
    shift = classes // 4 + DIRECT_BITS + 1 - 3
    magnitude = ((4 + classes % 4) << shift) | low
    values[large] = np.where(negative == 1, -magnitude, magnitude)
    return values


def low_bit_counts(tokens: Tokens, max_bits: int) -> Ints:
    """How many raw bits belong to each large token."""
    direct = (1 << min(max_bits, DIRECT_BITS)) - 1
    large = tokens[tokens > 2 * direct].astype(np.int64)
    return (large - 2 * direct - 1) // 8 + DIRECT_BITS + 1 - 3


def pack_bits(values: Ints, widths: Ints) -> bytes:
    """Concatenate unsigned values, each in its own number of bits (most significant first)."""
    total = int(widths.sum())
    if not total:
        return b""
    owner = np.repeat(np.arange(len(values)), widths)
    place = np.repeat(np.cumsum(widths), widths) - np.arange(total) - 1
    return np.packbits(((values[owner] >> place) & 1).astype(np.uint8)).tobytes()


def unpack_bits(data: bytes | memoryview, widths: Ints) -> Ints:
    """Inverse of `pack_bits`; the data must be exactly as long as the widths say."""
    total = int(widths.sum())
    if len(data) != (total + 7) // 8:
        raise ArtifactError(f"artifact: {len(data)} bytes of raw bits where the tokens need {(total + 7) // 8}")
    if not total:
        return np.zeros(len(widths), np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total).astype(np.int64)
    place = np.repeat(np.cumsum(widths), widths) - np.arange(total) - 1
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(bits << place)])
    stops = np.cumsum(widths)
    values: Ints = sums[stops] - sums[stops - widths]
    return values


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
        np.minimum(level, len(_BUCKET_OF) - 1, out=level)
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
        if header.max_bits > MAX_BITS or mean_code > 2 * (MAX_BITS + FRACTION_BITS):
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


def _code_matrix(run: Pass, tokens: Tokens, contexts: MagnitudeContexts, max_bits: int, *, reading: bool) -> None:
    """Code tokens [steps, lanes] in place; where all values are zero there is nothing to code."""
    if not max_bits:
        return
    magnitudes = _token_magnitudes(max_bits)
    for lanes in _tiles(tokens.shape[1]):
        contexts.tile(lanes)
        for step in range(len(tokens)):
            expected = contexts.expect(step)
            got = run.code(None if reading else tokens[step, lanes], expected)
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
    grid = np.ascontiguousarray(values if across else values.T, dtype=np.int32)
    largest = max(int(grid.max(initial=0)), -int(grid.min(initial=0)))
    if largest >> MAX_BITS:
        raise ValueError(f"{largest} is too large to code")
    header = _Header(largest.bit_length(), _mean_code(grid, lanes_of, steps_of), across)
    tokens, low, widths = split_integers(grid.reshape(-1), header.max_bits)
    run = WritingPass(_prior(header))
    contexts = MagnitudeContexts(header.mean, lanes_of, steps_of)
    _code_matrix(run, tokens.reshape(grid.shape), contexts, header.max_bits, reading=False)
    return header.to_bytes() + block(pack_bits(low, widths)) + run.finish()


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
    rows, columns = _exponents(shape, row_exponents, column_exponents)
    reader = Reader(data, "an integer stream")
    header = _Header.read(reader)
    if not _steps_allowed(shape, header.across):
        raise ArtifactError("artifact: an integer stream runs along the long side of its matrix")
    raw = reader.block()
    lanes_of, steps_of = (columns, rows) if header.across else (rows, columns)
    tokens = np.zeros((len(steps_of), len(lanes_of)), np.int32)
    run = ReadingPass(_prior(header), reader.take(reader.remaining))
    contexts = MagnitudeContexts(header.mean, lanes_of, steps_of)
    _code_matrix(run, tokens, contexts, header.max_bits, reading=True)
    grid = _finish(tokens, raw, header.max_bits)
    return grid if header.across else np.ascontiguousarray(grid.T)


def _finish(tokens: Tokens, raw: memoryview, max_bits: int) -> Values:
    flat = tokens.reshape(-1)
    if max_bits <= DIRECT_BITS:
        if len(raw):
            raise ArtifactError("artifact: an integer stream has raw bits that no value needs")
        return tokens - np.int32((1 << max_bits) - 1)
    low = unpack_bits(raw, low_bit_counts(flat, max_bits))
    return join_integers(flat, max_bits, low).astype(np.int32).reshape(tokens.shape)


def _mean_code(grid: Values, lanes_of: Ints, steps_of: Ints) -> int:
    """floor(2 log2) of the mean of |value| sqrt(2)^(exponents), in units of 2^-8."""
    if not grid.size:
        return 0
    lane_roots = _roots(lanes_of)
    weighted = sum(
        int(np.minimum(np.abs(row), MAX_SEEN) @ lane_roots) * root
        for row, root in zip(grid, _roots(steps_of).tolist(), strict=True)
    )
    mean: int = (weighted << FRACTION_BITS) // (grid.size << 2 * ROOT_BITS)
    return max(0, min((mean * mean).bit_length() - 1, 2 * (BUCKETS // 2)))


def encode_vector(values: NDArray[Any]) -> bytes:
    """Code a vector of integers below 2^30 in magnitude, relative to its median.

    >>> decode_vector(encode_vector(np.array([7, 7, -9])), 3).tolist()
    [7, 7, -9]
    """
    values = values.astype(np.int64)
    offset = int(np.sort(values)[len(values) // 2]) if len(values) else 0
    centred = values - offset
    largest = int(np.abs(centred).max(initial=0))
    if largest >> MAX_BITS:
        raise ValueError(f"{largest} is too large to code")
    mean_code = _mean_code(centred[None, :].astype(np.int32), np.zeros(len(values), np.int64), np.zeros(1, np.int64))
    header = _Header(largest.bit_length(), mean_code, False)
    tokens, low, widths = split_integers(centred, header.max_bits)
    run = WritingPass(_prior(header))
    _code_vector(run, tokens, header, reading=False)
    return varint(zigzag(offset)) + header.to_bytes() + block(pack_bits(low, widths)) + run.finish()


def decode_vector(data: bytes | memoryview, length: int) -> Ints:
    """Inverse of `encode_vector`.

    Raises:
        ArtifactError: the bytes are not such a stream of this length.
    """
    reader = Reader(data, "an integer vector")
    offset = reader.signed(1 << MAX_BITS)
    header = _Header.read(reader)
    raw = reader.block()
    tokens = np.zeros(length, np.int32)
    run = ReadingPass(_prior(header), reader.take(reader.remaining))
    _code_vector(run, tokens, header, reading=True)
    return _finish(tokens, raw, header.max_bits).astype(np.int64) + offset


def _code_vector(run: Pass, tokens: Tokens, header: _Header, *, reading: bool) -> None:
    """Code a vector in place: one context, the tensor's mean magnitude, in blocks that grow by a quarter."""
    context = int(_BUCKET_OF[min(header.mean, len(_BUCKET_OF) - 1)])
    start = 0 if header.max_bits else len(tokens)
    while start < len(tokens):
        stop = min(len(tokens), start + max(4, start // 4))
        got = run.code(None if reading else tokens[start:stop], np.full(stop - start, context, np.uint8))
        if reading:
            tokens[start:stop] = got
        start = stop
