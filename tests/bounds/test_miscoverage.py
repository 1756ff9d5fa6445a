"""Monte-Carlo miscoverage: how often does a bound lie below the true risk?

Every method must fail with frequency at most delta, tested by a binomial test at level 1e-6. "At every step" runs
look at the bound after each token or draw and count a run as failed if the bound was ever below the risk so far. The
vectorised failure criteria are the theorems' own supermartingales; `test_criteria_are_the_functions` ties them to the
package's functions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from tokenbound.bounds import (
    Claim,
    Evidence,
    LineSums,
    RelativeEvidence,
    SamplingPlan,
    Tuning,
    certify,
    certify_relative,
    choose_relative,
    choose_tunings,
    line_sums,
    relative_sums,
    sampling_path,
)
from tokenbound.bounds.sampling import mixture_stakes, running_moments, total_upper_bounds
from tokenbound.bounds.smoothing import (
    alpha_levels,
    entropy_level,
    loss_interval_bits,
    loss_intervals_bits,
    smoothed_loss_bits,
)
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_bound,
    azuma_predictable_bound,
    document_bound,
    freedman_bound,
    kl_error_bound,
    paper_error_bound,
    paper_subsample_bound,
    relative_bound,
)

DELTA = 0.1
PAID = {"code_length_bits": 0.0, "tune_bits": 0.0, "delta": DELTA}
KAPPA = math.log(1 / DELTA)


def assert_covers(failures: np.ndarray, delta: float = DELTA) -> None:
    """No more failures than a probability of delta explains."""
    runs, failed = failures.size, int(failures.sum())
    assert failed <= binom.ppf(1 - 1e-6, runs, delta), f"{failed} of {runs} runs failed, delta = {delta}"


def ever_exceeds(log_factors: np.ndarray, kappa: float) -> np.ndarray:
    """[runs] whether the log of the supermartingale ever reached kappa: log_factors is [runs, steps]."""
    return np.asarray(np.cumsum(log_factors, axis=1).max(axis=1) > kappa)


def freedman_factors(loss, mean, forecast, lam):
    return np.log1p(lam * (forecast - loss)) - lam * (forecast - mean)


def azuma_factors(loss, mean, lam, ranges):
    return lam * (mean - loss) - lam**2 * ranges**2 / 8


def kl_factors(error, mean, lam):
    """The bound on the mean of conditional means p_i: -sum ln(1 - p (1 - e^-lam)) - lam e at their average p."""
    steps = np.arange(1, error.shape[1] + 1)
    average = np.cumsum(mean, axis=1) / steps
    total = -steps * np.log1p(average * math.expm1(-lam)) - lam * np.cumsum(error, axis=1)
    return np.diff(total, axis=1, prepend=0.0)


class Markov:
    """A four-letter Markov chain and a model that knows it only roughly; all conditional means are exact."""

    def __init__(self, runs: int, steps: int, seed: int, alpha: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        self.vocab, self.alpha = 4, alpha
        truth = rng.dirichlet(np.full(4, 0.4), 4)
        model = 0.8 * truth + 0.2 * rng.dirichlet(np.ones(4), 4)
        self.truth, self.model = truth, model
        state = rng.integers(0, 4, runs)
        self.states = np.empty((runs, steps), dtype=np.int64)
        self.nll, self.mean = np.empty((runs, steps)), np.empty((runs, steps))
        self.entropy, self.error, self.error_mean = (np.empty((runs, steps)) for _ in range(3))
        nll = -np.log(model)
        smoothed = smoothed_loss_bits(nll.ravel(), alpha=alpha, vocab_size=4).reshape(4, 4)
        ranks = (model[:, None, :] >= model[:, :, None]).sum(axis=2) - 1
        for i in range(steps):
            self.states[:, i] = state
            following = (rng.random((runs, 1)) > np.cumsum(truth[state], axis=1)[:, :-1]).sum(axis=1)
            self.nll[:, i] = nll[state, following]
            self.mean[:, i] = (truth[state] * smoothed[state]).sum(axis=1)
            self.entropy[:, i] = -(model[state] * np.log(model[state])).sum(axis=1)
            self.error[:, i] = ranks[state, following] >= 1
            self.error_mean[:, i] = (truth[state] * (ranks[state] >= 1)).sum(axis=1)
            state = following
        self.loss = smoothed_loss_bits(self.nll.ravel(), alpha=alpha, vocab_size=4).reshape(runs, steps)

    def risk(self, alpha: float, slope: int, run: int) -> float:
        """True risk of one run under alpha(H), exactly."""
        entropy = -(self.model * np.log(self.model)).sum(axis=1).astype(np.float32)
        alphas = alpha_levels(alpha, slope)[entropy_level(entropy, vocab_size=4)]
        loss = -np.log2((1 - alphas[:, None]) * self.model + alphas[:, None] / 4)
        return float((self.truth * loss).sum(axis=1)[self.states[run]].mean())


def test_criteria_are_the_functions():
    """A run fails by the vectorised criterion exactly where the package's function lies below the risk."""
    chain = Markov(40, 60, seed=1)
    low, high = loss_interval_bits(alpha=chain.alpha, vocab_size=4)
    lam = 0.6 / (high - low)
    freedman = np.cumsum(freedman_factors(chain.loss, chain.mean, 1.5, lam), axis=1)
    extreme = np.random.default_rng(0).random((40, 60)) < 0.5  # Azuma is tight where losses sit at both ends
    azuma = np.cumsum(azuma_factors(np.where(extreme, high, low), (low + high) / 2, 0.1, high - low), axis=1)
    kl = np.cumsum(kl_factors(chain.error, chain.error_mean, 0.5), axis=1)
    loose = {"code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.8}
    kappa = math.log(1 / 0.8)
    agreed = {"freedman": 0, "azuma": 0, "kl": 0}
    for run in range(40):
        for n in (1, 7, 60):
            shared = {"vocab_size": 4, "alpha": chain.alpha, **loose}
            risk = chain.mean[run, :n].mean()
            bound = freedman_bound(chain.nll[run, :n], 1.5, lam=lam, floor_bits=1.5, **shared)
            assert (bound < risk) == (freedman[run, n - 1] > kappa)
            agreed["freedman"] += bound < risk
            bound = azuma_predictable_bound(np.where(extreme[run, :n], 800.0, 0.0), lam=0.1, **shared)
            assert (bound < (low + high) / 2) == (azuma[run, n - 1] > kappa)
            agreed["azuma"] += bound < (low + high) / 2
            bound = kl_error_bound(chain.error[run, :n].mean(), num_tokens=n, lam=0.5, **loose)
            assert (bound < chain.error_mean[run, :n].mean()) == (kl[run, n - 1] > kappa)
            agreed["kl"] += bound < chain.error_mean[run, :n].mean()
    assert all(agreed.values()), "at delta = 0.8 each criterion must have been seen on both sides"


@pytest.mark.parametrize("forecast", ["constant", "entropy", "running mean"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.98])
def test_freedman_on_markov_chains_at_every_step(forecast, t):
    chain = Markov(1500, 400, seed=2)
    low, high = loss_interval_bits(alpha=chain.alpha, vocab_size=4)
    guess = {
        "constant": np.full(chain.loss.shape, 1.0),
        "entropy": chain.entropy / math.log(2),
        "running mean": np.pad(np.cumsum(chain.loss, axis=1) / np.arange(1, 401), ((0, 0), (1, 0)))[:, :-1],
    }[forecast]
    clipped = np.clip(guess, max(low, 0.25), high)
    lam = t / (high - max(low, 0.25))
    assert_covers(ever_exceeds(freedman_factors(chain.loss, chain.mean, clipped, lam), KAPPA))


@pytest.mark.parametrize("seed", [3, 4])
def test_azuma_for_all_m_on_markov_chains(seed):
    chain = Markov(1500, 400, seed=seed)
    low, high = loss_interval_bits(alpha=chain.alpha, vocab_size=4)
    for m0 in (20, 400):
        lam = math.sqrt(8 * KAPPA / m0) / (high - low)
        assert_covers(ever_exceeds(azuma_factors(chain.loss, chain.mean, lam, high - low), KAPPA))
    bound = azuma_anytime_bound(chain.nll[0], vocab_size=4, alpha=chain.alpha, m0_index=20, **PAID)
    fixed = azuma_bound(chain.nll[0], vocab_size=4, alpha=chain.alpha, **PAID)
    assert bound > fixed


@pytest.mark.parametrize("lam", [2.0**-4, 0.5, 4.0])
def test_errors_on_markov_chains_at_every_step(lam):
    chain = Markov(1500, 400, seed=5)
    assert_covers(ever_exceeds(kl_factors(chain.error, chain.error_mean, lam), KAPPA))


@pytest.mark.parametrize("chance", [0.3, 0.02, 0.002])
def test_heavy_tailed_losses(chance):
    """Mostly nothing, rarely everything: the loss is at A or at B of a large vocabulary."""
    rng = np.random.default_rng(6)
    vocab, alpha, runs, steps = 50257, 0.01, 2000, 500
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab)
    loss = np.where(rng.random((runs, steps)) < chance, high, low)
    mean = np.full(loss.shape, low + chance * (high - low))
    for t in (0.3, 127 / 128):
        for floor in (low, 1.0):
            lam = t / (high - floor)
            assert_covers(ever_exceeds(freedman_factors(loss, mean, floor, lam), KAPPA))
    lam = math.sqrt(8 * KAPPA / steps) / (high - low)
    assert_covers(ever_exceeds(azuma_factors(loss, mean, lam, high - low), KAPPA))


