"""Control variates: the shipped path covers whatever the features are, and what would break it is refused or shown."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from tokenbound.bounds import Claim, SamplingPlan, first_prefix
from tokenbound.bounds.controls import ControlVariates, adjustments, regress, unexplained_share
from tokenbound.bounds.sampling import (
    SamplingPath,
    UnitLimits,
    expected_slacks_of_windows,
    mixture_stakes,
    path_of_windows,
    running_moments,
    total_upper_bounds,
)
from tokenbound.errors import InputError

WINDOWS, PILOT = 120, 24


def population(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values in [0, length], lengths and features [N, 2] of 120 windows."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(4, 17, WINDOWS)
    values = lengths * np.where(rng.random(WINDOWS) < 0.08, 1.0, rng.beta(1, 6, WINDOWS))
    other = {
        "adversarially good": values,
        "useless": rng.normal(size=WINDOWS),
        "heavy-tailed": rng.pareto(0.7, WINDOWS) * rng.choice([-1.0, 1.0], WINDOWS) + values,
        "low where values are high": -(values**3),
    }[kind]
    return values, lengths, np.stack([lengths.astype(float), other], axis=1)


def claim_of(lengths: np.ndarray, delta: float) -> Claim:
    return Claim(256, 256, 0.0, delta, int(lengths.sum()), methods=("kl",), top_k=(1,))


def plan_of(lengths: np.ndarray, features: np.ndarray | None, order: np.ndarray) -> SamplingPlan:
    controls = None if features is None else ControlVariates(features, lengths, order)
    pilot = PILOT if len(lengths) == WINDOWS else 128
    return SamplingPlan(len(lengths), int(lengths.max()), pilot, controls=controls)


def drawn_path(values, lengths, features, order, delta, drawn=None) -> SamplingPath:
    first = order[:drawn]
    plan = plan_of(lengths, features, order)
    return path_of_windows(values[first], lengths[first], 1.0, claim_of(lengths, delta), plan)


def assert_covers(failures: np.ndarray, level: float) -> None:
    assert failures.sum() <= binom.ppf(1 - 1e-4, failures.size, level), f"{failures.sum()} of {failures.size}"


KINDS = ("adversarially good", "useless", "heavy-tailed", "low where values are high")


def failures_of(kind: str, delta: float, runs: int, seed: int) -> np.ndarray:
    values, lengths, features = population(kind)
    full, rng = values.sum() / lengths.sum(), np.random.default_rng(seed)
    failed = np.zeros(runs, bool)
    for run in range(runs):
        path = drawn_path(values, lengths, features, rng.permutation(WINDOWS), delta)
        assert path.upper[-1] == pytest.approx(full, rel=1e-9), "all windows leave no slack"
        failed[run] = (path.upper < full - 1e-9).any()
    return failed


@pytest.mark.parametrize("delta", [0.1, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_full_mean_is_covered_at_every_n(kind: str, delta: float) -> None:
    assert_covers(failures_of(kind, delta, 150, seed=5), delta / 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_full_mean_is_covered_at_every_n_long(kind: str) -> None:
    assert_covers(failures_of(kind, 0.2, 1500, seed=6), 0.1)


def many(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4,000 windows whose values are mostly explained by their features."""
    rng = np.random.default_rng(seed)
    lengths = np.full(4000, 16)
    known = rng.gamma(9, 0.4, 4000)
    values = np.clip(known + rng.normal(0, 0.25, 4000), 0, 16)
    return values, lengths, np.stack([lengths.astype(float), known, rng.normal(size=4000)], axis=1)


def test_features_that_explain_leave_less_slack() -> None:
    values, lengths, features = many()
    order = np.random.default_rng(1).permutation(4000)
    slacks = {}
    for name, given in {"none": None, "some": features}.items():
        path = drawn_path(values, lengths, given, order, 0.05, drawn=1600)
        slacks[name] = float(path.upper[-1]) - values.sum() / lengths.sum()
        assert len(path.beta) == (0 if given is None else 3)
        plan, claim = plan_of(lengths, given, order), claim_of(lengths, 0.05)
        first = order[:800]
        foretold = expected_slacks_of_windows(values[first], lengths[first], 1.0, claim, plan)[2]
        assert foretold == pytest.approx(slacks[name], rel=0.35), "what 1,600 windows leave, seen from 800"
    assert 0 < slacks["some"] < 0.6 * slacks["none"]


def test_a_sample_with_features_stops_earlier() -> None:
    values, lengths, features = many()
    order = np.random.default_rng(2).permutation(4000)
    stops = [first_prefix([drawn_path(values, lengths, given, order, 0.05)], 0.003) for given in (None, features)]
    assert stops[0] is not None
    assert stops[1] is not None
    assert stops[1] < stops[0]


