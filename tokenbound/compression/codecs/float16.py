"""Float tensors rounded to float16: what common practice does with embeddings, heads and vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenbound.compression.codecs.exact import decode_exact, encode_exact, plain_bytes

if TYPE_CHECKING:
    import torch


def encode_half(tensor: torch.Tensor) -> bytes | None:
    """The float16 code of a float tensor; None where it overflows or the tensor's own dtype is no wider."""
    import torch

    if not tensor.is_floating_point() or tensor.dtype.itemsize <= 2:
        return None
    half = tensor.to(torch.float16)
    return encode_exact(half) if bool(torch.isfinite(half).all()) else None


def decode_half(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `encode_half`, in the tensor's own dtype.

    Raises:
        ArtifactError: the payload is not such a code of this shape.
    """
    import torch

    return decode_exact(payload, shape, torch.float16).to(dtype)


def plain_halves(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The float16 values in plain bytes: what a general codec would be given."""
    import torch

    return plain_bytes(payload, shape, torch.float16)
