"""What a user may ask of the compressor. Light: importing this pulls in neither torch nor NumPy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LosslessSettings(_Settings):
    """Every tensor exactly as it is in the checkpoint."""

    method: Literal["lossless"] = "lossless"


class RoundToNearestSettings(_Settings):
    """Uniform quantization with one step per tensor, entropy coded."""

    method: Literal["rtn"] = "rtn"
    step: float = Field(default=0.25, gt=0)
    """Step of every tensor in units of its standard deviation (snapped to a power of sqrt(2))."""


CompressSettings = Annotated[LosslessSettings | RoundToNearestSettings, Field(discriminator="method")]
