"""GPTQ: the practice that others report, for comparison. The work is done in `quantizers.gptq`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tokenbound.compression.methods.base import CompressionMethod

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded


class GptqSettings(CompressionMethod):
    """GPTQ with group scales; embeddings, head and vectors in float16. Needs a calibration. For comparison."""

    needs_calibration: ClassVar[bool] = True
    codes_adapters: ClassVar[bool] = False

    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4] = 4
    """Bits of a code."""
    group: Literal[0] | Annotated[int, Field(ge=4)] = 128
    """Input columns that share a scale, 4 or more; 0 for whole rows."""

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Quantize the weight of a linear layer; other tensors are rounded to float16."""
        from tokenbound.compression.codecs import GROUPS
        from tokenbound.compression.codecs.select import code_half
        from tokenbound.compression.quantizers.gptq import quantize_layer
        from tokenbound.compression.quantizers.layers import linear_layer

        curvature = linear_layer(name, tensor, self.calibrated(calibration))
        if curvature is None:
            return code_half(tensor)
        return GROUPS, quantize_layer(tensor, curvature, self.bits, self.group)
