"""Two-pass entropy coding: bytes under tables that are written first, for tensors so large that tables cost nothing.

The adaptive coder (`coder`) learns while it codes, in both directions; here the writer counts first, so that the reader
only reads. Bytes come in segments, each under one table. The coder is `constriction`'s ANS coder (64 bits of state,
32-bit words, probabilities in 24 bits) under models of integers, made as `coder` explains; the tests hold it to an ANS
coder written out in Python. A table gives each symbol the level of its weight, a power of 2^(1/8), or 0 where it does
not occur:

    weight(0) = 0, weight(level) = floor(2^((level - 1) / 8))
    f(symbol) = max(1, floor(weight * total / sum of weights)) where the weight is not 0; the symbol of the largest
                weight (the first of several) takes what then is missing from the total, or gives up what is too much

A table is of singles (total 2^24) or of pairs (total 2^12). Of pairs, two consecutive symbols of a segment are coded at
once, under the product of their frequencies, which sums to 2^24 exactly and takes half the time; a last symbol without
a second is coded alone, under 2^12 times its frequency. Where a table has one symbol, nothing is coded.

    tables    varint number | for each whether it is of pairs, one bit | whether each of the 256 symbols is in any, one
              bit | their levels as a matrix [tables, symbols in any] of differences to the table before, and of the
              first to level 0 (`integers.encode_matrix`, in a block)
    segments  the coder's words, little-endian, to the end of what holds them; the first segment is written last

Bits fill bytes from the most significant one, with zeros to the end of the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import PRECISION_BITS, TOTAL, Ints, constriction_streams
from tokenbound.compression.container import ArtifactError, Reader, block, varint
from tokenbound.compression.integers import decode_matrix, encode_matrix

Bytes = NDArray[np.uint8]
Levels = NDArray[np.uint8]

SYMBOLS = 256
PAIR_BITS = PRECISION_BITS // 2
MAX_PAIRED = 64
"""Symbols that a table of pairs has at most: its model has the square of them."""
MIN_PAIRS = 8
"""A table of pairs codes at least so many for each entry of its model, or making that would take too long."""
PAIR_LOSS = 1 / 1000
"""Part of a segment's bits that the coarser frequencies of pairs may cost."""
LEVELS_PER_OCTAVE = 8
MAX_LEVEL = 1 + LEVELS_PER_OCTAVE * PRECISION_BITS
MAX_TABLES = 256
CUT_ELEMENTS = 1 << 17
"""Symbols of a segment of what is coded in parts, about; a constant of the formats that say so."""
PIECE = 1 << 16
"""Symbols or pairs that are coded at once: vectors that a core's cache holds."""


@lru_cache(maxsize=1)
def level_weights() -> Ints:
    """Weight of each level; the eighth root of 2^k is three integer square roots."""
    return np.array([0, *(isqrt(isqrt(isqrt(1 << k))) for k in range(MAX_LEVEL))], np.int64)


