"""Control variates: numbers known of every window before any is drawn, which take from a sample what they explain.

Let g_j be known exactly for all N windows. Of the N - n_p windows outside the pilot let g be the mean of g_j, and let
beta be fixed by the pilot. Then

    X_j = u_j - beta . (g_j - g)

has the same total over these windows as u_j, and a smaller spread where g_j explains u_j. Given the pilot, the windows
beyond it are a uniformly random order of a fixed population, and beta, g and X are fixed before the first of them; so
the sequence of :mod:`~tokenbound.bounds.sampling` takes X_j in place of u_j, with

    hi = max over the windows outside the pilot of (the limit of u_j) - beta . (g_j - g)

computed exactly. g_j may depend on the corpus and on the model, never on which windows were drawn. What breaks this
cannot be written down: features are given for every window, together with the order of the draw, and mean, beta and hi
are made from them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.constants import CONTROL_RIDGE_GRID, STAKE_CAP
from tokenbound.errors import InputError

_BLOCK = 1 << 16
"""Windows whose adjustments are held at once."""


@dataclass(frozen=True, eq=False)
class ControlVariates:
    """What is known of every window of a corpus, and the order in which windows are drawn.

    Raises:
        InputError: arrays that do not fit each other, or an order that draws a window twice.
    """

    features: NDArray[np.number]
    """[N, d] of every window of the corpus."""
    lengths: Ints
    """[N] scored tokens of every window."""
    order: Ints
    """[n] the first windows of the draw; the sums of a run are of a prefix of it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.features.ndim != 2 or not self.features.shape[1] or len(self.features) != len(self.lengths):
            raise InputError(
                f"control variates must be numbers of each of {len(self.lengths)} windows, got shape "
                f"{self.features.shape}"
            )
        if not np.isfinite(self.features).all():
            raise InputError("control variates must be finite; compute them again")
        if self.lengths.min(initial=1) < 1:
            raise InputError("every window has a scored token; the lengths of the windows are wrong")
        in_range = self.order.size and int(self.order.min()) >= 0 and int(self.order.max()) < self.num_units
        if not in_range or np.unique(self.order).size != self.order.size:
            raise InputError(f"the draw must name windows below {self.num_units}, each once")

    @property
    def num_units(self) -> int:
        """N."""
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Scored tokens of all windows."""
        return int(self.lengths.sum())

    @cached_property
    def max_unit_tokens(self) -> int:
        """Scored tokens of the largest window."""
        return int(self.lengths.max())

    def outside_mean(self, pilot: int) -> Floats:
        """[d] exact mean of the features over the windows outside the pilot; of integers without a rounding."""
        kind = np.int64 if np.issubdtype(self.features.dtype, np.integer) else np.float64
        total = self.features.sum(axis=0, dtype=kind) - self.features[self.order[:pilot]].sum(axis=0, dtype=kind)
        return np.asarray(total / (self.num_units - pilot), dtype=np.float64)

    def highest(self, limits: Floats, beta: Floats, mean: Floats, pilot: int) -> float:
        """Hi: the largest that X_j of a window outside the pilot can be.

        Args:
            limits: [N] or [1] what u_j of each window never exceeds.
            beta: [d].
            mean: [d] of the features outside the pilot.
            pilot: windows of the pilot.
        """
        outside = np.ones(self.num_units, dtype=bool)
        outside[self.order[:pilot]] = False
        limits = np.broadcast_to(limits, outside.shape)
        largest = -np.inf
        for start in range(0, self.num_units, _BLOCK):
            part = slice(start, start + _BLOCK)
            left = limits[part] - adjustments(self.features[part], beta, mean)
            largest = max(largest, float(left[outside[part]].max(initial=-np.inf)))
        return largest


def adjustments(features: NDArray[np.number], beta: Floats, mean: Floats) -> Floats:
    """[W] beta . (g_j - mean), each window's digits the same whatever windows are beside it."""
    total = np.zeros(len(features))
    for column, factor, centre in zip(features.T, beta.tolist(), mean.tolist(), strict=True):
        total += factor * (column.astype(np.float64) - centre)
    return total


