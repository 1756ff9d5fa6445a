"""Round to nearest: one step per tensor, entropy coded."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tokenbound.compression.methods.base import CompressionMethod

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded


class RoundToNearestSettings(CompressionMethod):
    """Uniform quantization with one step per tensor, entropy coded."""

    writes_grid: ClassVar[bool] = True

    method: Literal["rtn"] = "rtn"
    step: float = Field(default=0.25, gt=0)
    """Step of every tensor in units of its standard deviation (snapped to a power of sqrt(2))."""

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Round one tensor to the grid; integers stay exact."""
        from tokenbound.compression.codecs.select import code_grid
        from tokenbound.compression.quantizers.nearest import quantize

        return code_grid(tensor, quantize(tensor, self.step) if tensor.is_floating_point() else None)
