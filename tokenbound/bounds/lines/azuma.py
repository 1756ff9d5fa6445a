"""Azuma-Hoeffding: the mean loss, and what its range allows.

Theorem. Let l_i in [A_i, B_i] with D_i = B_i - A_i known before token i. With probability at least 1 - delta, for all
hypotheses and all m at once and any one lambda > 0 that is paid for,

    R <= R^ + lambda mean(D_i^2) / 8 + kappa / (lambda m).

Proof. By Hoeffding's lemma E[exp(lambda (mu_i - l_i)) | past] <= exp(lambda^2 D_i^2 / 8), so that
exp(lambda sum (mu_i - l_i) - lambda^2 sum D_i^2 / 8) is a nonnegative supermartingale started at 1. Ville's inequality
keeps it below exp(kappa) for all m at once with probability 1 - exp(-kappa); the union over hypotheses and tunings is
in kappa (Azuma 1967; Howard et al. 2020; Lotfi et al. 2024, arXiv 2407.18158, theorem 3.1).

Three forms of it are printed.

* A constant alpha, any m: D is constant and lambda = sqrt(8 kappa / m0) / D with m0 = 2^(j/4), where j is paid for.
  The gap is D sqrt(kappa / (2m)) times (sqrt(m / m0) + sqrt(m0 / m)) / 2, nearly 1 for the best j.
* A constant alpha and an m declared before the data was seen: the same with m0 = m, and no j to pay for.
* The alphas of a smoothing head: D_i follows the token's own alpha; lambda comes from a grid.

The functions :func:`~tokenbound.bounds.theorems.azuma_bound` and its siblings compute the same from plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tokenbound.bounds.blocks import Block, Evaluator, TokenSums, log_of_product, required
from tokenbound.bounds.claim import Claim, Line, Tuning
from tokenbound.bounds.coded import require_grid_alpha, require_member
from tokenbound.bounds.codes import azuma_predictable_tune_bits, azuma_tune_bits, elias_delta_bits, kappa_nats
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import ALPHA_GRID, AZUMA_LAMBDA_GRID, AZUMA_M0_STEPS_PER_OCTAVE, LN2
from tokenbound.bounds.curves import EvidenceView, LineCurves, sweep
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines.base import TokenBound
from tokenbound.bounds.printing import LineValue, Measured, alpha_words, line_kappa
from tokenbound.bounds.search import Cells, SlackModel
from tokenbound.bounds.smoothing import loss_interval_bits, loss_intervals_bits
from tokenbound.bounds.theorems import azuma_anytime_gap


class Azuma(TokenBound):
    """Azuma's bound on the loss: z_i = l_i, or l_i + lambda D_i^2 / 8 with the alphas of a smoothing head."""

    name = "azuma"
    smooths_by_head = True

    def choose(self, evidence: Evidence, claim: Claim, slack: SlackModel, top_k: int | None) -> Tuning:
        """The alpha of the grid at which the bound is smallest; with a smoothing head, the lambda."""
        if claim.has_alpha:
            lam = _best_lambda(evidence, claim, slack)
            return Tuning(self.name, claim.vocab_size, alpha=claim.alpha_min, alpha_column=True, lam=lam)
        return Tuning(self.name, claim.vocab_size, alpha=_best_alpha(evidence, claim, slack))

    def code_bits(self, tuning: Tuning) -> float:
        """Alpha from its grid, or lambda from its own. The j of m0 is chosen, and charged, where m is known."""
        if tuning.alpha_column:
            return azuma_predictable_tune_bits()
        return azuma_tune_bits(m0_index=None, choose_alpha=True)

    def require_coded(self, tuning: Tuning, claim: Claim) -> None:
        """A constant alpha of the grid, or the claimed alpha_min with a lambda of the grid."""
        require_member("alpha_slope", tuning.alpha_slope, (0,))
        if tuning.alpha_column:
            require_member("alpha", tuning.alpha, (claim.alpha_min,))
            require_member("lambda", tuning.lam, AZUMA_LAMBDA_GRID)
        else:
            require_grid_alpha("alpha", tuning.alpha)

    def evaluator(self, tuning: Tuning) -> Evaluator:
        """Sums of the smoothed losses."""
        return HeadSmoothedLoss(tuning) if tuning.alpha_column else SmoothedLoss(tuning)

    def value(self, tuning: Tuning, measured: Measured, claim: Claim) -> LineValue:
        """The mean loss plus both parts of the gap, in the form that the claim allows."""
        if tuning.alpha_column:
            return _predictable_value(tuning, measured, claim)
        alpha = required(tuning.alpha, "alpha")
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        variance, complexity, bits, form = _gap(high - low, tuning.tune_bits, claim, measured)
        value = measured.value + measured.slack + variance + complexity
        return LineValue(value, variance, complexity, bits, {"alpha": alpha, "loss_range_bits": high - low, **form})

    def row_name(self, line: Line) -> str:
        """The name, and whose smoothing it is where there are several."""
        return f"{self.name}{alpha_words(line)}"

    def curves(self, line: Line, view: EvidenceView) -> LineCurves:
        """Against m with alpha chosen again, and against alpha."""
        if not view.is_smoothed_as(line):
            return super().curves(line, view)
        alphas = view.alphas(float(line.parameters["alpha"]))
        means, ranges = (np.array(column) for column in zip(*(_row(alpha, view) for alpha in alphas), strict=True))

        def at_size(size: float) -> Floats:
            return np.asarray(means + ranges * math.sqrt(line.kappa_nats / (2 * size)))

        chosen = alphas.index(float(line.parameters["alpha"]))
        by_alpha = None if view.claim.has_alpha else sweep(alphas, at_size(view.claim.num_tokens), chosen)
        return LineCurves(lambda size: float(at_size(size).min()), by_alpha)