@dataclass(frozen=True)
class Regression:
    """What the pilot chose."""

    beta: Floats
    """[d]; zeros where the features would not help."""
    mean: Floats
    """[d] of the features over the windows outside the pilot."""
    highest: float
    """Hi."""
    deviation: float
    """Standard deviation that the pilot's units leave, each predicted by the others."""


def regress(
    controls: ControlVariates, units: Floats, limits: Floats, *, draws: int, log_inverse_delta: float
) -> Regression:
    """Ridge regression of the pilot's units on their features, at the penalty that promises the least slack.

    The penalties, and not to use the features at all, are compared by the slack that a sample of the plan's target
    size would leave: its deviation is that of units predicted from the others of the pilot, its range is hi. So
    features that say nothing, or whose extremes would raise hi too far, are left out.

    Args:
        controls: of all windows.
        units: [n_p] u_j of the pilot, in draw order.
        limits: [N] or [1] what u_j of each window never exceeds.
        draws: windows beyond the pilot to have in view.
        log_inverse_delta: ln(1 / delta_s).

    >>> length = np.array([4, 8, 6, 2, 4, 8, 6, 2] * 8)
    >>> controls = ControlVariates(length[:, None], length, np.arange(64))
    >>> found = regress(controls, 0.5 * length[:32] - 2.5, 10.0 * length, draws=16, log_inverse_delta=3.0)
    >>> found.beta.round(2).tolist(), round(found.highest, 1)
    ([0.5], 78.5)
    """
    pilot = units.size
    mean = controls.outside_mean(pilot)
    checked = [
        Regression(beta, mean, controls.highest(limits, beta, mean, pilot), deviation)
        for beta, deviation in _candidates(controls, units)
    ]
    return min(
        checked,
        key=lambda each: expected_unit_slack(
            each.deviation, each.highest, draws=draws, log_inverse_delta=log_inverse_delta
        ),
    )


def unexplained_share(controls: ControlVariates, units: Floats) -> float:
    """Share of the standard deviation of the pilot's units that the features leave: a guide for choices.

    Args:
        controls: of all windows.
        units: [n_p] sums of the pilot's windows about their mean, in draw order.
    """
    (_, without), *candidates = _candidates(controls, units)
    least = min((deviation for _, deviation in candidates), default=without)
    return min(least / without, 1.0) if without else 1.0


def _candidates(controls: ControlVariates, units: Floats) -> list[tuple[Floats, float]]:
    """Beta and the deviation that it leaves: first of no regression, then of one for each penalty."""
    pilot = units.size
    own = controls.features[controls.order[:pilot]].astype(np.float64)
    centred, target = own - own.mean(axis=0), units - units.mean()
    scale = np.sqrt(np.mean(centred**2, axis=0))
    used = scale > 1e-9 * (np.abs(own).max(axis=0) + 1e-300)  # a constant says nothing
    scaled = np.where(used, centred / np.where(used, scale, 1.0), 0.0)
    left, singular, right = np.linalg.svd(scaled, full_matrices=False)
    candidates = [(np.zeros(own.shape[1]), float(np.sqrt(np.mean(target**2))))]
    for penalty in CONTROL_RIDGE_GRID if pilot > 2 * own.shape[1] + 2 else ():
        shrink = np.where(singular > 0, singular / (singular**2 + penalty * pilot), 0.0)
        weights = right.T @ (shrink * (left.T @ target))
        leverage = (left**2) @ (singular * shrink) + 1 / pilot
        missed = (target - scaled @ weights) / np.maximum(1 - leverage, 1e-9)
        beta = np.where(used, weights / np.where(used, scale, 1.0), 0.0)
        candidates.append((beta, float(np.sqrt(np.mean(missed**2)))))
    return candidates


def expected_unit_slack(deviation: float, largest: float, *, draws: int, log_inverse_delta: float) -> float:
    """Slack per unit of a sequence at its best stake: a guide for choices, not a bound.

    Args:
        deviation: standard deviation of a unit.
        largest: how far a unit may lie above the mean.
        draws: units drawn.
        log_inverse_delta: ln(1 / delta_s).
    """
    free = np.sqrt(2 * log_inverse_delta / draws) / max(deviation, 1e-12)
    stake = min(float(free), STAKE_CAP / max(largest, 1e-12))
    return stake * deviation**2 / 2 + log_inverse_delta / (draws * stake)