def test_adversarial_predictable_ranges():
    """An adversary sets alpha_i, and so the range of the next loss, after seeing the wealth so far."""
    rng = np.random.default_rng(7)
    vocab, runs, steps, alpha_min = 16, 3000, 300, 0.01
    low, high = loss_interval_bits(alpha=alpha_min, vocab_size=vocab)
    azuma_lam, t = 0.25, 0.9
    lam = t / (high - low)
    wealth = {"azuma": np.zeros(runs), "freedman": np.zeros(runs)}
    failed = {name: np.zeros(runs, bool) for name in wealth}
    for _ in range(steps):
        for name, log_wealth in wealth.items():
            # close to the threshold: gamble with the widest range; far from it: small, steady steps
            alpha = np.where(log_wealth > KAPPA - 1.0, 0.4, np.where(log_wealth < -2, alpha_min, 0.1))
            lows, highs = loss_intervals_bits(alpha=alpha, vocab_size=vocab)
            chance = np.where(log_wealth > KAPPA - 1.0, 0.5, 0.03)
            mean = lows + chance * (highs - lows)
            loss = np.where(rng.random(runs) < chance, highs, lows)
            if name == "azuma":
                log_wealth += azuma_factors(loss, mean, azuma_lam, highs - lows)
            else:
                log_wealth += freedman_factors(loss, mean, np.clip(mean, lows, highs), lam)
            failed[name] |= log_wealth > KAPPA
    for failures in failed.values():
        assert_covers(failures)


