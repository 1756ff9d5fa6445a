"""What the searches for grid points share: the points they look at, the slack they expect, and steps along a grid.

A search looks only at the evidence, so its cost does not depend on the number of tokens. Whatever it returns is a paid
grid point, and the bound evaluated there is valid. It only has to be good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from tokenbound.bounds.claim import Claim, SamplingPlan
from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.constants import BUDGET_GRID, LN2, MAX_DEGREE, T_GRID
from tokenbound.bounds.controls import expected_unit_slack
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.smoothing import alpha_levels, entropy_level
from tokenbound.errors import InputError

_FLOOR_QUANTILES = (0.0, 0.01, 0.05, 0.2, 0.5)
"""Quantiles of the forecasts of an excess that are tried as floors y0."""


@dataclass(frozen=True)
class SlackModel:
    """Expected slack of the sampling sequence at the plan's target size; a guide for the choice, not a bound."""

    log_inverse_delta: float = 0.0
    draws: int = 0
    deviation_bits: float = 0.0
    """Of a window's sum: what the windows left undrawn and the control variates leave of it."""
    spread_bits: float = 0.0
    """Of a window's sum: all of it."""
    max_unit_tokens: int = 1
    mean_unit_tokens: float = 1.0

    @property
    def is_sampled(self) -> bool:
        """Whether any window is left undrawn, as far as is known."""
        return self.draws > 0

    @classmethod
    def of(cls, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None) -> SlackModel:
        """From the pilot's evidence."""
        if sampling is None or sampling.num_units <= sampling.pilot_units:
            return cls()
        deviation = evidence.window_deviation_nats()
        if deviation is None:
            raise InputError(
                "the pilot's evidence of a sampled run needs `window_lengths`: windows are the units drawn"
            )
        left = 1 - sampling.target_draws / sampling.num_units
        return cls(
            sampling.log_inverse_delta(claim),
            sampling.target_draws,
            deviation / LN2 * math.sqrt(max(left, 0.0)) * sampling.unexplained,
            deviation / LN2,
            sampling.max_unit_tokens,
            claim.num_tokens / sampling.num_units,
        )

    @classmethod
    def of_range(cls, claim: Claim, sampling: SamplingPlan | None) -> SlackModel:
        """As far as the range of the values decides it, where windows were not looked at."""
        if sampling is None or sampling.num_units <= sampling.pilot_units:
            return cls()
        tokens = claim.num_tokens / sampling.num_units
        return cls(sampling.log_inverse_delta(claim), sampling.target_draws, 0.0, 0.0, sampling.max_unit_tokens, tokens)

    def bits(self, highest: float, mean: float) -> float:
        """Slack in bits per token of values up to ``highest`` with the given mean."""
        return self.of_units((highest - mean) * self.max_unit_tokens)

    def of_units(self, largest: float) -> float:
        """Slack in bits per token of windows whose sums lie at most so far above their mean, in bits."""
        if not self.draws:
            return 0.0
        slack = expected_unit_slack(
            self.deviation_bits, largest, draws=self.draws, log_inverse_delta=self.log_inverse_delta
        )
        return slack / self.mean_unit_tokens

    def with_budget(self, budget: float, *, mean: float, highest: float, uniform: float, most: float) -> float:
        """Slack in bits per token of windows with a budget, and what those cost that exceed it.

        Sums of windows are taken to lie above that of the largest with an exponential tail.

        Args:
            budget: C.
            mean: of z per token.
            highest: the largest z of a step.
            uniform: bits per token of uniform predictions.
            most: what the largest window costs if it is predicted uniformly, above its mean.
        """
        if not self.draws:
            return 0.0
        beyond = (budget - mean * self.max_unit_tokens) / max(self.spread_bits, 1.0)
        exceeding = math.exp(-max(beyond, 0.0))
        return self.of_units(budget + highest + most) + exceeding * (uniform + highest / self.mean_unit_tokens)

    def best_budget(self, highest: float, mean: float, uniform: float) -> tuple[float, float]:
        """The smallest :meth:`with_budget` for values per token, and its budget.

        Args:
            highest: z_max.
            mean: of z.
            uniform: log2 V.
        """
        most = max(uniform - mean, 0.0) * self.max_unit_tokens

        def slack(index: int) -> float:
            return self.with_budget(BUDGET_GRID[index], mean=mean, highest=highest, uniform=uniform, most=most)

        start = round(4 * math.log2(max(4 * mean * self.max_unit_tokens, BUDGET_GRID[0]) / BUDGET_GRID[0]))
        best = descend(slack, min(start, len(BUDGET_GRID) - 1), len(BUDGET_GRID))
        return slack(best), BUDGET_GRID[best]


