"""Byte planes of large tensors: each as it is, as one byte, or entropy coded in two passes.

Planes go from high to low. What is nearly incompressible, as mantissas are, is found on a sample and stored as it is.

    planes    for each plane a stream; each is one byte that says how it is coded, and:
    RAW       the bytes
    CONSTANT  the byte that all are
    STATIC    one table of bytes and the words of one segment (see `static`), both in a block
    HUFFMAN   DEFLATE (RFC 1951) in a block: three times as fast as `static`, for a little more where symbols are many
    SPLIT     two streams: of the elements whose higher bytes are not all zero, and of those where they are
"""

from __future__ import annotations

import zlib
from heapq import heapify, heappop, heappush
from math import log2

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.static import (
    SYMBOLS,
    Bytes,
    SegmentReader,
    decode_tables,
    encode_segments,
    encode_tables,
    fit_table,
)

RAW, CONSTANT, STATIC, HUFFMAN, SPLIT = range(5)
WORTH_CODING = 0.995
"""A plane is coded only if its entropy is below this part of its size."""
SAMPLE = 1 << 16
"""Bytes by which a plane is found to be incompressible."""
HUFFMAN_LOSS = 1 / 150
"""Part of a tensor's entropy by which Huffman's codes may be longer than theirs, in all of its planes together."""
HUFFMAN_BLOCK, HUFFMAN_HEAD = 1 << 15, 80
"""Symbols for which DEFLATE makes a code, and about how many bytes that takes."""
SPLIT_SHARE = 1 / 512
"""A plane is split where at least this part of its elements have only zeros above, and not all."""
FEED = 1 << 14
"""Bytes that are inflated at once: to no more than a thousand times as many."""


def encode_planes(data: Bytes) -> bytes:
    """Code elements [n, bytes, the low one first], of which there is at least one."""
    allowed = _allowed_loss(data)
    is_zero: NDArray[np.bool_] | None = None
    parts = []
    for index in reversed(range(data.shape[1])):
        plane = np.ascontiguousarray(data[:, index])
        share = 0.0 if is_zero is None else np.count_nonzero(is_zero) / len(plane)
        if is_zero is not None and SPLIT_SHARE <= share < 1:
            streams = [_encode_stream(part, allowed) for part in (plane[~is_zero], plane[is_zero])]
            parts.append(bytes([SPLIT]) + b"".join(streams))
        else:
            parts.append(_encode_stream(plane, allowed))
        if index and (is_zero is None or share):
            zeros = plane == 0
            is_zero = zeros if is_zero is None else is_zero & zeros
    return b"".join(parts)


def _allowed_loss(data: Bytes) -> float:
    """Bytes by which each plane's code may be longer than its entropy; estimated on a sample."""
    sample = data[:: max(1, len(data) // SAMPLE)]
    found = [_entropy_bytes(_counts(sample[:, index])) for index in range(data.shape[1])]
    coded = sum(0 < entropy < WORTH_CODING * len(sample) for entropy in found)
    return HUFFMAN_LOSS * sum(found) * len(data) / len(sample) / max(1, coded)


def decode_planes(reader: Reader, data: Bytes) -> None:
    """Inverse of `encode_planes`, into an array of the right shape.

    Raises:
        ArtifactError: what is read there are not such planes.
    """
    for index in reversed(range(data.shape[1])):
        plane = data[:, index]
        kind = reader.byte()
        if kind != SPLIT:
            _decode_stream(reader, kind, plane)
            continue
        if index == data.shape[1] - 1:
            raise ArtifactError(f"artifact: {reader.what} split a plane that none is above")
        where: NDArray[np.bool_] = np.asarray(data[:, index + 1 :].any(axis=1))
        for _ in range(2):
            part = np.empty(np.count_nonzero(where), np.uint8)
            _decode_stream(reader, reader.byte(), part)
            plane[where] = part
            np.logical_not(where, out=where)


def _encode_stream(data: Bytes, allowed: float) -> bytes:
    """Code bytes [n].

    Args:
        data: The bytes.
        allowed: Bytes by which the code may be longer than their entropy, where that makes it faster.
    """
    raw = bytes([RAW])
    sample = data[:: max(1, len(data) // SAMPLE)]
    if _entropy_bytes(_counts(sample)) >= WORTH_CODING * len(sample):
        return raw + data.tobytes()
    counts = _counts(data)
    if int(counts.max()) == len(data):
        return bytes([CONSTANT, data[0]])
    if _huffman_bytes(counts) <= _entropy_bytes(counts) + allowed:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        coded = bytes([HUFFMAN]) + block(packer.compress(data.data) + packer.flush())
    else:
        table = fit_table(counts)
        coded = bytes([STATIC]) + encode_tables([table]) + block(encode_segments([(table, data)]))
    return coded if len(coded) < WORTH_CODING * len(data) else raw + data.tobytes()


def _decode_stream(reader: Reader, kind: int, out: Bytes) -> None:
    if kind == RAW:
        out[:] = np.frombuffer(reader.take(len(out)), np.uint8)
    elif kind == CONSTANT:
        out[:] = reader.byte()
    elif kind == STATIC:
        tables = decode_tables(reader)
        if len(tables) != 1:
            raise ArtifactError(f"artifact: {reader.what} have {len(tables)} tables for one plane")
        source = SegmentReader(reader.block(), reader.what)
        source.read_into(tables[0], out)
        source.finish()
    elif kind == HUFFMAN:
        _inflate(reader.block(), out, reader.what)
    else:
        raise ArtifactError(f"artifact: {reader.what} are coded in a way ({kind}) that this version does not know")


def _inflate(coded: memoryview, out: Bytes, what: str) -> None:
    unpacker, place = zlib.decompressobj(-15), 0
    try:
        for start in range(0, len(coded), FEED):
            part = unpacker.decompress(coded[start : start + FEED], len(out) - place + 1)
            if len(part) > len(out) - place or unpacker.unused_data or (unpacker.eof and start + FEED < len(coded)):
                raise ArtifactError(f"artifact: {what} have more in a DEFLATE stream than they declare")
            out[place : place + len(part)] = np.frombuffer(part, np.uint8)
            place += len(part)
    except zlib.error as error:
        raise ArtifactError(f"artifact: {what} have what is not a DEFLATE stream") from error
    if place != len(out) or not unpacker.eof:
        raise ArtifactError(f"artifact: {what} have a DEFLATE stream that ends too early")


def _counts(data: Bytes) -> NDArray[np.int64]:
    counts = np.zeros(SYMBOLS, np.int64)
    for start in range(0, len(data), SAMPLE):
        counts += np.bincount(data[start : start + SAMPLE], minlength=SYMBOLS)
    return counts


def _entropy_bytes(counts: NDArray[np.int64]) -> float:
    """Empirical entropy; an estimate to choose by, never part of a code."""
    total = int(counts.sum())
    bits: float = sum(count * log2(total / count) for count in counts.tolist() if count)
    return bits / 8


def _huffman_bytes(counts: NDArray[np.int64]) -> float:
    """Length of Huffman's code, and about that of saying what it is, for each of DEFLATE's blocks."""
    heap: list[int] = [count for count in counts.tolist() if count]
    blocks = 1 + sum(heap) // HUFFMAN_BLOCK
    heap.append(blocks)  # each block has a symbol for its end
    heapify(heap)
    bits = 0
    while len(heap) > 1:
        joint = heappop(heap) + heappop(heap)
        bits += joint
        heappush(heap, joint)
    return bits / 8 + HUFFMAN_HEAD * blocks
