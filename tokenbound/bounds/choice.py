"""Choosing the grid point of every line from merged evidence.

The search looks only at the histogram, so its cost does not depend on the number of tokens. What it returns is a paid
grid point; whatever it returns, the bound evaluated at it is valid. It only has to be good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tokenbound.bounds.claim import Claim, SamplingPlan, Tuning, corpus_delta
from tokenbound.bounds.codes import (
    azuma_predictable_tune_bits,
    azuma_tune_bits,
    elias_delta_bits,
    freedman_tune_bits,
    kappa_nats,
    kl_tune_bits,
)
from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.constants import (
    ALPHA_GRID,
    ALPHA_SLOPES,
    AZUMA_LAMBDA_GRID,
    AZUMA_M0_STEPS_PER_OCTAVE,
    LN2,
    MAX_DEGREE,
    STAKE_CAP,
    T_GRID,
)
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.smoothing import alpha_levels, entropy_level, loss_interval_bits
from tokenbound.errors import InputError, MismatchError

_FINALISTS = 6
"""Smoothings that are searched in full; the rest are ranked with a least-squares forecast."""
_T_WORTH_A_FLOOR = 0.25
"""Above this t a floor under the forecasts may buy a larger lambda."""
_NEWTON_STEPS, _REFITS = 3, 3
"""Newton steps at one lambda, and how often lambda is searched again for what they found."""
_FLOORS_PER_BIT = 4
"""Floors y0 are tried in steps of a quarter of a bit above A; the bound is flat about the best."""
_FLOOR_QUANTILES = (0.0, 0.01, 0.05, 0.2, 0.5)
"""Quantiles of the forecasts of an excess that are tried as floors y0."""


def choose_tunings(evidence: Evidence, claim: Claim, sampling: SamplingPlan | None = None) -> tuple[Tuning, ...]:
    """The grid point of every line of the claim, in the claim's order.

    Args:
        evidence: of all shards; for a sampled run, of the pilot windows only.
        claim: what is to be printed.
        sampling: the plan of a sampled run; the choice then minimises bound and sampling slack together.

    Returns:
        One tuning per line of ``claim.lines``. A line that cannot be computed says why in ``unavailable``.

    Raises:
        InputError: evidence without tokens, or a sampled run's evidence without windows.
        MismatchError: evidence that contradicts the claim.

    >>> from tokenbound.bounds import Claim, Evidence
    >>> evidence = Evidence.from_losses([0.2, 3.0] * 500, [0.3, 2.5] * 500, vocab_size=256)
    >>> claim = Claim(256, 256, code_length_bits=0, delta=0.05, num_tokens=1_000, methods=("freedman",))
    >>> (tuning,) = choose_tunings(evidence, claim)
    >>> tuning.method, tuning.degree, tuning.coefficients  # two entropies, two losses: a line forecasts them
    ('freedman', 1, (-0.1875, 1.2568359375))
    """
    _check(evidence, claim)
    slack = SlackModel.of(evidence, claim, sampling)
    tunings = {}
    if "freedman" in claim.methods:
        tunings["freedman"] = _choose_freedman(evidence, claim, slack)
    if "azuma" in claim.methods:
        choose = _choose_azuma_predictable if claim.has_alpha else _choose_azuma
        tunings["azuma"] = choose(evidence, claim, slack)
    return tuple(_kl_tuning(claim, k) if k is not None else tunings[method] for method, k in claim.lines)


def best_m0_index(kappa_of: Callable[[int], float], num_tokens: int) -> int:
    """J >= 1 that minimises any-time Azuma's gap, the cost of coding j included.

    Args:
        kappa_of: kappa in nats as a function of j.
        num_tokens: m.
    """
    centre = round(AZUMA_M0_STEPS_PER_OCTAVE * math.log2(num_tokens))
    candidates = range(max(1, centre - 8), max(1, centre) + 9)

    def gap(j: int) -> float:
        ratio = math.sqrt(num_tokens / 2.0 ** (j / AZUMA_M0_STEPS_PER_OCTAVE))
        return math.sqrt(kappa_of(j)) * (ratio + 1 / ratio)

    return min(candidates, key=gap)


def _check(evidence: Evidence, claim: Claim) -> None:
    if evidence.num_tokens == 0:
        raise InputError("there is no token with a finite loss to choose from")
    if evidence.vocab_size != claim.vocab_size:
        raise MismatchError(f"evidence was taken for V = {evidence.vocab_size}, the claim says {claim.vocab_size}")
    if claim.has_entropy and not evidence.has_entropy:
        raise MismatchError("the claim says that entropies were stored, but the evidence has none")
    if claim.has_alpha != (evidence.alpha_min is not None):
        raise MismatchError("claim and evidence disagree about the `alpha` column")
    if claim.alpha_min is not None and evidence.alpha_min is not None and evidence.alpha_min < claim.alpha_min:
        raise MismatchError(f"an alpha of {evidence.alpha_min} lies below the claimed alpha_min {claim.alpha_min}")


def _kl_tuning(claim: Claim, top_k: int) -> Tuning:
    return Tuning(
        method="kl",
        vocab_size=claim.vocab_size,
        top_k=top_k,
        tune_bits=kl_tune_bits() + claim.shared_bits,
        unavailable=None
        if claim.has_rank
        else "the losses have no `rank` column: which tokens ranked higher is not known",
    )


@dataclass(frozen=True)
class SlackModel:
    """Expected slack of the sampling sequence at the plan's target size; a guide for the choice, not a bound."""

    log_inverse_delta: float = 0.0
    draws: int = 0
    deviation_bits: float = 0.0
    max_unit_tokens: int = 1
    mean_unit_tokens: float = 1.0

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
        draws = max(sampling.target_units - sampling.pilot_units, 1)
        left = 1 - draws / sampling.num_units
        return cls(
            sampling.log_inverse_delta(claim),
            draws,
            deviation / LN2 * math.sqrt(max(left, 0.0)),
            sampling.max_unit_tokens,
            claim.num_tokens / sampling.num_units,
        )

    @classmethod
    def of_range(cls, claim: Claim, sampling: SamplingPlan | None) -> SlackModel:
        """As far as the range of the values decides it, where windows were not looked at."""
        if sampling is None or sampling.num_units <= sampling.pilot_units:
            return cls()
        draws = max(sampling.target_units - sampling.pilot_units, 1)
        tokens = claim.num_tokens / sampling.num_units
        return cls(sampling.log_inverse_delta(claim), draws, 0.0, sampling.max_unit_tokens, tokens)

    def bits(self, highest: float, mean: float) -> float:
        """Slack in bits per token of values up to ``highest`` with the given mean."""
        if not self.draws:
            return 0.0
        unit_range = max((highest - mean) * self.max_unit_tokens, 1e-12)
        free = math.sqrt(2 * self.log_inverse_delta / self.draws) / max(self.deviation_bits, 1e-12)
        stake = min(free, STAKE_CAP / unit_range)
        slack = stake * self.deviation_bits**2 / 2 + self.log_inverse_delta / (self.draws * stake)
        return slack / self.mean_unit_tokens


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

    def __init__(self, cells: Cells, claim: Claim, slack: SlackModel) -> None:
        """Search over these points for this claim."""
        self.cells, self.claim, self.slack = cells, claim, slack
        delta = corpus_delta(claim, sampled=slack.draws > 0)
        self.kappas = [
            kappa_nats(
                code_length_bits=claim.paid_code_bits,
                tune_bits=freedman_tune_bits(d, choose_alpha=not claim.has_alpha) + claim.shared_bits,
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
        lam = t / (smoothing.high - floor)
        terms = forecast - np.log1p(lam * (forecast - smoothing.loss)) / lam
        highest = floor - math.log1p(-t) / lam
        share = self.cells.worst_share
        mean = (1 - share) * float(self.cells.weight @ terms) + share * highest
        return mean + self.kappas[degree] / (lam * self.claim.num_tokens) + self.slack.bits(highest, mean)

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


def _choose_freedman(evidence: Evidence, claim: Claim, slack: SlackModel) -> Tuning:
    return freedman_tuning(FreedmanSearch(Cells.of(evidence, claim), claim, slack).best(), claim)


def freedman_tuning(best: Candidate, claim: Claim) -> Tuning:
    """The candidate as a paid tuning."""
    degree = len(best.coefficients) - 1
    return Tuning(
        method="freedman",
        vocab_size=claim.vocab_size,
        alpha=best.smoothing.alpha,
        alpha_slope=best.smoothing.slope,
        alpha_column=claim.has_alpha,
        t=best.t,
        lam=best.lam,
        degree=degree,
        coefficients=best.coefficients,
        y0=best.y0,
        tune_bits=freedman_tune_bits(degree, choose_alpha=not claim.has_alpha) + claim.shared_bits,
    )


def _choose_azuma(evidence: Evidence, claim: Claim, slack: SlackModel) -> Tuning:
    cells = Cells.of(evidence, claim)
    bits = azuma_tune_bits(m0_index=None, choose_alpha=True) + claim.shared_bits
    likely_m0 = elias_delta_bits(max(1, round(AZUMA_M0_STEPS_PER_OCTAVE * math.log2(claim.num_tokens))))
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=bits + likely_m0, delta=claim.delta)

    def value(alpha: float) -> float:
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        mean = (1 - cells.worst_share) * float(cells.weight @ cells.losses_bits(alpha, 0)) + cells.worst_share * high
        return mean + (high - low) * math.sqrt(kappa / (2 * claim.num_tokens)) + slack.bits(high, mean)

    alpha = min(ALPHA_GRID, key=value)
    return Tuning(method="azuma", vocab_size=claim.vocab_size, alpha=alpha, tune_bits=bits)


def _choose_azuma_predictable(evidence: Evidence, claim: Claim, slack: SlackModel) -> Tuning:
    bits = azuma_predictable_tune_bits() + claim.shared_bits
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=bits, delta=claim.delta)
    mean_square = evidence.sums["range_squared"] / 2.0**32 / evidence.num_tokens
    low, high = loss_interval_bits(alpha=claim.alpha_min or 0.5, vocab_size=claim.vocab_size)

    def value(lam: float) -> float:
        range_slack = slack.bits(high + lam * (high - low) ** 2 / 8, low)
        return lam * mean_square / 8 + kappa / (lam * claim.num_tokens) + range_slack

    lam = min(AZUMA_LAMBDA_GRID, key=value)
    return Tuning(
        method="azuma", vocab_size=claim.vocab_size, alpha=claim.alpha_min, alpha_column=True, lam=lam, tune_bits=bits
    )


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
