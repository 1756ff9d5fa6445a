"""A Freedman-type bound with predictable forecasts: the mean loss, and what the misses of a forecast allow.

Theorem. Let Y_i be a forecast of l_i made from what came before token i, clipped to [A_i, B_i] and to a floor y0, and
v(d) = d - ln(1 + d). With probability at least 1 - delta, for all hypotheses and all m at once and any one lambda that
is paid for, with lambda (B - y0') < 1,

    R <= R^ + mean(v(lambda (Y_i - l_i))) / lambda + kappa / (lambda m).

Proof. 1 + lambda (Y_i - l_i) > 0 has the conditional mean 1 + lambda (Y_i - mu_i) <= exp(lambda (Y_i - mu_i)), so the
product of (1 + lambda (Y_i - l_i)) exp(-lambda (Y_i - mu_i)) is a nonnegative supermartingale started at 1; Ville's
inequality (Fan et al. 2015; Waudby-Smith and Ramdas 2024 for the betting form).

The better the forecast, the smaller v, which is about d^2 / 2. The forecast is a polynomial of the predictive entropy
H_i, and the smoothing weight may follow the entropy too: both are known before the token. Everything that is chosen
(alpha and its slope, t = lambda (B - y0'), the degree, the coefficients and y0 as float16) is a word of a code.

The sum is computed in its betting form: since l + v(lambda (Y - l)) / lambda = Y - ln(1 + lambda (Y - l)) / lambda, a
token contributes its forecast and one factor; factors are multiplied in groups before the logarithm.

:func:`~tokenbound.bounds.theorems.freedman_bound` computes the same from plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tokenbound.bounds.blocks import Block, Evaluator, TokenSums, log_of_product, required
from tokenbound.bounds.claim import AlphaKind, Claim, Line, Tuning
from tokenbound.bounds.coded import require_forecast, require_grid_alpha, require_member, require_stake
from tokenbound.bounds.codes import freedman_tune_bits
from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.constants import ALPHA_LEVELS, ALPHA_SLOPES, LN2, T_GRID
from tokenbound.bounds.curves import EvidenceView, LineCurves, sweep
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.forecast_search import Candidate, FreedmanSearch
from tokenbound.bounds.lines.base import TokenBound
from tokenbound.bounds.printing import BUDGET, LineValue, Measured, alpha_words, line_kappa, yardsticks
from tokenbound.bounds.rounding import arithmetic_guard
from tokenbound.bounds.search import Cells, SlackModel
from tokenbound.bounds.smoothing import alpha_levels, loss_interval_bits, loss_intervals_bits
from tokenbound.errors import InputError


class Freedman(TokenBound):
    """The bound on the loss that forecasts tighten: z_i = Y_i - ln(1 + lambda (Y_i - l_i)) / lambda."""

    name = "freedman"
    smooths_by_head = True
    has_budget = True

    def compared_alphas(self, claim: Claim) -> tuple[AlphaKind, ...]:
        """Beside a smoothing head: the best constant alpha, and the best alpha(H) where entropies were stored."""
        if self.name not in claim.methods:
            return ()
        return ("constant", "entropy") if claim.has_entropy else ("constant",)

    def choose(self, evidence: Evidence, claim: Claim, slack: SlackModel, top_k: int | None) -> Tuning:
        """The smoothing, forecast and stake at which the bound is smallest, sampling slack included."""
        search = FreedmanSearch(Cells.of(evidence, claim), claim, slack, has_budget=slack.is_sampled)
        best = search.best()
        return replace(self.tuning(best, claim), budget=search.budget(best))

    def tuning(self, best: Candidate, claim: Claim) -> Tuning:
        """A candidate of the search as a tuning, without a budget."""
        return Tuning(
            method=self.name,
            vocab_size=claim.vocab_size,
            alpha=best.smoothing.alpha,
            alpha_slope=best.smoothing.slope,
            alpha_column=claim.has_alpha,
            t=best.t,
            lam=best.lam,
            degree=len(best.coefficients) - 1,
            coefficients=best.coefficients,
            y0=best.y0,
        )

    def code_bits(self, tuning: Tuning) -> float:
        """Smoothing, t, kind and degree of the forecast, its coefficients and its floor."""
        return freedman_tune_bits(tuning.degree, choose_alpha=not tuning.alpha_column)

    def require_coded(self, tuning: Tuning, claim: Claim) -> None:
        """Grid points, float16 coefficients, and a lambda that follows from t."""
        require_member("alpha_slope", tuning.alpha_slope, ALPHA_SLOPES)
        if tuning.alpha_column:
            require_member("alpha", tuning.alpha, (claim.alpha_min,))
        else:
            require_grid_alpha("alpha", tuning.alpha)
        low, high = loss_interval_bits(alpha=required(tuning.alpha, "alpha"), vocab_size=claim.vocab_size)
        require_forecast(tuning.coefficients, tuning.degree + 1, tuning.y0)
        require_stake(tuning.t, tuning.lam, high - max(low, required(tuning.y0, "y0")))

    def evaluator(self, tuning: Tuning) -> Evaluator:
        """Sums in the betting form."""
        return ForecastLoss(tuning)

    def value(self, tuning: Tuning, measured: Measured, claim: Claim) -> LineValue:
        """The mean of z_i plus the price; beside it the gap that a free lambda would leave."""
        lam = required(tuning.lam, "lam")
        kappa = line_kappa(tuning.tune_bits, claim, sampled=measured.sampled)
        complexity = kappa / (lam * claim.num_tokens)
        value = measured.value + measured.slack + complexity
        variance = measured.value - measured.empirical
        return LineValue(
            value,
            variance,
            complexity,
            tuning.tune_bits,
            _parameters(tuning, lam, claim),
            yardsticks(variance + complexity, measured.square, kappa, claim.num_tokens),
            guard=arithmetic_guard(value, lam, required(tuning.t, "t")),
            notes=() if claim.has_entropy else (NO_ENTROPY,),
        )

    def row_name(self, line: Line) -> str:
        """The name, and whose smoothing it is where there are several."""
        return f"{self.name}{alpha_words(line)}"

    def curves(self, line: Line, view: EvidenceView) -> LineCurves:
        """Against m, alpha and lambda, with the forecast fitted again at the printed degree, slope and floor."""
        if not view.is_smoothed_as(line):
            return super().curves(line, view)
        surface = _Surface(line, view)
        by_alpha = None if view.claim.has_alpha else sweep(surface.alphas, surface.values.min(axis=1), surface.chosen)
        stakes, values = surface.lam[surface.chosen].tolist(), surface.values[surface.chosen]
        return LineCurves(surface.at_size, by_alpha, sweep(stakes, values, surface.chosen_t))

    def forecast_bits(self, line: Line, entropy_bits: Floats, vocab_size: int) -> Floats | None:
        """The clipped polynomial."""
        low, high = loss_interval_bits(alpha=_number(line, "alpha"), vocab_size=vocab_size)
        coefficients = np.asarray(line.parameters["forecast_coefficients"], dtype=np.float64)
        guess = np.polynomial.polynomial.polyval(entropy_bits, coefficients)
        return np.asarray(np.clip(guess, max(low, _number(line, "forecast_floor_bits")), high))


NO_ENTROPY = "forecasts and smoothing are constant: the losses have no `entropy` column"


class ForecastLoss:
    """Sums of z_i over blocks.

    Works in nats with the logarithm g = ln p~ = -l, so that Y - l = Y + g; sums are converted to bits at the end.
    """

    def __init__(self, tuning: Tuning) -> None:
        """At the grid point of the tuning."""
        self.alpha, self.vocab_size = required(tuning.alpha, "alpha"), tuning.vocab_size
        self.slope, self.column = tuning.alpha_slope, tuning.alpha_column
        self.lam_bits = required(tuning.lam, "lam")
        low, high = loss_interval_bits(alpha=self.alpha, vocab_size=self.vocab_size)
        self.floor_bits = max(low, required(tuning.y0, "y0"))
        self.highest_bits = high
        if not self.lam_bits * (high - self.floor_bits) < 1:
            raise InputError(f"lambda {self.lam_bits} * (B - y0') must be below 1")
        self.floor, self.high = self.floor_bits * LN2, high * LN2
        self.coefficients = [c * LN2 for c in tuning.coefficients]
        self.lam = self.lam_bits / LN2
        self.levels = alpha_levels(self.alpha, self.slope)
        lows, highs = loss_intervals_bits(alpha=self.levels, vocab_size=self.vocab_size)
        self.level_lows, self.level_highs = np.maximum(lows * LN2, self.floor), highs * LN2
        self.level_weights, self.level_uniforms = 1 - self.levels, self.levels / self.vocab_size
        self.level_scale = ALPHA_LEVELS / math.log2(self.vocab_size)

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """Smooth, forecast, then one factor per token."""
        log_loss, forecast, factor = block.scratch
        level, alpha = self._smooth(block, log_loss)
        np.log(log_loss, out=log_loss)
        self._forecast(block, forecast, level, alpha)
        loss_sum, forecast_sum = -float(log_loss.sum()), float(forecast.sum())
        np.add(forecast, log_loss, out=log_loss)  # Y - l
        square = float(np.dot(log_loss, log_loss))
        np.multiply(log_loss, self.lam, out=factor)
        np.add(factor, 1.0, out=factor)
        if per_token is None:
            value = forecast_sum - log_of_product(factor) / self.lam
        else:
            np.log(factor, out=factor)
            np.multiply(factor, -1 / self.lam, out=factor)
            np.add(factor, forecast, out=factor)
            np.multiply(factor, 1 / LN2, out=per_token)
            value = float(per_token.sum()) * LN2
        return TokenSums(value / LN2, loss_sum / LN2, square / LN2**2)

    def worst(self) -> TokenSums:
        """The highest loss against the lowest forecast."""
        distance = self.highest_bits - self.floor_bits
        value = self.floor_bits - math.log1p(-self.lam_bits * distance) / self.lam_bits
        return TokenSums(value, self.highest_bits, distance**2)

    def _smooth(self, block: Block, smoothed: Floats) -> tuple[Ints | None, Floats | None]:
        """Smoothed probabilities into ``smoothed``; the level of alpha(H), or the alphas of a head, where used."""
        if self.column:
            alpha = block.head_alphas(self.alpha)
            np.multiply(block.likelihood, 1 - alpha, out=smoothed)
            np.add(smoothed, alpha / self.vocab_size, out=smoothed)
            return None, alpha
        if self.slope == 0:
            np.multiply(block.likelihood, 1 - self.alpha, out=smoothed)
            np.add(smoothed, self.alpha / self.vocab_size, out=smoothed)
            return None, None
        if block.entropy_bits is None:
            raise InputError("alpha(H) needs the `entropy` column")
        scratch = block.scratch[2]
        np.multiply(block.entropy_bits, self.level_scale, out=scratch)
        np.minimum(np.maximum(scratch, 0.0, out=scratch), ALPHA_LEVELS - 1, out=scratch)
        level = scratch.astype(np.int64)
        np.multiply(block.likelihood, np.take(self.level_weights, level, out=scratch, mode="clip"), out=smoothed)
        np.add(smoothed, np.take(self.level_uniforms, level, out=scratch, mode="clip"), out=smoothed)
        return level, None

    def _forecast(self, block: Block, forecast: Floats, level: Ints | None, alpha: Floats | None) -> None:
        """The polynomial by Horner's rule, clipped to the interval of each token's own alpha."""
        if len(self.coefficients) == 1:
            forecast.fill(self.coefficients[0])
        elif block.entropy_bits is None:
            raise InputError("a forecast of degree 1 or more needs the `entropy` column")
        else:
            np.multiply(block.entropy_bits, self.coefficients[-1], out=forecast)
            for coefficient in self.coefficients[-2:0:-1]:
                np.add(forecast, coefficient, out=forecast)
                np.multiply(forecast, block.entropy_bits, out=forecast)
            np.add(forecast, self.coefficients[0], out=forecast)
        low: float | Floats = self.floor
        high: float | Floats = self.high
        if level is not None:
            low, high = self.level_lows[level], self.level_highs[level]
        elif alpha is not None:
            lows, highs = loss_intervals_bits(alpha=alpha, vocab_size=self.vocab_size)
            low, high = np.maximum(lows * LN2, self.floor), highs * LN2
        np.maximum(forecast, low, out=forecast)
        np.minimum(forecast, high, out=forecast)


class _Surface:
    """Values [A, T] of a printed line over alphas and t, by the evidence.

    At another m other degrees without a floor may be better: those are tabled too, on every second alpha and t.
    """

    def __init__(self, line: Line, view: EvidenceView) -> None:
        self.claim, self.search = (
            view.claim,
            FreedmanSearch(view.cells, view.claim, view.slack, has_budget=BUDGET in line.parameters),
        )
        alpha, max_degree = _number(line, "alpha"), view.cells.max_degree
        degree, floor = min(int(_number(line, "forecast_degree")), max_degree), _number(line, "forecast_floor_bits")
        self.slope, self.alphas = int(_number(line, "alpha_slope")), view.alphas(alpha)
        self.lam, self.values = self._table(self.alphas, T_GRID, degree, floor)
        coarse = [(d, *self._table(self.alphas[::2], T_GRID[1::2], d, 0.0)) for d in range(max_degree + 1)]
        kappas = self.search.kappas
        self.tables = [(kappas[d], lam, values) for d, lam, values in ((degree, self.lam, self.values), *coarse)]
        self.chosen = self.alphas.index(alpha)
        self.chosen_t = int(np.argmin(np.abs(np.array(T_GRID) - _number(line, "t"))))

    def at_size(self, size: float) -> float:
        """The smallest value of the tables at another m."""
        change = 1 / size - 1 / self.claim.num_tokens
        return min(float((values + kappa / lam * change).min()) for kappa, lam, values in self.tables)

    def _table(self, alphas: Sequence[float], ts: Sequence[float], degree: int, floor: float) -> tuple[Floats, Floats]:
        rows = [self._row(alpha, ts, degree, floor) for alpha in alphas]
        return np.array([lam for lam, _ in rows]), np.array([values for _, values in rows])

    def _row(self, alpha: float, ts: Sequence[float], degree: int, floor: float) -> tuple[list[float], list[float]]:
        smoothing = self.search.smoothed(alpha, self.slope)
        lowest = max(smoothing.low, floor)
        coefficients = self.search.cells.least_squares(smoothing.loss, degree)
        forecast = self.search.forecast(coefficients, smoothing, lowest)
        values = [self.search.value(smoothing, forecast, t, lowest, degree) for t in ts]
        return [t / (smoothing.high - lowest) for t in ts], values


def _parameters(tuning: Tuning, lam: float, claim: Claim) -> dict[str, object]:
    """The grid point in words."""
    return {
        "alpha": tuning.alpha,
        "alpha_slope": tuning.alpha_slope,
        "alpha_from": "column" if tuning.alpha_column else {"any": "grid"}.get(claim.alphas, claim.alphas),
        "t": tuning.t,
        "lambda": lam,
        "forecast_degree": tuning.degree,
        "forecast_coefficients": list(tuning.coefficients),
        "forecast_floor_bits": tuning.y0,
    }


def _number(line: Line, name: str) -> float:
    """A numeric parameter of a printed line."""
    return float(line.parameters[name])
