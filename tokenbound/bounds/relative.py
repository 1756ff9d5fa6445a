"""The relative bound: a model given as a small delta on a base that was fixed independently of the scored tokens.

R(h) = R(h0) + [R(h) - R(h0)]. The base pays no code but that of the protocol, so its own risk is bounded tightly; the
excess d_i = l_i(h) - l_i(h0) varies little where the two models agree, so that the gap for the delta's code shrinks
with its standard deviation. delta is split in advance; both parts use the same base_alpha, and each pays for its own
tuning.

The tuning is chosen on a subset of the tokens (:mod:`~tokenbound.bounds.relative_evidence`); the bound is then
evaluated over every token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tokenbound.bounds.certify import yardsticks
from tokenbound.bounds.choice import (
    Candidate,
    Cells,
    FreedmanSearch,
    SlackModel,
    as_float16,
    best_t,
    floor_candidates,
    freedman_tuning,
    nearest_t,
    normal_solver,
)
from tokenbound.bounds.claim import PROTOCOL, Claim, Line, SamplingPlan, Tuning, corpus_delta
from tokenbound.bounds.coded import require_coded, require_forecast, require_grid_alpha, require_paid, require_stake
from tokenbound.bounds.codes import kappa_nats, relative_tune_bits
from tokenbound.bounds.columns import Floats, window_sums, worst_case_windows
from tokenbound.bounds.constants import (
    ALPHA_GRID,
    BLOCK_TOKENS,
    LN2,
    MAX_DEGREE,
    RELATIVE_DELTA_SHARE,
)
from tokenbound.bounds.exact import LineSums, highest_value, line_sums, merge_sums
from tokenbound.bounds.relative_evidence import RelativeEvidence, check_pair
from tokenbound.bounds.rounding import arithmetic_guard, round_up
from tokenbound.bounds.sampling import SamplingPath, path_of_windows
from tokenbound.bounds.smoothing import smoothed_loss_bits
from tokenbound.bounds.theorems import excess_interval_bits
from tokenbound.errors import InputError, MismatchError

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
        self.bases = [_basis(entropy / LN2, base_entropy / LN2, d) for d in range(MAX_DEGREE + 1)]
        self.solvers = [normal_solver(basis, self.weight) for basis in self.bases]
        self.kappas = [_excess_kappa(d, claim, sampled=slack.draws > 0) for d in range(MAX_DEGREE + 1)]

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
        return RelativeTuning(
            alpha=alphas[0],
            base_alpha=alphas[1],
            t=t,
            lam=lam,
            degree=degree,
            coefficients=coefficients,
            y0=y0,
            tune_bits=relative_tune_bits(degree) + self.claim.shared_bits,
            base=freedman_tuning(base, self.base_search.claim),
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


@dataclass(frozen=True)
class RelativeSums:
    """Exact sums of a relative line over some shards."""

    excess: LineSums
    """One line: z_i, d_i and (Y_i - d_i)^2 of the excess."""
    base: LineSums
    """One line: the base's own."""

    def collapsed(self) -> RelativeSums:
        """The same sums as of one shard, each total rounded once."""
        return RelativeSums(self.excess.collapsed(), self.base.collapsed())


def relative_sums(
    tuning: RelativeTuning,
    nll: ArrayLike,
    base_nll: ArrayLike,
    entropy: ArrayLike,
    base_entropy: ArrayLike,
    *,
    window_lengths: ArrayLike | None = None,
    worst_case: ArrayLike | int | None = None,
) -> RelativeSums:
    """Evaluate a relative line over one shard.

    Args:
        tuning: what :func:`choose_relative` chose.
        nll: [T] losses of the model, nats.
        base_nll: [T] losses of the base on the same tokens, nats.
        entropy: [T] entropies of the model's predictions, nats.
        base_entropy: [T] entropies of the base's, nats.
        window_lengths: [W] tokens of each window, for sampled runs; the windows' sums are then kept.
        worst_case: tokens that count at the worst case; their number, or [W] per window.

    Raises:
        InputError: arrays of different lengths, or values that are not finite.

    >>> from tokenbound.bounds import RelativeEvidence
    >>> nll, base_nll = [0.2, 2.8] * 50_000, [0.2, 3.0] * 50_000
    >>> entropy = base_entropy = [0.3, 2.5] * 50_000
    >>> claim = Claim(256, 256, 400.0, 0.05, num_tokens=100_000, methods=("freedman",), num_bases=1)
    >>> tuning = choose_relative(RelativeEvidence.from_losses(nll, base_nll, entropy, base_entropy), claim)
    >>> sums = relative_sums(tuning, nll, base_nll, entropy, base_entropy)
    >>> round(sums.excess.mean(0, "loss"), 3)  # of the smoothed losses, bits
    -0.783
    """
    nll_, base_nll_, entropy_, base_entropy_ = check_pair(nll, base_nll, entropy, base_entropy)
    lengths = None if window_lengths is None else np.asarray(window_lengths, dtype=np.int64)
    failed, worst_tokens = worst_case_windows(worst_case, lengths)
    base = line_sums([tuning.base], base_nll_, base_entropy_, window_lengths=window_lengths, worst_case=worst_case)
    per_token = None if lengths is None else np.empty(nll_.size)
    blocks = []
    for start in range(0, nll_.size, BLOCK_TOKENS):
        part = slice(start, start + BLOCK_TOKENS)
        value, excess, square = _excess_block(tuning, nll_[part], base_nll_[part], entropy_[part], base_entropy_[part])
        blocks.append((float(value.sum()), float(excess.sum()), float(square.sum())))
        if per_token is not None:
            per_token[part] = value
    lowest, high = tuning.interval_bits()
    worst = np.array([tuning.highest_excess_bits, high, (high - lowest) ** 2])
    totals = np.array([math.fsum(column) for column in zip(*blocks, strict=True)] if blocks else [0.0] * 3)
    totals = totals + worst * worst_tokens
    windows = None
    if per_token is not None and lengths is not None:
        row = window_sums(per_token, lengths if failed is None else np.where(failed, 0, lengths))
        if failed is not None:
            row[failed] = worst[0] * lengths[failed]
        windows = row[None]
    nll_sum = float(nll_.sum(dtype=np.float64))
    tokens = int(nll_.size) + worst_tokens
    excess_sums = LineSums(tokens, worst_tokens, totals[None, None], np.array([nll_sum]), windows, lengths)
    return RelativeSums(excess_sums, base)