def test_relative_bound_on_two_models_at_every_step():
    """The excess and the base at delta/2 each; a run fails if their sum was ever below the model's risk."""
    base, model = Markov(1500, 300, seed=8, alpha=0.05), Markov(1500, 300, seed=8, alpha=0.02)
    low, high = loss_interval_bits(alpha=0.02, vocab_size=4)
    base_low, base_high = loss_interval_bits(alpha=0.05, vocab_size=4)
    excess, mean = model.loss - base.loss, model.mean - base.mean
    lam = 0.8 / (high - base_low - (low - base_high))
    base_lam = 0.5 / (base_high - base_low)
    kappa, steps = math.log(2 / DELTA), np.arange(1, 301)
    gap = np.cumsum(freedman_factors(excess, mean, 0.0, lam), axis=1) / lam - kappa / lam
    base_gap = np.cumsum(freedman_factors(base.loss, base.mean, 1.0, base_lam), axis=1) / base_lam - kappa / base_lam
    assert_covers(((gap + base_gap) / steps > 0).any(axis=1))
    bound = relative_bound(
        model.nll[0],
        base.nll[0],
        0.0,
        vocab_size=4,
        alpha=0.02,
        base_alpha=0.05,
        lam=lam,
        **{**PAID, "delta": DELTA / 2},
    )
    assert bound - mean[0].mean() == pytest.approx(-gap[0, -1] / 300, rel=1e-9)