@dataclass(frozen=True)
class Table:
    """What frequencies a segment's symbols have.

    Attributes:
        levels: Of each symbol [256].
        paired: Whether two symbols are coded at once.
    """

    levels: Levels
    paired: bool

    @cached_property
    def symbols(self) -> Bytes:
        """Those that occur, in order [A]."""
        return np.flatnonzero(self.levels).astype(np.uint8)

    @cached_property
    def frequencies(self) -> Ints:
        """Of the symbols that occur [A]."""
        weights = level_weights()[self.levels[self.symbols]]
        total = 1 << PAIR_BITS if self.paired else TOTAL
        found = np.maximum(1, weights * total // weights.sum())
        found[weights.argmax()] += total - found.sum()
        frequencies: Ints = found
        return frequencies

    @cached_property
    def model(self) -> Any:
        """Of what is coded at once."""
        return _model(np.outer(self.frequencies, self.frequencies).reshape(-1) if self.paired else self.frequencies)

    @cached_property
    def last_model(self) -> Any:
        """Of a symbol that has no second."""
        return _model(self.frequencies << PRECISION_BITS - PAIR_BITS)

    def bits(self, counts: Ints) -> float:
        """Code length of so many of each symbol [256]: an estimate to choose by, never part of a code."""
        total_bits = PAIR_BITS if self.paired else PRECISION_BITS
        return float(counts[self.symbols] @ (total_bits - np.log2(self.frequencies)))


def _model(frequencies: Ints) -> Any:
    """A `constriction` model of exactly these frequencies, which sum to 2^24 (see `coder`)."""
    return constriction_streams().model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def fit_table(counts: Ints) -> Table:
    """The table for a segment in which each symbol occurs so often [256], at least one of them at all."""
    shares = counts * TOTAL // counts.max()
    weights = level_weights()[1:]
    after = np.searchsorted(weights[1:], shares, side="right")  # weights[after] <= share < weights[after + 1]
    nearer = after + (shares - weights[after] > weights[np.minimum(after + 1, MAX_LEVEL - 1)] - shares)
    levels = np.where(counts > 0, 1 + np.minimum(nearer, MAX_LEVEL - 1), 0).astype(np.uint8)
    single, pairs = Table(levels, False), Table(levels, True)
    size = len(single.symbols)
    if not 1 < size <= MAX_PAIRED or int(counts.sum()) < 2 * MIN_PAIRS * size * size:
        return single
    return pairs if pairs.bits(counts) <= (1 + PAIR_LOSS) * single.bits(counts) else single


def encode_tables(tables: list[Table]) -> bytes:
    """Wire form of 1 to 256 tables."""
    levels = np.stack([table.levels for table in tables]).astype(np.int64)
    used = levels.any(axis=0)
    differences = np.diff(levels[:, used], axis=0, prepend=0)
    paired = np.packbits([table.paired for table in tables])
    return varint(len(tables)) + paired.tobytes() + np.packbits(used).tobytes() + block(encode_matrix(differences))


def decode_tables(reader: Reader) -> list[Table]:
    """Inverse of `encode_tables`.

    Raises:
        ArtifactError: what is read there is not such a form.
    """
    count = reader.varint(MAX_TABLES)
    paired = read_bits(reader, count)
    used = np.flatnonzero(read_bits(reader, SYMBOLS))
    levels = np.cumsum(decode_matrix(reader.block(), (count, len(used))), axis=0, dtype=np.int64)
    if levels.size and not 0 <= int(levels.min()) <= int(levels.max()) <= MAX_LEVEL:
        raise ArtifactError(f"artifact: {reader.what} has frequency tables with levels beyond {MAX_LEVEL}")
    sizes = (levels > 0).sum(axis=1)
    if not count or (sizes == 0).any() or (sizes[paired] > MAX_PAIRED).any():
        raise ArtifactError(f"artifact: {reader.what} has frequency tables that the encoder does not write")
    whole = np.zeros((count, SYMBOLS), np.uint8)
    whole[:, used] = levels
    return [Table(row, bool(flag)) for row, flag in zip(whole, paired, strict=True)]


def read_bits(reader: Reader, count: int) -> NDArray[np.bool_]:
    """So many bits, from the most significant one of each byte."""
    packed = np.frombuffer(reader.take((count + 7) // 8), np.uint8)
    if len(packed) and count % 8 and int(packed[-1]) & (0xFF >> count % 8):
        raise ArtifactError(f"artifact: {reader.what} has bits that mean nothing")
    return np.unpackbits(packed, count=count).astype(bool)


class SegmentWriter:
    """Encodes; segments are given from the last to the first, because ANS is a stack."""

    def __init__(self) -> None:
        self._coder = constriction_streams().stack.AnsCoder()

    def write(self, table: Table, segment: Bytes) -> None:
        """Code a segment [n] under a table that has all its symbols."""
        size = len(table.symbols)
        if size < 2 or not len(segment):
            return
        index = np.zeros(SYMBOLS, np.int32)
        index[table.symbols] = np.arange(size)
        count = len(segment)
        if table.paired:
            if count % 2:
                self._coder.encode_reverse(index[segment[-1:]], table.last_model)
            first, second = segment[: count - 1 : 2], segment[1::2]
            for part in reversed(_pieces(count // 2)):
                pairs = np.take(index * np.int32(size), first[part])
                pairs += np.take(index, second[part])
                self._coder.encode_reverse(pairs, table.model)
        else:
            for part in reversed(_pieces(count)):
                self._coder.encode_reverse(np.take(index, segment[part]), table.model)

    def finish(self) -> bytes:
        """The coded words."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4", copy=False).tobytes()


class SegmentReader:
    """Decodes the words of a `SegmentWriter`, from the first segment to the last.

    Raises:
        ArtifactError: the bytes are not such words.
    """

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.what = what
        if len(data) % 4 or (len(data) and not any(data[-4:])):
            raise ArtifactError(f"artifact: {what} is coded in words that the encoder does not write")
        self._coder = constriction_streams().stack.AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def read(self, table: Table, count: int) -> Bytes:
        """The next segment, of so many symbols."""
        out = np.empty(count, np.uint8)
        self.read_into(table, out)
        return out

    def read_into(self, table: Table, out: Bytes) -> None:
        """The next segment, into an array of its length."""
        symbols, size, count = table.symbols, len(table.symbols), len(out)
        if size == 1:
            out[:] = symbols[0]
        elif not table.paired:
            for part in _pieces(count):
                out[part] = np.take(symbols, self._coder.decode(table.model, part.stop - part.start))
        else:
            both = np.stack([symbols.repeat(size), np.tile(symbols, size)], axis=1).view(np.uint16)[:, 0]
            for part in _pieces(count // 2):
                pairs = np.take(both, self._coder.decode(table.model, part.stop - part.start))
                out[2 * part.start : 2 * part.stop] = pairs.view(np.uint8)
            if count % 2:
                out[-1] = symbols[self._coder.decode(table.last_model, 1)[0]]

    def finish(self) -> None:
        """Require that the words are used up: an encoder starts from nothing."""
        if not self._coder.is_empty():
            raise ArtifactError(f"artifact: {self.what} has coded words that mean nothing")


def _pieces(count: int) -> list[slice]:
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]


def encode_segments(segments: Iterable[tuple[Table, Bytes]]) -> bytes:
    """Code segments that are all at hand."""
    writer = SegmentWriter()
    for table, segment in reversed(list(segments)):
        writer.write(table, segment)
    return writer.finish()
