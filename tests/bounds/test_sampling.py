"""The sampling sequence: its closed form, its limits, its tightness, and stopping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    SamplingPlan,
    certify,
    choose_tunings,
    first_prefix,
    kappa_nats,
    kl_grid_bound,
    line_sums,
    loss_interval_bits,
    sampling_path,
)
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.sampled_lines import expected_slacks
from tokenbound.bounds.sampling import mixture_stakes, running_moments, total_upper_bounds
from tokenbound.bounds.theorems import azuma_anytime_gap
from tokenbound.errors import IncompleteError, InputError, MismatchError


def closed_form(values, num_units, forecasts, stakes, level):
    """One sequence, literally: every sum written out for every n."""
    bounds = []
    for n in range(1, len(values) + 1):
        top, weight = level, 0.0
        for i in range(1, n + 1):
            stake, forecast, left = stakes[i - 1], forecasts[i - 1], num_units - i + 1
            top += stake * (forecast + sum(values[: i - 1]) / left)
            top -= math.log(1 + stake * (forecast - values[i - 1]))
            weight += stake / left
        bounds.append(top / weight)
    return np.minimum.accumulate(bounds)


def test_one_sequence_is_the_closed_form():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 3, 40)
    forecasts, stakes = rng.uniform(0, 3, 40), rng.uniform(0.01, 0.3, 40)
    bounds = total_upper_bounds(
        values, num_units=100, highest=3.0, log_inverse_delta=3.0, forecasts=forecasts, stakes=stakes[:, None]
    )
    certain = np.cumsum(values) + 3.0 * (100 - np.arange(1, 41))
    expected = np.minimum(closed_form(values, 100, forecasts, stakes, 3.0), certain)
    assert bounds == pytest.approx(expected, rel=1e-10)
    assert expected[-1] < certain[-1], "the sequence must have said more than what is certain"


def test_a_mixture_solves_its_equation_from_above():
    rng = np.random.default_rng(1)
    values, forecasts = rng.uniform(0, 1, 60), np.full(60, 0.5)
    stakes = np.stack([np.full(60, s) for s in (0.02, 0.1, 0.5, 1.5)], axis=1)
    bounds = total_upper_bounds(
        values, num_units=200, highest=1.0, log_inverse_delta=4.0, forecasts=forecasts, stakes=stakes
    )
    left = 200 - np.arange(60)
    before = np.concatenate([[0], np.cumsum(values)[:-1]])
    for n in (1, 7, 60):
        means = (bounds[n - 1] - before[:n]) / left[:n]
        wealth = [
            np.prod((1 + s[:n] * (forecasts[:n] - values[:n])) * np.exp(-s[:n] * (forecasts[:n] - means)))
            for s in stakes.T
        ]
        assert math.log(np.mean(wealth)) >= -1e-9 + min(4.0, math.log(np.mean(wealth)))
        singles = [closed_form(values[:n], 200, forecasts[:n], s[:n], 4.0 + math.log(4))[-1] for s in stakes.T]
        assert bounds[n - 1] <= min(singles) + 1e-9, "a mixture is never worse than its best part at the union's price"


def test_bounds_only_improve_and_stakes_are_checked():
    rng = np.random.default_rng(2)
    values = rng.uniform(0, 1, 50)
    shared = {"num_units": 50, "highest": 1.0, "log_inverse_delta": 3.0, "forecasts": np.full(50, 0.5)}
    bounds = total_upper_bounds(values, stakes=np.full((50, 1), 1.0), **shared)
    assert np.all(np.diff(bounds) <= 0)
    assert bounds[-1] >= values.sum()
    with pytest.raises(InputError, match="stake"):
        total_upper_bounds(values, stakes=np.full((50, 1), 2.0), **shared)
    with pytest.raises(InputError, match="exceeds"):
        total_upper_bounds(values + 1, stakes=np.full((50, 1), 1.0), **shared)
    with pytest.raises(InputError, match="drawn"):
        total_upper_bounds(values, stakes=np.full((50, 1), 1.0), **{**shared, "num_units": 49})


def test_forecasts_and_stakes_are_predictable():
    """Changing draw i changes no forecast or stake up to i."""
    rng = np.random.default_rng(3)
    values, pilot = rng.normal(0, 1, 80), rng.normal(0, 1, 20)
    changed = values.copy()
    changed[40:] += 5

    def of(x):
        forecasts, deviations = running_moments(x, pilot)
        return forecasts, mixture_stakes(
            forecasts, deviations, num_units=1000, highest=20.0, log_inverse_delta=4.0, target_units=100
        )

    for first, second in zip(of(values), of(changed), strict=True):
        assert np.array_equal(first[:41], second[:41])
        assert not np.array_equal(first[41:], second[41:])


def test_running_moments_are_means_of_what_came_before():
    rng = np.random.default_rng(4)
    values, pilot = rng.normal(3, 1, 30), rng.normal(3, 1, 10)
    means, deviations = running_moments(values, pilot)
    for i in (0, 1, 29):
        known = np.concatenate([pilot, values[:i]])
        assert means[i] == pytest.approx(known.mean())
        assert deviations[i] == pytest.approx(known.std())


def drawn_path(units, pilot, level, target, highest):
    forecasts, deviations = running_moments(units[pilot:], units[:pilot])
    others = units.size - pilot
    stakes = mixture_stakes(
        forecasts,
        deviations,
        num_units=others,
        highest=highest,
        log_inverse_delta=level,
        target_units=target,
    )
    bounds = total_upper_bounds(
        units[pilot:], num_units=others, highest=highest, log_inverse_delta=level, forecasts=forecasts, stakes=stakes
    )
    return bounds, forecasts, deviations


def test_slack_is_near_the_oracle_and_beats_fixed_stakes_across_sizes():
    """Oracle: the Bernstein slack at a sample size known in advance, sqrt(2 s2 L / n (1 - n/N)); means over draws.

    The mixture knows no sample size. A single stake tuned for 2048 units must lose to it far from there on both sides.
    """
    rng = np.random.default_rng(5)
    level, pilot, size, repetitions = 5.0, 128, 16_000, 10
    others, sizes = size - pilot, (128, 512, 2048, 8192, 15_000)
    ours, fixed = np.zeros(len(sizes)), np.zeros(len(sizes))
    oracle = np.array([others * math.sqrt(2 * level / n * (1 - n / others)) for n in sizes])
    at = np.array(sizes) - 1
    for _ in range(repetitions):
        units = rng.normal(0, 1, size).clip(-5, 5)
        total = units[pilot:].sum()
        bounds, forecasts, deviations = drawn_path(units, pilot, level, 2048, 5.0)
        ours += (bounds[at] - total) / oracle / repetitions
        q = np.sum(1.0 / (others - np.arange(2048)) ** 2)
        stakes = np.sqrt(2 * level / q) / (deviations * (others - np.arange(others)))
        bounds = total_upper_bounds(
            units[pilot:],
            num_units=others,
            highest=5.0,
            log_inverse_delta=level,
            forecasts=forecasts,
            stakes=np.minimum(stakes, 0.97 / (5.0 - forecasts))[:, None],
        )
        fixed += (bounds[at] - total) / oracle / repetitions
    assert np.all(ours <= 1.7)
    assert np.all(ours[1:] <= 1.45)
    assert ours[0] < fixed[0]
    assert ours[-1] < fixed[-1]


def corpus(windows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 65, windows)
    hardness = np.repeat(rng.gamma(20, 1 / 20, windows), lengths)
    entropy = np.minimum(rng.gamma(1.0, hardness), 5.0).astype(np.float32)
    nll = rng.gamma(0.7, entropy / 0.7 + 0.02).astype(np.float32)
    return nll, entropy, np.floor(nll * 3).astype(np.int32), lengths


def sampled_run(windows=3000, pilot=128, scored=1500, **claim_fields):
    nll, entropy, rank, lengths = corpus(windows)
    claim = Claim(300, 300, 500.0, 0.05, int(lengths.sum()), top_k=(1,), **claim_fields)
    plan = SamplingPlan(windows, 64, pilot)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    part = slice(0, ends[pilot])
    evidence = Evidence.from_losses(
        nll[part], entropy[part], rank[part], vocab_size=300, top_k=(1,), window_lengths=lengths[:pilot]
    )
    tunings = choose_tunings(evidence, claim, plan)
    part = slice(0, ends[scored])
    sums = line_sums(tunings, nll[part], entropy[part], rank[part], window_lengths=lengths[:scored])
    full = line_sums(tunings, nll, entropy, rank, window_lengths=lengths)
    return tunings, sums, claim, plan, full


def test_upper_bounds_cover_the_full_mean_and_terms_add_up():
    tunings, sums, claim, plan, full = sampled_run()
    for i, line in enumerate(certify(tunings, sums, claim, plan)):
        path = sampling_path(tunings[i], i, sums, claim, plan)
        assert path.upper.size == 1500 - 128
        assert np.all(path.upper >= full.mean(i, "value"))
        parts = ("empirical", "variance", "code", "tune", "delta", "sampling_slack")
        total = sum(line.terms[name] for name in parts)
        assert total <= line.value <= total + 2e-9
        assert line.terms["sampling_slack"] == pytest.approx(path.slack[-1])
        assert line.kappa_nats == pytest.approx(math.log(2) * (500.0 + line.tune_bits) + math.log(1 / 0.025)), (
            "half of delta is spent on the sampling"
        )


def test_a_sampled_line_is_its_theorem_at_the_upper_bound_and_the_rest_of_delta():
    tunings, sums, claim, plan, _ = sampled_run()
    freedman, azuma, kl = certify(tunings, sums, claim, plan)
    upper = [float(sampling_path(tunings[i], i, sums, claim, plan).upper[-1]) for i in range(3)]
    paid = {"code_length_bits": 500.0, "delta": 0.025}
    kappa = kappa_nats(tune_bits=freedman.tune_bits, **paid)
    low, high = loss_interval_bits(alpha=azuma.parameters["alpha"], vocab_size=300)
    j, m = azuma.parameters["m0_index"], claim.num_tokens
    gap = azuma_anytime_gap(high - low, kappa_nats(tune_bits=azuma.tune_bits, **paid), m, j)
    for line, value in (
        (freedman, upper[0] + kappa / (tunings[0].lam * m)),
        (azuma, upper[1] + sum(gap)),
        (kl, kl_grid_bound(upper[2], tune_bits=kl.tune_bits, num_tokens=m, **paid)[0]),
    ):
        assert value <= line.value <= value + 3e-9, line.method


def test_scoring_everything_leaves_no_slack():
    tunings, sums, claim, plan, full = sampled_run(scored=3000)
    for i, line in enumerate(certify(tunings, full, claim, plan)):
        assert line.terms["sampling_slack"] == pytest.approx(0.0, abs=1e-9)
        assert sampling_path(tunings[i], i, sums, claim, plan).upper[-1] == pytest.approx(full.mean(i, "value"))


def test_expected_slacks_foretell_what_larger_samples_leave():
    tunings, sums, claim, plan, full = sampled_run(scored=500)
    for i, line in enumerate(certify(tunings, sums, claim, plan)):
        actual = sampling_path(tunings[i], i, full, claim, plan).slack
        assert line.terms["slack_at_2n"] == pytest.approx(actual[1000 - 129], rel=0.2)
        assert line.terms["slack_at_4n"] == pytest.approx(actual[2000 - 129], rel=0.2)
        assert line.terms["slack_at_4n"] < line.terms["slack_at_2n"] < line.terms["sampling_slack"]


def test_expected_slacks_end_where_all_windows_are_scored():
    for scored, multiples in ((1400, {2}), (1500, set()), (3000, set())):
        tunings, sums, claim, plan, _ = sampled_run(scored=scored)
        assert set(expected_slacks(tunings[0], 0, sums, claim, plan)) == multiples


def test_until_slack_stops_at_the_first_prefix_and_can_go_on():
    tunings, sums, claim, plan, full = sampled_run()
    paths = [sampling_path(tunings[i], i, sums, claim, plan) for i in (0, 1)]
    target = float(np.maximum(paths[0].slack, paths[1].slack)[-300])
    stop = first_prefix(paths, target)
    worst = np.maximum(paths[0].slack, paths[1].slack)
    assert worst[stop - 129] <= target
    assert np.all(worst[: stop - 129] > target)
    assert first_prefix(paths, 1e-6) is None
    longer = [sampling_path(tunings[i], i, full, claim, plan) for i in (0, 1)]
    assert first_prefix(longer, target) == stop, "later windows do not move the stop"
    with pytest.raises(InputError, match="loss line"):
        first_prefix([], target)
    assert np.array_equal(longer[0].upper[: paths[0].upper.size], paths[0].upper)
    assert longer[0].upper[-1] < paths[0].upper[-1]


def test_trials_evaluations_and_lines_divide_delta():
    _, _, claim, plan, _ = sampled_run(scored=200)
    base = plan.log_inverse_delta(claim)
    assert base == pytest.approx(math.log(1 / 0.025) + math.log(3) + math.log(2))
    assert SamplingPlan(3000, 64, 128, trial=12).log_inverse_delta(claim) == pytest.approx(base + 7 * math.log(2))
    third = SamplingPlan(3000, 64, 128, evaluation=3).log_inverse_delta(claim)
    assert third == pytest.approx(base + math.log(12))
    spent = sum(
        math.exp(-SamplingPlan(3000, 64, 128, trial=k, evaluation=j).log_inverse_delta(claim))
        for k in range(1, 400)
        for j in range(1, 100)
    )
    assert 3 * spent <= 0.025


def test_worst_case_windows_in_a_sample():
    nll, entropy, rank, lengths = corpus(400)
    claim = Claim(300, 300, 500.0, 0.05, int(lengths.sum()), top_k=(1,))
    plan = SamplingPlan(400, 64, 50)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    evidence = Evidence.from_losses(
        nll[: ends[50]], entropy[: ends[50]], rank[: ends[50]], vocab_size=300, top_k=(1,), window_lengths=lengths[:50]
    )
    tunings = choose_tunings(evidence, claim, plan)
    failed = np.zeros(200, dtype=bool)
    failed[120] = True
    kept = np.repeat(~failed, lengths[:200])
    part = slice(0, ends[200])
    clean = line_sums(tunings, nll[part], entropy[part], rank[part], window_lengths=lengths[:200])
    worst = line_sums(
        tunings,
        nll[part][kept],
        entropy[part][kept],
        rank[part][kept],
        window_lengths=lengths[:200],
        worst_case=failed,
    )
    for i, tuning in enumerate(tunings):
        assert worst.windows[i, 120] == pytest.approx(highest_value(tuning) * lengths[120])
        first = sampling_path(tuning, i, clean, claim, plan).upper
        second = sampling_path(tuning, i, worst, claim, plan).upper
        assert np.array_equal(first[:70], second[:70])
        assert second[-1] >= first[-1]


def test_impossible_samples_are_refused():
    tunings, sums, claim, plan, full = sampled_run(scored=300)
    with pytest.raises(IncompleteError, match="pilot"):
        certify(tunings, sums, claim, SamplingPlan(3000, 64, 300))
    with pytest.raises(InputError, match="at most 10"):
        certify(tunings, sums, claim, SamplingPlan(3000, 10, 128))
    with pytest.raises(MismatchError, match="exactly once"):
        certify(tunings, sums, claim, SamplingPlan(300, 64, 300))
    with pytest.raises(InputError, match="the plan has 200"):
        certify(tunings, sums, claim, SamplingPlan(200, 64, 128))
    with pytest.raises(InputError, match="whole corpus"):
        certify(tunings, full, Claim(300, 300, 500.0, 0.05, claim.num_tokens + 1, top_k=(1,)), plan)
    flat = line_sums(tunings, *corpus(10)[:3])
    with pytest.raises(InputError, match="window_lengths"):
        certify(tunings, flat, claim, plan)
    for bad in ((0, 64, 1), (10, 0, 1), (10, 64, 0), (10, 64, 11)):
        with pytest.raises(InputError):
            SamplingPlan(*bad)
    with pytest.raises(InputError):
        SamplingPlan(10, 10, 1, evaluation=0)


def test_a_pilot_that_is_all_errors_still_gives_numbers():
    """No stake is possible where the mean is the maximum; the certain bound takes over and every term stays finite."""
    nll, lengths = np.full(400, 30.0, np.float32), np.full(40, 10)
    claim = Claim(300, 300, 5.0, 0.05, 1000, top_k=(1,))
    plan = SamplingPlan(100, 10, 20)
    rank = np.full(400, 299, np.int32)
    half = slice(0, 200)
    evidence = Evidence.from_losses(
        nll[half], nll[half] / 10, rank[half], vocab_size=300, top_k=(1,), window_lengths=lengths[:20]
    )
    tunings = choose_tunings(evidence, claim, plan)
    for line in certify(tunings, line_sums(tunings, nll, nll / 10, rank, window_lengths=lengths), claim, plan):
        assert math.isfinite(line.value)
        assert all(math.isfinite(term) for term in line.terms.values())
        assert line.vacuous
