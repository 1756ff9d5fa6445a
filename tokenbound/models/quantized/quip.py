"""QuIP# checkpoints (Tseng et al. 2024, arXiv 2402.04396) in 2, 3 and 4 bits, as published, to dense weights.

    w = diag(SV) R (Wscale Q) L diag(SU)        L, R = (K x Sylvester) / sqrt(size), K a small Hadamard matrix or 1
    Q = P           2 bits      P of the E8P codebook, eight inputs to a point: one of 256 vectors of magnitudes and a
                                byte of signs, four points in an int64 word that stand for 2 outputs x 16 inputs
    Q = P + P'/r    3 bits      P' of 256 short vectors of E8, eight points of one output in a word
                    4 bits      P' of E8P again

The words of P' stand right of those of P, and r is fixed unless the config says otherwise. All entries of P and P' are
multiples of 1/4, so the transforms are exact in float64 whatever the order of their sums; what follows are float64
operations in a fixed order and one rounding to float32. Layers of attention and of the MLP are joined in the files and
are split here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from tokenbound.errors import InputError

Tensors = Mapping[str, torch.Tensor]

PARTS = (".Qidxs", ".SU", ".SV", ".Wscale", ".codebook_id", ".fuse_scales", ".scaleWH")
E8P, RVQ4, RVQ3 = 7, 17, 18
"""Numbers of the codebooks in the files: 2, 4 and 3 bits."""
RESIDUAL_SCALES = {RVQ4: 3.45, RVQ3: 2.04}
"""r of the codebooks with a residual, where the config gives none."""
SETTINGS = "quip_params"
"""Key of an architecture under which the files' own settings stand."""
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
"""Layers that the files join, in the order of their outputs."""

_NORM_12 = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 "
    "33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 "
    "31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"
)
"""Twice the magnitudes of the 29 vectors of squared norm 12 that the codebook has, in its order."""


@lru_cache(maxsize=1)
def codebook() -> torch.Tensor:
    """E8P's points by their 16-bit code [65536, 8]: magnitudes above, signs below; multiples of 1/4."""
    short = sorted(v for v in product((1, 3, 5), repeat=8) if sum(x * x for x in v) <= 40)
    table = [*short, *(tuple(map(int, digits)) for digits in _NORM_12.split())]
    magnitudes = torch.tensor(table, dtype=torch.float64) / 2
    odd = magnitudes.sum(1) % 2 == 1  # of these the last sign is turned, so that all sums are even
    magnitudes[:, 7] *= 1 - 2 * odd.double()
    byte = torch.arange(256)
    bits = (byte[:, None] >> torch.arange(8)) & 1
    parity = bits.sum(1) % 2
    bits = ((byte ^ parity)[:, None] >> torch.tensor(_PLACES)) & 1
    shift = 0.25 - 0.5 * parity.double()
    points = magnitudes[:, None] * (1 - 2 * bits.double()) + shift[:, None]
    return points.flatten(0, 1)


_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Bit of the sign byte for each of a point's eight inputs."""