def coins(runs: int, size: int, chance: float, seed: int) -> np.ndarray:
    """[runs, size] unsmoothed losses that are 0 or so large that the smoothed ones lie at the ends of their range."""
    return np.where(np.random.default_rng(seed).random((runs, size)) < chance, 80.0, 0.0)


@pytest.mark.parametrize("chance", [0.05, 0.5])
def test_documents_drawn_independently(chance):
    """Documents of one to nine tokens, each wholly easy or wholly hard; the risk is that of a fresh document."""
    vocab, alpha = 16, 0.1
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab)
    lengths = np.random.default_rng(13).integers(1, 10, 40)
    document = np.repeat(np.arange(40), lengths)
    keywords = {"vocab_size": vocab, "alpha": alpha, **PAID}
    draws = coins(3000, 40, chance, 14)[:, document]
    bounds = np.array([document_bound(nll, document, **keywords) for nll in draws])
    assert_covers(bounds < low + chance * (high - low) - 1e-9)


def test_the_papers_sample_of_single_tokens():
    """A corpus of fixed m from a coin, n of its tokens drawn one by one; corpus and draw both vary."""
    tokens, drawn, chance = 200, 60, 0.5
    rng = np.random.default_rng(15)
    corpus = rng.random((4000, tokens)) < chance
    sample = np.take_along_axis(corpus, rng.integers(0, tokens, (4000, drawn)), axis=1)
    sizes = {"num_tokens": tokens, "num_sampled": drawn, "code_length_bits": 0.0, "delta": DELTA}
    gap = paper_subsample_bound(0.0, loss_range_bits=1.0, **sizes)
    assert_covers(sample.mean(axis=1) + gap < chance)


def test_fixed_m_forms():
    """Azuma's and the paper's error bound at one m that was named beforehand."""
    steps, chance = 80, 0.5
    low, high = loss_interval_bits(alpha=0.1, vocab_size=16)
    draws = coins(4000, steps, chance, 16)
    bounds = np.array([azuma_bound(nll, vocab_size=16, alpha=0.1, **PAID) for nll in draws])
    assert_covers(bounds < low + chance * (high - low) - 1e-9)
    errors = np.array([paper_error_bound(float(e), num_tokens=steps, **PAID) for e in (draws > 0).mean(axis=1)])
    assert_covers(errors < chance - 1e-12)


def certificate_fails(chain: Markov, run: int) -> bool:
    """A whole certificate, tuned on its own losses: does any of its lines lie below its risk?"""
    nll, entropy = chain.nll[run].astype(np.float32), chain.entropy[run].astype(np.float32)
    rank = chain.error[run].astype(np.int32)
    claim = Claim(4, 4, 0.0, DELTA, nll.size, top_k=(1,))
    tunings = choose_tunings(Evidence.from_losses(nll, entropy, rank, vocab_size=4, top_k=(1,)), claim)
    lines = certify(tunings, line_sums(tunings, nll, entropy, rank), claim)
    risks = [
        chain.error_mean[run].mean() if line.top_k else chain.risk(tuning.alpha, tuning.alpha_slope, run)
        for line, tuning in zip(lines, tunings, strict=True)
    ]
    return any(line.value < risk for line, risk in zip(lines, risks, strict=True))


def test_whole_certificates_tuned_on_their_own_losses():
    chain = Markov(25, 300, seed=9)
    assert_covers(np.array([certificate_fails(chain, run) for run in range(25)]))


@pytest.mark.slow
def test_whole_certificates_tuned_on_their_own_losses_long():
    for seed in range(6):
        chain = Markov(150, 1000, seed=200 + seed)
        assert_covers(np.array([certificate_fails(chain, run) for run in range(150)]))


def sampling_failures(units: np.ndarray, runs: int, highest: float, level: float, pilot: int, seed: int) -> np.ndarray:
    """Does the bound on the total ever fall below it, at any n, pilot excluded from the sequence?"""
    rng = np.random.default_rng(seed)
    failed = np.zeros(runs, bool)
    for run in range(runs):
        order = rng.permutation(units)
        first, rest = order[:pilot], order[pilot:]
        forecasts, deviations = running_moments(rest, first)
        stakes = mixture_stakes(
            forecasts, deviations, num_units=rest.size, highest=highest, log_inverse_delta=level, target_units=50
        )
        bounds = total_upper_bounds(
            rest, num_units=rest.size, highest=highest, log_inverse_delta=level, forecasts=forecasts, stakes=stakes
        )
        failed[run] = bool((bounds < rest.sum() - 1e-9).any())
    return failed


