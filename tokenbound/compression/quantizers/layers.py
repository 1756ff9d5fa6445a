"""Which tensors the methods quantize that, as common practice does, leave embeddings, heads and vectors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenbound.compression.codecs.groups import MIN_GROUP

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration, Curvature

OUTPUT_HEADS = ("lm_head", "embed_out", "output")
"""Modules that common practice leaves unquantized, as it does embeddings."""


def linear_layer(name: str, tensor: torch.Tensor, calibration: Calibration) -> Curvature | None:
    """The curvature of a linear layer's weight; None for embeddings, heads, very narrow and all other tensors."""
    wide = tensor.ndim == 2 and min(tensor.shape) >= MIN_GROUP and tensor.dtype.itemsize > 1
    curvature = calibration.curvature(name) if wide else None
    is_head = name.split(".")[-2:][0] in OUTPUT_HEADS
    return None if curvature is None or curvature.is_embedding or is_head else curvature
