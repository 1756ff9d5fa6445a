"""From exact sums to printed lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.coded import require_budget, require_coded
from tokenbound.bounds.exact import LineSums
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.printing import Measured
from tokenbound.bounds.rounding import round_up
from tokenbound.bounds.sampled_lines import counted_windows, expected_slacks, sampling_path, window_budget
from tokenbound.errors import MismatchError


def certify(
    tunings: Sequence[Tuning],
    sums: LineSums,
    claim: Claim,
    sampling: SamplingPlan | None = None,
    *,
    rounding: Callable[[float], float] = round_up,
) -> tuple[Line, ...]:
    """The lines of the certificate; together they hold with probability at least 1 - delta.

    Args:
        tunings: one per line of the claim, as chosen.
        sums: their exact sums over every scored token.
        claim: what is claimed.
        sampling: the plan of a sampled run; the sums are then those of a prefix of the draw.
        rounding: makes a value the printed one; must not make it smaller.

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
    return tuple(_line(tuning, i, sums, claim, sampling, rounding) for i, tuning in enumerate(tunings))


def _check(tunings: Sequence[Tuning], sums: LineSums, claim: Claim, sampling: SamplingPlan | None) -> None:
    if tuple((t.method, t.top_k) for t in tunings) != claim.lines:
        raise MismatchError(f"the tunings are not those of the lines {claim.lines}")
    for tuning in tunings:
        require_coded(tuning, claim)
    if sums.shards.shape[1] != len(tunings):
        raise MismatchError(f"sums of {sums.shards.shape[1]} lines were given for {len(tunings)} tunings")
    if not _leaves_windows(sampling) and not claim.what_if and sums.num_tokens != claim.num_tokens:
        raise MismatchError(
            f"the sums hold {sums.num_tokens} tokens, the corpus {claim.num_tokens}: a full run needs each "
            "exactly once, a sample needs its plan"
        )
    if sampling is not None and claim.what_if:
        raise MismatchError("a what-if for a larger corpus is made from a full run")
    if sums.num_tokens == 0:
        raise MismatchError("no token was scored")
    budgets = sampling is not None and sampling.has_budgets and _leaves_windows(sampling)
    for tuning in tunings:
        limited = budgets and token_bound(tuning.method).has_budget and tuning.unavailable is None
        require_budget(tuning.method, tuning.budget, has_budget=limited)


def _line(
    tuning: Tuning,
    index: int,
    sums: LineSums,
    claim: Claim,
    sampling: SamplingPlan | None,
    rounding: Callable[[float], float],
) -> Line:
    bound = token_bound(tuning.method)
    if tuning.unavailable is not None:
        return bound.unavailable_line(tuning, claim, sampled=sampling is not None)
    measured = _measured(tuning, index, sums, claim, sampling)
    return bound.printed_line(tuning.top_k, bound.value(tuning, measured, claim), measured, claim, rounding=rounding)


def _measured(tuning: Tuning, index: int, sums: LineSums, claim: Claim, sampling: SamplingPlan | None) -> Measured:
    mean, slack, over, budget = sums.mean(index, "value"), 0.0, 0, window_budget(tuning)
    if budget is not None:
        values, _ = counted_windows(tuning, index, sums)
        mean = math.fsum(values.tolist()) / sums.num_tokens
        over = int((values > budget.bits).sum())
    larger: Mapping[int, float] = {}
    beta: tuple[float, ...] = ()
    if sampling is not None and _leaves_windows(sampling):
        path = sampling_path(tuning, index, sums, claim, sampling)
        slack, beta = float(path.upper[-1]) - mean, path.beta
        larger = expected_slacks(tuning, index, sums, claim, sampling)
    square = sums.mean(index, "square")
    loss = sums.mean(index, "loss")
    return Measured(loss, mean, slack, square, sampling is not None, larger, beta, tuning.budget, over)


def _leaves_windows(sampling: SamplingPlan | None) -> bool:
    """Whether a plan leaves any window to chance."""
    return sampling is not None and sampling.pilot_units < sampling.num_units