def merge_relative_sums(parts: Sequence[RelativeSums]) -> RelativeSums:
    """The sums of all shards together; for sampled runs in draw order.

    Args:
        parts: sums of the same tuning.

    >>> from tokenbound.bounds import RelativeEvidence
    >>> nll, base_nll = [0.2, 2.8] * 50_000, [0.2, 3.0] * 50_000
    >>> entropy = base_entropy = [0.3, 2.5] * 50_000
    >>> claim = Claim(256, 256, 400.0, 0.05, num_tokens=100_000, methods=("freedman",), num_bases=1)
    >>> tuning = choose_relative(RelativeEvidence.from_losses(nll, base_nll, entropy, base_entropy), claim)
    >>> shard = relative_sums(tuning, nll, base_nll, entropy, base_entropy)
    >>> merge_relative_sums([shard, shard]).base.num_tokens
    200000
    """
    return RelativeSums(merge_sums([p.excess for p in parts]), merge_sums([p.base for p in parts]))


def certify_relative(
    tuning: RelativeTuning, sums: RelativeSums, claim: Claim, sampling: SamplingPlan | None = None
) -> Line:
    """The printed relative line: bound on R(h0) plus bound on R(h) - R(h0).

    ``terms`` hold both parts. Where every token was scored, `excess` is the bound on R(h) - R(h0) alone and
    `base_bound` that on R(h0), rounded up; a sample bounds only their sum.

    Args:
        tuning: what :func:`choose_relative` chose.
        sums: of every shard, merged; for sampled runs in draw order.
        claim: what is claimed.
        sampling: how windows were drawn; None where every one was scored.

    Raises:
        MismatchError: a tuning that is not paid for, or tokens are missing or counted twice.

    >>> from tokenbound.bounds import RelativeEvidence
    >>> nll, base_nll = [0.2, 2.8] * 50_000, [0.2, 3.0] * 50_000
    >>> entropy = base_entropy = [0.3, 2.5] * 50_000
    >>> claim = Claim(256, 256, 400.0, 0.05, num_tokens=100_000, methods=("freedman",), num_bases=1)
    >>> tuning = choose_relative(RelativeEvidence.from_losses(nll, base_nll, entropy, base_entropy), claim)
    >>> line = certify_relative(tuning, relative_sums(tuning, nll, base_nll, entropy, base_entropy), claim)
    >>> round(line.value, 3), round(line.terms["excess"], 3)  # of the fine-tune; beyond its base
    (2.226, -0.73)
    """
    _require_coded(tuning, claim)
    complete = sampling is None or sampling.pilot_units == sampling.num_units
    if complete and not claim.what_if and sums.excess.num_tokens != claim.num_tokens:
        raise MismatchError(f"the sums hold {sums.excess.num_tokens} tokens, the corpus {claim.num_tokens}")
    sampled, m = sampling is not None, claim.num_tokens
    kappa = _excess_kappa(tuning.degree, claim, sampled=sampled)
    base_kappa = _base_kappa(tuning, claim, sampled=sampled)
    base_lam = float(tuning.base.lam or 0.0)
    mean, base_mean = sums.excess.mean(0, "value"), sums.base.mean(0, "value")
    slack = 0.0
    if sampling is not None and sampling.pilot_units < sampling.num_units:
        slack = float(relative_path(tuning, sums, claim, sampling).upper[-1]) - (mean + base_mean)
    complexity, base_complexity = kappa / (tuning.lam * m), base_kappa / (base_lam * m)
    value = mean + base_mean + slack + complexity + base_complexity
    guard = arithmetic_guard(mean + complexity, tuning.lam, tuning.t)
    guard += arithmetic_guard(base_mean + base_complexity + slack, base_lam, float(tuning.base.t or 0.0))
    excess, base = sums.excess.mean(0, "loss"), sums.base.mean(0, "loss")
    guess = math.log2(claim.tokenizer_vocab_size)
    printed = round_up(value + guard)
    parts = {"excess": round_up(mean + complexity + guard), "base_bound": round_up(base_mean + base_complexity + guard)}
    notes = [f"what-if: the same losses, a larger m ({m} tokens); not a bound"] if claim.what_if else []
    notes += [f"vacuous: not below a random guess ({guess:.4g})"] if printed >= guess else []
    return Line(
        method="relative",
        top_k=None,
        value=printed,
        empirical=excess + base,
        kappa_nats=kappa,
        tune_bits=tuning.tune_bits,
        vacuous=printed >= guess,
        random_guess=guess,
        terms={
            "empirical": excess + base,
            "variance": mean - excess,
            "complexity": complexity,
            "base_variance": base_mean - base,
            "base_complexity": base_complexity,
            "sampling_slack": slack,
            "excess_empirical": excess,
            "base_empirical": base,
            **(parts if sampling is None else {}),
            **yardsticks(mean - excess + complexity, sums.excess.mean(0, "square"), kappa, m),
        },
        parameters=tuning.to_dict(),
        note="; ".join(notes),
    )


