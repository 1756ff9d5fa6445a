"""The smoothed loss at the edges of float32, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenbound.bounds.constants import ALPHA_GRID, ALPHA_SLOPES
from tokenbound.bounds.smoothing import (
    alpha_levels,
    entropy_level,
    loss_interval_bits,
    loss_intervals_bits,
    smoothed_loss_bits,
)
from tokenbound.bounds.theorems import azuma_bound, freedman_bound, relative_bound
from tokenbound.errors import InputError

PAID = {"code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.05}


@given(
    nll=st.floats(-(2.0**-17), 2.0**100, width=32),
    alpha=st.floats(1e-9, 0.999),
    vocab=st.integers(2, 2**20),
)
def test_loss_lies_in_its_interval(nll, alpha, vocab):
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab)
    loss = smoothed_loss_bits(np.array([nll], dtype=np.float32), alpha=alpha, vocab_size=vocab)[0]
    assert low - 1e-12 <= loss <= high + 1e-12
    assert high - low == pytest.approx(math.log2(1 + (1 - alpha) * vocab / alpha))


def test_float32_edges():
    nll = np.array([0.0, -0.0, -1e-8, -1e-5, 1e-7, 80.0, 3.4e38], dtype=np.float32)
    loss = smoothed_loss_bits(nll, alpha=0.25, vocab_size=256)
    low, high = loss_interval_bits(alpha=0.25, vocab_size=256)
    assert np.all(loss[:4] == loss[0]), "just below zero is clipped to zero before smoothing"
    assert loss[0] == pytest.approx(low, abs=1e-15)
    assert loss[4] == pytest.approx(low + 1e-7 * 0.75 / (0.75 + 0.25 / 256) / math.log(2), rel=1e-9)
    assert loss[5] == pytest.approx(high, rel=1e-12)
    assert loss[6] == high


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -2e-5, -1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unusable_losses_are_refused_everywhere(bad, dtype):
    nll = np.array([1.0, bad, 2.0], dtype=dtype)
    good = np.ones(3)
    with pytest.raises(InputError, match=r"nll_nats\[1\]"):
        azuma_bound(nll, vocab_size=256, alpha=0.1, **PAID)
    with pytest.raises(InputError, match=r"nll_nats\[1\]"):
        freedman_bound(nll, 1.0, vocab_size=256, alpha=0.1, lam=0.01, **PAID)
    with pytest.raises(InputError, match=r"nll_nats\[1\]"):
        relative_bound(good, nll, 0.0, vocab_size=256, alpha=0.1, base_alpha=0.1, lam=0.001, **PAID)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_outside_the_open_interval_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        smoothed_loss_bits([1.0], alpha=alpha, vocab_size=256)


@pytest.mark.parametrize("vocab", [1, 0, 2.5])
def test_vocabulary_is_checked(vocab):
    with pytest.raises(InputError, match="vocab_size"):
        loss_interval_bits(alpha=0.1, vocab_size=vocab)


def test_shapes_are_checked():
    with pytest.raises(InputError, match="flat"):
        smoothed_loss_bits(np.ones((2, 2)), alpha=0.1, vocab_size=256)
    with pytest.raises(InputError, match="shape"):
        smoothed_loss_bits([1.0, 2.0], alpha=np.array([0.1, 0.1, 0.1]), vocab_size=256)


@pytest.mark.parametrize("slope", ALPHA_SLOPES)
@pytest.mark.parametrize("alpha", ALPHA_GRID[::6])
def test_alpha_of_entropy_never_falls_below_its_minimum(alpha, slope):
    table = alpha_levels(alpha, slope)
    assert table.min() == alpha, "alpha_min is attained: the range B is not larger than it must be"
    assert table.max() <= 0.5
    steps = np.diff(table)
    assert np.all(steps >= 0) if slope >= 0 else np.all(steps <= 0)


def test_entropy_levels_cover_zero_to_log_v_and_beyond():
    levels = entropy_level([-1e-7, 0.0, math.log(512) / 2, math.log(512), 50.0], vocab_size=512)
    assert levels.tolist() == [0, 0, 32, 63, 63]


def test_intervals_of_an_array_agree_with_the_scalar_ones():
    alphas = np.array(ALPHA_GRID)
    lows, highs = loss_intervals_bits(alpha=alphas, vocab_size=50257)
    for alpha, low, high in zip(ALPHA_GRID, lows, highs, strict=True):
        assert (low, high) == pytest.approx(loss_interval_bits(alpha=alpha, vocab_size=50257), rel=1e-14)


def test_the_smallest_loss_that_counts_as_zero_is_minus_1e_5():
    at_zero = smoothed_loss_bits([0.0], alpha=0.1, vocab_size=256)
    assert smoothed_loss_bits([-1e-5], alpha=0.1, vocab_size=256) == at_zero
    with pytest.raises(InputError, match="below zero"):
        smoothed_loss_bits([math.nextafter(-1e-5, -1.0)], alpha=0.1, vocab_size=256)


@pytest.mark.parametrize("bad", [0.0, 1.0, math.nan])
def test_one_unusable_alpha_among_many_is_refused(bad):
    for alphas in ([0.1, bad], [bad, 0.1]):
        with pytest.raises(InputError, match="alpha"):
            smoothed_loss_bits([1.0, 2.0], alpha=alphas, vocab_size=256)
        with pytest.raises(InputError, match="alpha"):
            loss_intervals_bits(alpha=alphas, vocab_size=256)


@pytest.mark.parametrize("slope", ALPHA_SLOPES)
def test_an_alpha_above_the_cap_stays_what_it_is(slope):
    """The constant of a smoothing head may lie above one half; the table never falls below it."""
    assert alpha_levels(0.75, slope).tolist() == [0.75] * 64
