"""E8-lattice quantization at 2, 3 or 4 bits after a randomized Hadamard transform: QuIP#'s recipe, for comparison.

Rows and columns are mixed by fixed random signs and Hadamard transforms until the weights look Gaussian; then groups
of eight columns are rounded to the E8P codebook (2^16 points of E8 + 1/4: Tseng et al. 2024, arXiv 2402.04396), with
LDL feedback between groups. Three and four bits add a second codebook for the residual: 256 short E8 vectors, or E8P
again. Embeddings, head and vectors stay in float16. There is no fine-tuning.

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
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.methods.feedback import inverse_factor, round_with_feedback
from tokenbound.compression.methods.rtn import float_values
from tokenbound.compression.methods.uniform import matrix_shape
from tokenbound.compression.symbols import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Curvature

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

WIDTH = 8
DAMPING = 0.01
RESIDUAL = {2: 0.0, 3: 0.5, 4: 2 / 7}
"""Scale of the second codebook relative to the first."""
_SCALES = {2: 1.03, 3: 0.98, 4: 0.95}
"""Lattice units per standard deviation of the transformed weights; a search around it is made."""
_CHUNK = 1 << 12


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


def nearest_e8p(targets: Doubles) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Magnitude indices and sign bytes of the nearest E8P points of [n, 8]."""
    parts = [_nearest_part(targets[start : start + _CHUNK]) for start in range(0, len(targets), _CHUNK)]
    index, signs = zip(*parts, strict=True)
    return np.concatenate(index), np.concatenate(signs)


def _nearest_part(targets: Doubles) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    best = np.full(len(targets), np.inf)
    index, signs = np.zeros((2, len(targets)), np.uint8)
    table = magnitudes()
    sums = table.sum(axis=1)
    for shift in (0, 1):
        centred = targets - (0.25 if shift else -0.25)
        size, negative = np.abs(centred), centred < 0
        # With free signs the parity of the sum depends on how many are negative.
        wrong = (sums[None, :] + negative.sum(axis=1)[:, None]) % 2 != 0
        flip_costs = np.min(4 * size[:, None, :] * table[None, :, :], axis=2)
        distance = np.square(size).sum(1)[:, None] - 2 * size @ table.T + np.square(table).sum(1) + wrong * flip_costs
        choice = distance.argmin(axis=1)
        rows = np.arange(len(targets))
        closer = distance[rows, choice] < best
        flip = (size * table[choice]).argmin(axis=1)
        negative[rows, flip] ^= wrong[rows, choice]
        packed = (negative[:, :-1] << np.arange(WIDTH - 1)).sum(axis=1) | shift << (WIDTH - 1)
        best[closer] = distance[rows, choice][closer]
        index[closer], signs[closer] = choice[closer], packed[closer]
    return index, signs


def _nearest_short(targets: Doubles) -> NDArray[np.uint8]:
    table = short_vectors()
    distance = np.square(table).sum(1)[None, :] - 2 * targets @ table.T
    nearest: NDArray[np.uint8] = distance.argmin(axis=1).astype(np.uint8)
    return nearest


def quantize_points(targets: Doubles, bits: int) -> tuple[list[NDArray[np.uint8]], Floats]:
    """Byte planes of the codes of [n, 8] vectors, and the points that they stand for [n, 8]."""
    planes = list(nearest_e8p(targets))
    points = decode_e8p(planes[0], planes[1])
    if bits == 2:
        return planes, points
    rest = (targets - points) / RESIDUAL[bits]
    planes += [_nearest_short(rest)] if bits == 3 else list(nearest_e8p(rest))
    return planes, points_of(planes, bits)


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


# The method


@dataclass(frozen=True)
class LatticeCodes:
    """Byte planes of the codes [rows * column groups] each, and the scale of the lattice."""

    planes: list[NDArray[np.uint8]]
    scale: np.float32
    bits: int