class Cells:
    """Weighted points (nll, entropy), such as the histogram's cells, and the polynomial basis of their entropies."""

    def __init__(self, counts: Ints, nll: Floats, entropy_nats: Floats, worst_share: float, claim: Claim) -> None:
        """Points with their counts; without entropies in the claim the basis is the constant alone."""
        self.nll, self.entropy_nats, self.worst_share = nll, entropy_nats, worst_share
        self.weight = counts / counts.sum()
        self.vocab_size, self.has_alpha = claim.vocab_size, claim.has_alpha
        self.max_degree = MAX_DEGREE if claim.has_entropy else 0
        self.basis = (self.entropy_nats / LN2)[:, None] ** np.arange(self.max_degree + 1)
        self.likelihood = np.exp(-self.nll)
        self.level = entropy_level(self.entropy_nats, vocab_size=self.vocab_size)
        self._solvers = [normal_solver(self.basis[:, : d + 1], self.weight) for d in range(self.max_degree + 1)]

    @classmethod
    def of(cls, evidence: Evidence, claim: Claim) -> Cells:
        """The histogram's non-empty cells."""
        worst = evidence.worst_case_tokens / (evidence.num_tokens + evidence.worst_case_tokens)
        return cls(*evidence.cells(), worst, claim)

    def losses_bits(self, alpha: float, slope: int) -> Floats:
        """Smoothed loss of each point in bits."""
        if self.has_alpha:  # the histogram is over smoothed losses already
            return self.nll / LN2
        weights: float | Floats = alpha if slope == 0 else alpha_levels(alpha, slope)[self.level]
        return np.asarray(-np.log((1 - weights) * self.likelihood + weights / self.vocab_size) / LN2)

    def mean_loss_bits(self, alpha: float, highest: float) -> float:
        """Mean smoothed loss at a constant alpha, with the worst-case tokens at the highest."""
        finite = float(self.weight @ self.losses_bits(alpha, 0))
        return (1 - self.worst_share) * finite + self.worst_share * highest

    def least_squares(self, loss: Floats, degree: int) -> Floats:
        """Coefficients, constant first, of the best polynomial forecast in mean square."""
        basis = self.basis[:, : degree + 1]
        return np.asarray(self._solvers[degree] @ (basis.T @ (self.weight * loss)))


def normal_solver(basis: Floats, weight: Floats) -> Floats:
    """Pseudo-inverse of the weighted normal equations; columns are scaled first, because powers differ in size."""
    scale = np.sqrt(np.sum(weight[:, None] * basis**2, axis=0))
    scale[scale == 0] = 1.0
    scaled = basis / scale
    inverse = np.linalg.pinv(scaled.T @ (weight[:, None] * scaled), rcond=1e-12, hermitian=True)
    return np.asarray(inverse / np.outer(scale, scale))


def descend(value: Callable[[int], float], start: int, size: int) -> int:
    """Walk over the indices below ``size`` from ``start`` to a local minimum, the minimum of a function with one.

    >>> descend(lambda index: (index - 3) ** 2, start=7, size=10)
    3
    """
    known: dict[int, float] = {}

    def at(index: int) -> float:
        if not 0 <= index < size:
            return math.inf
        if index not in known:
            known[index] = value(index)
        return known[index]

    index = start
    while min(at(index - 1), at(index + 1)) < at(index):
        index += 1 if at(index + 1) < at(index - 1) else -1
    return index


def best_t(value: Callable[[float], float], start: int) -> tuple[float, float]:
    """The smallest value along the grid of t, walking from an index, and its t."""
    known = cache(value)
    t = T_GRID[descend(lambda index: known(T_GRID[index]), start, len(T_GRID))]
    return known(t), t


def nearest_t(t: float) -> int:
    """Index of the grid's t nearest in ratio."""
    return int(np.argmin(np.abs(np.log(np.array(T_GRID)) - math.log(t))))


def as_float16(coefficients: Floats) -> Floats:
    """Coefficients as they are paid; one beyond float16's range becomes infinite and the candidate is dropped."""
    with np.errstate(over="ignore"):
        return np.asarray(coefficients.astype(np.float16).astype(np.float64))


def floor_candidates(values: Floats, weight: Floats) -> list[float]:
    """Quantiles of the forecasts, to be tried as y0."""
    order = np.argsort(values)
    cumulative = np.cumsum(weight[order])
    positions = np.searchsorted(cumulative, np.array(_FLOOR_QUANTILES) * cumulative[-1])
    return sorted({float(values[order[min(p, order.size - 1)]]) for p in positions})
