"""Blocks of ggml (the tensors of GGUF files), bit for bit: taken apart into scales and codes, and each coded as such.

A row of such a tensor is a run of blocks. In a block lie one or two half-precision scales, perhaps a small integer
scale (and minimum) for each of its groups, and the codes of its weights, with their bits spread over bytes. General
codecs see bytes in which codes are joined or cut. Here

* half-precision numbers are coded in byte planes, or their low bytes under a table for each high byte: where weights
  were bfloat16, few low bytes occur beside each. The second of a block may be coded as a difference of bits to the
  first, which is about the logarithm of their ratio;
* integer scales are coded under one static table;
* the codes of a group are coded under a table chosen by two hints that the scales give. `spread`: how the group's scale
  compares with what its row and its column of groups suggest; a scale larger than that comes from an outlier, beside
  which all other codes are small. `centre`: which code stands for zero, where a group has a minimum.

    tensor   ggml's number of the type | the scales, in the order of `Format.heads` | byte: spreads << 4 | centres,
             indices into SPREADS and CENTRES | the codes by classes, the pairs (spread, centre) | what else a block
             has: `planes`
    scales   of integers `planes`; of halves a byte, DIFFERENCE and BY_HIGH or not, and then `planes`, or `planes` of
             the high bytes and the low bytes by classes, the high bytes
    classes  tables (see `static`), one for each class that occurs, in rising order | a block of segments: what is in
             each class

Every hint is made of exact or correctly rounded operations, so that all machines find the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.dtypes import bytes_tensor, tensor_bytes
from tokenbound.compression.planes import decode_planes, encode_planes
from tokenbound.compression.static import (
    SYMBOLS,
    SegmentReader,
    decode_tables,
    encode_segments,
    encode_tables,
    fit_table,
)
from tokenbound.gguf_file import TYPES

if TYPE_CHECKING:
    import torch

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

SPREADS = (1, 4, 8, 16)
"""In how many classes spreads may be told apart; the range is the same."""
SPREAD_SHIFTS = (4, 2, 1, 0)
"""Bits of the finest class that each of them drops."""
SPREAD_RANGE = 256
"""Between the smallest and the largest spread, in 128ths of an octave."""
CENTRES = (1, 2, 4, 8)
"""In how many classes centres may be told apart: halves of the codes' range around its middle."""
DIFFERENCE, BY_HIGH = 1, 2
"""How halves are coded: as differences to the first of the block; with a table for each high byte."""
USUAL_RATIO = 4 << 10
"""Four octaves, in bits of a half: so much larger than the first a number is before its difference wraps around."""
MARK = ".ggml_"
"""In the name of a tensor of blocks: what stands before the type."""
TABLE_BITS = 3
"""About what a table costs for each symbol in it; an estimate to choose by, never part of a code."""
CHUNK_GROUPS = 1 << 14
"""Groups whose codes are counted at once."""


@dataclass(frozen=True)
class Head:
    """One field of the scales of a block.

    Attributes:
        width: Numbers in a block.
        is_half: Whether they are half-precision; otherwise they are small integers.
    """

    width: int
    is_half: bool = False


@dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
        heads: The scales.
        groups: Groups of a block.
        symbols: Codes that there are.
        split: Blocks [n, size] to the heads [n, width] (of halves, their bits), codes [n, groups, codes of a group] and
            the bytes of what is left [n, any].
        join: Inverse of `split`.
        hints: Heads to the scale of each group and, where groups have one, its minimum [n, groups].
    """

    heads: tuple[Head, ...]
    groups: int
    symbols: int
    split: Callable[[Bytes], tuple[list[NDArray[Any]], Bytes, Bytes]]
    join: Callable[[list[NDArray[Any]], Bytes, Bytes], Bytes]
    hints: Callable[[list[NDArray[Any]]], tuple[Floats, Floats | None]]


# --- Coding


def encode_blocks(name: str, tensor: torch.Tensor) -> bytes | None:
    """Code of a tensor of blocks, which it is by its name; None if it is none, or would not be shorter."""
    number = _NUMBERS.get(name.rpartition(MARK)[2]) if MARK in name else None
    if number is None or str(tensor.dtype) != "torch.uint8" or not tensor.numel():
        return None
    kind = TYPES[number]
    if tensor.shape[-1] % kind.size:
        return None
    layout = FORMATS[number]
    blocks = tensor_bytes(tensor).reshape(-1, kind.size)
    heads, codes, rest = layout.split(blocks)
    parts = [bytes([number])]
    parts += _encode_heads(layout, heads)
    parts.append(_encode_codes(layout, heads, codes, tensor.shape[-1] // kind.size))
    if rest.shape[1]:
        parts.append(_encode_stream(rest.reshape(-1, 1)))
    coded = b"".join(parts)
    return coded if len(coded) < blocks.size else None


def decode_blocks(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `encode_blocks`.

    Raises:
        ArtifactError: the payload is not such a code of this shape and dtype.
    """
    reader = Reader(payload, "a tensor of blocks")
    number = reader.byte()
    if number not in FORMATS or str(dtype) != "torch.uint8" or not shape or shape[-1] % TYPES[number].size:
        raise ArtifactError(f"artifact: blocks of ggml's type {number} do not make a tensor {shape} of {dtype}")
    layout, kind = FORMATS[number], TYPES[number]
    per_row = shape[-1] // kind.size
    count = int(np.prod(shape, dtype=np.int64)) // kind.size
    if not count:
        raise ArtifactError("artifact: a tensor of blocks is empty")
    heads = _decode_heads(reader, layout, count)
    size, left = _widths(number)
    codes = _decode_codes(reader, layout, heads, (count, layout.groups, size), per_row)
    rest = np.empty((count, left), np.uint8)
    if rest.size:
        decode_planes(reader, rest.reshape(-1, 1))
    reader.finish()
    blocks = layout.join(heads, codes, rest)
    return bytes_tensor(blocks.reshape(-1), shape, dtype)


