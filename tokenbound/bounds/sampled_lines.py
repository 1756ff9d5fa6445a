"""The sampling sequence of a printed line: what its z_i say of the whole corpus after each window drawn."""

from __future__ import annotations

import math

from tokenbound.bounds.budgets import WindowBudget
from tokenbound.bounds.claim import Claim, SamplingPlan, Tuning
from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.exact import LineSums, highest_value
from tokenbound.bounds.sampling import SamplingPath, UnitLimits, expected_slacks_of_windows, path_of_windows
from tokenbound.errors import InputError


def sampling_path(tuning: Tuning, line: int, sums: LineSums, claim: Claim, sampling: SamplingPlan) -> SamplingPath:
    """Slack of every prefix of the draw, for one line.

    Args:
        tuning: the line, chosen from the pilot.
        line: its row in ``sums``.
        sums: of a prefix of the draw, in draw order.
        claim: for delta, K and m.
        sampling: the plan.

    Raises:
        IncompleteError: no window beyond the pilot was scored.
        InputError: sums without windows, or windows that contradict the plan.

    >>> from tokenbound.bounds import line_sums
    >>> claim = Claim(256, 256, code_length_bits=0, delta=0.05, num_tokens=10_000, methods=("kl",), top_k=(1,))
    >>> plan = SamplingPlan(num_units=1_000, max_unit_tokens=10, pilot_units=8)
    >>> top_1 = [Tuning("kl", vocab_size=256, top_k=1)]
    >>> sums = line_sums(top_1, nll=[1.0] * 2_000, rank=[0, 0, 0, 0, 2] * 400, window_lengths=[10] * 200)
    >>> path = sampling_path(top_1[0], 0, sums, claim, plan)
    >>> [(int(path.num_windows[i]), round(float(path.slack[i]), 3)) for i in (41, 91, -1)]
    [(50, 0.084), (100, 0.037), (200, 0.017)]
    """
    values, lengths = counted_windows(tuning, line, sums)
    limits = _limits(tuning, lengths, claim, sampling)
    return path_of_windows(values, lengths, highest_value(tuning), claim, sampling, limits=limits)


def expected_slacks(
    tuning: Tuning, line: int, sums: LineSums, claim: Claim, sampling: SamplingPlan
) -> dict[int, float]:
    """Slack per token that 2 n and 4 n windows would leave if the further ones were like the n drawn. No bound.

    The same sequence runs on over the windows beyond the pilot, repeated; a multiple beyond N is left out, since all
    windows leave no slack.

    Args:
        tuning: the line.
        line: its row in ``sums``.
        sums: of a prefix of the draw, in draw order.
        claim: for delta, K and m.
        sampling: the plan.

    Raises:
        InputError: sums without windows.
    """
    values, lengths = counted_windows(tuning, line, sums)
    limits = _limits(tuning, lengths, claim, sampling)
    return expected_slacks_of_windows(values, lengths, highest_value(tuning), claim, sampling, limits=limits)


def counted_windows(tuning: Tuning, line: int, sums: LineSums) -> tuple[Floats, Ints]:
    """[W] what each window counts as, under its budget if it has one, and [W] its tokens.

    Raises:
        InputError: sums without windows.
    """
    if sums.windows is None or sums.window_lengths is None:
        raise InputError("a sampled run needs sums taken with window_lengths")
    values, budget = sums.windows[line], window_budget(tuning)
    return values if budget is None else budget.counted(values, sums.window_lengths), sums.window_lengths


def window_budget(tuning: Tuning) -> WindowBudget | None:
    """The budget of a line's windows; None where they have none."""
    if tuning.budget is None:
        return None
    return WindowBudget(tuning.budget, highest_value(tuning), math.log2(tuning.vocab_size))


def _limits(tuning: Tuning, lengths: Ints, claim: Claim, sampling: SamplingPlan) -> UnitLimits | None:
    budget = window_budget(tuning)
    if budget is None:
        return None
    every = None if sampling.controls is None else sampling.controls.lengths
    return budget.limits(lengths, claim.num_tokens, sampling.max_unit_tokens, every)
