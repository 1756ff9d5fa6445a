"""What the plots of a report need to know of a line beyond its printed value. Nothing here is a bound.

Values come from the evidence alone. They are right up to a constant, which the report removes by letting each curve
pass through the printed value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenbound.bounds.claim import Claim, Line, SamplingPlan
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import ALPHA_GRID
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.printing import alpha_words
from tokenbound.bounds.search import Cells, SlackModel


@dataclass(frozen=True)
class Sweep:
    """The value of a line along one of its parameters."""

    x: tuple[float, ...]
    values: Floats
    """[X], all else chosen again or held, as the curve says."""
    chosen: int
    """Index of the printed point."""


@dataclass(frozen=True)
class LineCurves:
    """How the value of a line would move."""

    at_size: Callable[[float], float]
    """Its value for the same losses at another m."""
    by_alpha: Sweep | None = None
    """Against the smoothing weight, everything else chosen again."""
    by_stake: Sweep | None = None
    """Against lambda (per bit) at the chosen smoothing weight."""


@dataclass(frozen=True)
class EvidenceView:
    """What curves are computed from."""

    evidence: Evidence
    """Merged, of the scored tokens."""
    claim: Claim
    """Of the certificate, with the columns that the evidence has."""
    sampling: SamplingPlan | None

    @cached_property
    def slack(self) -> SlackModel:
        """Expected sampling slack; none where the evidence has no windows."""
        has_windows = bool(self.evidence.sums.get("windows"))
        return SlackModel.of(self.evidence, self.claim, self.sampling) if has_windows else SlackModel()

    @cached_property
    def cells(self) -> Cells:
        """The histogram's non-empty cells."""
        return Cells.of(self.evidence, self.claim)

    def is_smoothed_as(self, line: Line) -> bool:
        """Whether a line is smoothed as the evidence is, or may smooth it as it likes."""
        head = line.parameters.get("alpha_from") == "column"
        return head if self.claim.has_alpha else not alpha_words(line)

    def alphas(self, chosen: float) -> list[float]:
        """Smoothing weights to show: the grid and the chosen one; of a smoothing head the chosen one alone."""
        return [chosen] if self.claim.has_alpha else sorted({*ALPHA_GRID, chosen})


def fixed_point_at(line: Line, num_tokens: int) -> Callable[[float], float]:
    """At the printed grid point the complexity terms fall as 1/m, and nothing else moves."""
    complexity = line.terms.get("complexity", 0.0) + line.terms.get("base_complexity", 0.0)
    return lambda size: complexity * num_tokens / size


def sweep(x: Sequence[float], values: Floats, chosen: int) -> Sweep:
    """A sweep over any sequence."""
    return Sweep(tuple(x), values, chosen)
