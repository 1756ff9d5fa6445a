"""The choice from the histogram against exhaustive search over the losses themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from tokenbound.bounds import Claim, Evidence, SamplingPlan, certify, choose_tunings, line_sums
from tokenbound.bounds.codes import elias_delta_bits, freedman_tune_bits, kappa_nats
from tokenbound.bounds.constants import ALPHA_GRID, BUDGET_GRID, T_GRID
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.forecast_search import FreedmanSearch
from tokenbound.bounds.lines.azuma import best_m0_index
from tokenbound.bounds.search import Cells, SlackModel
from tokenbound.bounds.smoothing import loss_interval_bits, smoothed_loss_bits
from tokenbound.errors import InputError, MismatchError


def ledger(vocab: int, size: int, seed: int = 0):
    """Losses drawn from the model's own predictive distribution, near enough: mean loss = entropy, heavy upper tail."""
    rng = np.random.default_rng(seed)
    entropy = np.minimum(rng.gamma(0.9, 1.4, size), 0.95 * math.log(vocab)).astype(np.float32)
    nll = np.minimum(rng.gamma(0.6, entropy / 0.6 + 0.01), 40.0).astype(np.float32)
    return nll, entropy, np.floor(np.expm1(np.minimum(nll, 9))).astype(np.int32)


def exhaustive_freedman(nll, entropy, claim: Claim, kappa: float) -> float:
    """Smallest bound over alpha, t and floors with the least-squares cubic of the exact losses."""
    basis = (entropy.astype(np.float64) / math.log(2))[:, None] ** np.arange(4)
    pinv = np.linalg.pinv(basis)
    best = math.inf
    for alpha in ALPHA_GRID[::2]:
        loss = smoothed_loss_bits(nll, alpha=alpha, vocab_size=claim.vocab_size)
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        guess = basis @ (pinv @ loss)
        for floor in np.arange(low, 3.0, 0.5):
            lowest = max(low, floor)
            forecast = np.clip(guess, lowest, high)
            for t in T_GRID[20::2]:
                lam = t / (high - lowest)
                value = np.mean(forecast - np.log1p(lam * (forecast - loss)) / lam)
                best = min(best, value + kappa / (lam * claim.num_tokens))
    return best


@pytest.mark.parametrize("vocab", [257, 128256])
@pytest.mark.parametrize("kappa_per_token", [0.1, 0.01, 0.001])
def test_choice_is_as_good_as_exhaustive_search(vocab, kappa_per_token):
    nll, entropy, _ = ledger(vocab, 20_000)
    code = kappa_per_token * nll.size / math.log(2)
    claim = Claim(vocab, vocab, code, 0.05, nll.size, methods=("freedman", "azuma"))
    evidence = Evidence.from_losses(nll, entropy, vocab_size=vocab)
    tunings = choose_tunings(evidence, claim)
    freedman, azuma = certify(tunings, line_sums(tunings, nll, entropy), claim)
    bits = freedman_tune_bits(3, choose_alpha=True) + claim.shared_bits
    kappa = kappa_nats(code_length_bits=code, tune_bits=bits, delta=0.05)
    best = exhaustive_freedman(nll, entropy, claim, kappa)
    gap = best - freedman.empirical
    assert freedman.value <= best + 0.003 * gap
    best = exhaustive_azuma(nll, claim)
    assert azuma.value <= best + 0.01 * (best - azuma.empirical)


@pytest.mark.parametrize("kappa_per_token", [0.3, 0.1, 0.03])
def test_no_floor_and_no_t_do_better_than_the_chosen_ones(kappa_per_token):
    # where the code is long for its tokens, lambda is as large as the range allows and the floor decides
    nll, entropy, _ = ledger(257, 20_000, seed=1)
    claim = Claim(257, 257, kappa_per_token * nll.size / math.log(2), 0.05, nll.size, methods=("freedman",))
    (tuning,) = choose_tunings(Evidence.from_losses(nll, entropy, vocab_size=257), claim)
    (line,) = certify((tuning,), line_sums((tuning,), nll, entropy), claim)
    low, high = loss_interval_bits(alpha=tuning.alpha, vocab_size=257)
    loss = smoothed_loss_bits(nll, alpha=tuning.alpha, vocab_size=257)
    basis = (entropy.astype(np.float64) / math.log(2))[:, None] ** np.arange(4)

    def bound(point) -> float:
        floor, stake, *coefficients = point
        t, lowest = -math.expm1(-math.exp(stake)), min(max(floor, low), high - 1)
        lam = t / (high - lowest)
        forecast = np.clip(basis @ coefficients, lowest, high)
        return np.mean(forecast - np.log1p(lam * (forecast - loss)) / lam) + line.kappa_nats / (lam * nll.size)

    coefficients = [*tuning.coefficients, 0.0, 0.0, 0.0][:4]
    best = min(
        minimize(bound, [floor, 2.0, *coefficients], method="Nelder-Mead", options={"maxfev": 600}).fun
        for floor in (low, 0.5, 1.0, 2.0)
    )
    assert line.value <= best + 0.004 * (best - line.empirical)


