"""QuIP# checkpoints (Tseng et al. 2024, arXiv 2402.04396) in 2 bits, as their authors publish them, to dense weights.

    w = diag(SV) R (Wscale Q) L diag(SU)        L, R = (K x Sylvester) / sqrt(size), K a small Hadamard matrix or 1

Q holds points of the E8P codebook, eight inputs each: one of 256 vectors of magnitudes and a byte of signs, four points
in an int64 word that stand for 2 outputs x 16 inputs. All entries are multiples of 1/4, so the transforms are exact in
float64 whatever the order of their sums; what follows are float64 products in a fixed order and one rounding to
float32. Layers of attention and of the MLP are joined in the files and are split here.

K is Paley's matrix of order 12, 20, 28 or 36. The orders 52, 60, 108, 140, 156 and 172 of some models (Llama-2 7B and
13B among them) are not known here, nor are the codebooks of 3 and 4 bits.
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
E8P = 7
"""Number of the codebook in the files."""
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


def restore(parts: Tensors) -> torch.Tensor:
    """The weights [outputs, inputs], float32, of one layer of the files.

    Raises:
        InputError: another codebook or size than is known here.
        KeyError: a part is missing.
    """
    if int(parts.get(".codebook_id", E8P)) != E8P:
        raise InputError(f"codebook {int(parts['.codebook_id'])} is not known, only E8P ({E8P}), 2 bits")
    codes = codes_of(parts[".Qidxs"])
    weights = codebook()[codes].flatten(1)
    outputs, inputs = weights.shape
    mixed = mix(mix(weights).T).T
    scale = parts[".Wscale"].double() / math.sqrt(outputs * inputs)
    left, right = parts[".SV"].double(), parts[".SU"].double()
    if left.shape != (outputs,) or right.shape != (inputs,) or scale.ndim:
        raise InputError(f"SU {tuple(right.shape)} and SV {tuple(left.shape)} do not fit {outputs} x {inputs} weights")
    if ".scaleWH" in parts:
        right = right / parts[".scaleWH"].double()
    return (mixed * scale * left[:, None] * right).float()


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
    order = _order(size)
    mixed = rows.reshape(len(rows), order, -1)
    step = 1
    while step < size // order:
        pairs = mixed.view(len(rows), order, -1, 2, step)
        mixed = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        mixed, step = mixed.view(len(rows), order, -1), 2 * step
    return (paley(order) @ mixed if order > 1 else mixed).reshape(rows.shape)


def _order(size: int) -> int:
    """The order of K for this size: QuIP#'s rule, largest first."""
    known = (172, 156, 140, 108, 60, 52, 36, 28, 20, 12)
    order = next((order for order in known if size % order == 0), 1)
    if size < 1 or (size // order) & (size // order - 1) or order > 36:
        raise InputError(f"layers of size {size} are mixed by a Hadamard matrix (order {order}) that is not known here")
    return order


@lru_cache(maxsize=4)
def paley(order: int) -> torch.Tensor:
    """Paley's Hadamard matrix of order 12 or 20 (first kind), 28 or 36 (second kind), as QuIP# signs it.

    >>> matrix = paley(28)
    >>> torch.equal(matrix @ matrix.T, 28 * torch.eye(28, dtype=torch.float64))
    True
    """
    prime = order - 1 if order % 8 == 4 and order < 28 else order // 2 - 1
    squares = {index * index % prime for index in range(1, prime)}
    signs = torch.tensor([0.0] + [1.0 if index in squares else -1.0 for index in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    core = signs[(index - index[:, None]) % prime]
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    one = torch.eye(prime + 1, dtype=torch.float64)
    if prime == order - 1:
        bordered[0, 1:] = -1
        bordered[1:, 1:] = torch.eye(prime, dtype=torch.float64) - core
        return bordered
    bordered[0, 0], bordered[1:, 1:] = 0, core
    upper = torch.cat([bordered + one, bordered - one], dim=1)
    return torch.cat([upper, torch.cat([bordered - one, -bordered - one], dim=1)])
