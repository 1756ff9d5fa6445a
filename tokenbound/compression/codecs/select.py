"""Which wire form a tensor gets: the shortest of those that hold the same values.

Methods end here: with the values that they chose (`code_grid`), or where exact storage is the right answer
(`code_exact`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenbound.compression.codecs import EXACT, GGML, HALF, PACKED, UNIFORM, Coded
from tokenbound.compression.codecs.exact import encode_exact
from tokenbound.compression.codecs.float16 import encode_half
from tokenbound.compression.codecs.ggml import encode_blocks
from tokenbound.compression.codecs.packed import encode_packed
from tokenbound.compression.codecs.uniform import Grid, encode_grid

if TYPE_CHECKING:
    import torch

EXACT_CHECK_BYTES = 1 << 12
"""Quantized tensors of up to this many bytes are held against their exact code."""


def code_exact(tensor: torch.Tensor, name: str = "") -> Coded:
    """Code a tensor bit for bit, in whichever exact form is shorter; ggml's blocks are known by their name."""
    blocks = encode_blocks(name, tensor)
    if blocks is not None:
        return GGML, blocks
    exact = encode_exact(tensor)
    codes = encode_packed(tensor, len(exact))
    return (EXACT, exact) if codes is None else (PACKED, codes)


def code_half(tensor: torch.Tensor) -> Coded:
    """Code a float tensor in float16, unless that overflows or its own dtype is no wider."""
    half = encode_half(tensor)
    return code_exact(tensor) if half is None else (HALF, half)


def code_grid(tensor: torch.Tensor, grid: Grid | None) -> Coded:
    """Code a quantized tensor.

    Args:
        tensor: The values before quantization.
        grid: Integers and steps that stand for them; None codes the tensor exactly, which is also done where a small
            tensor's exact code is no longer than the grid's.
    """
    if grid is None:
        return code_exact(tensor)
    payload = encode_grid(grid)
    if len(payload) > EXACT_CHECK_BYTES:
        return UNIFORM, payload
    exact = encode_exact(tensor)
    return (EXACT, exact) if len(exact) <= len(payload) else (UNIFORM, payload)