def _padded(columns: int) -> int:
    return -(-columns // WIDTH) * WIDTH


def quantize_lattice(weights: torch.Tensor, bits: int, moment: torch.Tensor) -> LatticeCodes:
    """Quantize a matrix [rows, columns] given the second moment of its input [columns, columns]."""
    import torch

    rows, columns = weights.shape
    mixed = np.zeros((rows, _padded(columns)))
    mixed[:, :columns] = mix(mix(weights.numpy()).T.copy()).T
    scale = np.float32(max(float(mixed[:, :columns].std()), 2.0**-100) / _best_fit(mixed, bits))
    planes = [np.zeros((rows, mixed.shape[1] // WIDTH), np.uint8) for _ in range(bits if bits > 2 else 2)]

    def rounder(group: torch.Tensor, start: int) -> torch.Tensor:
        codes, points = quantize_points(group.numpy() / float(scale), bits)
        for plane, code in zip(planes, codes, strict=True):
            plane[:, start // WIDTH] = code
        return torch.from_numpy(points.astype(np.float64) * float(scale))

    factor = inverse_factor(_mixed_moment(moment, mixed.shape[1]), DAMPING)
    round_with_feedback(torch.from_numpy(mixed), factor, rounder, WIDTH)
    return LatticeCodes([plane.reshape(-1) for plane in planes], scale, bits)


def _best_fit(mixed: Doubles, bits: int) -> float:
    """Lattice units per standard deviation with the least error on a part of the weights."""
    sample = mixed.reshape(-1, WIDTH)[:: max(1, mixed.size // WIDTH // 2048)]
    spread = max(float(mixed.std()), 2.0**-100)

    def error(units: float) -> float:
        targets = sample / spread * units
        return float(np.square(targets - quantize_points(targets, bits)[1]).mean()) / units**2

    trials: list[float] = [_SCALES[bits] * 2.0 ** (step / 8) for step in range(-3, 4)]
    return min(trials, key=error)


def _mixed_moment(moment: torch.Tensor, padded: int) -> torch.Tensor:
    import torch

    columns = len(moment)
    scale = float(moment.diagonal().mean()) or 1.0
    mixed = torch.eye(padded, dtype=torch.float64)
    both = mix(mix((moment / scale).numpy().astype(np.float32)).T.copy())
    mixed[:columns, :columns] = torch.from_numpy(both.astype(np.float64) + both.T.astype(np.float64)) / 2
    return mixed


def lattice_values(codes: LatticeCodes, shape: tuple[int, int]) -> Floats:
    """float32 values [rows, columns] of the codes."""
    values = np.empty(shape, np.float32)
    for part, block_values in _value_parts(codes, shape):
        values[part] = block_values
    return values


def _value_parts(codes: LatticeCodes, shape: tuple[int, int]) -> Iterator[tuple[slice, Floats]]:
    """The values in parts, last rows first; what has been given is no longer held, and nothing else of their size."""
    rows, columns = shape
    groups = _padded(columns) // WIDTH
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
    count = rows * _padded(columns) // WIDTH
    planes = [decode_general(reader.block(), count, "a plane of lattice codes") for _ in range(max(2, bits))]
    reader.finish()
    return LatticeCodes(planes, scale, bits), transposed, (rows, columns)


def quantize_layer(tensor: torch.Tensor, curvature: Curvature, bits: int) -> bytes:
    """Quantize and code a linear layer's weight."""
    import torch

    values = torch.from_numpy(float_values(tensor))
    weights = values.T.contiguous() if curvature.transposed else values
    return encode_lattice(quantize_lattice(weights, bits, curvature.moment), transposed=curvature.transposed)


def decode_layer(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Decode a layer's weight."""
    import torch

    if dtype.itemsize < 2:
        raise ArtifactError(f"artifact: a lattice-coded tensor cannot have dtype {dtype}")
    codes, transposed, matrix = decode_lattice(payload, shape)
    tensor = torch.empty(matrix_shape(shape), dtype=dtype)
    target = tensor.T if transposed else tensor
    for part, values in _value_parts(codes, matrix):
        target[part] = torch.from_numpy(values).to(dtype)
    return tensor.reshape(shape)


def plain_codes(payload: memoryview, shape: tuple[int, ...]) -> bytes:
    """The code planes: what a general codec would be given."""
    return b"".join(plane.tobytes() for plane in decode_lattice(payload, shape)[0].planes)