def exhaustive_azuma(nll, claim: Claim) -> float:
    best = math.inf
    for alpha in ALPHA_GRID:
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        mean = smoothed_loss_bits(nll, alpha=alpha, vocab_size=claim.vocab_size).mean()
        for j in range(20, 90):
            bits = math.log2(40) + elias_delta_bits(j) + claim.shared_bits
            kappa = kappa_nats(code_length_bits=claim.code_length_bits, tune_bits=bits, delta=claim.delta)
            ratio = math.sqrt(claim.num_tokens / 2 ** (j / 4))
            gap = (high - low) * math.sqrt(kappa / (2 * claim.num_tokens)) * (ratio + 1 / ratio) / 2
            best = min(best, mean + gap)
    return best


def test_freedman_beats_azuma_and_stays_near_the_oracle():
    vocab = 257
    nll, entropy, _ = ledger(vocab, 100_000)
    evidence = Evidence.from_losses(nll, entropy, vocab_size=vocab)
    claim = Claim(vocab, vocab, 0.024 * nll.size / math.log(2), 0.05, nll.size, methods=("freedman", "azuma"))
    tunings = choose_tunings(evidence, claim)
    freedman, azuma = certify(tunings, line_sums(tunings, nll, entropy), claim)
    assert freedman.value < azuma.value
    assert freedman.terms["gap_over_oracle"] < 1.35
    larger = claim.with_larger_corpus(10 * nll.size)
    tunings = choose_tunings(evidence, larger)
    freedman, _ = certify(tunings, line_sums(tunings, nll, entropy), larger)
    assert freedman.terms["gap_over_oracle"] < 1.12
    assert freedman.note.startswith("what-if: the same losses, a larger m")


def test_entropy_buys_a_tighter_bound():
    nll, entropy, _ = ledger(257, 50_000)
    code = 0.005 * nll.size / math.log(2)
    values = {}
    for has_entropy in (True, False):
        column = entropy if has_entropy else None
        claim = Claim(257, 257, code, 0.05, nll.size, methods=("freedman",), has_entropy=has_entropy)
        tunings = choose_tunings(Evidence.from_losses(nll, column, vocab_size=257), claim)
        assert has_entropy or (tunings[0].degree, tunings[0].alpha_slope) == (0, 0)
        values[has_entropy] = certify(tunings, line_sums(tunings, nll, column), claim)[0].value
    assert values[True] < values[False]


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_degenerate_ledgers_have_a_choice(constant):
    """All losses and entropies equal: the normal equations are singular, the variance is zero."""
    nll = np.full(2000, constant, np.float32)
    claim = Claim(257, 257, 100.0, 0.05, 2000, methods=("freedman", "azuma"))
    tunings = choose_tunings(Evidence.from_losses(nll, nll, vocab_size=257), claim)
    lines = certify(tunings, line_sums(tunings, nll, nll), claim)
    assert all(math.isfinite(line.value) and line.value > line.empirical for line in lines)


def test_one_token_and_an_enormous_code_still_give_a_number():
    nll = np.array([2.0], np.float32)
    claim = Claim(257, 257, 1e12, 0.05, 1, methods=("freedman", "azuma"))
    tunings = choose_tunings(Evidence.from_losses(nll, nll, vocab_size=257), claim)
    lines = certify(tunings, line_sums(tunings, nll, nll), claim)
    assert all(line.vacuous and "vacuous" in line.note for line in lines)


def test_coefficients_are_float16_and_paid():
    nll, entropy, rank = ledger(257, 20_000)
    claim = Claim(257, 257, 1000.0, 0.05, nll.size)
    evidence = Evidence.from_losses(nll, entropy, rank, vocab_size=257, top_k=(1, 10, 100))
    tuning = choose_tunings(evidence, claim)[0]
    numbers = np.array([*tuning.coefficients, tuning.y0])
    assert np.array_equal(numbers, numbers.astype(np.float16).astype(np.float64))
    assert tuning.t in T_GRID
    assert tuning.alpha in ALPHA_GRID
    low, high = loss_interval_bits(alpha=tuning.alpha, vocab_size=257)
    assert tuning.lam == tuning.t / (high - max(low, tuning.y0))
    expected = freedman_tune_bits(tuning.degree, choose_alpha=True) + math.log2(5) + 1
    assert tuning.tune_bits == pytest.approx(expected)


def test_choice_depends_on_merged_counts_only():
    """Two orders of the same losses: one choice."""
    nll, entropy, _ = ledger(257, 10_000)
    order = np.random.default_rng(1).permutation(nll.size)
    claim = Claim(257, 257, 1000.0, 0.05, nll.size, methods=("freedman", "azuma"))
    first = choose_tunings(Evidence.from_losses(nll, entropy, vocab_size=257), claim)
    second = choose_tunings(Evidence.from_losses(nll[order], entropy[order], vocab_size=257), claim)
    assert first == second


