"""E8-lattice quantization at 2, 3 or 4 bits after a randomized Hadamard transform: QuIP#'s recipe, for comparison.

Rows and columns are mixed until the weights look Gaussian (see `codecs.lattice`); then groups of eight columns are
rounded to the nearest points of the codebook, with LDL feedback between groups. There is no fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.codecs.lattice import (
    RESIDUAL,
    WIDTH,
    Doubles,
    Floats,
    LatticeCodes,
    decode_e8p,
    encode_lattice,
    magnitudes,
    mix,
    padded,
    points_of,
    short_vectors,
)
from tokenbound.compression.quantizers.feedback import inverse_factor, round_with_feedback
from tokenbound.compression.quantizers.nearest import float_values

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Curvature

DAMPING = 0.01
_SCALES = {2: 1.03, 3: 0.98, 4: 0.95}
"""Lattice units per standard deviation of the transformed weights; a search around it is made."""
_CHUNK = 1 << 12


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


def quantize_lattice(weights: torch.Tensor, bits: int, moment: torch.Tensor) -> LatticeCodes:
    """Quantize a matrix [rows, columns] given the second moment of its input [columns, columns]."""
    import torch

    rows, columns = weights.shape
    mixed = np.zeros((rows, padded(columns)))
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


def quantize_layer(tensor: torch.Tensor, curvature: Curvature, bits: int) -> bytes:
    """Quantize and code a linear layer's weight."""
    import torch

    values = torch.from_numpy(float_values(tensor))
    weights = values.T.contiguous() if curvature.transposed else values
    return encode_lattice(quantize_lattice(weights, bits, curvature.moment), transposed=curvature.transposed)