def test_features_that_do_not_pay_change_nothing() -> None:
    """A single window whose feature is extreme would raise the limit of all; the pilot then uses none."""
    values, lengths, features = many()
    order = np.random.default_rng(3).permutation(4000)
    features[order[-1], 1] = -1e9
    without, path = (drawn_path(values, lengths, given, order, 0.05, drawn=600) for given in (None, features))
    assert path.beta[1] == 0
    assert path.upper == pytest.approx(without.upper, rel=0.02)


def test_beta_and_limit_are_fixed_by_the_pilot() -> None:
    """Whatever the later windows say, and however many there are: neither can be refitted."""
    values, lengths, features = many()
    order = np.random.default_rng(4).permutation(4000)
    changed = values.copy()
    changed[order[129:]] = 16.0
    paths = [
        drawn_path(values, lengths, features, order, 0.05, drawn=900),
        drawn_path(values, lengths, features, order, 0.05, drawn=200),
        drawn_path(changed, lengths, features, order, 0.05, drawn=900),
    ]
    assert {path.beta for path in paths} == {paths[0].beta}
    assert paths[0].upper[:72].tolist() == paths[1].upper.tolist()
    assert paths[0].upper[0] == paths[2].upper[0]


def test_the_limit_is_that_of_the_windows_outside_the_pilot() -> None:
    rng = np.random.default_rng(5)
    lengths, features = rng.integers(1, 9, 50), rng.normal(size=(50, 2))
    order = rng.permutation(50)
    controls = ControlVariates(features, lengths, order)
    units = 3 * features[order[:20], 0] + 0.01 * rng.normal(size=20)
    fit = regress(controls, units, 10.0 * lengths, draws=2000, log_inverse_delta=3.0)
    assert fit.beta[0] == pytest.approx(3, rel=0.05)
    rest = order[20:]
    assert fit.mean == pytest.approx(features[rest].mean(axis=0))
    by_hand = 10.0 * lengths[rest] - (features[rest] - features[rest].mean(axis=0)) @ fit.beta
    assert fit.highest == pytest.approx(by_hand.max())
    assert adjustments(features[rest], fit.beta, fit.mean).sum() == pytest.approx(0, abs=1e-9)


BLOCK = 1 << 16
"""Windows that `highest` takes at once."""


@pytest.mark.parametrize("place", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 4])
def test_the_limit_is_found_wherever_its_window_is(place: int) -> None:
    """In the first or the last window of a block, before and behind others; that of a pilot's window does not count."""
    size = 2 * BLOCK + 5
    features, lengths = np.zeros((size, 1)), np.ones(size, int)
    features[place], features[7], features[BLOCK + 7] = -3.0, -9.0, -8.0
    controls = ControlVariates(features, lengths, np.array([7, BLOCK + 7, 9]))
    assert controls.highest(np.array([5.0]), np.array([2.0]), np.array([0.25]), pilot=2) == 5 + 2 * 3.25


def test_the_mean_of_integers_is_not_rounded_on_the_way() -> None:
    large = 1 << 60
    features = np.array([[large + 1], [large - 1], [3], [5], [large]])
    controls = ControlVariates(features, np.ones(5, int), np.array([0, 1]))
    assert controls.outside_mean(2).tolist() == [(large + 8) / 3]
    features = np.array([[large + 1], [-large], [3], [5], [large]])
    controls = ControlVariates(features, np.ones(5, int), np.array([4]))
    assert controls.outside_mean(1).tolist() == [9 / 4], "1 of the sum is below the rounding of its largest terms"
    halves = ControlVariates(np.array([[0.5], [0.25], [0.25]]), np.ones(3, int), np.array([0]))
    assert halves.outside_mean(1).tolist() == [0.25]


def test_the_features_share_of_the_spread() -> None:
    """A useless feature leaves all of it, one that is the value itself next to nothing; it is never more than 1."""
    rng = np.random.default_rng(8)
    known, lengths = rng.normal(size=200), np.full(200, 4)
    controls = ControlVariates(known[:, None], lengths, np.arange(200))
    useless = ControlVariates(rng.normal(size=(200, 1)), lengths, np.arange(200))
    assert unexplained_share(controls, 3 * known[:100]) < 0.02
    assert 0.9 < unexplained_share(useless, 3 * known[:100]) <= 1
    assert unexplained_share(controls, np.zeros(100)) == 1, "there is nothing to explain"
    assert unexplained_share(controls, known[:4]) == 1, "four windows fix no regression"