POPULATIONS = {
    "rare extremes": np.concatenate([np.ones(3), np.zeros(297)]),
    "fair coin": np.tile([0.0, 1.0], 150),
    "heavy tail": np.minimum(np.random.default_rng(0).pareto(1.2, 300) / 20, 1.0),
    "nearly all extreme": np.concatenate([np.ones(290), np.zeros(10)]),
    "two clusters": np.repeat([0.1, 0.7], 150),
}


@pytest.mark.parametrize("population", sorted(POPULATIONS))
def test_sampling_at_every_n(population):
    units = POPULATIONS[population]
    assert_covers(sampling_failures(units, 400, 1.0, KAPPA, 20, seed=11))


@pytest.mark.slow
@pytest.mark.parametrize("population", sorted(POPULATIONS))
def test_sampling_at_every_n_long(population):
    assert_covers(sampling_failures(POPULATIONS[population], 6000, 1.0, KAPPA, 20, seed=12))


def unequal_windows(hard: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors and lengths of 120 windows; hardness goes with their length."""
    lengths = np.random.default_rng(3).integers(1, 33, 120)
    share = {"long": lengths > 24, "short": lengths < 8}[hard]
    return np.where(share, lengths, 0).astype(float), lengths


@pytest.mark.parametrize("delta", [0.1, 0.8])
@pytest.mark.parametrize("hard", ["long", "short"])
def test_samples_of_unequal_windows_with_their_pilot_at_every_n(hard, delta):
    """The whole path as a certificate takes it: the pilot exactly, the others centred by it, the largest window."""
    errors, lengths = unequal_windows(hard)
    claim = Claim(256, 256, 0.0, delta, int(lengths.sum()), methods=("kl",), top_k=(1,))
    plan = SamplingPlan(120, int(lengths.max()), 12)
    line, full = Tuning("kl", 256, top_k=1), errors.sum() / lengths.sum()
    rng, failed = np.random.default_rng(17), np.zeros(300, bool)
    for run in range(300):
        order = rng.permutation(120)
        sums = LineSums(1, 0, np.zeros((1, 1, 3)), np.zeros(1), errors[None, order], lengths[order])
        path = sampling_path(line, 0, sums, claim, plan)
        assert path.upper[-1] == pytest.approx(full)
        failed[run] = (path.upper < full - 1e-12).any()
    assert_covers(failed, math.exp(-plan.log_inverse_delta(claim)))
    if delta == 0.8:
        assert failed.any(), "at so large a delta a sharp bound must have been seen to fail"


@pytest.mark.slow
def test_whole_relative_certificates_tuned_on_their_own_losses_long():
    base, model = Markov(60, 600, seed=21, alpha=0.05), Markov(60, 600, seed=21, alpha=0.02)
    claim = Claim(4, 4, 0.0, DELTA, 600, methods=("freedman",), num_bases=1)
    failed = np.zeros(60, bool)
    for run in range(60):
        entropy = base.entropy[run].astype(np.float32)
        pair = model.nll[run].astype(np.float32), base.nll[run].astype(np.float32), entropy, entropy
        tuning = choose_relative(RelativeEvidence.from_losses(*pair), claim)
        failed[run] = certify_relative(tuning, relative_sums(tuning, *pair), claim).value < model.risk(
            tuning.alpha, 0, run
        )
    assert_covers(failed)


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_freedman_at_every_step_long(t):
    for seed in range(5):
        chain = Markov(4000, 1500, seed=100 + seed)
        low, high = loss_interval_bits(alpha=chain.alpha, vocab_size=4)
        clipped = np.clip(chain.entropy / math.log(2), max(low, 0.25), high)
        lam = t / (high - max(low, 0.25))
        assert_covers(ever_exceeds(freedman_factors(chain.loss, chain.mean, clipped, lam), KAPPA))
