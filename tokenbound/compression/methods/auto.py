"""The setting of another method whose artifact has the smallest bound: a search, run by `engine.compress`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tokenbound.compression.methods.base import SearchMethod, SearchSpace
from tokenbound.compression.methods.kfac import KfacSettings
from tokenbound.compression.methods.rtn import RoundToNearestSettings

ADAPTER_STEPS = (0.1, 4.0)
"""Steps, in standard deviations, between which that of an adapter is sought: `rtn`, for want of a calibration."""


class AutoSettings(SearchMethod):
    """The rate of `kfac`, of an adapter the step of `rtn`, that minimises the freedman bound for the corpus at hand."""

    writes_grid: ClassVar[bool] = True

    method: Literal["auto"] = "auto"
    low: float = Field(default=2e-4, gt=0)
    """Smallest rate of `kfac` tried."""
    high: float = Field(default=4e-3, gt=0)
    """Largest rate of `kfac` tried."""
    tries: int = Field(default=8, ge=2)
    """How many rates are tried at most."""

    def space(self, *, of_adapter: bool) -> SearchSpace:
        """Rates of `kfac`, or of an adapter steps of `rtn`."""
        if of_adapter:
            return SearchSpace("step", *ADAPTER_STEPS, self.tries, lambda step: RoundToNearestSettings(step=step))
        return SearchSpace(
            "rate", self.low, self.high, self.tries, lambda rate: KfacSettings(rate=rate), limits=("low", "high")
        )
