"""The reducer against the reference functions, and its indifference to how the work was cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds import (
    Claim,
    Evidence,
    Tuning,
    azuma_bound,
    azuma_predictable_bound,
    certify,
    choose_tunings,
    freedman_bound,
    line_sums,
    loss_interval_bits,
    merge_sums,
)
from tokenbound.bounds.blocks import Block, Columns, TokenSums, Unavailable, log_of_product
from tokenbound.bounds.columns import window_sums
from tokenbound.bounds.constants import BLOCK_TOKENS
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.smoothing import alpha_levels, entropy_level, smoothed_loss_bits
from tokenbound.errors import InputError, MismatchError

V = 512
ALPHA = 0.01
LOW, HIGH = loss_interval_bits(alpha=ALPHA, vocab_size=V)
COEFFICIENTS = (0.5, 0.875, 0.03125, -0.0078125)
Y0 = 0.75
T = 0.75
LAM = T / (HIGH - Y0)
FREEDMAN = Tuning(
    method="freedman", vocab_size=V, alpha=ALPHA, t=T, lam=LAM, degree=3, coefficients=COEFFICIENTS, y0=Y0
)
AZUMA = Tuning(method="azuma", vocab_size=V, alpha=0.05)
KL = Tuning(method="kl", vocab_size=V, top_k=3)
TUNINGS = (FREEDMAN, AZUMA, KL)
PAID = {"code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.5}


def losses(seed: int = 0, size: int = 3 * BLOCK_TOKENS + 77):
    rng = np.random.default_rng(seed)
    entropy = rng.gamma(1.0, 1.5, size).astype(np.float32)
    nll = rng.gamma(0.7, entropy / 0.7 + 0.02).astype(np.float32)
    nll[:4] = [0.0, 1e-7, 80.0, -1e-6]
    return nll, entropy, np.floor(nll * 3).astype(np.int32)


def polynomial(entropy, coefficients=COEFFICIENTS):
    bits = entropy.astype(np.float64) / math.log(2)
    return sum(c * bits**d for d, c in enumerate(coefficients))


def without_complexity(bound: float, lam: float, size: int) -> float:
    return bound - math.log(2) / (lam * size)


def test_freedman_sum_is_the_reference_bound():
    nll, entropy, rank = losses()
    reference = freedman_bound(nll, polynomial(entropy), vocab_size=V, alpha=ALPHA, lam=LAM, floor_bits=Y0, **PAID)
    sums = line_sums(TUNINGS, nll, entropy, rank)
    assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, LAM, nll.size), rel=1e-13)
    loss = smoothed_loss_bits(nll, alpha=ALPHA, vocab_size=V)
    forecast = np.clip(polynomial(entropy), max(LOW, Y0), HIGH)
    assert sums.mean(0, "loss") == pytest.approx(loss.mean(), rel=1e-13)
    assert sums.mean(0, "square") == pytest.approx(np.mean((forecast - loss) ** 2), rel=1e-12)
    assert sums.mean_nll_nats == pytest.approx(nll.mean(dtype=np.float64), rel=1e-13)


@pytest.mark.parametrize("slope", [4, -4])
def test_freedman_sum_with_alpha_of_entropy_is_the_reference_bound(slope):
    nll, entropy, _ = losses(1)
    alphas = alpha_levels(ALPHA, slope)[entropy_level(entropy, vocab_size=V)]
    reference = freedman_bound(
        nll,
        polynomial(entropy),
        vocab_size=V,
        alpha=alphas,
        alpha_min=ALPHA,
        lam=LAM,
        floor_bits=Y0,
        **PAID,
    )
    sums = line_sums([replace(FREEDMAN, alpha_slope=slope)], nll, entropy)
    assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, LAM, nll.size), rel=1e-12)


def test_alpha_column_is_the_reference_bound():
    nll, entropy, _ = losses(2)
    alpha = np.random.default_rng(0).uniform(ALPHA, 0.4, nll.size).astype(np.float32).astype(np.float64)
    alpha = np.maximum(alpha, ALPHA)
    freedman, azuma = (
        replace(FREEDMAN, alpha_column=True),
        Tuning("azuma", V, alpha=ALPHA, alpha_column=True, lam=0.125),
    )
    sums = line_sums([freedman, azuma], nll, entropy, None, alpha)
    shared = {"vocab_size": V, "alpha": alpha, **PAID}
    reference = freedman_bound(nll, polynomial(entropy), lam=LAM, floor_bits=Y0, alpha_min=ALPHA, **shared)
    assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, LAM, nll.size), rel=1e-12)
    reference = azuma_predictable_bound(nll, lam=0.125, **shared)
    assert sums.mean(1, "value") == pytest.approx(without_complexity(reference, 0.125, nll.size), rel=1e-12)
    with pytest.raises(InputError, match="alpha_min"):
        line_sums([freedman], nll, entropy, None, np.full(nll.size, ALPHA / 2))
    with pytest.raises(InputError, match="`alpha` column"):
        line_sums([freedman], nll, entropy)


def test_azuma_and_errors_are_plain_means():
    nll, entropy, rank = losses()
    sums = line_sums(TUNINGS, nll, entropy, rank)
    mean = smoothed_loss_bits(nll, alpha=0.05, vocab_size=V).mean()
    assert sums.mean(1, "value") == sums.mean(1, "loss") == pytest.approx(mean, rel=1e-13)
    assert sums.total(2, "value") == np.count_nonzero(rank >= 3)
    bound = azuma_bound(nll, vocab_size=V, alpha=0.05, **PAID)
    low, high = loss_interval_bits(alpha=0.05, vocab_size=V)
    assert sums.mean(1, "value") == pytest.approx(bound - (high - low) * math.sqrt(math.log(2) / 2 / nll.size))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6), data=st.data())
def test_shards_may_finish_and_merge_in_any_order(cuts, data):
    nll, entropy, rank = losses(4, 5000)
    edges = [0, *sorted(cuts), 5000]
    parts = [line_sums(TUNINGS, nll[a:b], entropy[a:b], rank[a:b]) for a, b in itertools.pairwise(edges)]
    flat = merge_sums(parts)
    shuffled = merge_sums(data.draw(st.permutations(parts)))
    tree = merge_sums([merge_sums(parts[:1]), merge_sums(parts[1:])]) if len(parts) > 1 else flat
    for line in range(3):
        for name in ("value", "loss", "square"):
            assert flat.total(line, name) == shuffled.total(line, name) == tree.total(line, name)
    whole = line_sums(TUNINGS, nll, entropy, rank)
    assert flat.num_tokens == 5000
    assert flat.mean(0, "value") == pytest.approx(whole.mean(0, "value"), rel=1e-13)


def test_window_sums_agree_with_totals_and_reference():
    nll, entropy, rank = losses(5, 10_000)
    lengths = np.array([3000, 1, 0, 6000, 999])
    sums = line_sums(TUNINGS, nll, entropy, rank, window_lengths=lengths)
    assert sums.windows.shape == (3, 5)
    assert sums.windows.sum(axis=1) == pytest.approx([sums.total(i, "value") for i in range(3)], rel=1e-12)
    assert sums.windows[1] == pytest.approx(window_sums(smoothed_loss_bits(nll, alpha=0.05, vocab_size=V), lengths))
    without = line_sums(TUNINGS, nll, entropy, rank)
    assert sums.mean(0, "value") == pytest.approx(without.mean(0, "value"), rel=1e-13)


def test_worst_case_windows_count_at_the_top():
    nll, entropy, rank = losses(6, 1000)
    sums = line_sums(TUNINGS, nll, entropy, rank, window_lengths=[600, 50, 400], worst_case=[False, True, False])
    plain = line_sums(TUNINGS, nll, entropy, rank)
    assert (sums.num_tokens, sums.worst_case_tokens) == (1050, 50)
    tops = [highest_value(tuning) for tuning in TUNINGS]
    assert tops == pytest.approx(
        [Y0 - (HIGH - Y0) * math.log(1 - T) / T, loss_interval_bits(alpha=0.05, vocab_size=V)[1], 1]
    )
    for line, top in enumerate(tops):
        assert sums.windows[line, 1] == pytest.approx(50 * top)
        assert sums.total(line, "value") == pytest.approx(plain.total(line, "value") + 50 * top)
    counted = line_sums(TUNINGS, nll, entropy, rank, worst_case=50)
    assert np.allclose(counted.shards, sums.shards, rtol=1e-12)


@given(
    nll=st.floats(0, 200, width=32),
    entropy=st.floats(0, 20, width=32),
    coefficients=st.tuples(*[st.floats(-100, 100, width=16)] * 4),
    slope=st.sampled_from([0, 4, -4]),
)
def test_no_token_exceeds_the_worst_case(nll, entropy, coefficients, slope):
    tuning = replace(FREEDMAN, coefficients=coefficients, alpha_slope=slope)
    sums = line_sums([tuning], np.array([nll], np.float32), np.array([entropy], np.float32))
    assert LOW - 1e-9 <= sums.total(0, "value") <= highest_value(tuning) + 1e-9


@pytest.mark.parametrize("column", [False, True])
def test_the_worst_case_is_reached(column):
    """`highest_value` is no guess: the worst token under the smallest alpha comes as near as exp(-800) allows."""
    shared = {"alpha": ALPHA, "alpha_column": column}
    floor = replace(FREEDMAN, **shared, degree=0, coefficients=(Y0,))
    azuma = Tuning("azuma", V, lam=0.125 if column else None, **shared)
    alpha = np.array([ALPHA]) if column else None
    sums = line_sums([floor, azuma], np.array([800.0]), None, None, alpha)
    for line, tuning in enumerate((floor, azuma)):
        assert sums.total(line, "value") == pytest.approx(highest_value(tuning), rel=1e-12)
        counted = line_sums([tuning], np.zeros(0), alpha=np.zeros(0), worst_case=3)
        assert counted.total(0, "value") == pytest.approx(3 * highest_value(tuning))
        assert counted.total(0, "loss") == pytest.approx(3 * HIGH)


def test_a_line_says_which_column_it_needs():
    nll, entropy, rank = losses(7, 100)
    with pytest.raises(InputError, match="`entropy`"):
        line_sums([FREEDMAN], nll)
    with pytest.raises(InputError, match="`entropy`"):
        line_sums([replace(FREEDMAN, coefficients=(1.0,), alpha_slope=2)], nll)
    with pytest.raises(InputError, match="`rank`"):
        line_sums([KL], nll, entropy)
    with pytest.raises(InputError, match="below 1"):
        line_sums([replace(FREEDMAN, lam=1 / (HIGH - Y0))], nll, entropy)
    with pytest.raises(InputError, match="unknown method"):
        line_sums([replace(KL, method="hope")], nll, entropy, rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_bad_losses_stop_the_pass(bad):
    nll, entropy, rank = losses(7, 100)
    nll[50] = bad
    with pytest.raises(InputError, match=r"nll_nats\[50\]"):
        line_sums(TUNINGS, nll, entropy, rank)


def test_merging_refuses_other_lines():
    nll, entropy, rank = losses(7, 100)
    one = line_sums(TUNINGS, nll, entropy, rank)
    with pytest.raises(MismatchError):
        merge_sums([one, line_sums(TUNINGS[:2], nll, entropy, rank)])
    with pytest.raises(MismatchError):
        merge_sums([one, line_sums(TUNINGS, nll, entropy, rank, window_lengths=[100])])
    with pytest.raises(InputError):
        merge_sums([])


def test_two_claims_in_one_pass():
    nll, entropy, rank = losses(8, 5000)
    claim = Claim(V, V, 1000.0, 0.05, 5000, top_k=(1,))
    larger = claim.with_larger_corpus(500_000)
    evidence = Evidence.from_losses(nll, entropy, rank, vocab_size=V, top_k=(1,))
    first, second = choose_tunings(evidence, claim), choose_tunings(evidence, larger)
    sums = line_sums(first + second, nll, entropy, rank)
    both = certify(second, sums.select(slice(len(first), None)), larger)
    alone = certify(second, line_sums(second, nll, entropy, rank), larger)
    assert both == alone
    assert all("not a bound" in line.note for line in both)


def test_tuning_round_trip():
    assert Tuning.from_dict(FREEDMAN.to_dict()) == FREEDMAN


def test_the_mean_nll_is_that_of_the_finite_losses() -> None:
    nll, entropy, rank = losses(9, 300)
    sums = line_sums(TUNINGS, nll, entropy, rank, worst_case=200)
    assert sums.mean_nll_nats == pytest.approx(nll.mean(dtype=np.float64), rel=1e-13)
    for size, mean in ((0, 0.0), (1, float(nll[10]))):
        part = slice(10, 10 + size)
        few = line_sums(TUNINGS, nll[part], entropy[part], rank[part], worst_case=7)
        assert few.mean_nll_nats == pytest.approx(mean, abs=1e-15)
    assert mean > 0.1


@pytest.mark.parametrize("lines", [1, 2, 3])
@pytest.mark.parametrize("windows", [False, True])
def test_collapsed_sums_have_the_same_totals(lines: int, windows: bool) -> None:
    """Each rounded once, whatever the number of shards and lines; the windows stay as they are."""
    nll, entropy, rank = losses(10, 3000)
    parts = [
        line_sums(
            TUNINGS[:lines],
            *(column[part] for column in (nll, entropy, rank)),
            window_lengths=[250] * 4 if windows else None,
        )
        for part in (slice(0, 1000), slice(1000, 2000), slice(2000, 3000))
    ]
    many = merge_sums(parts)
    one = many.collapsed()
    assert one.shards.shape == (1, lines, 3)
    assert one.nll.shape == (1,)
    assert (one.num_tokens, one.worst_case_tokens) == (3000, 0)
    for line in range(lines):
        for name in ("value", "loss", "square"):
            assert one.total(line, name) == many.total(line, name)
    assert one.mean_nll_nats == many.mean_nll_nats
    if windows:
        assert one.windows is many.windows
        assert one.window_lengths is many.window_lengths
    else:
        assert one.windows is one.window_lengths is None


def test_selected_lines_keep_their_windows() -> None:
    nll, entropy, rank = losses(11, 1000)
    sums = line_sums(TUNINGS, nll, entropy, rank, window_lengths=[400, 600])
    some = sums.select(slice(1, 3))
    assert np.array_equal(some.windows, sums.windows[1:3])
    assert np.array_equal(some.shards, sums.shards[:, 1:3])
    assert line_sums(TUNINGS, nll, entropy, rank).select(slice(0, 1)).windows is None


def test_windows_of_shards_follow_each_other() -> None:
    nll, entropy, rank = losses(12, 1000)
    columns = (nll, entropy, rank)
    whole = line_sums(TUNINGS, *columns, window_lengths=[100, 200, 300, 400])
    parts = [
        line_sums(TUNINGS, *(column[:300] for column in columns), window_lengths=[100, 200]),
        line_sums(TUNINGS, *(column[300:] for column in columns), window_lengths=[300, 400]),
    ]
    merged = merge_sums(parts)
    assert merged.window_lengths.tolist() == [100, 200, 300, 400]
    assert np.allclose(merged.windows, whole.windows, rtol=1e-13)
    assert merge_sums([line_sums(TUNINGS, *columns)] * 2).windows is None


def test_a_line_that_cannot_be_computed_sums_to_nothing() -> None:
    nll, entropy, _ = losses(13, 50)
    tuning = Tuning("kl", V, top_k=1, unavailable="no ranks")
    sums = line_sums([AZUMA, tuning], nll, entropy, window_lengths=[20, 30, 7], worst_case=[False, False, True])
    assert sums.shards[0, 1].tolist() == [0.0, 0.0, 0.0]
    assert sums.windows[1].tolist() == [0.0, 0.0, 0.0]
    assert sums.num_tokens == 57


@pytest.mark.parametrize("slope", [4, -4])
def test_entropies_outside_their_range_take_the_end_levels(slope: int) -> None:
    """Below 0 by rounding, or above ln V where the logits are wider than the tokenizer."""
    entropy = np.array([-3.0, -0.2, -1e-7, 0.0, 6.2, 6.3, 9.0, 50.0], np.float32)
    nll = np.linspace(0.1, 9.0, 8).astype(np.float32)
    alphas = alpha_levels(ALPHA, slope)[entropy_level(entropy, vocab_size=V)]
    lam = T / (HIGH - LOW)  # a floor below A: then each token's own A_i is the limit of its forecast
    for guess in (polynomial(entropy), -60.0 + 0 * entropy, 60.0 + 0 * entropy):
        coefficients = COEFFICIENTS if guess[0] not in (-60.0, 60.0) else (float(guess[0]), 0.0)
        reference = freedman_bound(
            nll, guess, vocab_size=V, alpha=alphas, alpha_min=ALPHA, lam=lam, floor_bits=0.0, **PAID
        )
        tuning = replace(FREEDMAN, alpha_slope=slope, y0=0.0, lam=lam, coefficients=coefficients)
        sums = line_sums([tuning], nll, entropy)
        assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, lam, 8), rel=1e-12)


@pytest.mark.parametrize("guess", [-60.0, 60.0])
@pytest.mark.parametrize("y0", [Y0, 0.0])
@pytest.mark.parametrize("smoothing", ["constant", "entropy", "column"])
def test_guesses_far_outside_are_clipped_to_the_tokens_own_interval(guess: float, y0: float, smoothing: str) -> None:
    nll, entropy, _ = losses(14, 500)
    lam = T / (HIGH - max(LOW, y0))
    alphas: object = {
        "constant": ALPHA,
        "entropy": alpha_levels(ALPHA, 6)[entropy_level(entropy, vocab_size=V)],
        "column": np.random.default_rng(0).uniform(ALPHA, 0.4, nll.size),
    }[smoothing]
    tuning = replace(
        FREEDMAN,
        degree=0,
        y0=y0,
        lam=lam,
        coefficients=(guess,),
        alpha_slope=6 if smoothing == "entropy" else 0,
        alpha_column=smoothing == "column",
    )
    column = alphas if smoothing == "column" else None
    reference = freedman_bound(nll, guess, vocab_size=V, alpha=alphas, alpha_min=ALPHA, lam=lam, floor_bits=y0, **PAID)
    for lengths in (None, [500]):
        sums = line_sums([tuning], nll, entropy, None, column, window_lengths=lengths)
        assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, lam, nll.size), rel=1e-12)


def test_a_line_that_cannot_be_computed_leaves_nothing_behind() -> None:
    per_token = np.ones(5)
    assert Unavailable().evaluate(Block(), per_token) == Unavailable().worst() == (0.0, 0.0, 0.0)
    assert per_token.tolist() == [0.0] * 5
    assert Unavailable().evaluate(Block(), None) == (0.0, 0.0, 0.0)


def test_one_alpha_of_a_head_below_its_least_is_refused() -> None:
    nll, entropy, _ = losses(15, 200)
    alpha = np.full(200, 0.3)
    azuma = Tuning("azuma", V, alpha=ALPHA, alpha_column=True, lam=0.125)
    for tuning in (replace(FREEDMAN, alpha_column=True), azuma):
        alpha[77] = ALPHA
        line_sums([tuning], nll, entropy, None, alpha)
        alpha[77] = np.nextafter(ALPHA, 0)
        with pytest.raises(InputError, match="lies below alpha_min"):
            line_sums([tuning], nll, entropy, None, alpha)


def test_a_field_that_a_line_needs_is_named() -> None:
    for tuning, name in (
        (replace(FREEDMAN, alpha=None), "alpha"),
        (replace(FREEDMAN, lam=None), "lam"),
        (replace(FREEDMAN, y0=None), "y0"),
        (replace(AZUMA, alpha=None), "alpha"),
        (Tuning("azuma", V, alpha=ALPHA, alpha_column=True), "lam"),
        (Tuning("kl", V), "top_k"),
    ):
        with pytest.raises(InputError, match=f"the tuning lacks `{name}`"):
            line_sums([tuning], [1.0], [1.0], [0], [0.1])


def test_losses_just_below_zero_are_clipped_where_there_are_any() -> None:
    for lowest, clip in ((-1e-6, True), (0.0, False), (0.5, False)):
        assert Columns.checked([lowest, 3.0], None, None, None).clip is clip
    assert not Columns.checked([], None, None, None).clip


def test_sums_start_at_nothing() -> None:
    block = Block()
    assert (block.size, block.nll_sum) == (0, 0.0)
    assert TokenSums(1.0, 2.0) == (1.0, 2.0, 0.0)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 8191, 8192])
def test_a_product_in_groups_is_the_sum_of_logarithms(size: int) -> None:
    factors = np.random.default_rng(size).uniform(1e-40, 2.0, size)
    assert log_of_product(factors) == pytest.approx(math.fsum(np.log(factors)), rel=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [None, [400, 600]])
def test_every_degree_is_the_reference_bound(degree: int, lengths: list[int] | None) -> None:
    nll, entropy, _ = losses(16, 1000)
    coefficients = COEFFICIENTS[: degree + 1]
    tuning = replace(FREEDMAN, degree=degree, coefficients=coefficients)
    guess = polynomial(entropy, coefficients) + np.zeros(1000)
    reference = freedman_bound(nll, guess, vocab_size=V, alpha=ALPHA, lam=LAM, floor_bits=Y0, **PAID)
    sums = line_sums([tuning], nll, entropy, window_lengths=lengths)
    assert sums.mean(0, "value") == pytest.approx(without_complexity(reference, LAM, 1000), rel=1e-13)
    forecast = np.clip(guess, max(LOW, Y0), HIGH)
    square = np.square(forecast - smoothed_loss_bits(nll, alpha=ALPHA, vocab_size=V))
    assert sums.mean(0, "square") == pytest.approx(square.mean(), rel=1e-12)


@pytest.mark.parametrize("y0", [Y0, 0.0, -2.0])
def test_the_worst_token_misses_its_forecast_by_all_of_the_range(y0: float) -> None:
    distance = HIGH - max(LOW, y0)
    tuning = replace(FREEDMAN, y0=y0, lam=T / distance)
    worst = line_sums([tuning], np.zeros(0), np.zeros(0), worst_case=3)
    value = max(LOW, y0) - math.log(1 - T) / (T / distance)
    totals = [worst.total(0, name) for name in ("value", "loss", "square")]
    assert totals == pytest.approx([3 * value, 3 * HIGH, 3 * distance**2], rel=1e-12)
    for lam in (1 / distance * (1 + 1e-12), 1.5 / distance):
        with pytest.raises(InputError, match="must be below 1"):
            line_sums([replace(tuning, lam=lam)], [1.0], [1.0])


def test_a_token_without_a_rank_is_an_error() -> None:
    sums = line_sums([KL], [0.5, 0.5], None, [0, 9], worst_case=4)
    assert [sums.total(0, name) for name in ("value", "loss", "square")] == [5.0, 5.0, 0.0]