def test_worst_case_windows_push_alpha_up():
    nll, entropy, _ = ledger(128256, 20_000)
    claim = Claim(128256, 128256, 100.0, 0.05, 40_000, methods=("freedman", "azuma"))
    clean = choose_tunings(Evidence.from_losses(nll, entropy, vocab_size=128256), claim)
    failed = choose_tunings(Evidence.from_losses(nll, entropy, vocab_size=128256, worst_case=20_000), claim)
    assert all(b.alpha > a.alpha for a, b in zip(clean, failed, strict=True))


def test_smoothing_head_is_not_tuned():
    nll, entropy, _ = ledger(257, 5000)
    alpha = np.random.default_rng(0).uniform(0.02, 0.3, nll.size)
    evidence = Evidence.from_losses(nll, entropy, None, alpha, vocab_size=257)
    claim = Claim(257, 257, 500.0, 0.05, nll.size, methods=("freedman", "azuma"), has_alpha=True, alpha_min=0.015625)
    tunings = choose_tunings(evidence, claim)
    assert all(t.alpha == 0.015625 and t.alpha_column and t.alpha_slope == 0 for t in tunings)
    assert tunings[0].tune_bits == pytest.approx(
        freedman_tune_bits(tunings[0].degree, choose_alpha=False) + claim.shared_bits
    )
    lines = certify(tunings, line_sums(tunings, nll, entropy, None, alpha), claim)
    assert all(line.value > line.empirical for line in lines)
    with pytest.raises(MismatchError, match="alpha_min"):
        choose_tunings(evidence, Claim(257, 257, 500.0, 0.05, nll.size, has_alpha=True, alpha_min=0.1))


def test_choice_refuses_evidence_of_something_else():
    nll, entropy, _ = ledger(257, 100)
    evidence = Evidence.from_losses(nll, entropy, vocab_size=257)
    with pytest.raises(MismatchError, match="V = 257"):
        choose_tunings(evidence, Claim(258, 257, 0.0, 0.05, 100))
    with pytest.raises(MismatchError, match="entropies"):
        choose_tunings(Evidence.from_losses(nll, vocab_size=257), Claim(257, 257, 0.0, 0.05, 100))
    with pytest.raises(MismatchError, match="alpha"):
        choose_tunings(evidence, Claim(257, 257, 0.0, 0.05, 100, has_alpha=True, alpha_min=0.1))
    with pytest.raises(InputError, match="no token"):
        choose_tunings(Evidence.from_losses(nll[:0], entropy[:0], vocab_size=257), Claim(257, 257, 0.0, 0.05, 100))
    with pytest.raises(InputError, match="window_lengths"):
        choose_tunings(evidence, Claim(257, 257, 0.0, 0.05, 10_000), SamplingPlan(100, 100, 10))


def test_a_budget_spares_a_sample_the_range():
    """z_max grows with t, and a sample without a budget pays for z_max in every token of a window: with a smaller t."""
    nll, entropy, _ = ledger(257, 256 * 100)
    evidence = Evidence.from_losses(nll, entropy, vocab_size=257, window_lengths=np.full(256, 100))
    claim = Claim(257, 257, 0.05 * 1_000_000 / math.log(2), 0.05, 1_000_000, methods=("freedman",))
    full = choose_tunings(evidence, claim)[0]
    plan = SamplingPlan(10_000, 100, 256)
    sampled = choose_tunings(evidence, claim, plan)[0]
    slack = SlackModel.of(evidence, claim, plan)
    without = FreedmanSearch(Cells.of(evidence, claim), claim, slack).best()
    assert without.t < sampled.t == full.t
    assert sampled.tune_bits == full.tune_bits + 6
    assert full.budget is None
    mean = evidence.mean_nll_nats / math.log(2) * 100
    assert mean < sampled.budget < 10 * mean
    highest = highest_value(sampled)
    found, budget = slack.best_budget(highest, mean / 100, 8.0)
    most = (8.0 - mean / 100) * 100
    others = [slack.with_budget(each, mean=mean / 100, highest=highest, uniform=8.0, most=most) for each in BUDGET_GRID]
    assert found == min(others) < 0.5 * slack.bits(highest, mean / 100)
    assert budget == BUDGET_GRID[int(np.argmin(others))]


@pytest.mark.parametrize("m", [1, 2, 1000, 10**12])
def test_best_m0_is_the_best_of_all(m):
    def kappa(j):
        return kappa_nats(code_length_bits=50.0, tune_bits=elias_delta_bits(j), delta=0.05)

    def gap(j):
        ratio = math.sqrt(m / 2 ** (j / 4))
        return math.sqrt(kappa(j)) * (ratio + 1 / ratio)

    assert gap(best_m0_index(kappa, m)) == min(gap(j) for j in range(1, 300))
