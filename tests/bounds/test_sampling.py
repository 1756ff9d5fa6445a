"""The sampling sequence: its closed form, its limits, its tightness, and stopping."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
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
    sampling,
    sampling_path,
)
from tokenbound.bounds.controls import ControlVariates
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.sampled_lines import expected_slacks
from tokenbound.bounds.sampling import (
    SamplingPath,
    UnitLimits,
    expected_slacks_of_windows,
    mixture_stakes,
    path_of_windows,
    running_moments,
    total_upper_bounds,
)
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


def exact_roots(values, num_units, forecasts, stakes, level):
    """For each n the S with mean over k of W_n(S) = exp(level), in 40 digits, from the definition of W_n."""
    mp = mpmath.mpf
    count = stakes.shape[1]
    constants, slopes = [mp(0)] * count, [mp(0)] * count
    for i, (value, forecast, row) in enumerate(zip(values.tolist(), forecasts.tolist(), stakes.tolist(), strict=True)):
        before, left = mpmath.fsum(values[:i].tolist()), num_units - i
        for k, lam in enumerate(map(mp, row)):
            constants[k] += mpmath.log1p(lam * (mp(forecast) - mp(value))) - lam * (mp(forecast) + before / left)
            slopes[k] += lam / left
        low, high = mp(-(10**6)), mp(10**6)
        for _ in range(110):
            middle = (low + high) / 2
            wealth = mpmath.fsum(mpmath.exp(c + middle * b) for c, b in zip(constants, slopes, strict=True)) / count
            low, high = (low, middle) if wealth > mpmath.exp(mp(level)) else (middle, high)
        yield high


@pytest.mark.parametrize("level", [0.5, 4.0])
@pytest.mark.parametrize("fixed", [(0.1,), (0.02, 0.1, 0.5, 1.5), (0.3, 0.3, 0.3), (0.0, 0.4), (1e-6, 1.6)])
def test_a_mixture_is_the_root_of_its_equation_and_never_below(fixed, level):
    rng = np.random.default_rng(len(fixed))
    values, forecasts = rng.uniform(0, 1, 20), rng.uniform(0.4, 0.5, 20)
    stakes = np.tile(fixed, (20, 1)) * rng.uniform(0.5, 1.0, 20)[:, None]
    bounds = total_upper_bounds(
        values, num_units=200, highest=1.0, log_inverse_delta=level, forecasts=forecasts, stakes=stakes
    )
    certain = np.cumsum(values) + 199 - np.arange(20)
    best = math.inf
    with mpmath.workdps(40):
        for n, root in enumerate(exact_roots(values, 200, forecasts, stakes, level)):
            best = min(best, float(root), certain[n])
            assert best * (1 - 1e-13) <= bounds[n] <= best + 1e-6, n


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


def test_sequences_of_nothing_are_empty():
    """A sample may be asked for its bounds before a window beyond the pilot was drawn."""
    nothing = np.empty(0)
    means, deviations = running_moments(nothing, np.array([1.0, 2.0]))
    assert means.size == deviations.size == 0
    bounds = total_upper_bounds(
        nothing, num_units=10, highest=1.0, log_inverse_delta=3.0, forecasts=nothing, stakes=np.empty((0, 2))
    )
    assert bounds.size == 0


def test_moments_without_a_pilot_are_finite():
    means, deviations = running_moments(np.array([4.0, 2.0, 0.0]), np.empty(0))
    assert means[0] == deviations[0] == 0.0
    assert np.all(np.isfinite(means))
    assert np.all(np.isfinite(deviations))


@pytest.mark.parametrize("row", [0, 25, 49])
@pytest.mark.parametrize("bad", [-1e-9, 1 / 0.6, math.nan, math.inf])
def test_one_bad_stake_among_many_is_refused(row, bad):
    values = np.random.default_rng(0).uniform(0, 1, 50)
    stakes = np.full((50, 3), 1.0)
    shared = {"num_units": 60, "highest": 1.0, "log_inverse_delta": 3.0, "forecasts": np.full(50, 0.4)}
    total_upper_bounds(values, stakes=stakes, **shared)
    stakes[row, 1] = bad
    with pytest.raises(InputError, match="every stake"):
        total_upper_bounds(values, stakes=stakes, **shared)


@pytest.mark.parametrize(
    ("highest", "rounded", "beyond"),
    [(0.0, 1e-12, 1.5e-12), (1e6, 1e6 + 0.9e-6, 1e6 + 1.5e-6), (5.0, 5.0, 5.0 + 1e-10)],
)
def test_units_may_exceed_the_highest_by_rounding_alone(highest, rounded, beyond):
    shared = {"num_units": 60, "highest": highest, "log_inverse_delta": 3.0, "forecasts": np.full(2, highest - 1)}
    stakes = np.full((2, 1), 0.1)
    total_upper_bounds(np.array([highest - 2, rounded]), stakes=stakes, **shared)
    with pytest.raises(InputError, match="exceeds"):
        total_upper_bounds(np.array([highest - 2, beyond]), stakes=stakes, **shared)


def test_a_path_has_an_entry_for_each_window_beyond_the_pilot():
    tunings, sums, claim, plan, _ = sampled_run(windows=600, pilot=100, scored=300)
    for i, tuning in enumerate(tunings):
        path = sampling_path(tuning, i, sums, claim, plan)
        assert path.num_windows.tolist() == list(range(101, 301))
        ends = np.cumsum(sums.window_lengths)
        means = np.cumsum(sums.windows[i]) / ends
        assert path.sample_mean == pytest.approx(means[100:], rel=1e-12)
        assert path.slack == pytest.approx(path.upper - means[100:], rel=1e-12)


def test_all_windows_add_up_without_rounding():
    """Nothing is left to chance after the last window: the bound is the sum itself, rounded once."""
    lengths = np.full(4000, 7)
    values = np.where(np.arange(4000) < 3, 0.0, 0.7)  # a tenth per token: adding it up 4000 times drifts
    claim, plan = Claim(300, 300, 0.0, 0.05, 28_000, methods=("azuma",)), SamplingPlan(4000, 7, 3)
    path = path_of_windows(values, lengths, 10.0, claim, plan)
    assert path.upper[-1] == math.fsum(values) / 28_000 != float(np.cumsum(values)[-1]) / 28_000
    assert path.upper[-2] > path.upper[-1]


@pytest.mark.parametrize("fixed", [None, 2.0, 30.0])
@pytest.mark.parametrize("scale", [3.0, 0.5])
def test_a_slack_holds_for_the_pilots_own_centre(fixed, scale):
    """The formulas of the docstrings, written out: u_j about the pilot's mean, the pilot exact, the rest bounded."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 9, 200)
    sizes = lengths if fixed is None else 3 * lengths + rng.integers(0, 4, 200)
    values = rng.uniform(0, scale, 200) * sizes
    claim = Claim(300, 300, 0.0, 0.05, int(lengths.sum()), methods=("azuma",))
    plan, part = SamplingPlan(200, 8, 20), slice(0, 120)
    limits = None if fixed is None else UnitLimits(sizes[part], int(sizes.sum()), 27, fixed, scale)
    path = path_of_windows(values[part], lengths[part], scale, claim, plan, limits=limits)
    centre = values[:20].sum() / sizes[:20].sum()
    units = values - centre * sizes
    level = math.log(1 / 0.025) + math.log(2)
    forecasts, deviations = running_moments(units[20:120], units[:20])
    highest = (scale - centre) * 8 if fixed is None else fixed + (scale - centre) * 27
    stakes = mixture_stakes(
        forecasts, deviations, num_units=180, highest=highest, log_inverse_delta=level, target_units=180
    )
    upper = total_upper_bounds(
        units[20:120],
        num_units=180,
        highest=highest,
        log_inverse_delta=level,
        forecasts=forecasts,
        stakes=stakes,
    )
    expected = (centre * sizes.sum() + units[:20].sum() + upper) / lengths.sum()
    assert path.upper == pytest.approx(expected, rel=1e-12)
    assert np.all(path.upper >= values.sum() / lengths.sum())