@lru_cache(maxsize=1)
def short_codebook() -> torch.Tensor:
    """E8's points of squared norm 0 and 2, and all of norm 4 along an axis but one [256, 8], in the files' order."""
    whole = [v for v in product((-1, 0, 1), repeat=8) if sum(v) % 2 == 0 and sum(map(abs, v)) <= 2]
    half = [v for v in product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    inner = torch.tensor([*whole, *half], dtype=torch.float64)
    axes = 2 * torch.eye(8, dtype=torch.float64)
    return torch.cat([inner, axes, -axes[:7]])


def codes_of(words: torch.Tensor) -> torch.Tensor:
    """Codes [outputs, inputs / 8] of the packed words, int64 [outputs, inputs / 32].

    Raises:
        InputError: not such words.
    """
    if words.dtype != torch.int64 or words.ndim != 2 or words.shape[0] % 16 or words.shape[1] % 2:
        raise InputError(f"Qidxs is {words.dtype} {tuple(words.shape)}, not int64 words of codebook version 1")
    rows, columns = words.shape[0], 4 * words.shape[1]
    tiles = words.reshape(rows // 16, columns // 8, 8, 4).transpose(1, 2).reshape(rows // 2, columns // 2)
    codes = torch.empty(rows // 2, 2, columns // 2, 2, dtype=torch.int64)
    for point in range(4):
        magnitude = (tiles >> 8 * point) & 255
        signs = sum(((tiles >> 32 + 4 * bit + point) & 1) << bit for bit in range(8))
        codes[:, point % 2, :, point // 2] = (magnitude << 8) | signs
    return codes.view(rows, columns)


def short_codes_of(words: torch.Tensor) -> torch.Tensor:
    """Codes [outputs, inputs / 8] of packed points of `short_codebook`, int64 words [outputs, inputs / 64]."""
    return ((words[:, :, None] >> torch.arange(0, 64, 8)) & 255).flatten(1)


def _residual_scale(number: int, given: object) -> float:
    """The files' own settings may give an r in place of the codebook's."""
    found = given.get("resid_scale_override") if isinstance(given, Mapping) else None
    if found is None:
        return RESIDUAL_SCALES[number]
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise InputError(f"{SETTINGS}: resid_scale_override is {str(found)[:40]!r}, not a number")
    return float(found) if found > 0 else RESIDUAL_SCALES[number]


def restore(parts: Tensors, settings: Mapping[str, Any] | None = None) -> torch.Tensor:
    """The weights [outputs, inputs], float32, of one layer of the files.

    Args:
        parts: Its tensors, by ending.
        settings: What the config has under `SETTINGS`.

    Raises:
        InputError: another codebook or size than is known here.
        KeyError: a part is missing.
    """
    number = int(parts.get(".codebook_id", E8P))
    mixed = _mixed(parts[".Qidxs"], number, settings)
    outputs, inputs = mixed.shape
    scale = parts[".Wscale"].double() / math.sqrt(outputs * inputs)
    left, right = parts[".SV"].double(), parts[".SU"].double()
    if left.shape != (outputs,) or right.shape != (inputs,) or scale.ndim:
        raise InputError(f"SU {tuple(right.shape)} and SV {tuple(left.shape)} do not fit {outputs} x {inputs} weights")
    if ".scaleWH" in parts:
        right = right / parts[".scaleWH"].double()
    return (mixed * scale * left[:, None] * right).float()


def _mixed(words: torch.Tensor, number: int, settings: Mapping[str, Any] | None) -> torch.Tensor:
    """R Q L, not scaled [outputs, inputs]; of P and P' one by one, so that both are exact."""
    if number == E8P:
        return _transformed(codebook(), codes_of(words))
    if number not in RESIDUAL_SCALES:
        raise InputError(
            f"codebook {number} is not known, only E8P12 ({E8P}), E8P12RVQ3B ({RVQ3}) and E8P12RVQ4B ({RVQ4})"
        )
    parts = 3 if number == RVQ3 else 2
    if words.ndim != 2 or words.shape[1] % parts:
        raise InputError(f"Qidxs {tuple(words.shape)} does not divide into words of points and of residuals")
    points, residual = torch.split(words, [(parts - 1) * words.shape[1] // parts, words.shape[1] // parts], dim=1)
    mixed = _transformed(codebook(), codes_of(points))
    if number == RVQ3:
        inner = _transformed(short_codebook(), short_codes_of(residual))
    else:
        inner = _transformed(codebook(), codes_of(residual))
    return mixed + inner / _residual_scale(number, settings)


def _transformed(points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return mix(mix(points[codes].flatten(1)).T).T


def weight_names(layer: str) -> tuple[str, ...]:
    """Names of the weights that one layer of the files holds.

    >>> weight_names("model.layers.0.mlp.upgate_proj")
    ('model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.gate_proj.weight')
    """
    path, _, last = layer.rpartition(".")
    return tuple(f"{path}.{name}.weight" for name in JOINED[last]) if last in JOINED else (f"{layer}.weight",)


def split(
    layer: str, weight: torch.Tensor, scales: torch.Tensor | None, architecture: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The layers of transformers' model that one layer of the files holds, by name.

    Raises:
        InputError: outputs that do not divide so.
    """
    path, _, last = layer.rpartition(".")
    if last not in JOINED:
        return {f"{layer}.weight": weight}
    names, sizes = JOINED[last], _sizes(last, len(weight), architecture)
    if scales is None or len(scales) != len(names) or sum(sizes) != len(weight):
        raise InputError(
            f"quip# layer {layer}: {len(weight)} outputs do not divide into {sizes}, with a scale for each"
        )
    pieces = zip(names, torch.split(weight, sizes), scales, strict=True)
    return {f"{path}.{name}.weight": (piece.double() * scale.double()).float() for name, piece, scale in pieces}


def _sizes(last: str, outputs: int, architecture: Mapping[str, Any]) -> list[int]:
    """Outputs of each of the joined layers."""
    if last == "upgate_proj":
        return [outputs // 2, outputs // 2]
    heads = int(architecture.get("num_attention_heads") or 1)
    keys = int(architecture.get("num_key_value_heads") or heads)
    width = int(architecture.get("head_dim") or int(architecture.get("hidden_size") or 0) // heads)
    return [heads * width, keys * width, keys * width]


# --- Hadamard matrices --------------------------------------------------------------------------------------------


def mix(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, size] times (K x Sylvester), not scaled."""
    size = rows.shape[1]
    order = order_of(size)
    mixed = rows.reshape(len(rows), order, -1)
    step = 1
    while step < size // order:
        pairs = mixed.view(len(rows), order, -1, 2, step)
        mixed = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        mixed, step = mixed.view(len(rows), order, -1), 2 * step
    return (small_hadamard(order) @ mixed if order > 1 else mixed).reshape(rows.shape)


PALEY = {12: 11, 20: 19, 60: 59, 108: 107, 140: 139}
"""Orders of Paley's first kind, and their primes."""
PALEY_DOUBLED = {28: 13, 36: 17}
"""Orders of his second kind, and their primes."""
WILLIAMSON = {
    52: (0x14F2, 0x11F8, 0x1A65, 0x1090),
    156: (0x7282619053, 0x7898528647, 0x73452128B3, 0x46A0EDC158),
    172: (0x467AECDD798, 0x6FC29B650FD, 0x7595E85EA6B, 0x63D260192F1),
}
"""Orders of Williamson's form: the first rows of his four symmetric circulant matrices, a bit for each +1."""
ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 20, 12)
"""In the order in which QuIP# tries them."""


def order_of(size: int) -> int:
    """The order of K for this size.

    Raises:
        InputError: none fits, as in QuIP# itself.
    """
    order = next((order for order in ORDERS if size % order == 0), 1)
    if size < 1 or (size // order) & (size // order - 1):
        raise InputError(f"layers of size {size} are mixed by no Hadamard matrix that QuIP# has (order {order} tried)")
    return order


@lru_cache(maxsize=4)
def small_hadamard(order: int) -> torch.Tensor:
    """The Hadamard matrix K of an order in `ORDERS`, signed as QuIP# has it; float64.

    Paley 1933 and Williamson 1944; the choice among equivalent ones is that of N. Sloane's library.

    >>> matrix = small_hadamard(28)
    >>> torch.equal(matrix @ matrix.T, 28 * torch.eye(28, dtype=torch.float64))
    True
    """
    if order in WILLIAMSON:
        return _williamson(order // 4, WILLIAMSON[order])
    return _paley(PALEY[order]) if order in PALEY else _paley_doubled(PALEY_DOUBLED[order])


def _residues(prime: int) -> torch.Tensor:
    """Quadratic characters of index differences [prime, prime]."""
    squares = {index * index % prime for index in range(1, prime)}
    signs = torch.tensor([0.0] + [1.0 if index in squares else -1.0 for index in range(1, prime)], dtype=torch.float64)
    return signs[_differences(prime)]


def _differences(size: int) -> torch.Tensor:
    index = torch.arange(size)
    return (index - index[:, None]) % size


def _bordered(core: torch.Tensor, corner: float, row: float) -> torch.Tensor:
    """A core with a first column of ones and a first row that is constant."""
    whole = torch.ones(len(core) + 1, len(core) + 1, dtype=torch.float64)
    whole[0, 0], whole[0, 1:], whole[1:, 1:] = corner, row, core
    return whole


def _paley(prime: int) -> torch.Tensor:
    return _bordered(torch.eye(prime, dtype=torch.float64) - _residues(prime), 1, -1)


def _paley_doubled(prime: int) -> torch.Tensor:
    inner, one = _bordered(_residues(prime), 0, 1), torch.eye(prime + 1, dtype=torch.float64)
    return torch.cat(
        [torch.cat([inner + one, inner - one], dim=1), torch.cat([inner - one, -inner - one], dim=1)],
    )


def _williamson(size: int, rows: tuple[int, ...]) -> torch.Tensor:
    places = torch.arange(size - 1, -1, -1)
    bits = [(torch.tensor(row) >> places) & 1 for row in rows]
    a, b, c, d = ((2 * row - 1).double()[_differences(size)] for row in bits)
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(line, dim=1) for line in blocks])
