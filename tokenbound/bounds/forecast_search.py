"""The search for a forecast, a smoothing and a stake: for a Freedman-type bound on a loss.

It serves the line `freedman` and the base of the line `relative`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tokenbound.bounds.claim import Claim, corpus_delta
from tokenbound.bounds.codes import budget_bits, freedman_tune_bits, kappa_nats
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import ALPHA_GRID, ALPHA_SLOPES, MAX_DEGREE, T_GRID
from tokenbound.bounds.search import Cells, SlackModel, as_float16, best_t, descend, nearest_t
from tokenbound.bounds.smoothing import loss_interval_bits

_FINALISTS = 6
"""Smoothings that are searched in full; the rest are ranked with a least-squares forecast."""
_T_WORTH_A_FLOOR = 0.25
"""Above this t a floor under the forecasts may buy a larger lambda."""
_NEWTON_STEPS, _REFITS = 3, 3
"""Newton steps at one lambda, and how often lambda is searched again for what they found."""
_FLOORS_PER_BIT = 4
"""Floors y0 are tried in steps of a quarter of a bit above A; the bound is flat about the best."""


@dataclass(frozen=True)
class Smoothing:
    """One smoothing tried: its losses in bits and their interval."""

    alpha: float
    slope: int
    loss: Floats
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """One grid point and the value of the bound at it, as far as the evidence can tell."""

    value: float
    smoothing: Smoothing
    t: float
    lam: float
    coefficients: tuple[float, ...]
    y0: float


class FreedmanSearch:
    """Minimises mean(Y - ln(1 + lambda (Y - l)) / lambda) + kappa / (lambda m) + expected sampling slack."""

    def __init__(self, cells: Cells, claim: Claim, slack: SlackModel, *, has_budget: bool = False) -> None:
        """Search over these points for this claim, with or without a budget for the windows of a sample."""
        self.cells, self.claim, self.slack, self.has_budget = cells, claim, slack, has_budget
        delta = corpus_delta(claim, sampled=slack.draws > 0)
        self.kappas = [
            kappa_nats(
                code_length_bits=claim.paid_code_bits,
                tune_bits=freedman_tune_bits(d, choose_alpha=not claim.has_alpha)
                + budget_bits(has_budget=has_budget)
                + claim.shared_bits,
                delta=delta,
            )
            for d in range(MAX_DEGREE + 1)
        ]

    def smoothings(self) -> Sequence[tuple[float, int]]:
        """(alpha, slope) of everything that may be chosen."""
        if self.claim.alpha_min is not None:
            return [(self.claim.alpha_min, 0)]
        slopes = ALPHA_SLOPES if self.claim.has_entropy else (0,)
        if self.claim.alphas != "any":
            slopes = tuple(slope for slope in slopes if (slope == 0) == (self.claim.alphas == "constant"))
        return [(alpha, slope) for alpha in ALPHA_GRID for slope in slopes]

    def best(self) -> Candidate:
        """The best grid point found."""
        ranked = sorted((self.quick(alpha, slope) for alpha, slope in self.smoothings()), key=lambda pair: pair[0])
        return min((self.refined(smoothing) for _, smoothing in ranked[:_FINALISTS]), key=lambda c: c.value)

    def quick(self, alpha: float, slope: int) -> tuple[float, Smoothing]:
        """Rank a smoothing with a least-squares forecast at one t."""
        smoothing = self.smoothed(alpha, slope)
        degree = self.cells.max_degree
        forecast = self.forecast(self.cells.least_squares(smoothing.loss, degree), smoothing, smoothing.low)
        t = self.start(smoothing, forecast, degree, smoothing.low)
        return self.value(smoothing, forecast, T_GRID[t], smoothing.low, degree), smoothing

    def smoothed(self, alpha: float, slope: int) -> Smoothing:
        """Losses and interval of one smoothing."""
        low, high = loss_interval_bits(alpha=alpha, vocab_size=self.claim.vocab_size)
        return Smoothing(alpha, slope, self.cells.losses_bits(alpha, slope), low, high)

    def forecast(self, coefficients: Floats, smoothing: Smoothing, floor: float) -> Floats:
        """Clipped forecasts of a polynomial."""
        guess = self.cells.basis[:, : len(coefficients)] @ coefficients
        return np.asarray(np.minimum(np.maximum(guess, floor), smoothing.high))

    def start(self, smoothing: Smoothing, forecast: Floats, degree: int, floor: float) -> int:
        """Index of the t that the quadratic approximation asks for."""
        square = float(self.cells.weight @ (forecast - smoothing.loss) ** 2)
        lam = math.sqrt(2 * self.kappas[degree] / (self.claim.num_tokens * max(square, 1e-12)))
        return nearest_t(lam * (smoothing.high - floor))

    def value(self, smoothing: Smoothing, forecast: Floats, t: float, floor: float, degree: int) -> float:
        """The bound at one grid point, by the evidence."""
        mean, highest = self.mean_and_highest(smoothing, forecast, t, floor)
        lam = t / (smoothing.high - floor)
        if self.has_budget:
            slack, _ = self.slack.best_budget(highest, mean, self.uniform)
        else:
            slack = self.slack.bits(highest, mean)
        return mean + self.kappas[degree] / (lam * self.claim.num_tokens) + slack

    def mean_and_highest(self, smoothing: Smoothing, forecast: Floats, t: float, floor: float) -> tuple[float, float]:
        """Of z, in bits per token."""
        lam = t / (smoothing.high - floor)
        terms = forecast - np.log1p(lam * (forecast - smoothing.loss)) / lam
        highest = floor - math.log1p(-t) / lam
        share = self.cells.worst_share
        return (1 - share) * float(self.cells.weight @ terms) + share * highest, highest

    @property
    def uniform(self) -> float:
        """Loss of a token that is predicted uniformly, bits."""
        return math.log2(self.claim.vocab_size)

    def budget(self, best: Candidate) -> float | None:
        """The budget of a window that suits a candidate; None where windows have none."""
        if not self.has_budget:
            return None
        lowest = max(best.smoothing.low, best.y0)
        forecast = self.forecast(np.array(best.coefficients), best.smoothing, lowest)
        mean, highest = self.mean_and_highest(best.smoothing, forecast, best.t, lowest)
        return self.slack.best_budget(highest, mean, self.uniform)[1]

    def refined(self, smoothing: Smoothing) -> Candidate:
        """The best grid point of one smoothing."""
        return min(
            (self.refined_degree(smoothing, degree) for degree in range(self.cells.max_degree + 1)),
            key=lambda c: c.value,
        )

    def refined_degree(self, smoothing: Smoothing, degree: int) -> Candidate:
        """The best grid point of one smoothing and degree."""

        @cache
        def at(step: int) -> Candidate:
            return self.fitted(smoothing, degree, smoothing.low + step / _FLOORS_PER_BIT)

        if at(0).t < _T_WORTH_A_FLOOR:
            return at(0)
        return at(descend(lambda step: at(step).value, 0, int((smoothing.high - smoothing.low) * _FLOORS_PER_BIT)))

    def fitted(self, smoothing: Smoothing, degree: int, floor: float) -> Candidate:
        """The best forecast above one floor: least squares, then Newton steps on the bound itself."""
        best = self.with_floor(smoothing, self.cells.least_squares(smoothing.loss, degree), floor)
        for _ in range(_REFITS):
            improved = self.with_floor(smoothing, self.newton(best), floor)
            if not improved.value < best.value:
                break
            best = improved
        return best

    def with_floor(self, smoothing: Smoothing, coefficients: Floats, floor: float) -> Candidate:
        """The best t for these coefficients and this floor, all as they would be paid (float16)."""
        rounded = as_float16(coefficients)
        y0 = float(np.float16(floor))
        lowest = max(smoothing.low, y0)
        degree = len(coefficients) - 1
        if not (np.isfinite(rounded).all() and lowest < smoothing.high):
            return Candidate(math.inf, smoothing, T_GRID[0], 0.0, tuple(rounded), y0)
        forecast = self.forecast(rounded, smoothing, lowest)
        start = self.start(smoothing, forecast, degree, lowest)
        value, t = best_t(lambda t: self.value(smoothing, forecast, t, lowest, degree), start)
        return Candidate(value, smoothing, t, t / (smoothing.high - lowest), tuple(rounded.tolist()), y0)

    def newton(self, start: Candidate) -> Floats:
        """Newton steps on the objective itself, convex in the forecast; least squares is its small-lambda limit."""
        smoothing, coefficients = start.smoothing, np.array(start.coefficients)
        basis = self.cells.basis[:, : len(coefficients)]
        lowest = max(smoothing.low, start.y0)
        for _ in range(_NEWTON_STEPS if math.isfinite(start.value) else 0):
            forecast = self.forecast(coefficients, smoothing, lowest)
            free = (forecast > lowest) & (forecast < smoothing.high)
            factor = 1 + start.lam * (forecast - smoothing.loss)
            slope = np.where(free, self.cells.weight * (1 - 1 / factor), 0.0)
            curvature = np.where(free, self.cells.weight * start.lam / factor**2, 0.0)
            hessian = basis.T @ (curvature[:, None] * basis)
            coefficients = coefficients - np.linalg.lstsq(hessian, basis.T @ slope, rcond=1e-12)[0]
        return coefficients
