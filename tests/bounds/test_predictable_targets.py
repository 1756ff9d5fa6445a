"""Bounds over a part of the positions: sound where each is chosen before its token, not behind it."""

from __future__ import annotations

import numpy as np

from tokenbound.bounds.codes import kl_tune_bits
from tokenbound.bounds.theorems import kl_grid_bound

RUNS, POSITIONS, DELTA = 400, 600, 0.05


def failures(*, predictable: bool) -> float:
    """How often the bound is below the mean chance of an error at the positions that are scored.

    The chance of each error depends on the last one. Scored are the positions behind an error, and some others; or,
    where the choice looks ahead, fewer of those that turn out to be errors.
    """
    rng = np.random.default_rng(0)
    last = np.zeros(RUNS, bool)
    scored, errors, chances = np.zeros(RUNS), np.zeros(RUNS), np.zeros(RUNS)
    for _ in range(POSITIONS):
        chance = np.where(last, 0.5, 0.2)
        error = rng.random(RUNS) < chance
        wanted = last | (rng.random(RUNS) < 0.3)
        if not predictable:
            wanted &= ~error | (rng.random(RUNS) < 0.3)
        scored += wanted
        errors += wanted & error
        chances += wanted * chance
        last = error
    found = [
        kl_grid_bound(e / m, code_length_bits=0.0, tune_bits=kl_tune_bits(), delta=DELTA, num_tokens=int(m))[0]
        for e, m in zip(errors, scored, strict=True)
    ]
    return float(np.mean(np.array(found) < chances / scored))


def test_answers_may_be_chosen_by_what_came_before() -> None:
    assert failures(predictable=True) <= DELTA


def test_the_simulation_finds_a_choice_that_looks_ahead() -> None:
    assert failures(predictable=False) > 10 * DELTA
