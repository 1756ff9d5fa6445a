"""The relative bound: a model given as a small delta on a base that was fixed independently of the scored tokens.

Theorem. R(h) = R(h0) + [R(h) - R(h0)]. The base h0 pays no code but that of the protocol, so its own risk is bounded
tightly; the excess d_i = l_i(h) - l_i(h0) lies in [A - B0, B - A0] and varies little where the two models agree. Both
parts are Freedman-type bounds with forecasts (:mod:`~tokenbound.bounds.lines.freedman`), at delta_1 + delta_2 = delta
split in advance:

    R(h) <= bound(R(h0); the protocol's code, delta_2) + mean(d + v(lambda (Y - d)) / lambda) + kappa_1 / (lambda m),

where kappa_1 pays for the delta artifact alone. The gap of the second part shrinks with the standard deviation of d.

Proof. That of `freedman` for each part, and a union bound over the two. Both use the same base_alpha, so that R(h0)
cancels, and each pays for its own tuning. A base picked among M candidates after seeing the tokens pays ln M.

:func:`~tokenbound.bounds.theorems.relative_bound` computes the second part from plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tokenbound.bounds.blocks import required
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, corpus_delta
from tokenbound.bounds.coded import require_coded, require_forecast, require_grid_alpha, require_paid, require_stake
from tokenbound.bounds.codes import kappa_nats, relative_tune_bits
from tokenbound.bounds.columns import Floats, Piece, window_sums, worst_case_windows
from tokenbound.bounds.constants import BLOCK_TOKENS, LN2
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.exact import FIELDS, LineSums, highest_value, line_sums, merge_sums
from tokenbound.bounds.lines.base import SeparateBound
from tokenbound.bounds.lines.freedman import Freedman
from tokenbound.bounds.printing import notes_of, yardsticks
from tokenbound.bounds.relative_evidence import check_pair
from tokenbound.bounds.relative_search import (
    RelativeTuning,
    base_claim,
    choose_relative,
    entropy_basis,
    excess_kappa,
)
from tokenbound.bounds.rounding import arithmetic_guard, format_bound, round_up
from tokenbound.bounds.sampling import SamplingPath, path_of_windows
from tokenbound.bounds.smoothing import smoothed_loss_bits
from tokenbound.errors import InputError, MismatchError


class Relative(SeparateBound[RelativeTuning, "RelativeSums"]):
    """The bound for deltas, with sums of the excess and of the base."""

    name = "relative"
    is_method = False  # every delta has its line
    columns = ("entropy", "base_nll", "base_entropy")

    def rows(self, claim: Claim) -> tuple[int | None, ...]:
        """One, where the model is a delta."""
        return (None,) if claim.num_bases else ()

    def check_claim(self, claim: Claim) -> None:
        """Both parts smooth at constant alphas."""
        if claim.num_bases and (claim.has_alpha or claim.head_alpha_min is not None):
            raise InputError("a delta on a base cannot have a smoothing head: its excess is bounded at constant alphas")

    def choose(self, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None) -> RelativeTuning:
        """The grid point of both parts."""
        if evidence.relative is None:
            raise MismatchError("the model is a delta, but the columns base_nll and base_entropy are missing")
        return choose_relative(evidence.relative, claim, sampling)

    def sums(self, tuning: RelativeTuning, piece: Piece) -> RelativeSums:
        """Of both parts over a piece."""
        pair = (piece.finite(name) for name in ("nll", "base_nll", "entropy", "base_entropy"))
        return relative_sums(tuning, *pair, window_lengths=piece.window_lengths, worst_case=piece.worst_case)

    def merge(self, parts: Sequence[RelativeSums]) -> RelativeSums:
        """Of several parts."""
        return merge_relative_sums(parts)

    def collapse(self, sums: RelativeSums) -> RelativeSums:
        """As of one shard."""
        return RelativeSums(sums.excess.collapsed(), sums.base.collapsed())

    def certify(self, tuning: RelativeTuning, sums: RelativeSums, claim: Claim, sampling: SamplingPlan | None) -> Line:
        """The printed line."""
        return certify_relative(tuning, sums, claim, sampling)

    def path(self, tuning: RelativeTuning, sums: RelativeSums, claim: Claim, sampling: SamplingPlan) -> SamplingPath:
        """Of both parts together."""
        return relative_path(tuning, sums, claim, sampling)

    def sentences(self, line: Line) -> tuple[str, ...]:
        """How the value divides into both parts; a sample bounds only their sum."""
        terms = line.terms
        if "base_bound" not in terms:
            return ()
        return (
            f"The relative line adds two bounds: the base's own risk is at most {format_bound(terms['base_bound'], 4)} "
            f"bits per token, and the fine-tune's excess over it at most {format_bound(terms['excess'], 4)} "
            f"(measured {terms['excess_empirical']:.4f}, negative is better than the base).",
        )


@dataclass(frozen=True)
class RelativeSums:
    """Exact sums of a relative line over some shards."""

    excess: LineSums
    """One line: z_i, d_i and (Y_i - d_i)^2 of the excess."""
    base: LineSums
    """One line: the base's own."""


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
    totals = np.array([math.fsum(block[field] for block in blocks) for field in range(len(FIELDS))])
    totals += worst * worst_tokens
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
    tuning: RelativeTuning,
    sums: RelativeSums,
    claim: Claim,
    sampling: SamplingPlan | None = None,
    *,
    rounding: Callable[[float], float] = round_up,
) -> Line:
    """The printed relative line: bound on R(h0) plus bound on R(h) - R(h0).

    ``terms`` hold both parts. Where every token was scored, `excess` is the bound on R(h) - R(h0) alone and
    `base_bound` that on R(h0), rounded up; a sample bounds only their sum.

    Args:
        tuning: what :func:`choose_relative` chose.
        sums: of every shard, merged; for sampled runs in draw order.
        claim: what is claimed.
        sampling: how windows were drawn; None where every one was scored.
        rounding: makes a value the printed one; must not make it smaller.

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
    kappa = excess_kappa(tuning.degree, claim, sampled=sampled)
    base_kappa = _base_kappa(tuning, claim, sampled=sampled)
    base_lam = required(tuning.base.lam, "lam")
    mean, base_mean = sums.excess.mean(0, "value"), sums.base.mean(0, "value")
    slack, parameters = 0.0, tuning.to_dict()
    if sampling is not None and sampling.pilot_units < sampling.num_units:
        path = relative_path(tuning, sums, claim, sampling)
        slack = float(path.upper[-1]) - (mean + base_mean)
        parameters |= {"control_variates": list(path.beta)} if path.beta else {}
    complexity, base_complexity = kappa / (tuning.lam * m), base_kappa / (base_lam * m)
    value = mean + base_mean + slack + complexity + base_complexity
    guard = arithmetic_guard(mean + complexity, tuning.lam, tuning.t)
    guard += arithmetic_guard(base_mean + base_complexity + slack, base_lam, required(tuning.base.t, "t"))
    excess, base = sums.excess.mean(0, "loss"), sums.base.mean(0, "loss")
    guess = Relative().random_guess(claim, None)
    printed = rounding(value + guard)
    parts = {"excess": rounding(mean + complexity + guard), "base_bound": rounding(base_mean + base_complexity + guard)}
    return Line(
        method=Relative.name,
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
        parameters=parameters,
        note="; ".join(notes_of(claim, printed, guess)),
    )


def _require_coded(tuning: RelativeTuning, claim: Claim) -> None:
    """Both parts are words of their codes, and speak of the same base."""
    require_coded(tuning.base, base_claim(claim))
    if (tuning.base.method, tuning.base.alpha, tuning.base.alpha_slope) != (Freedman.name, tuning.base_alpha, 0):
        raise MismatchError("the base's own line is not smoothed as the excess takes it to be")
    require_grid_alpha("alpha", tuning.alpha)
    require_paid(Relative.name, tuning.tune_bits, relative_tune_bits(tuning.degree) + claim.shared_bits)
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
    basis = entropy_basis(entropy.astype(np.float64) / LN2, base_entropy.astype(np.float64) / LN2, tuning.degree)
    guess = basis @ np.array(tuning.coefficients)
    forecast = np.minimum(np.maximum(guess, lowest), high)
    value = forecast - np.log(1 + tuning.lam * (forecast - excess)) / tuning.lam
    return value, excess, np.square(forecast - excess)
