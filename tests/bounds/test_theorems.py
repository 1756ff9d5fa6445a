"""Properties of the bounds as functions: monotonicity, limits, and what cannot be asked of them."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenbound.bounds.constants import KL_LAMBDA_GRID
from tokenbound.bounds.rounding import arithmetic_guard
from tokenbound.bounds.smoothing import loss_interval_bits
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_bound,
    azuma_predictable_bound,
    document_bound,
    document_losses_bits,
    freedman_bound,
    kl_error_bound,
    kl_grid_bound,
    oracle_gap_bits,
    paper_error_bound,
    paper_subsample_bound,
    relative_bound,
)
from tokenbound.errors import InputError

NLL = np.random.default_rng(0).exponential(2.0, 200)
BASE = np.random.default_rng(1).exponential(2.0, 200)


def every_bound(*, num_tokens=10_000, code=1000.0, tune=10.0, delta=0.05):
    paid = {"code_length_bits": code, "tune_bits": tune, "delta": delta}
    full = {**paid, "vocab_size": 256, "alpha": 0.1, "num_tokens": num_tokens, "sampling_slack_bits": 0.0}
    return {
        "azuma": azuma_bound(NLL, **full),
        "azuma_anytime": azuma_anytime_bound(NLL, m0_index=40, **full),
        "azuma_predictable": azuma_predictable_bound(NLL, lam=0.05, **full),
        "freedman": freedman_bound(NLL, 2.0, lam=0.05, **full),
        "relative": relative_bound(NLL, BASE, 0.0, base_alpha=0.2, lam=0.02, **full),
        "document": document_bound(NLL, np.arange(200) // 5, vocab_size=256, alpha=0.1, **paid),
        "kl": kl_error_bound(0.3, lam=0.5, num_tokens=num_tokens, **paid),
        "kl_grid": kl_grid_bound(0.3, num_tokens=num_tokens, **paid)[0],
        "paper_error": paper_error_bound(0.3, num_tokens=num_tokens, **paid),
        "paper_subsample": paper_subsample_bound(
            0.3, loss_range_bits=9.0, code_length_bits=code + tune, num_tokens=num_tokens, num_sampled=100, delta=delta
        ),
    }


def assert_not_better(worse, better, *, skip=()):
    for name, value in better.items():
        if name not in skip:
            assert worse[name] >= value - 1e-12 * abs(value), name


@given(m=st.integers(200, 10**12), factor=st.floats(1.0, 1e4))
def test_more_tokens_never_hurt(m, factor):
    # any-time Azuma at one fixed m0 is monotone too: lambda is fixed by m0, only kappa / (lambda m) falls
    assert_not_better(every_bound(num_tokens=m), every_bound(num_tokens=int(m * factor) + 1), skip=("paper_subsample",))


@given(code=st.floats(0, 1e9), extra=st.floats(0, 1e9))
def test_longer_codes_never_help(code, extra):
    assert_not_better(every_bound(code=code + extra), every_bound(code=code))


@given(tune=st.floats(0, 1e4), extra=st.floats(0, 1e4))
def test_more_tuning_never_helps(tune, extra):
    assert_not_better(every_bound(tune=tune + extra), every_bound(tune=tune))


@given(delta=st.floats(1e-9, 0.9), factor=st.floats(1e-6, 1.0))
def test_smaller_delta_never_helps(delta, factor):
    assert_not_better(every_bound(delta=delta * factor), every_bound(delta=delta))


@given(st.lists(st.floats(0, 60, width=32), min_size=1, max_size=40), st.floats(-5, 30), st.floats(0.001, 0.99))
def test_freedman_never_lies_below_the_empirical_risk(nll, forecast, t):
    low, high = loss_interval_bits(alpha=0.1, vocab_size=256)
    lam = t / (high - low)
    paid = {"vocab_size": 256, "alpha": 0.1, "code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.5}
    bound = freedman_bound(nll, forecast, lam=lam, **paid)
    gap = math.log(2) / (lam * len(nll))
    assert bound >= azuma_bound(nll, **paid, num_tokens=10**300, sampling_slack_bits=0.0) + gap - 1e-9


def test_anytime_azuma_at_the_nearest_m0_is_within_a_thousandth():
    paid = {"vocab_size": 256, "alpha": 0.1, "code_length_bits": 500.0, "tune_bits": 9.0, "delta": 0.05}
    for m in np.unique(np.geomspace(200, 1e9, 60).astype(int)):
        sizes = {"num_tokens": int(m), "sampling_slack_bits": 0.0}
        fixed = azuma_bound(NLL, **paid, **sizes)
        mean = azuma_bound(NLL, **paid, num_tokens=10**300, sampling_slack_bits=0.0)
        anytime = min(azuma_anytime_bound(NLL, m0_index=j, **paid, **sizes) for j in range(1, 130))
        assert 1 <= (anytime - mean) / (fixed - mean) <= 1.001


def test_freedman_refuses_a_stake_that_could_lose_everything():
    _, high = loss_interval_bits(alpha=0.1, vocab_size=256)
    paid = {"vocab_size": 256, "alpha": 0.1, "code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.05}
    with pytest.raises(InputError, match="below 1"):
        freedman_bound(NLL, 2.0, lam=1 / (high - 2.0), **paid)
    assert freedman_bound(NLL, 2.0, lam=0.999 / (high - 2.0), **paid) > 0
    with pytest.raises(InputError, match="below 1"):  # a paid floor below every observed forecast is what counts
        freedman_bound(NLL, 4.0, lam=0.999 / (high - 4.0), floor_bits=1.0, **paid)
    with pytest.raises(InputError, match="positive"):
        freedman_bound(NLL, 2.0, lam=0.0, **paid)


@pytest.mark.parametrize("function", [azuma_bound, freedman_bound, relative_bound])
def test_a_sample_needs_its_slack(function):
    """Ignoring the sampling slack cannot be expressed: m other than the number of losses is an error without it."""
    arguments = {
        azuma_bound: (NLL,),
        freedman_bound: (NLL, 1.0),
        relative_bound: (NLL, BASE, 0.0),
    }[function]
    keywords = {"vocab_size": 256, "alpha": 0.1, "code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.05}
    if function is not azuma_bound:
        keywords["lam"] = 0.01
    if function is relative_bound:
        keywords["base_alpha"] = 0.1
    with pytest.raises(InputError, match="sampling_slack_bits"):
        function(*arguments, **keywords, num_tokens=1000)
    with pytest.raises(InputError, match="smaller than"):
        function(*arguments, **keywords, num_tokens=100, sampling_slack_bits=0.0)
    with pytest.raises(InputError, match="finite and >= 0"):
        function(*arguments, **keywords, num_tokens=1000, sampling_slack_bits=-0.1)
    plain = function(*arguments, **keywords)
    assert function(*arguments, **keywords, num_tokens=200) == plain
    sampled = function(*arguments, **keywords, num_tokens=200, sampling_slack_bits=0.5)
    assert sampled == pytest.approx(plain + 0.5)


def test_arrays_must_fit():
    keywords = {"vocab_size": 256, "alpha": 0.1, "code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.05, "lam": 0.01}
    with pytest.raises(InputError, match="shape"):
        freedman_bound(NLL, np.ones(3), **keywords)
    with pytest.raises(InputError, match="finite"):
        freedman_bound(NLL, math.nan, **keywords)
    with pytest.raises(InputError, match="same tokens"):
        relative_bound(NLL, BASE[:-1], 0.0, base_alpha=0.1, **keywords)
    with pytest.raises(InputError, match="alpha_min"):
        freedman_bound(NLL, 1.0, **{**keywords, "alpha": np.full(NLL.size, 0.1)})
    with pytest.raises(InputError, match="below alpha_min"):
        freedman_bound(NLL, 1.0, **{**keywords, "alpha": np.full(NLL.size, 0.1)}, alpha_min=0.2)
    with pytest.raises(InputError, match="no losses"):
        freedman_bound([], 1.0, **keywords)
    with pytest.raises(InputError, match="error rate"):
        kl_error_bound(1.5, code_length_bits=0, tune_bits=0, delta=0.05, num_tokens=10, lam=1.0)


@settings(max_examples=50)
@given(error=st.floats(0, 1), kappa_bits=st.floats(0, 1e6), m=st.integers(1, 10**7))
@example(error=0.953125, kappa_bits=468917.0, m=222338)  # 5e-16 below 1, where one rounding moves kl by half a percent
@example(error=0.0, kappa_bits=0.0, m=10**7)
@example(error=1.0, kappa_bits=1.0, m=3)
def test_kl_grid_is_at_least_the_kl_inverse_and_at_most_one(error, kappa_bits, m):
    """Compared in 50 digits: kl(e^, q) is steep near q = 1, and float64's last digit of q decides it there.

    The exact value of the grid's bound lies above the kl-inverse; the function gives that value but for rounding, which
    the allowance covers.
    """
    value, lam = kl_grid_bound(error, code_length_bits=kappa_bits, tune_bits=0.0, delta=0.05, num_tokens=m)
    assert lam in KL_LAMBDA_GRID
    assert value <= 1
    with mpmath.workdps(50):
        e, step = mpmath.mpf(error), mpmath.mpf(lam)
        rho = (mpmath.mpf(kappa_bits) * mpmath.log(2) - mpmath.log(mpmath.mpf(0.05))) / m
        exact = (1 - mpmath.exp(-step * e - rho)) / (1 - mpmath.exp(-step))
        assert abs(value - min(exact, 1)) <= arithmetic_guard(value, lam)
        assert min(value + arithmetic_guard(value, lam), 1) >= e
        if exact < 1:
            divergence = e * mpmath.log(e / exact) if error else mpmath.mpf(0)
            divergence += (1 - e) * mpmath.log((1 - e) / (1 - exact)) if error < 1 else 0
            assert divergence >= rho * (1 - mpmath.mpf("1e-30"))


def test_documents_weigh_the_same_whatever_their_length():
    nll = np.array([0.0, 0.0, 0.0, 8.0])
    document = np.array([4, 4, 4, 9])
    losses = document_losses_bits(nll, document)
    assert losses.tolist() == [0.0, 8.0]
    two = document_bound(nll, document, vocab_size=256, alpha=0.1, code_length_bits=0, tune_bits=0, delta=0.05)
    many = document_bound(
        np.tile(nll, 50),
        np.repeat(np.arange(100), [3, 1] * 50),
        vocab_size=256,
        alpha=0.1,
        code_length_bits=0,
        tune_bits=0,
        delta=0.05,
    )
    low, high = loss_interval_bits(alpha=0.1, vocab_size=256)
    half = (high - low) * math.sqrt(math.log(20) / 2)
    assert two - half / math.sqrt(2) == pytest.approx(many - half / math.sqrt(100))
    with pytest.raises(InputError, match="one id per token"):
        document_losses_bits(nll, document[:2])


def test_the_range_counts_from_alpha_min_even_of_one_constant_alpha():
    """alpha_min is the constant of the hypothesis: B, and with it the largest lambda, is what it makes it."""
    paid = {"vocab_size": 256, "code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.05}
    highs = {alpha: loss_interval_bits(alpha=alpha, vocab_size=256)[1] for alpha in (0.1, 0.01)}
    lam = 0.5 * (1 / (highs[0.1] - 1.0) + 1 / (highs[0.01] - 1.0))
    freedman_bound(NLL, 2.0, alpha=0.1, floor_bits=1.0, lam=lam, **paid)
    with pytest.raises(InputError, match="below 1"):
        freedman_bound(NLL, 2.0, alpha=0.1, alpha_min=0.01, floor_bits=1.0, lam=lam, **paid)
    with pytest.raises(InputError, match="below 1"):
        freedman_bound(NLL, 2.0, alpha=0.01, alpha_min=0.1, floor_bits=1.0, lam=lam, **paid)


def test_the_papers_bound_refuses_a_negative_range():
    paid = {"code_length_bits": 10.0, "num_tokens": 100, "num_sampled": 10, "delta": 0.05}
    assert paper_subsample_bound(0.5, loss_range_bits=0.0, **paid) == 0.5
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="loss_range_bits"):
            paper_subsample_bound(0.5, loss_range_bits=bad, **paid)
        with pytest.raises(InputError, match="loss_range_bits"):
            paper_subsample_bound(math.nan, loss_range_bits=1.0, **paid)


@given(square=st.floats(0, 1e3), kappa=st.floats(1e-3, 1e9), m=st.integers(1, 10**12))
def test_the_oracle_gap_is_the_root_of_twice_variance_times_kappa(square, kappa, m):
    with mpmath.workdps(40):
        exact = mpmath.sqrt(2 * mpmath.mpf(square) * mpmath.mpf(kappa) / m)
    assert oracle_gap_bits(square, kappa=kappa, num_tokens=m) == pytest.approx(float(exact), rel=1e-12)