class SmoothedLoss:
    """z_i = l_i at a constant alpha."""

    def __init__(self, tuning: Tuning) -> None:
        """At the alpha of the tuning."""
        alpha = required(tuning.alpha, "alpha")
        self.weight, self.uniform = 1 - alpha, alpha / tuning.vocab_size
        self.highest = loss_interval_bits(alpha=alpha, vocab_size=tuning.vocab_size)[1]

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """One logarithm per group of tokens, or per token where each is asked for."""
        smoothed = block.scratch[0]
        np.multiply(block.likelihood, self.weight, out=smoothed)
        np.add(smoothed, self.uniform, out=smoothed)
        if per_token is None:
            total = -log_of_product(smoothed) / LN2
        else:
            np.multiply(np.log(smoothed, out=smoothed), -1 / LN2, out=per_token)
            total = float(per_token.sum())
        return TokenSums(total, total)

    def worst(self) -> TokenSums:
        """B."""
        return TokenSums(self.highest, self.highest)


class HeadSmoothedLoss:
    """z_i = l_i + lambda D_i^2 / 8 with the alphas of a smoothing head."""

    def __init__(self, tuning: Tuning) -> None:
        """At the lambda of the tuning."""
        self.vocab_size, self.lam = tuning.vocab_size, required(tuning.lam, "lam")
        self.alpha_min = required(tuning.alpha, "alpha")
        low, self.highest = loss_interval_bits(alpha=self.alpha_min, vocab_size=self.vocab_size)
        self.worst_value = self.highest + self.lam * (self.highest - low) ** 2 / 8

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """Loss and range of each token follow its own alpha."""
        alpha = block.head_alphas(self.alpha_min)
        loss = np.log((1 - alpha) * block.likelihood + alpha / self.vocab_size) / -LN2
        low, high = loss_intervals_bits(alpha=alpha, vocab_size=self.vocab_size)
        value = loss + self.lam / 8 * np.square(high - low)
        if per_token is not None:
            np.copyto(per_token, value)
        return TokenSums(float(value.sum()), float(loss.sum()))

    def worst(self) -> TokenSums:
        """The highest loss at alpha_min, with the widest range."""
        return TokenSums(self.worst_value, self.highest)


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


def _gap(
    loss_range: float, paid: float, claim: Claim, measured: Measured
) -> tuple[float, float, float, dict[str, object]]:
    """Variance and complexity of a constant alpha, what they cost to tune, and the form in words."""
    m = claim.num_tokens
    if claim.declared_tokens == m:
        gap = loss_range * math.sqrt(line_kappa(paid, claim, sampled=measured.sampled) / (2 * m))
        return gap / 2, gap / 2, paid, {"form": "fixed m"}

    def kappa_of(j: int) -> float:
        return line_kappa(paid + elias_delta_bits(j), claim, sampled=measured.sampled)

    j = best_m0_index(kappa_of, m)
    variance, complexity = azuma_anytime_gap(loss_range, kappa_of(j), m, j)
    return variance, complexity, paid + elias_delta_bits(j), {"form": "any m", "m0_index": j}


def _predictable_value(tuning: Tuning, measured: Measured, claim: Claim) -> LineValue:
    lam = required(tuning.lam, "lam")
    complexity = line_kappa(tuning.tune_bits, claim, sampled=measured.sampled) / (lam * claim.num_tokens)
    value = measured.value + measured.slack + complexity
    form = {"alpha": tuning.alpha, "alpha_from": "column", "lambda": lam, "form": "predictable ranges, any m"}
    return LineValue(value, measured.value - measured.empirical, complexity, tuning.tune_bits, form)


def _best_alpha(evidence: Evidence, claim: Claim, slack: SlackModel) -> float:
    cells = Cells.of(evidence, claim)
    bits = azuma_tune_bits(m0_index=None, choose_alpha=True) + claim.shared_bits
    likely_m0 = elias_delta_bits(max(1, round(AZUMA_M0_STEPS_PER_OCTAVE * math.log2(claim.num_tokens))))
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=bits + likely_m0, delta=claim.delta)

    def value(alpha: float) -> float:
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        mean = cells.mean_loss_bits(alpha, high)
        return mean + (high - low) * math.sqrt(kappa / (2 * claim.num_tokens)) + slack.bits(high, mean)

    return min(ALPHA_GRID, key=value)


def _best_lambda(evidence: Evidence, claim: Claim, slack: SlackModel) -> float:
    bits = azuma_predictable_tune_bits() + claim.shared_bits
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=bits, delta=claim.delta)
    mean_square = evidence.mean_square_range
    low, high = loss_interval_bits(alpha=claim.alpha_min or 0.5, vocab_size=claim.vocab_size)

    def value(lam: float) -> float:
        range_slack = slack.bits(high + lam * (high - low) ** 2 / 8, low)
        return lam * mean_square / 8 + kappa / (lam * claim.num_tokens) + range_slack

    return min(AZUMA_LAMBDA_GRID, key=value)


def _row(alpha: float, view: EvidenceView) -> tuple[float, float]:
    """Mean loss with its slack at one alpha, and the range D; of a smoothing head its root mean square."""
    low, high = loss_interval_bits(alpha=alpha, vocab_size=view.claim.vocab_size)
    mean = view.cells.mean_loss_bits(alpha, high)
    spread = math.sqrt(view.evidence.mean_square_range) if view.claim.has_alpha else high - low
    return mean + view.slack.bits(high, mean), spread