@pytest.mark.parametrize("centre", [0.5, 3.0, -2.0])
def test_a_size_takes_from_the_limit_what_the_centre_takes_from_the_sum(centre):
    """Where windows of the pilot have more than any other can, only the fixed part is left, and never less."""
    lengths, values = np.full(300, 8), np.random.default_rng(1).uniform(0, 2, 300) * 8
    values[:20] = 8 * centre
    claim, plan = Claim(300, 300, 0.0, 0.05, 2400, methods=("azuma",)), SamplingPlan(300, 8, 20)
    limits = UnitLimits(lengths[:100], 2400, 8, 5.0, 2.0)
    path = path_of_windows(values[:100], lengths[:100], 0.0, claim, plan, limits=limits)
    highest = 5.0 + max(2.0 - centre, 0.0) * 8
    plain = path_of_windows(values[:100], lengths[:100], highest / 8 + centre, claim, plan)
    assert path.upper.tolist() == pytest.approx(plain.upper.tolist(), rel=1e-12)
    slacks = expected_slacks_of_windows(values[:100], lengths[:100], 0.0, claim, plan, limits=limits)
    expected = expected_slacks_of_windows(values[:100], lengths[:100], highest / 8 + centre, claim, plan)
    assert slacks == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "drawn", "words"),
    [
        ({"largest_size": 9}, 100, "a window has the size 10"),
        ({"total_size": 899}, 100, "900 were drawn, all windows have 899"),
        ({"total_size": 900 + 200 * 10 + 1}, 100, "all windows have 2901"),
        ({"total_size": 2701}, 300, "2700 were drawn, all windows have 2701"),
        ({"total_size": 2699}, 300, "2700 were drawn, all windows have 2699"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change, drawn, words):
    lengths, sizes = np.full(300, 4), np.full(300, 9)
    sizes[3:5] = 8, 10
    claim, plan = Claim(300, 300, 0.0, 0.05, 1200, methods=("azuma",)), SamplingPlan(300, 4, 20)
    limits = UnitLimits(sizes[:drawn], 2700, 10, 1.0, 1.0)
    path_of_windows(np.ones(drawn), lengths[:drawn], 0.0, claim, plan, limits=limits)
    for total in (900, 900 + 200 * 10) if drawn == 100 else ():
        path_of_windows(np.ones(drawn), lengths[:drawn], 0.0, claim, plan, limits=replace(limits, total_size=total))
    with pytest.raises(InputError, match=words):
        path_of_windows(np.ones(drawn), lengths[:drawn], 0.0, claim, plan, limits=replace(limits, **change))


def test_a_sequence_that_lost_everything_does_not_drown_the_others():
    """One stake loses e^900 against the other; the mixture is then the other at the price of two."""
    values, size = np.full(400, 1.0), 500
    shared = {"num_units": size, "highest": 1.0, "log_inverse_delta": 4.0}
    forecasts = np.concatenate([np.zeros(399), [0.5]])
    stakes = np.stack([np.full(400, 0.9), np.full(400, 1e-3)], axis=1)
    both = total_upper_bounds(values * 0.999, forecasts=forecasts, stakes=stakes, **shared)
    alone = total_upper_bounds(
        values * 0.999, forecasts=forecasts, stakes=stakes[:, 1:], **{**shared, "log_inverse_delta": 4.0 + math.log(2)}
    )
    assert np.all(np.isfinite(both))
    assert both == pytest.approx(alone, rel=1e-9)
    level = 4.0 + math.log(2)
    offsets = np.array([[-921.0, -1.0], [-1.0, -1.0]])
    assert sampling._roots(offsets, np.array([[0.5, 0.5], [0.5, 0.5]]), 4.0) == pytest.approx(
        [(level + 1) / 0.5, (level + 1 - math.log(2)) / 0.5], rel=1e-12
    )


def test_moments_of_a_single_pilot_window():
    means, deviations = running_moments(np.array([4.0, 2.0, 0.0]), np.array([1.0]))
    assert means.tolist() == pytest.approx([1.0, 2.5, 7 / 3])
    assert deviations.tolist() == pytest.approx([0.0, 1.5, np.std([1.0, 4.0, 2.0])])


def test_a_unit_above_its_limit_is_refused():
    lengths, values = np.full(300, 8), np.random.default_rng(1).uniform(1, 2, 300) * 8
    claim, plan = Claim(300, 300, 0.0, 0.05, 2400, methods=("azuma",)), SamplingPlan(300, 8, 20)
    for fixed, rate in ((1.0, 1.0), (0.0, 1.9)):
        limits = UnitLimits(lengths[:100], 2400, 8, fixed, rate)
        with pytest.raises(InputError, match="exceeds"):
            path_of_windows(values[:100], lengths[:100], 3.0, claim, plan, limits=limits)


def test_windows_without_a_token_are_drawn_too():
    """A document of one token has nothing to score; a pilot of such windows has the centre 0 and no mean."""
    lengths = np.array([0, 0, 0, 1, 2, 3] + [2] * 44)
    values = np.where(lengths > 0, np.linspace(0.2, 2.0, 50), 0.0)
    claim, plan = Claim(300, 300, 0.0, 0.05, int(lengths.sum()), methods=("azuma",)), SamplingPlan(50, 3, 2)
    path = path_of_windows(values[:30], lengths[:30], 3.0, claim, plan)
    assert path.sample_mean[0] == 0.0
    assert path.sample_mean[1] == pytest.approx(values[3])
    assert np.all(path.upper >= values.sum() / lengths.sum())
    single = SamplingPlan(50, 3, 4)  # one token in the pilot: c is its value
    path = path_of_windows(values[:30], lengths[:30], 3.0, claim, single)
    assert path.sample_mean[0] == pytest.approx(values[:5].sum() / 3)
    units = values - values[3] * lengths
    shifted = path_of_windows(units[:30], lengths[:30], 3.0 - values[3], claim, single)
    assert path.upper == pytest.approx(shifted.upper + values[3], rel=1e-12)


@pytest.mark.parametrize("pilot", [5, 6, 10])
def test_a_sample_begins_behind_the_pilot_and_ends_with_the_corpus(pilot):
    lengths, values = np.full(10, 4), np.linspace(0, 4, 10)
    claim, plan = Claim(300, 300, 0.0, 0.05, 40, methods=("azuma",)), SamplingPlan(10, 4, pilot)
    whole = path_of_windows(values, lengths, 3.0, claim, plan)
    assert whole.upper.size == whole.slack.size == 10 - pilot
    if pilot == 10:
        assert first_prefix([whole], 0.5) is None
    for scored in range(1, min(pilot, 9) + 1):
        with pytest.raises(IncompleteError, match="the pilot alone takes"):
            path_of_windows(values[:scored], lengths[:scored], 3.0, claim, plan)
    for tokens in (39, 41):
        with pytest.raises(InputError, match="the whole corpus"):
            path_of_windows(values, lengths, 3.0, replace(claim, num_tokens=tokens), plan)
    few = replace(claim, num_tokens=27)
    if pilot < 7:
        path_of_windows(values[:7], lengths[:7], 3.0, claim, plan)
        with pytest.raises(InputError, match="the whole corpus"):
            path_of_windows(values[:7], lengths[:7], 3.0, few, plan)
        path_of_windows(values[:7], lengths[:7], 3.0, replace(claim, num_tokens=28), plan)
        longest = replace_one(lengths[:7], 3, 5)
        with pytest.raises(InputError, match="a window has 5 tokens"):
            path_of_windows(values[:7], longest, 3.0, claim, plan)


def replace_one(array, place, value):
    return np.where(np.arange(array.size) == place, value, array)


def test_a_slack_that_is_just_reached_is_reached():
    path = SamplingPath(np.array([7, 8, 9]), np.array([3.0, 2.5, 2.25]), np.array([2.0, 2.0, 2.0]))
    assert path.slack.tolist() == [1.0, 0.5, 0.25]
    for target, stop in ((1.0, 7), (0.5, 8), (0.49, 9), (0.25, 9), (0.2, None)):
        assert first_prefix([path], target) == stop


def test_expected_slacks_are_those_of_a_repeated_sample():
    rng = np.random.default_rng(9)
    lengths, values = np.full(400, 5), rng.uniform(4, 6, 400)
    values[[39, 79]] = 0.0  # the last window of either repetition, so that the last bound is better than the one before
    claim, plan = Claim(300, 300, 0.0, 0.05, 2000, methods=("azuma",)), SamplingPlan(400, 5, 20)
    found = expected_slacks_of_windows(values[:90], lengths[:90], 3.0, claim, plan)
    assert set(found) == {2, 4}
    assert set(expected_slacks_of_windows(values[:100], lengths[:100], 3.0, claim, plan)) == {2}
    for factor, slack in found.items():
        drawn = np.concatenate([values[:20], np.resize(values[20:90], factor * 90 - 20)])
        path = path_of_windows(drawn, lengths[: drawn.size], 3.0, claim, plan)
        mean = (values[:20].sum() + 380 * drawn[20:].mean()) / 2000
        assert slack == pytest.approx(path.upper[-1] - mean, rel=1e-9)
        assert path.upper[-1] < path.upper[-2]
    flat = expected_slacks_of_windows(np.full(90, 5.0), lengths[:90], 1.0, claim, plan)
    assert all(0 <= slack < 1e-9 for slack in flat.values())


@pytest.mark.parametrize("missing", ["windows", "window_lengths"])
def test_a_path_needs_the_sums_of_windows_and_their_lengths(missing):
    tunings, sums, claim, plan, _ = sampled_run(windows=300, pilot=20, scored=60)
    for function in (sampling_path, expected_slacks):
        assert function(tunings[0], 0, sums, claim, plan)
        with pytest.raises(InputError, match="window_lengths"):
            function(tunings[0], 0, replace(sums, **{missing: None}), claim, plan)


def test_an_expected_slack_is_never_negative():
    """Where the first windows were easy and the later ones hard, the bound may already lie below what is expected."""
    lengths, values = np.full(4000, 5), np.where(np.arange(4000) < 450, 0.0, 15.0)
    claim, plan = Claim(300, 300, 0.0, 0.05, 20_000, methods=("azuma",)), SamplingPlan(4000, 5, 20)
    found = expected_slacks_of_windows(values[:900], lengths[:900], 3.0, claim, plan)
    assert found == {2: 0.0, 4: 0.0}


def test_a_pilot_of_all_windows_leaves_nothing_for_control_variates():
    lengths, values = np.full(30, 4), np.linspace(0, 4, 30)
    controls = ControlVariates(values[:, None], lengths, np.arange(30))
    claim, plan = Claim(300, 300, 0.0, 0.05, 120, methods=("azuma",)), SamplingPlan(30, 4, 30, controls=controls)
    path = path_of_windows(values, lengths, 3.0, claim, plan)
    assert (path.upper.size, path.beta) == (0, ())
