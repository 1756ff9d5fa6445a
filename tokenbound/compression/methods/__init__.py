"""The registry: how each method of the settings encodes a tensor, and how each wire form is decoded.

A method is what a user asks for; a codec is what stands in the file, one number per tensor. A method may choose
another codec tensor by tensor (integers are always exact). Adding a method is one file here, its settings, and a
line in `METHODS`; a new wire form is a line in `CODECS` whose number is never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.methods import lossless, rtn, uniform

if TYPE_CHECKING:
    import torch

EXACT, UNIFORM = 0, 1


@dataclass(frozen=True)
class Codec:
    """A wire form.

    Attributes:
        name: What `inspect` calls it.
        decode: (payload, shape, dtype) to the tensor.
        plain: (payload, shape, dtype) to the same information in plain bytes, for comparison with general codecs.
    """

    name: str
    decode: Callable[[memoryview, tuple[int, ...], torch.dtype], torch.Tensor]
    plain: Callable[[memoryview, tuple[int, ...], torch.dtype], bytes]


def _decode_uniform(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        raise ArtifactError(f"artifact: a quantized tensor cannot have dtype {dtype}")
    return uniform.grid_tensor(uniform.decode_grid(payload, shape), shape, dtype)


CODECS: dict[int, Codec] = {
    EXACT: Codec(
        "exact",
        lossless.decode_exact,
        lambda payload, shape, dtype: tensor_bytes(lossless.decode_exact(payload, shape, dtype)).tobytes(),
    ),
    UNIFORM: Codec(
        "uniform",
        _decode_uniform,
        lambda payload, shape, dtype: uniform.plain_integers(uniform.decode_grid(payload, shape)),
    ),
}

Coded = tuple[int, bytes]
"""Codec number and payload."""


def _lossless(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    return EXACT, lossless.encode_exact(tensor)


def _rtn(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    grid = rtn.quantize(tensor, settings.step) if tensor.is_floating_point() else None
    return _shorter(tensor, grid)


def _shorter(tensor: torch.Tensor, grid: uniform.Grid | None) -> Coded:
    """The grid's code, unless there is none or a small tensor's exact code is no longer."""
    if grid is None:
        return EXACT, lossless.encode_exact(tensor)
    payload = uniform.encode_grid(grid)
    if len(payload) > EXACT_CHECK_BYTES:
        return UNIFORM, payload
    exact = lossless.encode_exact(tensor)
    return (EXACT, exact) if len(exact) <= len(payload) else (UNIFORM, payload)


EXACT_CHECK_BYTES = 1 << 12
"""Quantized tensors of up to this many bytes are held against their exact code."""

METHODS: dict[str, Callable[[str, Any, Any, Any], Coded]] = {
    "lossless": _lossless,
    "rtn": _rtn,
}
"""By `settings.method`: (name, tensor, settings, calibration) to the coded tensor."""