def test_each_window_has_the_limit_of_its_own_tokens():
    """And not that of the largest, which is only taken where the sizes of all windows are not known."""
    rng = np.random.default_rng(9)
    lengths = np.where(rng.random(WINDOWS) < 0.5, 4, 16)
    known = np.where(lengths == 4, -3.0, rng.normal(0, 0.3, WINDOWS))
    values = (lengths * 0.3 + known + 3.0 + rng.normal(0, 0.05, WINDOWS)) / 2
    order, claim = rng.permutation(WINDOWS), claim_of(lengths, 0.1)
    plan, first = plan_of(lengths, known[:, None], order), order[:80]
    found = {}
    for name, every in (("given", lengths), ("unknown", None)):
        limits = UnitLimits(lengths[first], int(lengths.sum()), 16, 0.0, 1.0, every)
        found[name] = path_of_windows(values[first], lengths[first], 1.0, claim, plan, limits=limits)
    default = path_of_windows(values[first], lengths[first], 1.0, claim, plan)
    assert default.beta[0] > 0.1
    assert default.upper.tolist() == found["given"].upper.tolist()
    assert found["given"].upper.tolist() != found["unknown"].upper.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, n, o: (f[:, :0], n, o), "numbers of each of 120 windows"),
        (lambda f, n, o: (f, np.where(o == 7, 0, n), o), "every window has a scored token"),
        (lambda f, n, o: (f, n, o - 1), "below 120"),
        (lambda f, n, o: (f[o[:40]], n, o), "numbers of each of 120 windows"),
        (lambda f, n, o: (f[:, 0], n, o), "numbers of each of 120 windows"),
        (lambda f, n, o: (np.where(f > 9, np.nan, f), n, o), "must be finite"),
        (lambda f, n, o: (f, n, np.concatenate([o[:5], o[:5]])), "each once"),
        (lambda f, n, o: (f, n, o + 1), "below 120"),
        (lambda f, n, o: (f, n, o[:0]), "below 120"),
    ],
)
def test_features_of_drawn_windows_alone_cannot_be_given(change, words: str) -> None:
    _, lengths, features = population("useless")
    with pytest.raises(InputError, match=words):
        ControlVariates(*change(features, lengths, np.arange(WINDOWS)))


def test_a_plan_and_sums_of_other_windows_are_refused() -> None:
    values, lengths, features = population("useless")
    order = np.random.default_rng(6).permutation(WINDOWS)
    plan = plan_of(lengths, features, order)
    with pytest.raises(InputError, match="control variates are of 120 windows"):
        replace(plan, num_units=121)
    claim, first = claim_of(lengths, 0.05), order[:60]
    with pytest.raises(InputError, match="in another order"):
        path_of_windows(values[first[::-1]], lengths[first[::-1]], 1.0, claim, plan)
    with pytest.raises(InputError, match="the whole corpus has"):
        path_of_windows(values[first], lengths[first], 1.0, replace(claim, num_tokens=claim.num_tokens + 1), plan)
    short = replace(plan, controls=ControlVariates(features, lengths, order[:50]))
    with pytest.raises(InputError, match="of other windows"):
        path_of_windows(values[first], lengths[first], 1.0, claim, short)


KAPPA = math.log(1 / 0.05)


def bounds_of(units: np.ndarray, pilot: np.ndarray, highest: float, others: int) -> np.ndarray:
    forecasts, deviations = running_moments(units, pilot)
    stakes = mixture_stakes(
        forecasts, deviations, num_units=others, highest=highest, log_inverse_delta=KAPPA, target_units=60
    )
    return total_upper_bounds(
        units, num_units=others, highest=highest, log_inverse_delta=KAPPA, forecasts=forecasts, stakes=stakes
    )


@pytest.mark.parametrize("shortcut", ["mean of the drawn features", "beta refitted on the draw", "limit of u alone"])
def test_what_breaks_it(shortcut: str) -> None:
    """Each broken variant fails far more often than at 0.05; `ControlVariates` and `regress` leave no room for it."""
    rng, runs, pilot, drawn = np.random.default_rng(7), 200, 20, 80
    failed = np.zeros(runs, bool)
    for run in range(runs):
        known = rng.normal(size=300)
        values = np.clip(0.5 + 0.1 * known + 0.01 * rng.normal(size=300), 0, 1)
        if shortcut == "limit of u alone":  # a few windows whose features promise little and whose values are the most
            known[:4], values[:4] = -40.0, 1.0
        if shortcut == "beta refitted on the draw":
            features = rng.normal(size=(300, 20))
            values = np.clip(0.5 + 0.2 * rng.normal(size=300), 0, 1)
        order = rng.permutation(300)
        first, rest = order[:pilot], order[pilot:]
        fed = rest[:drawn]
        adjusted = values.copy()
        if shortcut == "mean of the drawn features":
            adjusted -= 0.1 * (known - known[fed].mean())
        elif shortcut == "limit of u alone":
            adjusted -= 0.1 * (known - known[rest].mean())
        else:
            centred = features[fed] - features[rest].mean(axis=0)
            adjusted -= (features - features[rest].mean(axis=0)) @ centred.mean(axis=0)  # so that the drawn look good
        limit = 1.0 if shortcut == "limit of u alone" else float(adjusted.max())
        if float(adjusted[fed].max()) > limit:
            continue  # refused: a unit exceeds the largest possible
        found = bounds_of(adjusted[fed], adjusted[first], limit, 280)
        failed[run] = (found < values[rest].sum() - 1e-9).any()
    assert failed.sum() > binom.ppf(1 - 1e-4, runs, 0.05), f"only {failed.sum()} of {runs} failed"
