"""QuIP#-like quantization to the E8 lattice, for comparison. The work is done in `quantizers.e8`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenbound.compression.methods.base import CompressionMethod

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded


class E8Settings(CompressionMethod):
    """QuIP#-like E8 lattice; embeddings, head and vectors in float16. Needs a calibration. For comparison."""

    needs_calibration: ClassVar[bool] = True
    codes_adapters: ClassVar[bool] = False

    method: Literal["e8"] = "e8"
    bits: Literal[2, 3, 4] = 2
    """Bits for each weight."""

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Quantize the weight of a linear layer; other tensors are rounded to float16."""
        from tokenbound.compression.codecs import LATTICE
        from tokenbound.compression.codecs.select import code_half
        from tokenbound.compression.quantizers.e8 import quantize_layer
        from tokenbound.compression.quantizers.layers import linear_layer

        curvature = linear_layer(name, tensor, self.calibrated(calibration))
        return code_half(tensor) if curvature is None else (LATTICE, quantize_layer(tensor, curvature, self.bits))
