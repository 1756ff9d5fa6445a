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


class KfacSettings(_Settings):
    """Entropy-coded uniform quantization with steps from K-FAC curvature and error feedback. Needs a calibration."""

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


class GptqSettings(_Settings):
    """GPTQ with group scales; embeddings, head and vectors in float16. Needs a calibration. For comparison."""

    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4] = 4
    """Bits of a code."""
    group: Literal[0] | Annotated[int, Field(ge=4)] = 128
    """Input columns that share a scale, 4 or more; 0 for whole rows."""


class E8Settings(_Settings):
    """QuIP#-like E8 lattice; embeddings, head and vectors in float16. Needs a calibration. For comparison."""

    method: Literal["e8"] = "e8"
    bits: Literal[2, 3, 4] = 2
    """Bits for each weight."""


class AutoSettings(_Settings):
    """The rate of `kfac`, of an adapter the step of `rtn`, that minimises the freedman bound for the corpus at hand."""

    method: Literal["auto"] = "auto"
    low: float = Field(default=2e-4, gt=0)
    """Smallest rate of `kfac` tried."""
    high: float = Field(default=4e-3, gt=0)
    """Largest rate of `kfac` tried."""
    tries: int = Field(default=8, ge=2)
    """How many rates are tried at most."""


CompressSettings = Annotated[
    LosslessSettings | RoundToNearestSettings | KfacSettings | GptqSettings | E8Settings | AutoSettings,
    Field(discriminator="method"),
]

CALIBRATED = ("kfac", "gptq", "e8", "auto")
"""Methods that need a calibration on some tokens."""
