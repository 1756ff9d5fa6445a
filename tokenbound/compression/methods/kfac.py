"""Steps from K-FAC curvature, with error feedback: the method to use. The work is done in `quantizers.kfac`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tokenbound.compression.methods.base import CompressionMethod

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded


class KfacSettings(CompressionMethod):
    """Entropy-coded uniform quantization with steps from K-FAC curvature and error feedback. Needs a calibration."""

    needs_calibration: ClassVar[bool] = True
    codes_adapters: ClassVar[bool] = False
    writes_grid: ClassVar[bool] = True

    method: Literal["kfac"] = "kfac"
    rate: float = Field(default=1e-3, gt=0)
    """The constant c: the step of weight (i, j) is c / sqrt(g_i d_j). Larger is smaller and worse."""
    row_steps: bool = True
    """A step for each output; otherwise their average."""
    column_steps: bool = True
    """A step for each input; otherwise their average."""
    deadzone: float = Field(default=0.0, ge=0, lt=0.5)
    """How much further than half a step a value must be from zero to be coded as one."""
    damping: float = Field(default=0.02, ge=0)
    """Part of the mean diagonal added to a second moment: the fewer calibration tokens, the more is needed."""
    centroids: bool = True
    """Decode nonzero integers to where the mean of their values lies, one shift for each tensor."""

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Quantize one tensor by what its errors cost; integers stay exact."""
        from tokenbound.compression.codecs.select import code_exact, code_grid
        from tokenbound.compression.quantizers.kfac import quantize_calibrated

        seen = self.calibrated(calibration)
        if not tensor.is_floating_point():
            return code_exact(tensor)
        return code_grid(tensor, quantize_calibrated(name, tensor, self, seen))