def plain_blocks(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The blocks as they lie in the file: what a general codec would be given."""
    return decode_blocks(payload, shape, dtype).numpy().tobytes()


def _encode_stream(data: Bytes) -> bytes:
    return encode_planes(np.ascontiguousarray(data))


def _encode_by_class(classes: NDArray[np.uint8], values: Bytes) -> bytes:
    """Code values [n, any], those of each class [n] under a table of its own."""
    segments = [values[classes == each].reshape(-1) for each in np.unique(classes)]
    tables = [fit_table(np.bincount(segment, minlength=SYMBOLS)) for segment in segments]
    return encode_tables(tables) + block(encode_segments(zip(tables, segments, strict=True)))


def _decode_by_class(reader: Reader, classes: NDArray[np.uint8], values: Bytes, symbols: int) -> None:
    """Inverse of `_encode_by_class`, into values, all of which are less than `symbols`."""
    tables, found = decode_tables(reader), np.unique(classes)
    if len(tables) != len(found) or any(int(table.symbols[-1]) >= symbols for table in tables):
        raise ArtifactError(f"artifact: {reader.what} has other tables than its classes ask for")
    source = SegmentReader(reader.block(), reader.what)
    for each, table in zip(found, tables, strict=True):
        where = np.flatnonzero(classes == each)
        values[where] = source.read(table, len(where) * values.shape[1]).reshape(-1, values.shape[1])
    source.finish()


# --- Scales


def _encode_heads(layout: Format, heads: list[NDArray[Any]]) -> list[bytes]:
    """Each head in its shortest form."""
    parts: list[bytes] = []
    first: NDArray[Any] | None = None
    for head, values in zip(layout.heads, heads, strict=True):
        if not head.is_half:
            parts.append(_encode_stream(values.reshape(-1, 1)))
            continue
        forms = [_encode_halves(values, None, mode) for mode in (0, BY_HIGH)]
        if first is not None:
            forms += [_encode_halves(values, first, mode) for mode in (DIFFERENCE, DIFFERENCE | BY_HIGH)]
        parts.append(min(forms, key=len))
        first = values if first is None else first
    return parts


def _encode_halves(bits: NDArray[Any], first: NDArray[Any] | None, mode: int) -> bytes:
    data = _half_words(bits, first).view(np.uint8).reshape(-1, 2)
    if not mode & BY_HIGH:
        return bytes([mode]) + _encode_stream(data)
    return bytes([mode]) + _encode_stream(data[:, 1:]) + _encode_by_class(data[:, 1], data[:, :1])


def _decode_heads(reader: Reader, layout: Format, count: int) -> list[NDArray[Any]]:
    heads: list[NDArray[Any]] = []
    first: NDArray[Any] | None = None
    for head in layout.heads:
        if not head.is_half:
            heads.append(np.empty((count, head.width), np.uint8))
            decode_planes(reader, heads[-1].reshape(-1, 1))
            continue
        heads.append(_decode_halves(reader, count * head.width, first).reshape(count, head.width))
        first = heads[-1] if first is None else first
    return heads


def _decode_halves(reader: Reader, count: int, first: NDArray[Any] | None) -> NDArray[np.uint16]:
    mode = reader.byte()
    if mode > (DIFFERENCE | BY_HIGH) or (mode & DIFFERENCE and first is None):
        raise ArtifactError(f"artifact: {reader.what} has its scales in a form ({mode}) that is unknown")
    data = np.empty((count, 2), np.uint8)
    if mode & BY_HIGH:
        decode_planes(reader, data[:, 1:])
        _decode_by_class(reader, data[:, 1], data[:, :1], SYMBOLS)
    else:
        decode_planes(reader, data)
    return _half_bits(data.reshape(-1).view("<u2")[:, None], first if mode & DIFFERENCE else None)


def _half_words(bits: NDArray[Any], first: NDArray[Any] | None) -> NDArray[np.uint16]:
    """Bits of halves [n, 1] with the sign at the low end, and without the magnitude of another's where there is one."""
    magnitude, sign = bits & 0x7FFF, bits >> 15
    if first is not None:
        magnitude = (magnitude - (first & 0x7FFF) + USUAL_RATIO) & 0x7FFF
    return (magnitude << 1 | sign).astype("<u2")


def _half_bits(words: NDArray[Any], first: NDArray[Any] | None) -> NDArray[np.uint16]:
    """Inverse of `_half_words`."""
    magnitude, sign = words >> 1, words & 1
    if first is not None:
        magnitude = (magnitude + (first & 0x7FFF) - USUAL_RATIO) & 0x7FFF
    return (magnitude | sign << 15).astype(np.uint16)


# --- Codes


def _spreads(scales: Floats, per_row: int) -> Ints:
    """How much smaller the scale of each group is than its row and its column suggest, in 128ths of an octave.

    The bits of a positive float are about its logarithm, so all of this is done in integers.

    Args:
        scales: Of the groups [n, groups].
        per_row: Blocks of a row.

    Returns:
        [n * groups], 0 where nothing is known.
    """
    bits = (np.abs(scales).astype("<f4").view("<u4") >> np.uint32(16)).astype(np.int64)
    bits = bits.reshape(-1, per_row * scales.shape[1])
    known = bits > 0

    def mean(axis: int | None) -> Ints:
        found: Ints = bits.sum(axis=axis, keepdims=True) // np.maximum(1, known.sum(axis=axis, keepdims=True))
        return found

    expected = mean(1) + mean(0) - mean(None)
    return np.where(known, expected - bits, 0).reshape(-1)


def _centres(scales: Floats, minima: Floats | None, symbols: int) -> Floats:
    """Which code stands for zero, as a distance to the middle in eighths of half the range [n * groups]."""
    if minima is None:
        return np.zeros(scales.size, np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = minima / scales
    zero = np.where(np.isfinite(zero), zero, np.float32(0)).astype(np.float32).reshape(-1)
    return (zero * np.float32(16 / symbols) - np.float32(8)).astype(np.float32)


def _pairs(layout: Format, heads: list[NDArray[Any]], count: int, per_row: int) -> NDArray[np.uint8]:
    """The finest spread and centre of each of `count` groups: spread << 3 | centre."""
    if not layout.heads:
        return np.zeros(count, np.uint8)
    scales, minima = layout.hints(heads)
    spread = _spreads(scales, per_row) * SPREADS[-1] // SPREAD_RANGE + SPREADS[-1] // 2
    centre = np.floor(np.clip(_centres(scales, minima, layout.symbols), -4, 3)).astype(np.int64) + CENTRES[-1] // 2
    found: NDArray[np.uint8] = (np.clip(spread, 0, SPREADS[-1] - 1) << 3 | centre).astype(np.uint8)
    return found


def _coarser(pairs: NDArray[np.uint8], spreads: int, centres: int) -> NDArray[np.uint8]:
    """The same in fewer classes: indices into SPREADS and CENTRES."""
    spread = pairs >> 3 >> SPREAD_SHIFTS[spreads]
    return (spread << 3 | (pairs & 7) >> len(CENTRES) - 1 - centres).astype(np.uint8)


def _encode_codes(layout: Format, heads: list[NDArray[Any]], codes: Bytes, per_row: int) -> bytes:
    groups = codes.reshape(-1, codes.shape[2])
    finest = _pairs(layout, heads, len(groups), per_row)
    counts = _counts(finest, groups, layout.symbols)
    spreads, centres = _best_classes(counts)
    pairs = _coarser(finest, spreads, centres)
    return bytes([spreads << 4 | centres]) + _encode_by_class(pairs, groups)


def _decode_codes(
    reader: Reader, layout: Format, heads: list[NDArray[Any]], shape: tuple[int, int, int], per_row: int
) -> Bytes:
    spreads, centres = divmod(reader.byte(), 16)
    if spreads >= len(SPREADS) or centres >= len(CENTRES):
        raise ArtifactError(f"artifact: {reader.what} has its codes in classes that are unknown")
    pairs = _coarser(_pairs(layout, heads, shape[0] * shape[1], per_row), spreads, centres)
    groups = np.empty((shape[0] * shape[1], shape[2]), np.uint8)
    _decode_by_class(reader, pairs, groups, layout.symbols)
    return groups.reshape(shape)


def _counts(pairs: NDArray[np.uint8], groups: Bytes, symbols: int) -> Ints:
    """How often each code occurs under each of the finest pairs [spreads, centres, symbols]."""
    found = np.zeros(SPREADS[-1] * CENTRES[-1] * symbols, np.int64)
    for start in range(0, len(groups), CHUNK_GROUPS):
        part = slice(start, start + CHUNK_GROUPS)
        index = pairs[part, None].astype(np.int64) * symbols + groups[part]
        found += np.bincount(index.reshape(-1), minlength=len(found))
    return found.reshape(SPREADS[-1], CENTRES[-1], symbols)


def _best_classes(counts: Ints) -> tuple[int, int]:
    """Indices into SPREADS and CENTRES whose code is about the shortest, with its tables."""

    def bits(choice: tuple[int, int]) -> float:
        spreads, centres = SPREADS[choice[0]], CENTRES[choice[1]]
        shape = (spreads, SPREADS[-1] // spreads, centres, CENTRES[-1] // centres, counts.shape[2])
        merged = counts.reshape(shape).sum(axis=(1, 3)).reshape(-1, counts.shape[2])
        totals = merged.sum(axis=1, keepdims=True)
        entropy = -(merged * np.log2(np.maximum(merged, 1) / np.maximum(totals, 1))).sum()
        return float(entropy) + TABLE_BITS * np.count_nonzero(merged)

    choices = [(spreads, centres) for spreads in range(len(SPREADS)) for centres in range(len(CENTRES))]
    return min(choices, key=bits)


# --- Formats


def _bits(blocks: Bytes, start: int) -> NDArray[np.uint16]:
    """Bits of the half-precision number at a place of each block [n, 1]."""
    found: NDArray[np.uint16] = np.ascontiguousarray(blocks[:, start : start + 2]).view("<u2").astype(np.uint16)
    return found


def _half_bytes(bits: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(bits.astype("<u2")).view(np.uint8).reshape(len(bits), -1)


def _value(bits: NDArray[Any]) -> Floats:
    """What halves stand for; infinities and NaN count as zero."""
    found = np.ascontiguousarray(bits.astype("<u2")).view("<f2").astype(np.float32)
    return np.where(np.isfinite(found), found, np.float32(0))


def _unpack(data: Bytes, bits: int, width: int) -> Bytes:
    """Fields of `bits` bits [n, fields]; each run of `width` bytes holds all its lowest fields first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    fields = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(len(data), -1)


def _pack(fields: Bytes, bits: int, width: int) -> Bytes:
    """Inverse of `_unpack`."""
    runs = fields.reshape(len(fields), -1, 8 // bits, width)
    data = np.zeros((len(fields), runs.shape[1], width), np.uint8)
    for place in range(8 // bits):
        data |= runs[:, :, place] << np.uint8(bits * place)
    return data.reshape(len(fields), -1)


def _none(count: int) -> Bytes:
    return np.zeros((count, 0), np.uint8)


def _simple(size: int, start: int, *, halves: int = 1, high: int | None = None, bits: int = 4) -> Format:
    """32 codes in a block, with a scale and perhaps a minimum before them.

    Args:
        size: bytes of a block.
        start: where the codes begin.
        halves: half-precision numbers: the scale, and the minimum.
        high: where the fifth bits of the codes begin, if they have five.
        bits: of a code without that; 8 for signed bytes.
    """
    heads = tuple(Head(1, is_half=True) for _ in range(halves))

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        scales: list[NDArray[Any]] = [_bits(blocks, 2 * place) for place in range(halves)]
        codes = blocks[:, start:] if bits == 8 else _unpack(blocks[:, start:], bits, 16)
        if high is not None:
            codes = codes | np.unpackbits(blocks[:, high : high + 4], axis=1, bitorder="little") << np.uint8(4)
        return scales, codes.reshape(len(blocks), 1, 32), _none(len(blocks))

    def join(scales: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        flat = codes.reshape(-1, 32)
        parts = [_half_bytes(scale) for scale in scales]
        if high is not None:
            parts.append(np.packbits(flat >> np.uint8(4), axis=1, bitorder="little"))
        parts.append(flat if bits == 8 else _pack(flat & np.uint8(15), bits, 16))
        return np.concatenate(parts, axis=1)

    def hints(scales: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        return _value(scales[0]), -_value(scales[1]) if halves == 2 else None

    symbols = 1 << (bits if high is None else 5)
    assert size == start + (32 if bits == 8 else 16), "nothing is left over"
    return Format(heads, 1, symbols, split, join, hints)


def _k_scales(data: Bytes) -> tuple[Bytes, Bytes]:
    """Six-bit scales and minima [n, 8] of twelve bytes (Q4_K, Q5_K)."""
    low, mid, high = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 0x30], axis=1)
    return scales, np.concatenate([mid & 63, high >> 4 | mid >> 2 & 0x30], axis=1)


def _k_bytes(scales: Bytes, minima: Bytes) -> Bytes:
    """Inverse of `_k_scales`."""
    low = scales[:, :4] | (scales[:, 4:] & 0x30) << np.uint8(2)
    mid = minima[:, :4] | (minima[:, 4:] & 0x30) << np.uint8(2)
    return np.concatenate([low, mid, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << np.uint8(4)], axis=1)


def _affine_hints(heads: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
    """Of two halves and integer scales and minima."""
    return _value(heads[0]) * heads[2].astype(np.float32), _value(heads[1]) * heads[3].astype(np.float32)


_K_HEADS = (Head(1, is_half=True), Head(1, is_half=True), Head(8), Head(8))


def _q4_k(*, five: bool) -> Format:
    """Eight groups of 32 codes, of four bits or five."""
    high, start = 16, 48 if five else 16

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        codes = _unpack(blocks[:, start:], 4, 32)
        if five:
            codes = codes | _unpack(blocks[:, high:start], 1, 32) << np.uint8(4)
        scales = _k_scales(blocks[:, 4:16])
        return [_bits(blocks, 0), _bits(blocks, 2), *scales], codes.reshape(-1, 8, 32), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        flat = codes.reshape(-1, 256)
        parts = [
            _half_bytes(heads[0]),
            _half_bytes(heads[1]),
            _k_bytes(heads[2] & np.uint8(63), heads[3] & np.uint8(63)),
        ]
        if five:
            parts.append(_pack(flat >> np.uint8(4), 1, 32))
        return np.concatenate([*parts, _pack(flat & np.uint8(15), 4, 32)], axis=1)

    return Format(_K_HEADS, 8, 32 if five else 16, split, join, _affine_hints)


def _q2_k() -> Format:
    """Sixteen groups of 16 codes of two bits."""

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        scales = blocks[:, :16]
        heads: list[NDArray[Any]] = [_bits(blocks, 80), _bits(blocks, 82), scales & 15, scales >> 4]
        return heads, _unpack(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        scales = heads[2] & 15 | (heads[3] & 15) << np.uint8(4)
        packed = _pack(codes.reshape(-1, 256), 2, 32)
        return np.concatenate([scales, packed, _half_bytes(heads[0]), _half_bytes(heads[1])], axis=1)

    heads = (Head(1, is_half=True), Head(1, is_half=True), Head(16), Head(16))
    return Format(heads, 16, 4, split, join, _affine_hints)


def _q3_k() -> Format:
    """Sixteen groups of 16 codes of three bits, with six-bit scales."""

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        codes = _unpack(blocks[:, 32:96], 2, 32) | _unpack(blocks[:, :32], 1, 32) << np.uint8(2)
        scales = _unpack(blocks[:, 96:104], 4, 8) | _unpack(blocks[:, 104:108], 2, 4) << np.uint8(4)
        return [_bits(blocks, 108), scales], codes.reshape(-1, 16, 16), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        flat, scales = codes.reshape(-1, 256), heads[1] & np.uint8(63)
        low, high = _pack(flat & np.uint8(3), 2, 32), _pack(flat >> np.uint8(2), 1, 32)
        packed = [_pack(scales & np.uint8(15), 4, 8), _pack(scales >> np.uint8(4), 2, 4)]
        return np.concatenate([high, low, *packed, _half_bytes(heads[0])], axis=1)

    def hints(heads: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        return _value(heads[0]) * (heads[1].astype(np.float32) - np.float32(32)), None

    return Format((Head(1, is_half=True), Head(16)), 16, 8, split, join, hints)


def _q6_k() -> Format:
    """Sixteen groups of 16 codes of six bits, with signed bytes as scales."""

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        codes = _unpack(blocks[:, :128], 4, 64) | _unpack(blocks[:, 128:192], 2, 32) << np.uint8(4)
        return [_bits(blocks, 208), blocks[:, 192:208]], codes.reshape(-1, 16, 16), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        flat = codes.reshape(-1, 256)
        low, high = _pack(flat & np.uint8(15), 4, 64), _pack(flat >> np.uint8(4), 2, 32)
        return np.concatenate([low, high, heads[1], _half_bytes(heads[0])], axis=1)

    def hints(heads: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        return _value(heads[0]) * np.ascontiguousarray(heads[1]).view(np.int8).astype(np.float32), None

    return Format((Head(1, is_half=True), Head(16)), 16, 64, split, join, hints)


def _iq4_xs() -> Format:
    """Eight groups of 32 codes of four bits, with six-bit scales."""

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        low = _interleaved(blocks[:, 4:8], 4)
        scales = low | _interleaved(blocks[:, 2:4], 2) << np.uint8(4)
        return [_bits(blocks, 0), scales], _unpack(blocks[:, 8:], 4, 16).reshape(-1, 8, 32), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        scales = heads[1] & np.uint8(63)
        packed = [_pack(scales >> np.uint8(4), 2, 1), _pack(scales & np.uint8(15), 4, 1)]
        return np.concatenate([_half_bytes(heads[0]), *packed, _pack(codes.reshape(-1, 256), 4, 16)], axis=1)

    def hints(heads: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        return _value(heads[0]) * (heads[1].astype(np.float32) - np.float32(32)), None

    return Format((Head(1, is_half=True), Head(8)), 8, 16, split, join, hints)


def _interleaved(data: Bytes, bits: int) -> Bytes:
    return _unpack(np.ascontiguousarray(data), bits, 1)


def _mxfp4() -> Format:
    """32 codes of four bits under an exponent."""

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        return [blocks[:, :1]], _unpack(blocks[:, 1:], 4, 16).reshape(-1, 1, 32), _none(len(blocks))

    def join(heads: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        return np.concatenate([heads[0], _pack(codes.reshape(-1, 32), 4, 16)], axis=1)

    def hints(heads: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        exponents = np.clip(heads[0].astype(np.uint32), 1, 254) << np.uint32(23)
        return exponents.view(np.float32), None

    return Format((Head(1),), 1, 16, split, join, hints)


def _bytewise(size: int, half: int | None, start: int, stop: int, *, ternary: bool = False) -> Format:
    """Codes that are whole bytes, as indices into a grid are; what else there is, is coded as bytes.

    Args:
        size: bytes of a block.
        half: where the scale lies; None where it is not a field of its own.
        start: where the codes begin.
        stop: where they end.
        ternary: whether the codes are four values of two bits in a byte instead.
    """
    taken = [] if half is None else [half, half + 1]
    left = [place for place in range(size) if place not in taken and not start <= place < stop]
    heads = () if half is None else (Head(1, is_half=True),)

    def split(blocks: Bytes) -> tuple[list[NDArray[Any]], Bytes, Bytes]:
        scales: list[NDArray[Any]] = [] if half is None else [_bits(blocks, half)]
        codes = blocks[:, start:stop]
        codes = _unpack(codes, 2, 32) if ternary else codes
        return scales, codes.reshape(len(blocks), 1, -1), blocks[:, left]

    def join(scales: list[NDArray[Any]], codes: Bytes, rest: Bytes) -> Bytes:
        blocks = np.empty((len(codes), size), np.uint8)
        flat = codes.reshape(len(codes), -1)
        blocks[:, start:stop] = _pack(flat, 2, 32) if ternary else flat
        blocks[:, left] = rest
        if half is not None:
            blocks[:, half : half + 2] = _half_bytes(scales[0])
        return blocks

    def hints(scales: list[NDArray[Any]]) -> tuple[Floats, Floats | None]:
        return _value(scales[0]), None

    return Format(heads, 1, 4 if ternary else 256, split, join, hints)


FORMATS = {
    2: _simple(18, 2),
    3: _simple(20, 4, halves=2),
    6: _simple(22, 6, high=2),
    7: _simple(24, 8, halves=2, high=4),
    8: _simple(34, 2, bits=8),
    10: _q2_k(),
    11: _q3_k(),
    12: _q4_k(five=False),
    13: _q4_k(five=True),
    14: _q6_k(),
    16: _bytewise(66, 0, 2, 66),
    17: _bytewise(74, 0, 2, 66),
    18: _bytewise(98, 0, 2, 66),
    19: _bytewise(50, 0, 2, 34),
    20: _simple(18, 2),
    21: _bytewise(110, 0, 2, 66),
    22: _bytewise(82, 0, 2, 34),
    23: _iq4_xs(),
    29: _bytewise(56, None, 0, 32),
    34: _bytewise(54, 52, 0, 52),
    35: _bytewise(66, 64, 0, 64, ternary=True),
    39: _mxfp4(),
}
"""By ggml's number of the type."""
_NUMBERS = {kind.name.lower(): number for number, kind in TYPES.items() if number in FORMATS}


def _widths(number: int) -> tuple[int, int]:
    """Codes of a group, and further bytes of a block."""
    _, codes, rest = FORMATS[number].split(np.zeros((1, TYPES[number].size), np.uint8))
    return int(codes.shape[2]), int(rest.shape[1])
