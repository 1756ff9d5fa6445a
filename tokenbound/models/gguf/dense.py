"""Blocks of ggml to the weights that they stand for, by the NumPy code of llama.cpp's own `gguf` package.

Every weight is one or two correctly rounded float32 operations on its code and scales, so it is defined to the last bit
on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tokenbound.compression.codecs.ggml import MARK
from tokenbound.errors import InputError
from tokenbound.models.gguf.checkpoint import PART

Tensors = Mapping[str, torch.Tensor]

ROWS_BYTES = 1 << 24
"""Bytes of blocks that are turned into weights at once."""


def dense_weights(
    tensors: Tensors, *, dtype: torch.dtype, transposed: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Replace every tensor of blocks by its weights.

    Args:
        tensors: as stored, by name.
        dtype: of the weights; they are rounded to it once.
        transposed: of a layer's name, whether the model keeps its weight as [inputs, outputs].

    Returns:
        Tensors by the names of the model; what are no blocks is as it was.

    Raises:
        InputError: a type that is not known, or scales that are infinite or NaN; by name.
    """
    out: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        plain, _, kind = name.partition(MARK)
        weight = _weights(name, kind, tensors[name], dtype) if kind else tensors[name]
        target, _, part = plain.partition(PART)
        if kind and transposed(target.removesuffix(".weight")):
            weight = weight.T.contiguous()
        joined = [out[target], weight.to(out[target].dtype)] if part == "1" and target in out else [weight]
        out[target] = torch.cat(joined, dim=1) if len(joined) > 1 else weight
    return out


def _weights(name: str, kind: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights [..., columns] of blocks [..., bytes]."""
    quants, number = _type(name, kind)
    data = np.ascontiguousarray(blocks.numpy())
    rows = data.reshape(-1, data.shape[-1])
    step = max(1, ROWS_BYTES // rows.shape[1])
    parts = [_finite(name, quants.dequantize(rows[i : i + step], number)).to(dtype) for i in range(0, len(rows), step)]
    return torch.cat(parts).reshape(*data.shape[:-1], -1)


def _finite(name: str, weights: np.ndarray[Any, Any]) -> torch.Tensor:
    if not np.isfinite(weights).all():
        raise InputError(f"tensor {name!r} has scales that are infinite or NaN; fetch the file again")
    return torch.from_numpy(weights)


def _type(name: str, kind: str) -> tuple[Any, Any]:
    """The dequantizers, and their number of a type."""
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    if kind.upper() not in GGMLQuantizationType.__members__:
        raise InputError(f"tensor {name!r} is of ggml's type {kind!r}, which is not known")
    return quants, GGMLQuantizationType[kind.upper()]
