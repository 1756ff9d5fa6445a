"""Every tensor exactly as it is, in whichever exact code is shortest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tokenbound.compression.methods.base import CompressionMethod

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded


class LosslessSettings(CompressionMethod):
    """Every tensor exactly as it is in the checkpoint."""

    is_exact: ClassVar[bool] = True

    method: Literal["lossless"] = "lossless"

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Code one tensor bit for bit."""
        from tokenbound.compression.codecs.select import code_exact

        return code_exact(tensor, name)
