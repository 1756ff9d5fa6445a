"""What the reference functions and the codes refuse, at the edge of what they accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from tokenbound.bounds import codes
from tokenbound.bounds.smoothing import (
    check_alpha,
    check_nll,
    loss_interval_bits,
    loss_intervals_bits,
    smoothed_loss_bits,
)
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_anytime_gap,
    azuma_bound,
    azuma_predictable_bound,
    document_losses_bits,
    excess_interval_bits,
    freedman_bound,
    kl_error_bound,
    kl_grid_bound,
    paper_error_bound,
    paper_subsample_bound,
    relative_bound,
)
from tokenbound.errors import InputError

V = 256
NLL = np.random.default_rng(0).exponential(2.0, 100)
PAID = {"code_length_bits": 10.0, "tune_bits": 3.0, "delta": 0.05}
SHARED = {"vocab_size": V, "alpha": 0.1, **PAID}
LOSS_BOUNDS: dict[str, Callable[..., float]] = {
    "azuma": lambda **more: azuma_bound(NLL, **{**SHARED, **more}),
    "azuma_anytime": lambda **more: azuma_anytime_bound(NLL, m0_index=30, **{**SHARED, **more}),
    "azuma_predictable": lambda **more: azuma_predictable_bound(NLL, **{**SHARED, "lam": 0.01, **more}),
    "freedman": lambda **more: freedman_bound(NLL, 2.0, **{**SHARED, "lam": 0.01, **more}),
    "relative": lambda **more: relative_bound(
        NLL, NLL[::-1], 0.0, **{**SHARED, "base_alpha": 0.1, "lam": 0.01, **more}
    ),
}
ERROR_BOUNDS: dict[str, Callable[..., float]] = {
    "kl": lambda error=0.1, **more: kl_error_bound(error, **{**PAID, "num_tokens": 100, "lam": 0.5, **more}),
    "kl_grid": lambda error=0.1, **more: kl_grid_bound(error, **{**PAID, "num_tokens": 100, **more})[0],
    "paper": lambda error=0.1, **more: paper_error_bound(error, **{**PAID, "num_tokens": 100, **more}),
}


@pytest.mark.parametrize("name", LOSS_BOUNDS)
def test_the_slack_of_a_sample_is_added_once(name: str) -> None:
    bound = LOSS_BOUNDS[name]
    without = bound(num_tokens=300, sampling_slack_bits=0.0)
    assert bound(num_tokens=300, sampling_slack_bits=0.25) == pytest.approx(without + 0.25, abs=1e-12)


@pytest.mark.parametrize("name", LOSS_BOUNDS)
@pytest.mark.parametrize("slack", [math.inf, math.nan, -1e-9])
def test_a_slack_that_is_no_allowance_is_refused(name: str, slack: float) -> None:
    with pytest.raises(InputError, match="sampling_slack_bits"):
        LOSS_BOUNDS[name](num_tokens=300, sampling_slack_bits=slack)


@pytest.mark.parametrize("name", [*LOSS_BOUNDS, *ERROR_BOUNDS])
@pytest.mark.parametrize("size", [math.inf, math.nan, -math.inf, 0, -5, 300.5])
def test_a_number_of_tokens_is_a_positive_integer(name: str, size: float) -> None:
    bound = {**LOSS_BOUNDS, **ERROR_BOUNDS}[name]
    slack = {"sampling_slack_bits": 0.0} if name in LOSS_BOUNDS else {}
    with pytest.raises(InputError, match="num_tokens must be a positive integer"):
        bound(num_tokens=size, **slack)


@pytest.mark.parametrize("field", ["num_tokens", "num_sampled"])
def test_the_papers_sample_has_a_size(field: str) -> None:
    sizes = {"num_tokens": 1, "num_sampled": 1}
    paper_subsample_bound(0.5, loss_range_bits=1.0, code_length_bits=10.0, delta=0.05, **sizes)
    with pytest.raises(InputError, match=field):
        paper_subsample_bound(0.5, loss_range_bits=1.0, code_length_bits=10.0, delta=0.05, **{**sizes, field: 0})


@pytest.mark.parametrize("bound", [*[LOSS_BOUNDS[n] for n in list(LOSS_BOUNDS)[2:]], ERROR_BOUNDS["kl"]])
@pytest.mark.parametrize("lam", [0.0, -0.01, math.inf, -math.inf, math.nan])
def test_a_stake_is_finite_and_positive(bound: Callable[..., float], lam: float) -> None:
    with pytest.raises(InputError, match="lambda must be finite and positive"):
        bound(lam=lam)


@pytest.mark.parametrize("name", ERROR_BOUNDS)
@pytest.mark.parametrize("error", [-1e-9, 1 + 1e-9, math.nan])
def test_an_error_is_a_rate(name: str, error: float) -> None:
    for edge in (0.0, 1.0):
        assert ERROR_BOUNDS[name](error=edge) >= edge
    with pytest.raises(InputError, match="error rate"):
        ERROR_BOUNDS[name](error=error)


@pytest.mark.parametrize("j", [0, -1])
def test_m0_is_named_from_one(j: int) -> None:
    with pytest.raises(InputError, match="j >= 1"):
        azuma_anytime_gap(5.0, 10.0, 100, j)
    assert azuma_anytime_gap(5.0, 10.0, 100, 1)[0] > 0


@pytest.mark.parametrize("j", [1, 30, 77])
def test_both_parts_of_the_any_time_gap_are_what_their_names_say(j: int) -> None:
    """First what the range costs, lambda D^2 / 8, then what the code costs, kappa / (lambda m)."""
    kappa, width, m = 50.0, 12.0, 4096
    with mpmath.workdps(50):
        lam = mpmath.sqrt(8 * mpmath.mpf(kappa) / mpmath.mpf(2) ** (mpmath.mpf(j) / 4)) / width
        expected = (float(lam * width**2 / 8), float(kappa / (lam * m)))
    assert azuma_anytime_gap(width, kappa, m, j) == pytest.approx(expected, rel=1e-12)


# --------------------------------------------------------------------------------------- lambda * (B - y0') < 1


def accepted(bound: Callable[[float], float], limit: float) -> None:
    """The stake may come as near to its limit as floats do, and no further."""
    assert math.isfinite(bound(0.999 * limit))
    for lam in (limit * (1 + 1e-12), 1.001 * limit):
        with pytest.raises(InputError, match="must be below 1"):
            bound(lam)


LOW, HIGH = loss_interval_bits(alpha=0.1, vocab_size=V)
BOTH = excess_interval_bits(alpha=0.1, base_alpha=0.02, vocab_size=V)


@pytest.mark.parametrize(
    ("forecast", "floor", "lowest"),
    [
        (3.0, None, 3.0),
        (-9.0, None, LOW),
        (np.where(np.arange(100) == 7, 2.0, 5.0), None, 2.0),
        (3.0, LOW - 5.0, LOW),  # a floor below A is none
        (3.0, 2.5, 2.5),
    ],
)
def test_the_largest_stake_of_a_loss(forecast: Any, floor: float | None, lowest: float) -> None:
    accepted(
        lambda lam: freedman_bound(NLL, forecast, lam=lam, floor_bits=floor, **SHARED),
        1 / (HIGH - lowest),
    )


@pytest.mark.parametrize(
    ("forecast", "floor", "lowest"),
    [
        (-2.0, None, -2.0),
        (4.0, None, 4.0),
        (-99.0, None, BOTH[0]),
        (np.where(np.arange(100) == 7, -3.0, 1.0), None, -3.0),
        (0.0, BOTH[0] - 5.0, BOTH[0]),
        (0.0, -1.0, -1.0),
    ],
)
def test_the_largest_stake_of_an_excess(forecast: Any, floor: float | None, lowest: float) -> None:
    accepted(
        lambda lam: relative_bound(NLL, NLL[::-1], forecast, base_alpha=0.02, lam=lam, floor_bits=floor, **SHARED),
        1 / (BOTH[1] - lowest),
    )


def test_one_forecast_that_is_no_number_is_refused() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        guesses = np.where(np.arange(100) == 50, bad, 2.0)
        with pytest.raises(InputError, match="forecast_bits must be finite"):
            freedman_bound(NLL, guesses, **SHARED, lam=0.01)
        with pytest.raises(InputError, match="forecast_bits must be finite"):
            relative_bound(NLL, NLL, guesses, base_alpha=0.1, **SHARED, lam=0.01)


def test_one_alpha_below_the_least_is_refused() -> None:
    alphas = np.where(np.arange(100) == 50, 0.05, 0.3)
    keywords = {**SHARED, "alpha": alphas, "lam": 0.01}
    with pytest.raises(InputError, match="below alpha_min"):
        freedman_bound(NLL, 2.0, alpha_min=0.1, **keywords)
    assert freedman_bound(NLL, 2.0, alpha_min=0.05, **keywords) > 0


# --------------------------------------------------------------------------------------------- losses and widths


def test_losses_of_documents_are_one_flat_array() -> None:
    square = np.ones((3, 3))
    with pytest.raises(InputError, match="one id per token"):
        document_losses_bits(square, np.arange(9).reshape(3, 3))


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float32, np.float64, bool])
def test_losses_come_as_floats_of_32_or_64_bits(dtype: Any) -> None:
    """So that nothing later is computed in integers or in half precision."""
    found = check_nll(np.ones(3, dtype=dtype))
    assert found.dtype == (np.float32 if dtype is np.float32 else np.float64)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(InputError, match=r"^nll_nats\[2\] is .*every loss must be finite"):
        check_nll([0.0, 1.0, bad])


def test_no_losses_and_no_alphas_pass_the_checks() -> None:
    assert check_nll([]).size == 0
    assert check_alpha([]).size == 0


@pytest.mark.parametrize("vocab", [1, 0, -3, 2.5])
def test_every_smoothing_checks_the_vocabulary(vocab: Any) -> None:
    for call in (
        lambda: smoothed_loss_bits([1.0], alpha=0.1, vocab_size=vocab),
        lambda: loss_interval_bits(alpha=0.1, vocab_size=vocab),
        lambda: loss_intervals_bits(alpha=[0.1], vocab_size=vocab),
    ):
        with pytest.raises(InputError, match="vocab_size"):
            call()


# ---------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_an_artifact_has_a_whole_number_of_bytes(size: Any) -> None:
    with pytest.raises(InputError, match="at least one byte"):
        codes.artifact_code_length_bits(size)
    assert codes.artifact_code_length_bits(1) == 8 + codes.elias_delta_bits(8)


def test_a_certificate_has_lines() -> None:
    for number in (0, -1):
        with pytest.raises(InputError, match="at least one line"):
            codes.shared_tune_bits(number, 1)
    assert codes.shared_tune_bits(1, 1) == 1.0


@pytest.mark.parametrize(("m", "n"), [(1000, 500), (300, 100), (10**6, 10**4)])
def test_the_papers_sample_bound_splits_delta_by_size(m: int, n: int) -> None:
    value = paper_subsample_bound(
        2.0, loss_range_bits=14.0, code_length_bits=100.0, num_tokens=m, num_sampled=n, delta=0.05
    )
    with mpmath.workdps(50):
        delta, r = mpmath.mpf(0.05), mpmath.mpf(n) / (n + m)
        corpus = mpmath.sqrt((mpmath.log(2) * 100 - mpmath.log(r * delta)) / (2 * m))
        exact = 2 + 14 * (corpus + mpmath.sqrt(-mpmath.log((1 - r) * delta) / (2 * n)))
        assert abs(value - exact) < mpmath.mpf("1e-12")
