"""Budgets of a sample's windows: what a window counts at, that samples hold, and that nobody gets one unpaid."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tokenbound.bounds import Claim, Evidence, SamplingPlan, Tuning, certify, choose_tunings, line_sums, sampling_path
from tokenbound.bounds.budgets import WindowBudget
from tokenbound.bounds.constants import BUDGET_GRID
from tokenbound.bounds.controls import ControlVariates
from tokenbound.bounds.exact import LineSums, highest_value
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.printing import Measured, budget_sentences
from tokenbound.bounds.sampled_lines import counted_windows, expected_slacks, window_budget
from tokenbound.bounds.sampling import path_of_windows
from tokenbound.bounds.smoothing import smoothed_loss_bits
from tokenbound.errors import MismatchError

V, LENGTH = 300, 16


def with_uniform_rest(values: np.ndarray, budget: float, uniform: float) -> float:
    """What a window costs whose steps behind the budget are predicted uniformly, step by step."""
    total = 0.0
    for value in values.tolist():
        total += uniform if total > budget else value
    return total


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60), st.floats(1, 300), st.floats(0.5, 9))
@settings(max_examples=300, deadline=None)
def test_a_window_is_counted_at_no_less_than_it_costs(values, budget, uniform):
    values = np.array(values)
    sums, highest = np.array([math.fsum(values)]), float(values.max())
    limited = WindowBudget(budget, highest, uniform)
    [counted] = limited.counted(sums, np.array([values.size]))
    cost = with_uniform_rest(values, budget, uniform)
    assert cost <= counted + 1e-9
    assert counted <= budget * (1 + 1e-8) + highest + uniform * values.size
    if sums[0] < budget * (1 - 1e-8):
        assert counted == sums[0] == pytest.approx(cost, rel=1e-12)
    else:
        assert counted == budget + highest + uniform * values.size or not limited.exceeded(sums)


def test_sums_at_the_budget_count_as_beyond_it():
    budget = WindowBudget(100.0, 5.0, 2.0)
    sums = np.array([99.9, 100 * (1 - 1e-10), 100.0, 100.1])
    assert budget.exceeded(sums).tolist() == [False, True, True, True]
    assert budget.counted(sums, np.array([10, 10, 10, 20])).tolist() == [99.9, 125.0, 125.0, 145.0]
    limits = budget.limits(np.array([3, 4]), 70, 9, np.array([3, 4, 9]))
    assert (limits.sizes.tolist(), limits.total_size, limits.largest_size) == ([3, 4], 70, 9)
    assert (limits.fixed, limits.rate) == (105.0, 2.0)
    assert limits.every_size is not None
    assert limits.every_size.tolist() == [3, 4, 9]


def hard_corpus(windows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """nll and entropy [windows, LENGTH]; the model is sure and wrong all along a few windows."""
    rng = np.random.default_rng(seed)
    entropy = rng.gamma(1.0, 0.8, (windows, LENGTH)).clip(max=5).astype(np.float32)
    nll = rng.gamma(0.7, entropy / 0.7 + 0.02).astype(np.float32)
    wrong = rng.random(windows) < 0.01
    entropy[wrong], nll[wrong] = 0.01, 30.0
    return nll, entropy


def tuned(nll: np.ndarray, entropy: np.ndarray, claim: Claim, plan: SamplingPlan) -> list[Tuning]:
    pilot = slice(0, plan.pilot_units)
    evidence = Evidence.from_losses(
        nll[pilot].ravel(), entropy[pilot].ravel(), vocab_size=V, window_lengths=[LENGTH] * plan.pilot_units
    )
    return list(choose_tunings(evidence, claim, plan))


def values_of(tuning: Tuning, nll: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """[W, LENGTH] z of every token."""
    sums = line_sums([tuning], nll.ravel(), entropy.ravel(), window_lengths=[1] * nll.size)
    return sums.windows[0].reshape(nll.shape)


def sums_of(tunings: list[Tuning], nll: np.ndarray, entropy: np.ndarray) -> LineSums:
    """Sums of some lines over windows of LENGTH tokens, given as [W, LENGTH]."""
    return line_sums(tunings, nll.ravel(), entropy.ravel(), window_lengths=[LENGTH] * len(nll))


def claim_of(windows: int, delta: float = 0.05) -> Claim:
    return Claim(V, V, 400.0, delta, windows * LENGTH, methods=("freedman",))


def test_a_sampled_freedman_line_is_that_of_windows_with_a_budget():
    nll, entropy = hard_corpus(1500, seed=1)
    claim, plan = claim_of(1500), SamplingPlan(1500, LENGTH, 100)
    [tuning] = tuned(nll, entropy, claim, plan)
    tuning = replace(tuning, budget=BUDGET_GRID[3])
    drawn = slice(0, 700)
    sums = sums_of([tuning], nll[drawn], entropy[drawn])
    [line] = certify([tuning], sums, claim, plan)

    values = values_of(tuning, nll, entropy)
    assert values.min() >= 0
    assert values.max() <= highest_value(tuning)
    over = values.sum(axis=1) > tuning.budget
    assert line.parameters["window_budget_bits"] == tuning.budget
    assert line.parameters["windows_over_budget"] == over[drawn].sum() > 0
    capped = np.where(over, tuning.budget + highest_value(tuning) + LENGTH * math.log2(V), values.sum(axis=1))
    counted, lengths = counted_windows(tuning, 0, sums)
    assert counted == pytest.approx(capped[drawn])
    assert lengths.tolist() == [LENGTH] * 700
    path = sampling_path(tuning, 0, sums, claim, plan)
    assert path.sample_mean == pytest.approx(np.cumsum(capped[drawn])[100:] / np.arange(101, 701) / LENGTH)
    whole = sum(with_uniform_rest(row, tuning.budget, math.log2(V)) for row in values) / claim.num_tokens
    assert (path.upper >= whole).all()
    complexity = line.kappa_nats / (tuning.lam * claim.num_tokens)
    assert line.value == pytest.approx(path.upper[-1] + complexity, abs=3e-9)
    assert line.terms["sampling_slack"] == pytest.approx(path.upper[-1] - capped[drawn].mean() / LENGTH)
    assert set(expected_slacks(tuning, 0, sums, claim, plan)) == {2}
    [said] = token_bound("freedman").sentences(line)
    assert f"{over[drawn].sum()} windows drawn exceeded" in said


def test_it_leaves_less_slack_than_the_largest_losses_would():
    nll, entropy = hard_corpus(3000, seed=2)
    claim, plan = claim_of(3000), SamplingPlan(3000, LENGTH, 100)
    slacks = {}
    for has_budgets in (True, False):
        own = replace(plan, has_budgets=has_budgets)
        tunings = tuned(nll, entropy, claim, own)
        assert (tunings[0].budget is not None) == has_budgets
        drawn = slice(0, 900)
        sums = sums_of(tunings, nll[drawn], entropy[drawn])
        [line] = certify(tunings, sums, claim, own)
        slacks[has_budgets] = line.value
        assert ("window_budget_bits" in line.parameters) == has_budgets
    assert slacks[True] < slacks[False] - 0.1


def risk_misses(runs: int, delta: float, seed: int) -> int:
    """How often the whole bound lies below the risk of the hypothesis: windows are a martingale that adapts.

    A token is what the model expects, or one of the others. After a surprise the next is likelier, and in rare windows
    it is likelier than the model ever says.
    """
    rng, failed = np.random.default_rng(seed), 0
    windows, q = 200, 0.9
    claim, plan = Claim(V, V, 0.0, delta, windows * LENGTH, methods=("freedman",)), SamplingPlan(windows, LENGTH, 20)
    entropy = np.full((windows, LENGTH), -q * math.log(q) - (1 - q) * math.log((1 - q) / (V - 1)), np.float32)
    for _ in range(runs):
        chances, surprised = np.empty((windows, LENGTH)), np.empty((windows, LENGTH), bool)
        base = np.where(rng.random(windows) < 0.03, 0.8, 0.08)
        before = np.zeros(windows, bool)
        for step in range(LENGTH):
            chances[:, step] = np.minimum(base + 0.1 * before, 0.95)
            before = surprised[:, step] = rng.random(windows) < chances[:, step]
        nll = np.where(surprised, -math.log((1 - q) / (V - 1)), -math.log(q)).astype(np.float32)
        [tuning] = tuned(nll, entropy, claim, plan)
        drawn = slice(0, 120)
        sums = sums_of([tuning], nll[drawn], entropy[drawn])
        [line] = certify([tuning], sums, claim, plan)
        values = values_of(tuning, nll, entropy)
        losses = [smoothed_loss_bits([x], alpha=tuning.alpha, vocab_size=V)[0] for x in (-math.log(q), nll.max())]
        risk = 0.0
        for row, chance in zip(values, chances, strict=True):
            over = np.concatenate([[0.0], np.cumsum(row)[:-1]]) > tuning.budget
            risk += float(np.where(over, math.log2(V), (1 - chance) * losses[0] + chance * losses[1]).sum())
        failed += line.value < risk / claim.num_tokens
    return failed


def test_the_risk_of_windows_with_budgets_is_bounded():
    assert risk_misses(4, 0.5, seed=8) <= binom.ppf(1 - 1e-4, 4, 0.5)


@pytest.mark.slow
def test_the_risk_of_windows_with_budgets_is_bounded_long():
    assert risk_misses(150, 0.5, seed=9) <= binom.ppf(1 - 1e-4, 150, 0.5)


def misses(runs: int, delta: float, seed: int) -> int:
    """How many paths lie below the mean of all windows as the hypothesis has them, at any size of the sample."""
    nll, entropy = hard_corpus(240, seed=4)
    claim, plan = claim_of(240, delta), SamplingPlan(240, LENGTH, 20)
    rng, failed = np.random.default_rng(seed), 0
    for _ in range(runs):
        order = rng.permutation(240)
        [tuning] = tuned(nll[order], entropy[order], claim, plan)
        tuning = replace(tuning, budget=BUDGET_GRID[rng.integers(0, 8)])
        drawn = order[:160]
        sums = sums_of([tuning], nll[drawn], entropy[drawn])
        path = sampling_path(tuning, 0, sums, claim, plan)
        values = values_of(tuning, nll, entropy)
        whole = sum(with_uniform_rest(row, tuning.budget, math.log2(V)) for row in values) / claim.num_tokens
        failed += bool((path.upper < whole - 1e-9).any())
    return failed


def test_samples_hold():
    assert misses(6, 0.4, seed=5) <= binom.ppf(1 - 1e-4, 6, 0.2)


@pytest.mark.slow
def test_samples_hold_long():
    assert misses(200, 0.4, seed=6) <= binom.ppf(1 - 1e-4, 200, 0.2)


def test_a_budget_is_named_paid_for_and_only_in_a_sample():
    nll, entropy = hard_corpus(300, seed=7)
    claim, plan = claim_of(300), SamplingPlan(300, LENGTH, 100)
    [tuning] = tuned(nll, entropy, claim, plan)
    sums = sums_of([tuning], nll[:200], entropy[:200])
    for change, words in (
        ({"budget": None}, "has no budget; choose its tuning with the plan"),
        ({"budget": 100.0}, "budget 100.0 of a line is not in the grid"),
        ({"tune_bits": tuning.tune_bits - 1}, "pays"),
    ):
        with pytest.raises(MismatchError, match=words):
            certify([replace(tuning, **change)], sums, claim, plan)
    with pytest.raises(MismatchError, match="lines of a sample alone may have"):
        certify([tuning], sums, claim, replace(plan, has_budgets=False))
    whole = line_sums([tuning], nll.ravel(), entropy.ravel())
    with pytest.raises(MismatchError, match="lines of a sample alone may have"):
        certify([tuning], whole, claim)
    assert window_budget(replace(tuning, budget=None)) is None
    assert token_bound("freedman").word_bits(tuning) == token_bound("freedman").code_bits(tuning) + 6


def test_what_is_said_of_a_budget():
    nll, entropy = hard_corpus(300, seed=7)
    claim, plan = claim_of(300), SamplingPlan(300, LENGTH, 100)
    [tuning] = tuned(nll, entropy, claim, plan)
    sums = sums_of([tuning], nll[:200], entropy[:200])
    said = {}
    for index in (3, 60):
        [line] = certify([replace(tuning, budget=BUDGET_GRID[index])], sums, claim, plan)
        [said[index]] = budget_sentences(line)
    assert "No window drawn exceeded that." in said[60]
    assert "window drawn exceeded that." in said[3] or "windows drawn exceeded that." in said[3]
    assert "No window" not in said[3]
    assert budget_sentences(replace(line, parameters={})) == ()
    assert Measured(1.0, 1.0).parameters == {}
    assert Measured(1.0, 1.0, budget=64.0).parameters["windows_over_budget"] == 0
    assert Measured(1.0, 1.0, budget=64.0, over_budget=2).parameters == {
        "window_budget_bits": 64.0,
        "windows_over_budget": 2,
    }


def test_a_line_that_cannot_be_computed_needs_no_budget():
    nll, entropy = hard_corpus(300, seed=7)
    claim, plan = claim_of(300), SamplingPlan(300, LENGTH, 100)
    bound = token_bound("freedman")
    tuning = bound.charged(Tuning("freedman", V, unavailable="a column is missing"), claim)
    sums = sums_of([tuning], nll[:200], entropy[:200])
    [line] = certify([tuning], sums, claim, plan)
    assert line.value is None


def test_with_control_variates_each_window_has_the_limit_of_its_own_tokens():
    rng = np.random.default_rng(10)
    lengths = np.where(rng.random(200) < 0.5, 4, LENGTH)
    losses = np.where(lengths == 4, 0.2, 2.0) + rng.uniform(0, 0.1, 200)
    controls = ControlVariates((losses * lengths)[:, None], lengths, np.arange(200))
    plan = SamplingPlan(200, LENGTH, 40, controls=controls)
    claim = Claim(V, V, 400.0, 0.05, int(lengths.sum()), methods=("freedman",))
    ends = int(lengths[:120].sum())
    nll = np.repeat(losses, lengths)[:ends].astype(np.float32)
    tuning = replace(tuned(*hard_corpus(300, seed=7), claim_of(300), SamplingPlan(300, LENGTH, 100))[0], budget=256.0)
    sums = line_sums([tuning], nll, np.full(ends, 1.0, np.float32), window_lengths=lengths[:120])
    path = sampling_path(tuning, 0, sums, claim, plan)
    assert path.beta[0] > 0.1
    counted, drawn = counted_windows(tuning, 0, sums)
    budget = window_budget(tuning)
    assert budget is not None
    for every, agrees in ((lengths, True), (None, False)):
        limits = budget.limits(drawn, claim.num_tokens, LENGTH, every)
        other = path_of_windows(counted, drawn, highest_value(tuning), claim, plan, limits=limits)
        assert (other.upper.tolist() == path.upper.tolist()) == agrees


def test_other_lines_have_no_budget():
    nll, entropy = hard_corpus(300, seed=7)
    claim, plan = replace(claim_of(300), methods=("freedman", "azuma")), SamplingPlan(300, LENGTH, 100)
    freedman, azuma = tuned(nll, entropy, claim, plan)
    assert freedman.budget is not None
    assert azuma.budget is None
    sums = sums_of([freedman, azuma], nll[:200], entropy[:200])
    _, line = certify([freedman, azuma], sums, claim, plan)
    assert "window_budget_bits" not in line.parameters
    assert (Tuning("azuma", V).degree, Tuning("azuma", V).tune_bits, plan.unexplained) == (0, 0.0, 1.0)


@pytest.mark.parametrize("method", ["freedman", "azuma"])
def test_the_windows_of_a_smoothing_head_add_up_to_its_sum(method):
    nll, entropy = hard_corpus(60, seed=11)
    alphas = np.random.default_rng(3).uniform(2.0**-6, 0.4, nll.size)
    claim = replace(claim_of(60), methods=(method,), has_alpha=True, alpha_min=2.0**-6)
    [tuning] = choose_tunings(Evidence.from_losses(nll.ravel(), entropy.ravel(), alpha=alphas, vocab_size=V), claim)
    sums = line_sums([tuning], nll.ravel(), entropy.ravel(), None, alphas, window_lengths=[LENGTH] * 60)
    assert math.fsum(sums.windows[0]) == pytest.approx(sums.total(0, "value"), rel=1e-12)
    first = line_sums([tuning], nll[0], entropy[0], None, alphas[:LENGTH])
    assert sums.windows[0][0] == pytest.approx(first.total(0, "value"), rel=1e-12)
