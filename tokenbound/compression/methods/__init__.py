"""The registry: how each method of the settings encodes a tensor, and how each wire form is decoded.

A method is what a user asks for; a codec is what stands in the file, one number per tensor. A method may choose
another codec tensor by tensor (integers are always exact). Adding a method is one file here, its settings, and a
line in `METHODS`; a new wire form is a line in `CODECS` whose number is never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenbound.compression import ngram_codec
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.methods import e8, gptq, lossless, packed, rtn, uniform
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

EXACT, UNIFORM, GROUPS, LATTICE, HALF, PACKED, NGRAMS = range(7)


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
    return uniform.decode_tensor(payload, shape, dtype)


def _decode_half(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return lossless.decode_exact(payload, shape, torch.float16).to(dtype)


def _half_bytes(payload: memoryview, shape: tuple[int, ...]) -> bytes:
    import torch

    return tensor_bytes(lossless.decode_exact(payload, shape, torch.float16)).tobytes()


def _decode_ngrams(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    if dtype != torch.int32 or len(shape) != 1:
        raise ArtifactError(f"artifact: an n-gram model is one int32 row, not {dtype} of {len(shape)} axes")
    return torch.from_numpy(ngram_codec.decode_ngrams(payload, shape[0]))


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
    GROUPS: Codec("groups", gptq.decode_layer, lambda payload, shape, dtype: gptq.plain_codes(payload, shape)),
    LATTICE: Codec("lattice", e8.decode_layer, lambda payload, shape, dtype: e8.plain_codes(payload, shape)),
    HALF: Codec("float16", _decode_half, lambda payload, shape, dtype: _half_bytes(payload, shape)),
    PACKED: Codec("packed", packed.decode_packed, packed.packed_bytes),
    NGRAMS: Codec(
        "n-grams",
        _decode_ngrams,
        lambda payload, shape, dtype: tensor_bytes(_decode_ngrams(payload, shape, dtype)).tobytes(),
    ),
}

Coded = tuple[int, bytes]
"""Codec number and payload."""


def _lossless(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    return _exact(tensor)


def _exact(tensor: torch.Tensor) -> Coded:
    """Bit for bit, by whichever exact code is shorter."""
    exact = lossless.encode_exact(tensor)
    codes = packed.encode_packed(tensor, len(exact))
    return (EXACT, exact) if codes is None else (PACKED, codes)


def _rtn(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    grid = rtn.quantize(tensor, settings.step) if tensor.is_floating_point() else None
    return _shorter(tensor, grid)


def _require(calibration: Any, method: str) -> None:
    if calibration is None:
        raise InputError(f"method `{method}` needs a calibration; collect one with `collect_calibration`")


def _linear_layer(name: str, tensor: torch.Tensor, calibration: Any) -> Any:
    """The curvature of a linear layer's weight; None for embeddings, heads, very narrow and all other tensors."""
    wide = tensor.ndim == 2 and min(tensor.shape) >= gptq.MIN_GROUP and tensor.dtype.itemsize > 1
    curvature = calibration.curvature(name) if wide else None
    is_head = name.split(".")[-2:][0] in OUTPUT_HEADS
    return None if curvature is None or curvature.is_embedding or is_head else curvature


OUTPUT_HEADS = ("lm_head", "embed_out", "output")
"""Modules that common practice leaves unquantized, as it does embeddings."""


def _half(tensor: torch.Tensor) -> Coded:
    """Float tensors in float16, unless that overflows or their own dtype is no wider."""
    import torch

    if not tensor.is_floating_point() or tensor.dtype.itemsize <= 2:
        return _exact(tensor)
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        return _exact(tensor)
    return HALF, lossless.encode_exact(half)


def _gptq(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    _require(calibration, "gptq")
    curvature = _linear_layer(name, tensor, calibration)
    if curvature is None:
        return _half(tensor)
    return GROUPS, gptq.quantize_layer(tensor, curvature, settings.bits, settings.group)


def _e8(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    _require(calibration, "e8")
    curvature = _linear_layer(name, tensor, calibration)
    return _half(tensor) if curvature is None else (LATTICE, e8.quantize_layer(tensor, curvature, settings.bits))


def _kfac(name: str, tensor: torch.Tensor, settings: Any, calibration: Any) -> Coded:
    _require(calibration, "kfac")
    if not tensor.is_floating_point():
        return _exact(tensor)
    from tokenbound.compression.methods import kfac

    return _shorter(tensor, kfac.quantize_calibrated(name, tensor, settings, calibration))


def _shorter(tensor: torch.Tensor, grid: uniform.Grid | None) -> Coded:
    """The grid's code, unless there is none or a small tensor's exact code is no longer."""
    if grid is None:
        return _exact(tensor)
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
    "kfac": _kfac,
    "gptq": _gptq,
    "e8": _e8,
}
"""By `settings.method`: (name, tensor, settings, calibration) to the coded tensor."""