def _require_coded(tuning: RelativeTuning, claim: Claim) -> None:
    """Both parts are words of their codes, and speak of the same base."""
    require_coded(tuning.base, base_claim(claim))
    if (tuning.base.method, tuning.base.alpha, tuning.base.alpha_slope) != ("freedman", tuning.base_alpha, 0):
        raise MismatchError("the base's own line is not smoothed as the excess takes it to be")
    require_grid_alpha("alpha", tuning.alpha)
    require_paid("relative", tuning.tune_bits, relative_tune_bits(tuning.degree) + claim.shared_bits)
    require_forecast(tuning.coefficients, (tuning.degree + 1) * (tuning.degree + 2) // 2, tuning.y0)
    lowest, high = tuning.interval_bits()
    require_stake(tuning.t, tuning.lam, high - lowest)


def relative_path(tuning: RelativeTuning, sums: RelativeSums, claim: Claim, sampling: SamplingPlan) -> SamplingPath:
    """Bounds on the full mean of both parts' values together after each window: one sequence, one share of delta_s.

    Raises:
        IncompleteError: no window beyond the pilot was scored.
        InputError: sums without windows, or windows that contradict the plan.
    """
    if sums.excess.windows is None or sums.base.windows is None or sums.excess.window_lengths is None:
        raise InputError("a sampled run needs sums taken with window_lengths")
    both = sums.excess.windows[0] + sums.base.windows[0]
    highest = tuning.highest_excess_bits + highest_value(tuning.base)
    return path_of_windows(both, sums.excess.window_lengths, highest, claim, sampling)


def _excess_kappa(degree: int, claim: Claim, *, sampled: bool) -> float:
    return kappa_nats(
        code_length_bits=claim.paid_code_bits,
        tune_bits=relative_tune_bits(degree) + claim.shared_bits,
        delta=corpus_delta(excess_claim(claim), sampled=sampled),
    )


def _base_kappa(tuning: RelativeTuning, claim: Claim, *, sampled: bool) -> float:
    of_base = base_claim(claim)
    delta = corpus_delta(of_base, sampled=sampled)
    kappa = kappa_nats(code_length_bits=of_base.paid_code_bits, tune_bits=tuning.base.tune_bits, delta=delta)
    return kappa + math.log(claim.num_bases)


def _excess_block(
    tuning: RelativeTuning, nll: Floats, base_nll: Floats, entropy: Floats, base_entropy: Floats
) -> tuple[Floats, Floats, Floats]:
    vocab = tuning.base.vocab_size
    excess = smoothed_loss_bits(nll, alpha=tuning.alpha, vocab_size=vocab)
    excess -= smoothed_loss_bits(base_nll, alpha=tuning.base_alpha, vocab_size=vocab)
    lowest, high = tuning.interval_bits()
    guess = np.full(excess.shape, tuning.coefficients[0])
    if tuning.degree:
        basis = _basis(entropy.astype(np.float64) / LN2, base_entropy.astype(np.float64) / LN2, tuning.degree)
        guess = basis @ np.array(tuning.coefficients)
    forecast = np.minimum(np.maximum(guess, lowest), high)
    value = forecast - np.log(1 + tuning.lam * (forecast - excess)) / tuning.lam
    return value, excess, np.square(forecast - excess)


def _basis(entropy_bits: Floats, base_entropy_bits: Floats, degree: int) -> Floats:
    """[T, (degree + 1)(degree + 2) / 2] monomials of the two entropies, by total degree."""
    columns = [entropy_bits ** (d - j) * base_entropy_bits**j for d in range(degree + 1) for j in range(d + 1)]
    return np.stack(columns, axis=1)
