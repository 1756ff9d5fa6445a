"""Signed integers as tokens of a small alphabet and raw low bits, a block at a time.

Small values are tokens themselves; of a large one the token holds its sign, bit length and two leading bits, and the
bits below follow raw. A token fits a byte, and what is done to a matrix is done to blocks of it, so that coding a
tensor holds one byte for each element and little more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import Ints, Tokens
from tokenbound.compression.container import ArtifactError

Values = NDArray[np.int32]
TokenBytes = NDArray[np.uint8]

DIRECT_BITS = 4
DIRECT = (1 << DIRECT_BITS) - 1
"""Integers up to this magnitude are tokens of their own."""
MAX_BITS = 31
"""Bit length of the largest magnitude that can be coded."""
BLOCK_ELEMENTS = 1 << 16
"""Elements that are taken apart or put together at once."""
_WORD_BITS = 32
"""Raw bits of one value lie in at most two words of so many: 28, and up to 31 before them."""

Cut = tuple[slice, slice]
"""A part of a matrix: steps and lanes."""


def blocks(shape: tuple[int, int]) -> Iterator[Cut]:
    """Parts of a matrix of at most `BLOCK_ELEMENTS`, in the order of its elements."""
    steps, lanes = shape
    height = max(1, BLOCK_ELEMENTS // max(1, lanes))
    for step in range(0, steps, height):
        for lane in range(0, lanes, BLOCK_ELEMENTS):
            yield slice(step, min(step + height, steps)), slice(lane, min(lane + BLOCK_ELEMENTS, lanes))


def alphabet_size(max_bits: int) -> int:
    """Tokens needed for magnitudes below 2^max_bits; at most 247."""
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


def tokens_of(values: NDArray[Any], max_bits: int) -> TokenBytes:
    """The tokens alone, of integers in any shape: looked up where the integers are of 8 or 16 bits."""
    if max_bits <= DIRECT_BITS:
        return values.astype(np.uint8) + np.uint8((1 << max_bits) - 1)  # modulo 256, which is right for negative ones
    if values.dtype in (np.int8, np.int16) and max_bits < 8 * values.itemsize:
        places: NDArray[Any] = values.view(np.uint8 if values.itemsize == 1 else np.uint16)
        return np.take(_token_table(max_bits, values.itemsize), places)
    return split_integers(values.reshape(-1), max_bits)[0].astype(np.uint8).reshape(values.shape)


@lru_cache(maxsize=16)
def _token_table(max_bits: int, itemsize: int) -> TokenBytes:
    """Token of each integer of so many bytes and at most so many bits, by what it is as an unsigned one."""
    every = np.arange(1 << 8 * itemsize, dtype=np.uint16).astype(f"u{itemsize}").view(f"i{itemsize}")
    within = np.abs(every.astype(np.int32)) >> max_bits == 0
    table = np.zeros(len(every), np.uint8)
    table[within] = split_integers(every[within].astype(np.int32), max_bits)[0]
    return table


def low_bits_of(values: NDArray[Any], tokens: TokenBytes, max_bits: int) -> tuple[Ints, Ints]:
    """The raw low bits of the large ones among integers [n], given their tokens, and how many bits those are."""
    if max_bits <= DIRECT_BITS:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    widths = low_bit_counts(tokens, max_bits)
    magnitude = np.abs(values[tokens > 2 * DIRECT].astype(np.int64))
    return magnitude & ((np.int64(1) << widths) - 1), widths


def join_integers(tokens: Tokens | TokenBytes, max_bits: int, low: Ints) -> Ints:
    """Inverse of `split_integers` given the low bits."""
    direct = (1 << min(max_bits, DIRECT_BITS)) - 1
    values = tokens.astype(np.int64) - direct
    if max_bits <= DIRECT_BITS:
        return values
    large = np.flatnonzero(tokens > 2 * direct)
    classes, negative = np.divmod(tokens[large].astype(np.int64) - 2 * direct - 1, 2)
    shift = classes // 4 + DIRECT_BITS + 1 - 3
    magnitude = ((4 + classes % 4) << shift) | low
    values[large] = np.where(negative == 1, -magnitude, magnitude)
    return values


def narrow_values(tokens: TokenBytes, max_bits: int, low: Ints) -> Values:
    """As `join_integers`, of tokens [n] that are looked up."""
    values = np.take(_least_values(max_bits), tokens)
    if len(low):
        large = np.flatnonzero(tokens > 2 * DIRECT)
        least, more = values[large], low.astype(np.int32)
        values[large] = np.where(least < 0, least - more, least + more)
    return values


@lru_cache(maxsize=64)
def _least_values(max_bits: int) -> Values:
    """Of each token the value whose raw bits are zero."""
    tokens = np.arange(alphabet_size(max_bits), dtype=np.int32)
    zeros = np.zeros(len(low_bit_counts(tokens, max_bits)), np.int64)
    return join_integers(tokens, max_bits, zeros).astype(np.int32)


def low_bit_counts(tokens: Tokens | TokenBytes, max_bits: int) -> Ints:
    """How many raw bits belong to each large token."""
    direct = (1 << min(max_bits, DIRECT_BITS)) - 1
    large = tokens[tokens > 2 * direct].astype(np.int64)
    return (large - 2 * direct - 1) // 8 + DIRECT_BITS + 1 - 3


def tokenize(values: NDArray[Any], max_bits: int) -> tuple[TokenBytes, bytes]:
    """Tokens of a matrix of integers below 2^max_bits, and all raw bits.

    Args:
        values: [steps, lanes].
        max_bits: At most `MAX_BITS`.
    """
    tokens = np.empty(values.shape, np.uint8)
    raw = BitWriter()
    for cut in blocks(values.shape):  # type: ignore[arg-type]
        part = values[cut]
        found, low, widths = split_integers(part.reshape(-1), max_bits)
        tokens[cut] = found.reshape(part.shape)
        raw.add(low, widths)
    return tokens, raw.finish()


def values_of(tokens: TokenBytes, raw: memoryview | bytes, max_bits: int) -> Iterator[tuple[Cut, Ints]]:
    """Inverse of `tokenize`, part by part.

    Raises:
        ArtifactError: the raw bits are not exactly as many as the tokens need.
    """
    bits = BitReader(raw)
    for cut in blocks(tokens.shape):  # type: ignore[arg-type]
        part = tokens[cut]
        flat = part.reshape(-1)
        yield cut, join_integers(flat, max_bits, bits.take(low_bit_counts(flat, max_bits))).reshape(part.shape)
    bits.finish()


class BitWriter:
    """Concatenates unsigned values, each in its own number of bits (at most 28, most significant first)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._rest, self._rest_bits = 0, 0

    def add(self, values: Ints, widths: Ints) -> None:
        """Append values [n] in widths [n] bits."""
        stops = self._rest_bits + np.cumsum(widths)
        total = int(stops[-1]) if len(stops) else self._rest_bits
        starts = stops - widths
        windows = values.astype(np.uint64) << (2 * _WORD_BITS - starts % _WORD_BITS - widths).astype(np.uint64)
        words = np.zeros(total // _WORD_BITS + 2, np.int64)
        words[0] = self._rest << _WORD_BITS - 8
        for index, part in enumerate((windows >> np.uint64(_WORD_BITS), windows & np.uint64((1 << _WORD_BITS) - 1))):
            # Bits of different values never meet, so that adding them is joining them; below 2^53 floats do it exactly.
            words += np.bincount(starts // _WORD_BITS + index, part.astype(np.float64), len(words)).astype(np.int64)
        data = words.astype(">u4").view(np.uint8)
        whole = total // 8
        self._parts.append(data[:whole].tobytes())
        self._rest, self._rest_bits = int(data[whole]), total - 8 * whole

    def finish(self) -> bytes:
        """All bits, with zeros to the end of the last byte."""
        return b"".join([*self._parts, bytes([self._rest] if self._rest_bits else [])])


class BitReader:
    """Reads what a `BitWriter` wrote."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._place = 0

    def take(self, widths: Ints) -> Ints:
        """The next values, in widths [n] bits.

        Raises:
            ArtifactError: there are not so many bits.
        """
        stops = self._place + np.cumsum(widths)
        stop = int(stops[-1]) if len(stops) else self._place
        if stop > 8 * len(self._data):
            raise ArtifactError(
                f"artifact: {len(self._data)} bytes of raw bits where the tokens need {(stop + 7) // 8}"
            )
        first = self._place >> 3
        data = self._data[first : (stop + 7) >> 3]
        padded = np.concatenate([data, np.zeros(8 + -len(data) % 4, np.uint8)])
        words = padded.view(">u4").astype(np.int64)
        starts = stops - widths - 8 * first
        word, offset = starts // _WORD_BITS, starts % _WORD_BITS
        windows = words[word] << _WORD_BITS | words[word + 1]
        self._place = stop
        values: Ints = (windows >> (2 * _WORD_BITS - offset - widths)) & ((np.int64(1) << widths) - 1)
        return values

    def finish(self) -> None:
        """Require that no byte is left."""
        if (needed := (self._place + 7) // 8) != len(self._data):
            raise ArtifactError(f"artifact: {len(self._data)} bytes of raw bits where the tokens need {needed}")
