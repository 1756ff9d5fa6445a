"""From exact sums to printed lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenbound.bounds.choice import best_m0_index
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning, corpus_delta
from tokenbound.bounds.coded import require_coded
from tokenbound.bounds.codes import elias_delta_bits, kappa_nats
from tokenbound.bounds.constants import LN2
from tokenbound.bounds.exact import LineSums
from tokenbound.bounds.rounding import arithmetic_guard, round_up
from tokenbound.bounds.sampling import expected_slacks, sampling_path
from tokenbound.bounds.smoothing import loss_interval_bits
from tokenbound.bounds.theorems import azuma_anytime_gap, kl_error_bound, kl_grid_bound, oracle_gap_bits
from tokenbound.errors import MismatchError


def certify(
    tunings: Sequence[Tuning], sums: LineSums, claim: Claim, sampling: SamplingPlan | None = None
) -> tuple[Line, ...]:
    """The lines of the certificate; together they hold with probability at least 1 - delta.

    Args:
        tunings: one per line of the claim, as chosen.
        sums: their exact sums over every scored token.
        claim: what is claimed.
        sampling: the plan of a sampled run; the sums are then those of a prefix of the draw.

    Raises:
        MismatchError: tunings and sums belong to another claim, a tuning is not paid for, or tokens are missing or
            counted twice.
        IncompleteError: a sampled run has no window beyond the pilot.

    >>> from tokenbound.bounds import Evidence, choose_tunings, line_sums
    >>> nll, entropy = [0.2, 3.0] * 50_000, [0.3, 2.5] * 50_000
    >>> claim = Claim(256, 256, code_length_bits=8_000, delta=0.05, num_tokens=100_000, methods=("freedman", "azuma"))
    >>> tunings = choose_tunings(Evidence.from_losses(nll, entropy, vocab_size=256), claim)
    >>> for line in certify(tunings, line_sums(tunings, nll, entropy), claim):
    ...     print(line.method, round(line.empirical, 3), round(line.value, 3))
    freedman 2.397 3.013
    azuma 2.594 4.282
    """
    _check(tunings, sums, claim, sampling)
    return tuple(_line(tuning, i, sums, claim, sampling) for i, tuning in enumerate(tunings))


def _check(tunings: Sequence[Tuning], sums: LineSums, claim: Claim, sampling: SamplingPlan | None) -> None:
    if tuple((t.method, t.top_k) for t in tunings) != claim.lines:
        raise MismatchError(f"the tunings are not those of the lines {claim.lines}")
    for tuning in tunings:
        require_coded(tuning, claim)
    if sums.shards.shape[1] != len(tunings):
        raise MismatchError(f"sums of {sums.shards.shape[1]} lines were given for {len(tunings)} tunings")
    complete = sampling is None or sampling.pilot_units == sampling.num_units
    if complete and not claim.what_if and sums.num_tokens != claim.num_tokens:
        raise MismatchError(
            f"the sums hold {sums.num_tokens} tokens, the corpus {claim.num_tokens}: a full run needs each "
            "exactly once, a sample needs its plan"
        )
    if sampling is not None and claim.what_if:
        raise MismatchError("a what-if for a larger corpus is made from a full run")
    if sums.num_tokens == 0:
        raise MismatchError("no token was scored")


def _line(tuning: Tuning, index: int, sums: LineSums, claim: Claim, sampling: SamplingPlan | None) -> Line:
    if tuning.unavailable is not None:
        return _unavailable(tuning, claim, sampling)
    mean, slack, larger = sums.mean(index, "value"), 0.0, {}
    if sampling is not None and sampling.pilot_units < sampling.num_units:
        slack = float(sampling_path(tuning, index, sums, claim, sampling).upper[-1]) - mean
        larger = expected_slacks(tuning, index, sums, claim, sampling)
    square = sums.mean(index, "square")
    measured = Measured(sums.mean(index, "loss"), mean, slack, square, sampling is not None, larger)
    build = {"freedman": _freedman_line, "azuma": _azuma_line, "kl": _kl_line}[tuning.method]
    return build(tuning, measured, claim)


@dataclass(frozen=True)
class Measured:
    """What the data say about one line: means over the scored tokens and the slack for the rest."""

    empirical: float
    """Mean loss in bits, or mean error."""
    value: float
    """Mean of z_i, which the bound averages."""
    slack: float = 0.0
    """How far the mean of z_i over the whole corpus may lie above it."""
    square: float = 0.0
    """Mean of (Y_i - l_i)^2, bits^2."""
    sampled: bool = False
    larger: Mapping[int, float] = field(default_factory=dict)
    """Expected slack at multiples of the sample."""


def _freedman_line(tuning: Tuning, measured: Measured, claim: Claim) -> Line:
    lam = float(tuning.lam or 0.0)
    kappa = _kappa(tuning.tune_bits, claim, measured.sampled)
    complexity = kappa / (lam * claim.num_tokens)
    value = measured.value + measured.slack + complexity
    variance = measured.value - measured.empirical
    terms = {
        "variance": variance,
        **complexity_terms(complexity, tuning.tune_bits, claim, measured.sampled),
        **yardsticks(variance + complexity, measured.square, kappa, claim.num_tokens),
    }
    parameters = {
        "alpha": tuning.alpha,
        "alpha_slope": tuning.alpha_slope,
        "alpha_from": "column" if tuning.alpha_column else {"any": "grid"}.get(claim.alphas, claim.alphas),
        "t": tuning.t,
        "lambda": lam,
        "forecast_degree": tuning.degree,
        "forecast_coefficients": list(tuning.coefficients),
        "forecast_floor_bits": tuning.y0,
    }
    guard = arithmetic_guard(value, lam, float(tuning.t or 0.0))
    return printed_line(tuning, measured, claim, value, guard, kappa, tuning.tune_bits, terms, parameters)


def _azuma_line(tuning: Tuning, measured: Measured, claim: Claim) -> Line:
    if tuning.alpha_column:
        return _azuma_predictable_line(tuning, measured, claim)
    alpha = float(tuning.alpha or 0.0)
    low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
    m, declared = claim.num_tokens, claim.declared_tokens == claim.num_tokens
    bits = tuning.tune_bits
    parameters: dict[str, Any] = {
        "alpha": alpha,
        "loss_range_bits": high - low,
        "form": "fixed m" if declared else "any m",
    }
    if declared:
        gap = (high - low) * math.sqrt(_kappa(bits, claim, measured.sampled) / (2 * m))
        variance, complexity = gap / 2, gap / 2
    else:
        base_bits = bits
        j = best_m0_index(lambda j: _kappa(base_bits + elias_delta_bits(j), claim, measured.sampled), m)
        bits = base_bits + elias_delta_bits(j)
        variance, complexity = azuma_anytime_gap(high - low, _kappa(bits, claim, measured.sampled), m, j)
        parameters["m0_index"] = j
    value = measured.value + measured.slack + variance + complexity
    terms = {"variance": variance, **complexity_terms(complexity, bits, claim, measured.sampled)}
    kappa = _kappa(bits, claim, measured.sampled)
    return printed_line(tuning, measured, claim, value, arithmetic_guard(value), kappa, bits, terms, parameters)


def _azuma_predictable_line(tuning: Tuning, measured: Measured, claim: Claim) -> Line:
    lam = float(tuning.lam or 0.0)
    kappa = _kappa(tuning.tune_bits, claim, measured.sampled)
    complexity = kappa / (lam * claim.num_tokens)
    value = measured.value + measured.slack + complexity
    terms = {
        "variance": measured.value - measured.empirical,
        **complexity_terms(complexity, tuning.tune_bits, claim, measured.sampled),
    }
    parameters = {"alpha": tuning.alpha, "alpha_from": "column", "lambda": lam, "form": "predictable ranges, any m"}
    return printed_line(
        tuning, measured, claim, value, arithmetic_guard(value), kappa, tuning.tune_bits, terms, parameters
    )


def _kl_line(tuning: Tuning, measured: Measured, claim: Claim) -> Line:
    paid = {
        "code_length_bits": claim.paid_code_bits,
        "tune_bits": tuning.tune_bits,
        "delta": corpus_delta(claim, sampled=measured.sampled),
        "num_tokens": claim.num_tokens,
    }
    error = min(max(measured.value + measured.slack, 0.0), 1.0)
    value, lam = kl_grid_bound(error, **paid)  # type: ignore[arg-type]
    raw = kl_error_bound(error, lam=lam, **paid)  # type: ignore[arg-type]
    variance = -math.expm1(-lam * error) / -math.expm1(-lam) - error
    complexity = value - error - variance
    terms = {
        "variance": variance,
        **complexity_terms(complexity, tuning.tune_bits, claim, measured.sampled),
    }
    kappa = _kappa(tuning.tune_bits, claim, measured.sampled)
    parameters = {"lambda": lam, "uncapped": round_up(raw)}
    guard = min(arithmetic_guard(value, lam), 1.0 - value)  # an error rate is at most 1, whatever float64 did
    return printed_line(tuning, measured, claim, value, guard, kappa, tuning.tune_bits, terms, parameters)


def _kappa(tune_bits: float, claim: Claim, sampled: bool) -> float:
    delta = corpus_delta(claim, sampled=sampled)
    return kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=tune_bits, delta=delta)


def yardsticks(gap: float, mean_square_bits: float, kappa: float, num_tokens: int) -> dict[str, float]:
    """The oracle gap, no bound, and the gap in units of it; the latter only where forecasts ever missed.

    >>> yardsticks(0.5, 2.0, kappa=100.0, num_tokens=10_000)
    {'oracle_gap': 0.2, 'gap_over_oracle': 2.5}
    """
    oracle = oracle_gap_bits(mean_square_bits, kappa=kappa, num_tokens=num_tokens)
    return {"oracle_gap": oracle, **({"gap_over_oracle": gap / oracle} if oracle > 0 else {})}


def complexity_terms(complexity: float, tune_bits: float, claim: Claim, sampled: bool) -> dict[str, float]:
    """The complexity term by what it pays for, in proportion to the nats of kappa."""
    kappa = _kappa(tune_bits, claim, sampled)
    split = dict(claim.code_split) or {"code": claim.code_length_bits}
    paid = {name: (bits if claim.paid_code_bits else 0.0) for name, bits in split.items()}
    nats = {**{name: LN2 * bits for name, bits in paid.items()}, "tune": LN2 * tune_bits}
    nats["delta"] = math.log(1 / corpus_delta(claim, sampled=sampled))
    return {"complexity": complexity, **{name: complexity * part / kappa for name, part in nats.items()}}


def printed_line(
    tuning: Tuning,
    measured: Measured,
    claim: Claim,
    value: float,
    guard: float,
    kappa: float,
    tune_bits: float,
    terms: Mapping[str, float],
    parameters: Mapping[str, Any],
) -> Line:
    """A line with its value rounded up, and whether it says anything."""
    printed = round_up(value + guard)
    guess = random_guess(claim, tuning.top_k)
    vacuous = printed >= guess
    all_terms = {"empirical": measured.empirical, **terms, "sampling_slack": measured.slack}
    if measured.sampled:
        all_terms["sample_mean"] = measured.value
        all_terms |= {f"slack_at_{factor}n": slack for factor, slack in measured.larger.items()}
    return Line(
        method=tuning.method,
        top_k=tuning.top_k,
        value=printed,
        empirical=measured.empirical,
        kappa_nats=kappa,
        tune_bits=tune_bits,
        vacuous=vacuous,
        random_guess=guess,
        terms=all_terms,
        parameters=parameters,
        note=_note(tuning.method, claim, vacuous, guess),
    )


def random_guess(claim: Claim, top_k: int | None) -> float:
    """What guessing uniformly among the tokenizer's ids achieves: log2 V_tok bits, or an error of 1 - k / V_tok.

    Args:
        claim: of which V_tok is used.
        top_k: k of an error; None for a loss.

    >>> claim = Claim(512, 256, code_length_bits=0, delta=0.05, num_tokens=100)
    >>> random_guess(claim, None), random_guess(claim, 10)
    (8.0, 0.9609375)
    """
    vocab = claim.tokenizer_vocab_size
    return math.log2(vocab) if top_k is None else max(0.0, 1 - top_k / vocab)


def _note(method: str, claim: Claim, vacuous: bool, guess: float) -> str:
    parts = []
    if method == "freedman" and not claim.has_entropy:
        parts.append("forecasts and smoothing are constant: the losses have no `entropy` column")
    if claim.what_if:
        parts.append(f"what-if: the same losses, a larger m ({claim.num_tokens} tokens); not a bound")
    if vacuous:
        parts.append(f"vacuous: not below a random guess ({guess:.4g})")
    return "; ".join(parts)


def _unavailable(tuning: Tuning, claim: Claim, sampling: SamplingPlan | None) -> Line:
    return Line(
        method=tuning.method,
        top_k=tuning.top_k,
        value=None,
        empirical=None,
        kappa_nats=_kappa(tuning.tune_bits, claim, sampling is not None),
        tune_bits=tuning.tune_bits,
        vacuous=True,
        random_guess=random_guess(claim, tuning.top_k),
        terms={},
        parameters={},
        note=f"not computed: {tuning.unavailable}",
    )
