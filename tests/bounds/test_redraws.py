"""The best of twelve redraws: unpaid it lies below the truth too often, with the register's ordinals it does not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tokenbound.bounds import Claim, SamplingPlan
from tokenbound.bounds.sampling import mixture_stakes, running_moments, total_upper_bounds
from tokenbound.store.draws import Configuration, Register
from tokenbound.store.run import sha256_hex

DELTA, UNITS, PILOT, SCORED, SIMULATIONS = 0.05, 160, 20, 100, 150


def lies_below(drawn: np.ndarray, level: float) -> bool:
    """Whether the bound on the total of all units outside the pilot is ever below it while the sample grows."""
    pilot, rest = drawn[:PILOT], drawn[PILOT:]
    forecasts, deviations = running_moments(rest[:SCORED], pilot)
    shape = {"num_units": UNITS - PILOT, "highest": 1.0, "log_inverse_delta": level}
    stakes = mixture_stakes(forecasts, deviations, **shape, target_units=60)
    found = total_upper_bounds(rest[:SCORED], **shape, forecasts=forecasts, stakes=stakes)
    return bool((found < rest.sum() - 1e-9).any())


def test_the_best_of_twelve_redraws_is_paid_for(tmp_path: Path) -> None:
    """Twelve seeds on one corpus, each entered before it is drawn; the smallest bound is quoted."""
    register = Register(str(tmp_path), ["a" * 64])
    seeds = [Configuration((sha256_hex(f"seed {seed}".encode()),), "b" * 64) for seed in range(12)]
    ordinals = [register.assign(seed).ordinal for seed in seeds]
    assert ordinals == list(range(1, 13))
    # As in a certificate, up to the constants that all draws share: its share of delta, and its one line.
    claim = Claim(257, 257, 0.0, 2 * DELTA, 10_000, methods=("azuma",))
    levels = [SamplingPlan(UNITS, 64, PILOT, trial=k).log_inverse_delta(claim) for k in ordinals]
    unpaid_level = math.log(1 / DELTA)
    rng, units = np.random.default_rng(19), np.repeat([0.0, 1.0], UNITS // 2)
    unpaid = paid = 0
    for _ in range(SIMULATIONS):
        draws = [rng.permutation(units) for _ in ordinals]
        unpaid += any(lies_below(drawn, unpaid_level) for drawn in draws)
        paid += any(lies_below(drawn, level) for drawn, level in zip(draws, levels, strict=True))
    assert unpaid > 0.1 * SIMULATIONS
    assert paid <= DELTA * SIMULATIONS
