"""Codes of the E8 lattice for weights that were mixed by fixed random signs and Hadamard transforms.

Groups of eight columns are points of the E8P codebook (2^16 points of E8 + 1/4: Tseng et al. 2024, arXiv 2402.04396).
Three and four bits add a second codebook for the residual: 256 short E8 vectors, or E8P again.

The decoder transforms with float32 additions in a fixed order and one product for each scaling, so that its values are
the same everywhere. The signs are constants of the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.bytestreams import decode_general, encode_general
from tokenbound.compression.codecs.uniform import matrix_shape
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.symbols import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch


Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

WIDTH = 8
RESIDUAL = {2: 0.0, 3: 0.5, 4: 2 / 7}
"""Scale of the second codebook relative to the first."""


# Codebooks


@lru_cache(maxsize=1)
def magnitudes() -> Doubles:
    """E8P's 256 vectors of magnitudes [256, 8]: half-odd, the 227 of squared norm up to 10 and 29 of norm 12."""
    vectors = []
    for count in range(5):
        vectors += [_with(places, ()) for places in combinations(range(WIDTH), count)]
    vectors += [_with((), (big,)) for big in range(WIDTH)]
    vectors += [_with((small,), (big,)) for big in range(WIDTH) for small in range(WIDTH) if small != big]
    vectors += [_with(places, ()) for places in list(combinations(range(WIDTH), 5))[:29]]
    return np.array(vectors)


def _with(three_halves: tuple[int, ...], five_halves: tuple[int, ...]) -> Doubles:
    vector = np.full(WIDTH, 0.5)
    vector[list(three_halves)] = 1.5
    vector[list(five_halves)] = 2.5
    return vector


@lru_cache(maxsize=1)
def short_vectors() -> Doubles:
    """256 vectors of E8 [256, 8]: zero, its 240 roots, and 15 of squared norm 4."""
    vectors = [np.zeros(WIDTH)]
    for first, second in combinations(range(WIDTH), 2):
        for signs in product((1.0, -1.0), repeat=2):
            vector = np.zeros(WIDTH)
            vector[[first, second]] = signs
            vectors.append(vector)
    halves = (np.array(signs) for signs in product((0.5, -0.5), repeat=WIDTH))
    vectors += [vector for vector in halves if vector.sum() % 2 == 0]
    vectors += [sign * 2 * np.eye(WIDTH)[axis] for axis in range(WIDTH) for sign in (1, -1)][:15]
    return np.array(vectors)


def decode_e8p(index: NDArray[np.uint8], signs: NDArray[np.uint8]) -> Floats:
    """E8P points [n, 8] from their magnitude index and sign byte (seven signs and the shift)."""
    vectors = magnitudes()[index]
    negative = (signs[:, None] >> np.arange(WIDTH - 1)) & 1
    # The eighth sign makes the sum even; flipping any sign changes it by an odd number.
    odd = (vectors.sum(axis=1).astype(np.int64) - (vectors[:, :-1] * 2 * negative).sum(axis=1).astype(np.int64)) % 2
    negative = np.concatenate([negative, odd[:, None]], axis=1)
    shift = np.where(signs >> (WIDTH - 1) & 1, 0.25, -0.25)
    points: Floats = (vectors * (1 - 2 * negative) + shift[:, None]).astype(np.float32)
    return points


def points_of(planes: list[NDArray[np.uint8]], bits: int) -> Floats:
    """Lattice points [n, 8] of code planes."""
    points = decode_e8p(planes[0], planes[1])
    if bits == 2:
        return points
    second = short_vectors()[planes[2]].astype(np.float32) if bits == 3 else decode_e8p(planes[2], planes[3])
    return points + second * np.float32(RESIDUAL[bits])


# Incoherence


