"""What a decision of the `bits` line costs: recalibration, smoothing and forecast of every level, in closed form.

Let r be the probability that is expected of an outcome and q the one that the hypothesis gives it. The Freedman-type
line charges z = Y - ln(1 + lambda (Y - l)) / lambda for a loss l = -log2 q(outcome) at the forecast Y. For two outcomes
the best q and Y at a given r and lambda are those with

    r = q + lambda q (1 - q) log2(q / (1 - q))        and        Y = H2(q) = -q log2 q - (1 - q) log2(1 - q).

Proof. The expected z is convex in (q, Y). With w_b = 1 + lambda (Y - l_b) for outcome b, dz/dY = 0 says that
r / w_1 + (1 - r) / w_0 = 1, and dz/dq = 0 that r / (w_1 q) = (1 - r) / (w_0 (1 - q)). Hence w_1 = r / q and
w_0 = (1 - r) / (1 - q); their difference lambda log2(q / (1 - q)) gives the first equation, and w_1 the second.

So nothing is forecast but the entropy of the hypothesis's own decision, and the smoothing follows from the stake: q is
r drawn towards 1/2, the more so the larger lambda. The right side of the first equation is below 0 for q below some
q0(lambda) and rises from there, so every r in (0, 1) has one q with w_1, w_0 > 0, whatever lambda is.

Whether r is right decides how good the bound is, never whether it holds: q and Y are functions of the level alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import LN2
from tokenbound.bounds.decisions import LEVEL_STEP, LEVELS, MAX_LEVEL

_HALVINGS = 64
"""Bisection steps: q is below 1/2 and above 1e-8, so that its last bit is found."""


@dataclass(frozen=True)
class DecisionBet:
    """A grid point of the line: everything about a cell follows from it."""

    lam: float
    """lambda per bit, any positive number."""
    slope: float
    """Factor on the log-odds of the model."""
    alpha: float
    """Weight of a fair coin in what is expected: r = (1 - alpha) sigmoid(slope * log-odds) + alpha / 2."""

    @cached_property
    def expected(self) -> Floats:
        """[MAX_LEVEL + 1] r of the less likely outcome, from level 0 outwards."""
        log_odds = -self.slope * LEVEL_STEP * np.arange(MAX_LEVEL + 1)
        return np.asarray((1 - self.alpha) / (1 + np.exp(-log_odds)) + self.alpha / 2)

    @cached_property
    def smoothed(self) -> Floats:
        """[MAX_LEVEL + 1] q of the less likely outcome."""
        low, high = np.zeros(MAX_LEVEL + 1), np.full(MAX_LEVEL + 1, 0.5)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                found = middle * (1 + self.lam * (1 - middle) * np.log2(middle / (1 - middle)))
            is_below = ~(found >= self.expected)
            low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
        return high  # of the two ends the one with w_1 > 0

    @cached_property
    def log_odds_bits(self) -> Floats:
        """[MAX_LEVEL + 1] log2(q / (1 - q)), at most 0."""
        return np.asarray(np.log2(self.smoothed / (1 - self.smoothed)))

    @cached_property
    def loss(self) -> Floats:
        """[2, LEVELS] l in bits of each cell."""
        return _mirrored(-np.log2(self.smoothed), -np.log1p(-self.smoothed) / LN2)

    @cached_property
    def forecast(self) -> Floats:
        """[2, LEVELS] Y in bits of each cell; the same for both outcomes."""
        q = self.smoothed
        entropy = -q * np.log2(q) - (1 - q) * np.log1p(-q) / LN2
        return _mirrored(entropy, entropy)

    @cached_property
    def factor(self) -> Floats:
        """[2, LEVELS] w = 1 + lambda (Y - l) of each cell, above 0."""
        q, odds = self.smoothed, self.log_odds_bits
        return _mirrored(1 + self.lam * (1 - q) * odds, 1 - self.lam * q * odds)

    @cached_property
    def value(self) -> Floats:
        """[2, LEVELS] z in bits of each cell."""
        return np.asarray(self.forecast - np.log(self.factor) / self.lam)

    @property
    def highest_value(self) -> float:
        """The largest z of a decision."""
        return float(self.value.max())

    @cached_property
    def rounding(self) -> Floats:
        """[2, LEVELS] how far the float64 z of a cell may be off, bits."""
        return np.asarray(2.0**-51 * (64 + 1 / self.lam) / np.minimum(self.factor, 1.0))


def _mirrored(surprised: Floats, unsurprised: Floats) -> NDArray[np.float64]:
    """[2, LEVELS] by outcome and level, from the values of the less and the more likely outcome at levels 0, 1, ..."""
    right_unlikely = np.concatenate([surprised[:0:-1], [surprised[0]], unsurprised[1:]])  # outcome 1: levels -127..127
    assert right_unlikely.size == LEVELS
    return np.stack([right_unlikely[::-1], right_unlikely])
