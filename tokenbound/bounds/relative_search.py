"""The grid point of a relative line: two smoothings, a forecast of the excess in two entropies, and a stake.

It is chosen on a subset of the tokens (:mod:`~tokenbound.bounds.relative_evidence`); the bound is then evaluated over
every token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tokenbound.bounds.claim import PROTOCOL, Claim, SamplingPlan, Tuning, corpus_delta
from tokenbound.bounds.codes import kappa_nats, relative_tune_bits
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import ALPHA_GRID, LN2, MAX_DEGREE, RELATIVE_DELTA_SHARE
from tokenbound.bounds.forecast_search import Candidate, FreedmanSearch
from tokenbound.bounds.lines.freedman import Freedman
from tokenbound.bounds.relative_evidence import RelativeEvidence
from tokenbound.bounds.search import (
    Cells,
    SlackModel,
    as_float16,
    best_t,
    floor_candidates,
    nearest_t,
    normal_solver,
)
from tokenbound.bounds.smoothing import smoothed_loss_bits
from tokenbound.bounds.theorems import excess_interval_bits
from tokenbound.errors import InputError

_COARSE_ALPHAS = ALPHA_GRID[::2]
_FINALISTS = 4


@dataclass(frozen=True)
class RelativeTuning:
    """The grid point of a relative line."""

    alpha: float
    """Smoothing weight of the model."""
    base_alpha: float
    """Smoothing weight of the base, in both parts."""
    t: float
    """lambda * (B - A0 - y0')."""
    lam: float
    """lambda per bit, derived from t."""
    degree: int
    """Total degree of the forecast's polynomial in the two entropies."""
    coefficients: tuple[float, ...]
    """float16 coefficients of H^i H0^j (bits), by total degree i + j, then by j."""
    y0: float
    """float16 floor of the forecasts, bits."""
    tune_bits: float
    """L_tune of the excess."""
    base: Tuning
    """The freedman line of the base itself, at base_alpha; its code is that of the protocol."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RelativeTuning:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "coefficients": tuple(data["coefficients"]), "base": Tuning.from_dict(data["base"])})

    @property
    def highest_excess_bits(self) -> float:
        """Largest possible value of d_i + v(lambda (Y_i - d_i)) / lambda."""
        lowest, high = self.interval_bits()
        return lowest - math.log1p(-self.lam * (high - lowest)) / self.lam

    def interval_bits(self) -> tuple[float, float]:
        """(y0', B - A0): between these lie the forecasts."""
        vocab = self.base.vocab_size
        low, high = excess_interval_bits(alpha=self.alpha, base_alpha=self.base_alpha, vocab_size=vocab)
        return max(low, self.y0), high


def excess_claim(claim: Claim) -> Claim:
    """The claim on the excess: its share of delta, the delta artifact's code."""
    return replace(claim, delta=claim.delta * RELATIVE_DELTA_SHARE)


def base_claim(claim: Claim) -> Claim:
    """The claim on the base's own risk: the rest of delta, and the code of the protocol alone.

    The base was fixed before the tokens were seen; how it is applied to them (windows, stride, dtype) was not.
    """
    delta, protocol = claim.delta * (1 - RELATIVE_DELTA_SHARE), claim.code_split.get(PROTOCOL, 0.0)
    return replace(claim, delta=delta, code_length_bits=protocol, code_split={PROTOCOL: protocol})


def excess_kappa(degree: int, claim: Claim, *, sampled: bool) -> float:
    """Kappa of the excess: the delta artifact's code, its share of delta, and the forecast's own length."""
    return kappa_nats(
        code_length_bits=claim.paid_code_bits,
        tune_bits=relative_tune_bits(degree) + claim.shared_bits,
        delta=corpus_delta(excess_claim(claim), sampled=sampled),
    )


def choose_relative(evidence: RelativeEvidence, claim: Claim, sampling: SamplingPlan | None = None) -> RelativeTuning:
    """The grid point of the relative line, excess and base together.

    Args:
        evidence: of all shards; of the pilot in a sampled run.
        claim: with `code_length_bits` that of the delta artifact and `num_bases` saying that there is a base.
        sampling: the plan of a sampled run.

    Raises:
        InputError: no token to choose from, or a claim without a base.

    >>> from tokenbound.bounds import RelativeEvidence
    >>> nll, base_nll = [0.2, 2.8] * 50_000, [0.2, 3.0] * 50_000
    >>> entropy = base_entropy = [0.3, 2.5] * 50_000
    >>> claim = Claim(256, 256, 400.0, 0.05, num_tokens=100_000, methods=("freedman",), num_bases=1)
    >>> tuning = choose_relative(RelativeEvidence.from_losses(nll, base_nll, entropy, base_entropy), claim)
    >>> tuning.degree, tuning.base.method
    (0, 'freedman')
    """
    if evidence.rows.shape[0] == 0:
        raise InputError("there is no token with finite losses to choose from")
    if claim.num_bases < 1:
        raise InputError("a relative line needs a base: set `num_bases` in the claim, which counts the line in K")
    return _RelativeSearch(evidence, claim, SlackModel.of_range(claim, sampling)).best()


class _RelativeSearch:
    def __init__(self, evidence: RelativeEvidence, claim: Claim, slack: SlackModel) -> None:
        self.claim, self.slack = claim, slack
        nll, base_nll, entropy, base_entropy = evidence.rows.astype(np.float64).T
        self.nll, self.base_nll = np.maximum(nll, 0.0), np.maximum(base_nll, 0.0)
        counts = np.ones(nll.size, dtype=np.int64)
        plain = replace(base_claim(claim), has_alpha=False, alpha_min=None, has_entropy=True)
        self.base_search = FreedmanSearch(Cells(counts, self.base_nll, base_entropy, 0.0, plain), plain, slack)
        self.weight = counts / counts.sum()
        self.bases = [entropy_basis(entropy / LN2, base_entropy / LN2, d) for d in range(MAX_DEGREE + 1)]
        self.solvers = [normal_solver(basis, self.weight) for basis in self.bases]
        self.kappas = [excess_kappa(d, claim, sampled=slack.draws > 0) for d in range(MAX_DEGREE + 1)]

    def best(self) -> RelativeTuning:
        vocab = self.claim.vocab_size
        losses = {a: smoothed_loss_bits(self.nll, alpha=a, vocab_size=vocab) for a in _COARSE_ALPHAS}
        base_losses = {a: smoothed_loss_bits(self.base_nll, alpha=a, vocab_size=vocab) for a in _COARSE_ALPHAS}
        base_values = {a: self.base_search.quick(a, 0)[0] for a in _COARSE_ALPHAS}
        pairs = [(a, b) for a in _COARSE_ALPHAS for b in _COARSE_ALPHAS]
        ranked = sorted(pairs, key=lambda ab: self.quick(ab, losses[ab[0]] - base_losses[ab[1]]) + base_values[ab[1]])
        found = [self.refined(ab, losses[ab[0]] - base_losses[ab[1]]) for ab in ranked[:_FINALISTS]]
        return min(found, key=lambda pair: pair[0])[1]

    def quick(self, alphas: tuple[float, float], excess: Floats) -> float:
        low, high = excess_interval_bits(alpha=alphas[0], base_alpha=alphas[1], vocab_size=self.claim.vocab_size)
        square = float(self.weight @ (excess - self.weight @ excess) ** 2)
        lam = min(math.sqrt(2 * self.kappas[0] / (self.claim.num_tokens * max(square, 1e-12))), 0.99 / (high - low))
        return float(self.weight @ excess) + lam * square / 2 + self.kappas[0] / (lam * self.claim.num_tokens)

    def refined(self, alphas: tuple[float, float], excess: Floats) -> tuple[float, RelativeTuning]:
        base = self.base_search.refined(self.base_search.smoothed(alphas[1], 0))
        options = [self.with_degree(alphas, excess, d) for d in range(MAX_DEGREE + 1)]
        value, t, lam, coefficients, y0 = min(options, key=lambda option: option[0])
        degree = [basis.shape[1] for basis in self.bases].index(len(coefficients))
        return value + base.value, self.tuning(alphas, t, lam, degree, coefficients, y0, base)

    def tuning(
        self,
        alphas: tuple[float, float],
        t: float,
        lam: float,
        degree: int,
        coefficients: tuple[float, ...],
        y0: float,
        base: Candidate,
    ) -> RelativeTuning:
        freedman = Freedman()
        return RelativeTuning(
            alpha=alphas[0],
            base_alpha=alphas[1],
            t=t,
            lam=lam,
            degree=degree,
            coefficients=coefficients,
            y0=y0,
            tune_bits=relative_tune_bits(degree) + self.claim.shared_bits,
            base=freedman.charged(freedman.tuning(base, self.base_search.claim), self.base_search.claim),
        )

    def with_degree(
        self, alphas: tuple[float, float], excess: Floats, degree: int
    ) -> tuple[float, float, float, tuple[float, ...], float]:
        low, high = excess_interval_bits(alpha=alphas[0], base_alpha=alphas[1], vocab_size=self.claim.vocab_size)
        basis = self.bases[degree]
        fitted = self.solvers[degree] @ (basis.T @ (self.weight * excess))
        coefficients = as_float16(fitted)
        options = []
        guess = basis @ coefficients
        if not np.isfinite(coefficients).all():
            return math.inf, 0.5, 0.5 / (high - low), (0.0,) * len(fitted), low
        for floor in (low, *floor_candidates(np.maximum(guess, low), self.weight)):
            y0 = float(np.float16(floor))
            lowest = max(low, y0)
            if not lowest < high:
                continue
            value, t = self.best_t(excess, np.minimum(np.maximum(guess, lowest), high), lowest, high, degree)
            options.append((value, t, t / (high - lowest), tuple(coefficients.tolist()), y0))
        return min(options, key=lambda option: option[0])

    def best_t(self, excess: Floats, forecast: Floats, lowest: float, high: float, degree: int) -> tuple[float, float]:
        kappa, m = self.kappas[degree], self.claim.num_tokens

        def value(t: float) -> float:
            lam = t / (high - lowest)
            mean = float(self.weight @ (forecast - np.log1p(lam * (forecast - excess)) / lam))
            return mean + kappa / (lam * m) + self.slack.bits(lowest - math.log1p(-t) / lam, mean)

        square = float(self.weight @ (forecast - excess) ** 2)
        lam = math.sqrt(2 * kappa / (m * max(square, 1e-12)))
        return best_t(value, nearest_t(lam * (high - lowest)))


def entropy_basis(entropy_bits: Floats, base_entropy_bits: Floats, degree: int) -> Floats:
    """[T, (degree + 1)(degree + 2) / 2] monomials of the two entropies, by total degree."""
    columns = [entropy_bits ** (d - j) * base_entropy_bits**j for d in range(degree + 1) for j in range(d + 1)]
    return np.stack(columns, axis=1)