@lru_cache(maxsize=64)
def random_signs(size: int, salt: int) -> Floats:
    """Fixed signs [size]; constants of the package."""
    stream = hashlib.shake_256(f"tokenbound e8 {salt}".encode()).digest((size + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=size)
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


def _hadamard(values: Floats) -> Floats:
    """Orthonormal Walsh-Hadamard transform of the last axis, a power of two."""
    size = values.shape[-1]
    half = 1
    while half < size:
        pairs = values.reshape(*values.shape[:-1], size // (2 * half), 2, half)
        values = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        values = values.reshape(*values.shape[:-3], size)
        half *= 2
    exponent = size.bit_length() - 1
    scale = np.ldexp(np.float32(0.70710678 if exponent % 2 else 1), -(exponent // 2)).astype(np.float32)
    scaled: Floats = values * scale
    return scaled


def mix(values: Floats, *, inverse: bool = False) -> Floats:
    """Randomly mix the last axis: signs and a Hadamard transform of the first 2^k entries, then of the last 2^k.

    Any length works; 2^k is the largest power of two that fits, and the second step is needed only if it is shorter.
    """
    size = values.shape[-1]
    power = 1 << (size.bit_length() - 1)
    spans = [slice(0, power)] if power == size else [slice(0, power), slice(size - power, size)]
    out = values.astype(np.float32)
    for salt, span in reversed(list(enumerate(spans))) if inverse else enumerate(spans):
        signs = random_signs(power, salt)
        part = out[..., span]
        out[..., span] = _hadamard(part) * signs if inverse else _hadamard(part * signs)
    return out


# The wire form


@dataclass(frozen=True)
class LatticeCodes:
    """Byte planes of the codes [rows * column groups] each, and the scale of the lattice."""

    planes: list[NDArray[np.uint8]]
    scale: np.float32
    bits: int


def padded(columns: int) -> int:
    """Columns in whole groups."""
    return -(-columns // WIDTH) * WIDTH


def lattice_values(codes: LatticeCodes, shape: tuple[int, int]) -> Floats:
    """float32 values [rows, columns] of the codes."""
    values = np.empty(shape, np.float32)
    for part, block_values in value_parts(codes, shape):
        values[part] = block_values
    return values


def value_parts(codes: LatticeCodes, shape: tuple[int, int]) -> Iterator[tuple[slice, Floats]]:
    """The values in parts, last rows first; what has been given is no longer held, and nothing else of their size."""
    rows, columns = shape
    groups = padded(columns) // WIDTH
    values = np.empty((rows, columns), np.float32)
    for part in _slices(rows, groups * WIDTH):
        planes = [plane[part.start * groups : part.stop * groups] for plane in codes.planes]
        points = points_of(planes, codes.bits) * codes.scale
        values[part] = points.reshape(-1, groups * WIDTH)[:, :columns]
    for part in _slices(columns, rows):
        values[:, part] = mix(values[:, part].T.copy(), inverse=True).T
    for part in reversed(_slices(rows, columns)):
        yield part, mix(values[part], inverse=True)
        values.resize((part.start, columns), refcheck=False)


def _slices(count: int, width: int) -> list[slice]:
    """Rows of a matrix in parts of at most `BLOCK_ELEMENTS`, or one by one."""
    height = max(1, BLOCK_ELEMENTS // max(1, width))
    return [slice(start, min(start + height, count)) for start in range(0, count, height)]


def encode_lattice(codes: LatticeCodes, *, transposed: bool) -> bytes:
    """Wire form."""
    head: bytes = bytes([codes.bits | transposed << 7]) + np.float32(codes.scale).astype("<f4").tobytes()
    return head + b"".join(block(encode_general(plane)) for plane in codes.planes)


def decode_lattice(payload: memoryview, shape: tuple[int, ...]) -> tuple[LatticeCodes, bool, tuple[int, int]]:
    """Inverse of `encode_lattice` for a tensor of this shape: codes, whether stored transposed, rows and columns.

    Raises:
        ArtifactError: the payload is not such a form.
    """
    reader = Reader(payload, "a lattice-coded tensor")
    flags = reader.byte()
    bits, transposed = flags & 0x7F, bool(flags >> 7)
    scale = np.frombuffer(reader.take(4), "<f4")[0]
    if bits not in RESIDUAL or not np.isfinite(scale) or len(shape) < 2:
        raise ArtifactError("artifact: a lattice-coded tensor has a head that the encoder does not write")
    rows, columns = matrix_shape(shape)[:: -1 if transposed else 1]
    if not rows or not columns:
        raise ArtifactError("artifact: a lattice-coded tensor is empty")
    count = rows * padded(columns) // WIDTH
    planes = [decode_general(reader.block(), count, "a plane of lattice codes") for _ in range(max(2, bits))]
    reader.finish()
    return LatticeCodes(planes, scale, bits), transposed, (rows, columns)


def decode_layer(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Decode a layer's weight."""
    if dtype.itemsize < 2:
        raise ArtifactError(f"artifact: a lattice-coded tensor cannot have dtype {dtype}")
    return dense_layer(*decode_lattice(payload, shape), shape, dtype)


def dense_layer(
    codes: LatticeCodes, transposed: bool, matrix: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A layer's weight from what `decode_lattice` gives."""
    import torch

    tensor = torch.empty(matrix_shape(shape), dtype=dtype)
    target = tensor.T if transposed else tensor
    for part, values in value_parts(codes, matrix):
        target[part] = torch.from_numpy(values).to(dtype)
    return tensor.reshape(shape)


def plain_codes(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The code planes: what a general codec would be given."""
    return b"".join(plane.tobytes() for plane in decode_lattice(payload, shape)[0].planes)
