"""The relative line: a model given as a small delta on a base."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds import (
    Claim,
    Evidence,
    RelativeEvidence,
    RelativeTuning,
    SamplingPlan,
    Tuning,
    certify,
    certify_relative,
    choose_relative,
    choose_tunings,
    freedman_bound,
    kappa_nats,
    line_sums,
    merge_relative_evidence,
    merge_relative_sums,
    relative_bound,
    relative_sums,
)
from tokenbound.bounds.codes import freedman_tune_bits, relative_tune_bits
from tokenbound.bounds.columns import Piece, window_sums
from tokenbound.bounds.constants import RELATIVE_ROWS, RELATIVE_ROWS_PER_SHARD
from tokenbound.bounds.controls import ControlVariates
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.lines.relative import Relative, RelativeSums, relative_path
from tokenbound.bounds.relative_evidence import check_pair
from tokenbound.bounds.relative_search import base_claim, entropy_basis, excess_claim, excess_kappa
from tokenbound.bounds.rounding import arithmetic_guard, format_bound, round_up
from tokenbound.bounds.smoothing import loss_interval_bits, smoothed_loss_bits
from tokenbound.bounds.theorems import excess_interval_bits
from tokenbound.errors import InputError, MismatchError

V, SIZE = 300, 12_000


def ledger(seed: int = 0, size: int = SIZE):
    """A base and a fine-tune that agrees with it on most tokens."""
    rng = np.random.default_rng(seed)
    base_entropy = np.minimum(rng.gamma(1.0, 1.2, size), 5.5).astype(np.float32)
    base_nll = rng.gamma(0.7, base_entropy / 0.7 + 0.02).astype(np.float32)
    change = rng.normal(-0.03, 0.2, size) * (rng.random(size) < 0.3)
    nll = np.maximum(base_nll + change, 0).astype(np.float32)
    return nll, base_nll, (base_entropy * 0.98).astype(np.float32), base_entropy


CLAIM = Claim(V, V, 200.0, 0.05, SIZE, methods=("freedman",), num_bases=1)


@pytest.fixture(scope="module")
def chosen():
    columns = ledger()
    return columns, choose_relative(RelativeEvidence.from_losses(*columns), CLAIM)


def test_line_is_the_sum_of_the_two_reference_bounds(chosen):
    columns, tuning = chosen
    nll, base_nll, entropy, base_entropy = columns
    line = certify_relative(tuning, relative_sums(tuning, *columns), CLAIM)
    h, h0 = entropy.astype(float) / math.log(2), base_entropy.astype(float) / math.log(2)
    monomials = [h ** (d - j) * h0**j for d in range(tuning.degree + 1) for j in range(d + 1)]
    forecast = sum(c * x for c, x in zip(tuning.coefficients, monomials, strict=True))
    excess = relative_bound(
        nll,
        base_nll,
        forecast,
        vocab_size=V,
        alpha=tuning.alpha,
        base_alpha=tuning.base_alpha,
        lam=tuning.lam,
        floor_bits=tuning.y0,
        code_length_bits=200.0,
        tune_bits=tuning.tune_bits,
        delta=0.025,
    )
    base = freedman_bound(
        base_nll,
        sum(c * h0**d for d, c in enumerate(tuning.base.coefficients)),
        vocab_size=V,
        alpha=tuning.base_alpha,
        lam=tuning.base.lam,
        floor_bits=tuning.base.y0,
        code_length_bits=0.0,
        tune_bits=tuning.base.tune_bits,
        delta=0.025,
    )
    assert excess <= line.terms["excess"] <= excess + 2e-9
    assert base <= line.terms["base_bound"] <= base + 2e-9
    assert excess + base <= line.value <= excess + base + 3e-9
    assert json.loads(json.dumps(line.to_dict()))["method"] == "relative"


def test_delta_is_split_in_advance_and_all_tuning_is_paid(chosen):
    """A relative bound without the split, or with an unpaid lambda, cannot be expressed."""
    _, tuning = chosen
    assert excess_claim(CLAIM).delta + base_claim(CLAIM).delta == CLAIM.delta
    shared = math.log2(2) + 1
    assert tuning.tune_bits == pytest.approx(relative_tune_bits(tuning.degree) + shared)
    assert tuning.base.tune_bits == pytest.approx(freedman_tune_bits(tuning.base.degree, choose_alpha=True) + shared)
    assert tuning.base.alpha == tuning.base_alpha
    assert tuning.base.alpha_slope == 0
    columns, _ = chosen
    sums = relative_sums(tuning, *columns)
    picked = certify_relative(tuning, sums, replace(CLAIM, num_bases=7))
    alone = certify_relative(tuning, sums, CLAIM)
    extra = math.log(7) / (tuning.base.lam * SIZE)
    assert picked.value - alone.value == pytest.approx(extra, abs=3e-9)


@pytest.mark.parametrize(("prior", "paid"), [("code", 37.0), ("holdout", 0.0)])
def test_the_base_pays_for_the_protocol_too(chosen, prior, paid):
    """A base that was fixed beforehand is still applied in a way that may have been chosen on the tokens."""
    columns, _ = chosen
    split = {"artifact": 163.0, "protocol": 37.0}
    claim, sums = replace(CLAIM, prior=prior), {}
    for known in ({}, split):
        tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim)
        sums[len(known)] = certify_relative(
            tuning, relative_sums(tuning, *columns), replace(claim, code_split=known)
        ).terms["base_bound"]
    extra = math.log(2) * paid / (tuning.base.lam * SIZE)
    assert sums[2] - sums[0] == pytest.approx(extra, abs=3e-9)
    assert (extra > 0) == (prior == "code")


def test_a_small_change_of_a_good_base_is_certified_tighter_than_from_scratch():
    columns = ledger(3)
    claim = replace(CLAIM, code_length_bits=0.06 * SIZE / math.log(2))
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim)
    relative = certify_relative(tuning, relative_sums(tuning, *columns), claim)
    tunings = choose_tunings(Evidence.from_losses(columns[0], columns[2], vocab_size=V), claim)
    absolute = certify(tunings, line_sums(tunings, columns[0], columns[2]), claim)[0]
    assert relative.value < absolute.value


def test_identical_models_pay_only_for_the_code():
    _, base_nll, _, base_entropy = ledger(4)
    columns = (base_nll, base_nll, base_entropy, base_entropy)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), CLAIM)
    line = certify_relative(tuning, relative_sums(tuning, *columns), CLAIM)
    assert math.isfinite(line.value)
    assert line.terms["excess"] < 0.2


@settings(max_examples=10, deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.integers(0, 900), min_size=3, max_size=3))
def test_evidence_merges_in_any_order(order, sizes):
    parts = [RelativeEvidence.from_losses(*ledger(seed, size)) for seed, size in enumerate(sizes)]
    whole = merge_relative_evidence(parts).to_dict()
    assert merge_relative_evidence([parts[i] for i in order]).to_dict() == whole
    tree = merge_relative_evidence([merge_relative_evidence(parts[:2]), parts[2]])
    assert tree.to_dict() == whole


def test_evidence_is_bounded_and_survives_json():
    evidence = RelativeEvidence.from_losses(*ledger(0, 3 * RELATIVE_ROWS_PER_SHARD))
    assert evidence.rows.shape == (RELATIVE_ROWS_PER_SHARD, 4)
    assert evidence.num_tokens == 3 * RELATIVE_ROWS_PER_SHARD
    many = merge_relative_evidence([evidence] * 6)
    assert many.rows.shape == (RELATIVE_ROWS, 4)
    data = evidence.to_dict()
    assert RelativeEvidence.from_dict(json.loads(json.dumps(data))).to_dict() == data
    with pytest.raises(MismatchError):
        RelativeEvidence.from_dict({**data, "keys": data["keys"][:-20]})
    with pytest.raises(MismatchError):
        RelativeEvidence.from_dict({**data, "keys": "AAAA" + data["keys"]})
    with pytest.raises(MismatchError):
        RelativeEvidence.from_dict({})


def test_the_subset_is_fair():
    """The hash must not prefer easy tokens: the mean of the kept rows is that of all within five standard errors."""
    columns = ledger(1, 60_000)
    rows = RelativeEvidence.from_losses(*columns).rows
    for kept, column in zip(rows.T, columns, strict=True):
        assert abs(kept.mean() - column.mean()) < 5 * column.std() / math.sqrt(len(rows))


def test_shards_merge(chosen):
    columns, tuning = chosen
    whole = certify_relative(tuning, relative_sums(tuning, *columns), CLAIM)
    parts = [relative_sums(tuning, *[c[a:b] for c in columns]) for a, b in ((0, 5000), (5000, 5001), (5001, SIZE))]
    merged = certify_relative(tuning, merge_relative_sums(parts), CLAIM)
    assert merged.value == pytest.approx(whole.value, abs=2e-9)
    assert certify_relative(tuning, merge_relative_sums(parts[::-1]), CLAIM) == merged


def test_worst_case_tokens_raise_the_bound(chosen):
    columns, tuning = chosen
    sums = relative_sums(tuning, *[c[:-50] for c in columns], worst_case=50)
    assert (
        certify_relative(tuning, sums, CLAIM).value
        > certify_relative(tuning, relative_sums(tuning, *columns), CLAIM).value
    )
    with pytest.raises(MismatchError, match="tokens"):
        certify_relative(tuning, relative_sums(tuning, *[c[:-50] for c in columns]), CLAIM)


def test_sampled_windows_cover_the_full_mean():
    columns = ledger(6, 60_000)
    lengths = np.full(2000, 30)
    claim = replace(CLAIM, num_tokens=60_000, code_length_bits=500.0)
    plan = SamplingPlan(2000, 30, 100)
    tuning = choose_relative(RelativeEvidence.from_losses(*[c[:3000] for c in columns]), claim, plan)
    full = relative_sums(tuning, *columns, window_lengths=lengths)
    part = relative_sums(tuning, *[c[:30_000] for c in columns], window_lengths=lengths[:1000])
    whole, sampled = certify_relative(tuning, full, claim, plan), certify_relative(tuning, part, claim, plan)
    assert whole.terms["sampling_slack"] == pytest.approx(0, abs=1e-9)
    assert sampled.terms["sampling_slack"] > 0
    assert sampled.value > whole.value
    path = relative_path(tuning, part, claim, plan)
    both = full.excess.windows[0] + full.base.windows[0]
    assert np.all(path.upper >= both.sum() / 60_000)
    quarter = {"delta": 0.05 / 4}  # half is spent on the sampling, the rest halved between excess and base
    kappa = kappa_nats(code_length_bits=500.0, tune_bits=tuning.tune_bits, **quarter)
    base_kappa = kappa_nats(code_length_bits=0.0, tune_bits=tuning.base.tune_bits, **quarter)
    value = path.upper[-1] + kappa / (tuning.lam * 60_000) + base_kappa / (tuning.base.lam * 60_000)
    assert value <= sampled.value <= value + 3e-9
    worst = tuning.highest_excess_bits + highest_value(tuning.base)
    none = relative_sums(tuning, *[c[:0] for c in columns], window_lengths=[30], worst_case=[True])
    assert none.excess.windows[0, 0] + none.base.windows[0, 0] == pytest.approx(30 * worst)
    failed = np.zeros(1000, bool)
    failed[500] = True
    kept = np.repeat(~failed, 30)
    worst = relative_sums(
        tuning, *[c[:30_000][kept] for c in columns], window_lengths=lengths[:1000], worst_case=failed
    )
    assert certify_relative(tuning, worst, claim, plan).value > sampled.value


def test_bad_input_is_refused(chosen):
    columns, tuning = chosen
    nll, base_nll, entropy, base_entropy = columns
    with pytest.raises(InputError, match="base_nll"):
        RelativeEvidence.from_losses(nll, base_nll[:-1], entropy, base_entropy)
    with pytest.raises(InputError, match="base_nll"):
        relative_sums(tuning, nll, np.full(SIZE, math.nan), entropy, base_entropy)
    with pytest.raises(InputError, match="num_bases"):
        choose_relative(RelativeEvidence.from_losses(*columns), replace(CLAIM, num_bases=0))
    with pytest.raises(InputError, match="num_bases"):
        replace(CLAIM, num_bases=-1)
    with pytest.raises(InputError, match="no token"):
        choose_relative(RelativeEvidence.from_losses(*[c[:0] for c in columns]), CLAIM)


def test_tuning_round_trip(chosen):
    _, tuning = chosen
    assert RelativeTuning.from_dict(json.loads(json.dumps(tuning.to_dict()))) == tuning


# ---------------------------------------------------------------------------------- every part of the printed line


PLAN = SamplingPlan(400, 30, 100)


def parts_of(tuning, columns, claim, sampling=None, scored=SIZE, rounding=round_up):
    """(line, sums) of the first tokens, in windows of 30."""
    windows = [30] * (scored // 30)
    sums = relative_sums(tuning, *(c[:scored] for c in columns), window_lengths=windows)
    return certify_relative(tuning, sums, claim, sampling, rounding=rounding), sums


@pytest.mark.parametrize("sampling", [None, PLAN, SamplingPlan(400, 30, 400)])
@pytest.mark.parametrize("bases", [1, 6])
def test_every_term_of_the_line(chosen, sampling, bases):
    """Terms, price and allowance from the sums alone, before anything is rounded to nine decimals."""
    columns, _ = chosen
    claim = replace(CLAIM, num_bases=bases, code_length_bits=200.0, code_split={"artifact": 190.0, "protocol": 10.0})
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim, sampling)
    partial = sampling is PLAN
    line, sums = parts_of(tuning, columns, claim, sampling, SIZE // 2 if partial else SIZE, float)
    share = 4 if sampling else 2
    kappa = kappa_nats(code_length_bits=200.0, tune_bits=tuning.tune_bits, delta=0.05 / share)
    base_kappa = kappa_nats(code_length_bits=10.0, tune_bits=tuning.base.tune_bits, delta=0.05 / share)
    base_kappa += math.log(bases)
    values = [part.mean(0, "value") for part in (sums.excess, sums.base)]
    losses = [part.mean(0, "loss") for part in (sums.excess, sums.base)]
    complexity, base_complexity = kappa / (tuning.lam * SIZE), base_kappa / (tuning.base.lam * SIZE)
    slack = 0.0
    if partial:
        slack = relative_path(tuning, sums, claim, sampling).upper[-1] - sum(values)
        assert slack > 0
    parts = (values[0] + complexity, tuning.lam, tuning.t)
    base_parts = (values[1] + base_complexity + slack, tuning.base.lam, tuning.base.t)
    guard = arithmetic_guard(*parts) + arithmetic_guard(*base_parts)
    total = sum(values) + slack + complexity + base_complexity
    assert line.value == pytest.approx(total + guard, rel=5e-16, abs=0.0)
    assert guard > 20 * 5e-16 * total, "or the comparison could not see it"
    oracle = math.sqrt(2 * sums.excess.mean(0, "square") * kappa / SIZE)
    expected = {
        "empirical": sum(losses),
        "variance": values[0] - losses[0],
        "complexity": complexity,
        "base_variance": values[1] - losses[1],
        "base_complexity": base_complexity,
        "sampling_slack": slack,
        "excess_empirical": losses[0],
        "base_empirical": losses[1],
        "oracle_gap": oracle,
        "gap_over_oracle": (values[0] - losses[0] + complexity) / oracle,
    }
    if sampling is None:
        expected["excess"] = values[0] + complexity + guard
        expected["base_bound"] = values[1] + base_complexity + guard
    assert set(line.terms) == set(expected)
    for name, value in expected.items():
        assert line.terms[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name
    assert line.empirical == pytest.approx(sum(losses), rel=1e-15)
    assert line.kappa_nats == pytest.approx(kappa, rel=1e-14)
    assert line.tune_bits == tuning.tune_bits
    assert line.random_guess == math.log2(V)
    assert (line.vacuous, line.note, line.top_k) == (False, "", None)
    assert RelativeTuning.from_dict(line.parameters) == tuning


def test_two_sentences_only_where_both_parts_are_bounded(chosen):
    columns, tuning = chosen
    line, _ = parts_of(tuning, columns, CLAIM)
    for name in ("excess", "base_bound"):
        assert -Decimal(repr(line.terms[name])).as_tuple().exponent <= 9, "as every bound that is printed"
    (sentence,) = Relative().sentences(line)
    assert format_bound(line.terms["base_bound"], 4) in sentence
    assert f"measured {line.terms['excess_empirical']:.4f}" in sentence
    sampled = choose_relative(RelativeEvidence.from_losses(*columns), CLAIM, PLAN)
    line, _ = parts_of(sampled, columns, CLAIM, PLAN, SIZE // 2)
    assert Relative().sentences(line) == ()


def test_a_line_that_a_guess_beats_says_so(chosen):
    columns, _ = chosen
    dear = replace(CLAIM, code_length_bits=30.0 * SIZE)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), dear)
    line, _ = parts_of(tuning, columns, dear)
    assert line.vacuous
    assert line.note.startswith("vacuous")
    larger = CLAIM.with_larger_corpus(10**6)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), larger)
    line, _ = parts_of(tuning, columns, larger)
    assert line.note.startswith("what-if")
    assert not line.vacuous


def test_a_guess_is_vacuous_from_equality_on(chosen):
    columns, tuning = chosen
    for step, vacuous in ((-1e-9, False), (0.0, True), (1e-9, True)):
        printed = math.log2(V) + step
        line, _ = parts_of(tuning, columns, CLAIM, rounding=lambda _, printed=printed: printed)
        assert line.vacuous is vacuous


@pytest.mark.parametrize("lengths", [None, [30] * 10, [100, 0, 200]])
def test_sums_of_the_excess_are_those_of_its_tokens(chosen, lengths):
    """Value, excess and square of every token, from the formulas; the windows add them up; failed ones count most."""
    columns, tuning = chosen
    few = [c[:300] for c in columns]
    sums = relative_sums(tuning, *few, window_lengths=lengths)
    h, h0 = few[2].astype(float) / math.log(2), few[3].astype(float) / math.log(2)
    monomials = [h ** (d - j) * h0**j for d in range(tuning.degree + 1) for j in range(d + 1)]
    low, high = tuning.interval_bits()
    forecast = np.clip(sum(c * x for c, x in zip(tuning.coefficients, monomials, strict=True)), low, high)
    excess = smoothed_loss_bits(few[0], alpha=tuning.alpha, vocab_size=V)
    excess = excess - smoothed_loss_bits(few[1], alpha=tuning.base_alpha, vocab_size=V)
    values = forecast - np.log1p(tuning.lam * (forecast - excess)) / tuning.lam
    for name, column in (("value", values), ("loss", excess), ("square", (forecast - excess) ** 2)):
        assert sums.excess.total(0, name) == pytest.approx(column.sum(), rel=1e-11, abs=1e-11), name
    assert sums.excess.nll.tolist() == [pytest.approx(few[0].sum(dtype=float))]
    if lengths is None:
        assert sums.excess.windows is sums.excess.window_lengths is None
    else:
        assert sums.excess.windows[0] == pytest.approx(window_sums(values, np.array(lengths)), abs=1e-11)
        assert sums.excess.window_lengths.tolist() == lengths
    lowest = max(excess_interval_bits(alpha=tuning.alpha, base_alpha=tuning.base_alpha, vocab_size=V)[0], tuning.y0)
    assert low == lowest
    worst = [tuning.highest_excess_bits, high, (high - low) ** 2]
    failed = np.array([w == 1 for w in range(len(lengths or []))])
    marks = 7 if lengths is None else np.append(failed, True)
    more = relative_sums(
        tuning,
        *(c[np.repeat(~failed, lengths)] for c in few) if lengths else few,
        window_lengths=None if lengths is None else [*lengths, 5],
        worst_case=marks,
    )
    lost = 7 if lengths is None else lengths[1] + 5
    assert more.excess.worst_case_tokens == more.base.worst_case_tokens == lost
    assert more.excess.num_tokens == (307 if lengths is None else 305)
    kept = np.ones(300, bool) if lengths is None else np.repeat(~failed, lengths)
    columns_of = {"value": values, "loss": excess, "square": (forecast - excess) ** 2}
    for (name, column), top in zip(columns_of.items(), worst, strict=True):
        expected = column[kept].sum() + lost * top
        assert more.excess.total(0, name) == pytest.approx(expected, rel=1e-11, abs=1e-11), name
    if lengths is not None:
        assert more.excess.windows[0, -1] == pytest.approx(5 * worst[0], rel=1e-12)
        assert more.excess.windows[0, 1] == pytest.approx(lengths[1] * worst[0], rel=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_polynomial_of_two_entropies_has_its_monomials_in_order(degree):
    h, h0 = np.array([0.5, 2.0, 3.0]), np.array([1.5, 0.25, 7.0])
    basis = entropy_basis(h, h0, degree)
    expected = [[1.0, 1.0, 1.0], h, h0, h**2, h * h0, h0**2, h**3, h**2 * h0, h * h0**2, h0**3]
    assert basis.shape == (3, (degree + 1) * (degree + 2) // 2)
    assert basis.T.tolist() == [pytest.approx(column) for column in expected[: basis.shape[1]]]


def test_a_relative_line_needs_its_base_and_constant_alphas(chosen):
    columns, _ = chosen
    relative = Relative()
    assert relative.rows(CLAIM) == (None,)
    assert relative.rows(replace(CLAIM, num_bases=0)) == ()
    heads = ({"has_alpha": True, "alpha_min": 0.1}, {"head_alpha_min": 0.1})
    for head in heads:
        relative.check_claim(replace(CLAIM, num_bases=0, **head))
        with pytest.raises(InputError, match="cannot have a smoothing head"):
            replace(CLAIM, **head)
    plain = Evidence.from_losses(columns[0], columns[2], vocab_size=V)
    with pytest.raises(MismatchError, match="base_nll and base_entropy are missing"):
        relative.choose(plain, CLAIM, None)
    both = Evidence.from_losses(columns[0], columns[2], vocab_size=V, base_nll=columns[1], base_entropy=columns[3])
    assert relative.choose(both, CLAIM, None) == choose_relative(RelativeEvidence.from_losses(*columns), CLAIM)


def test_a_piece_leaves_out_the_windows_that_failed(chosen):
    columns, tuning = chosen
    names = ("nll", "base_nll", "entropy", "base_entropy")
    failed = np.repeat([False, True, False], 100)
    piece = Piece(
        {name: c[:300] for name, c in zip(names, columns, strict=True)},
        failed,
        np.array([100, 100, 100]),
        np.array([False, True, False]),
    )
    relative = Relative()
    sums = relative.sums(tuning, piece)
    expected = relative_sums(
        tuning, *(c[:300][~failed] for c in columns), window_lengths=[100] * 3, worst_case=[False, True, False]
    )
    assert sums.excess.windows.tolist() == expected.excess.windows.tolist()
    merged = relative.merge([sums, sums])
    assert merged.excess.num_tokens == merged.base.num_tokens == 600
    collapsed = relative.collapse(merged)
    assert collapsed.excess.shards.shape == collapsed.base.shards.shape == (1, 1, 3)
    for part in ("excess", "base"):
        assert getattr(collapsed, part).mean(0, "value") == getattr(merged, part).mean(0, "value")


def test_the_line_is_certified_as_its_function_says(chosen):
    columns, tuning = chosen
    _, sums = parts_of(tuning, columns, CLAIM)
    assert Relative().certify(tuning, sums, CLAIM, None) == certify_relative(tuning, sums, CLAIM)
    sampled = choose_relative(RelativeEvidence.from_losses(*columns), CLAIM, PLAN)
    _, half = parts_of(sampled, columns, CLAIM, PLAN, SIZE // 2)
    path = Relative().path(sampled, half, CLAIM, PLAN)
    assert path.upper.tolist() == relative_path(sampled, half, CLAIM, PLAN).upper.tolist()
    flat = relative_sums(sampled, *columns)
    for sums in (
        flat,
        RelativeSums(half.excess, flat.base),
        RelativeSums(flat.excess, half.base),
        RelativeSums(replace(half.excess, window_lengths=None), half.base),
        RelativeSums(replace(half.excess, windows=None), half.base),
    ):
        with pytest.raises(InputError, match="window_lengths"):
            relative_path(sampled, sums, CLAIM, PLAN)


@pytest.mark.parametrize(
    ("forged", "field"),
    [
        ({"y0": 0.1}, "y0 0.1"),
        ({"degree": 3}, "pays"),
        ({"coefficients": ()}, "are paid"),
        ({"t": 0.3, "lam": 0.3}, "t 0.3"),
    ],
)
def test_a_forged_excess_is_refused(chosen, forged, field):
    columns, tuning = chosen
    sums = relative_sums(tuning, *columns)
    with pytest.raises(MismatchError, match=field):
        certify_relative(replace(tuning, **forged), sums, CLAIM)


def test_the_base_is_smoothed_as_its_own_line_is(chosen):
    columns, tuning = chosen
    sums = relative_sums(tuning, *columns)
    azuma = token_bound("azuma").charged(Tuning("azuma", V, alpha=tuning.base_alpha), base_claim(CLAIM))
    high = loss_interval_bits(alpha=0.5, vocab_size=V)[1]
    base = tuning.base
    others = [
        azuma,
        replace(base, alpha=0.5, lam=base.t / (high - max(base.y0, loss_interval_bits(alpha=0.5, vocab_size=V)[0]))),
        replace(base, alpha_slope=2),
    ]
    for other in others:
        with pytest.raises(MismatchError, match="not smoothed as the excess takes it"):
            certify_relative(replace(tuning, base=other), sums, CLAIM)
    with pytest.raises(MismatchError, match="V = 301"):
        certify_relative(replace(tuning, base=replace(base, vocab_size=301)), sums, CLAIM)


def test_columns_of_a_pair_are_checked(chosen):
    columns, tuning = chosen
    nll, base_nll, entropy, base_entropy = (c[:50] for c in columns)
    for place, name in enumerate(("nll_nats", "base_nll", "entropy", "base_entropy")):
        bad = [nll.copy(), base_nll.copy(), entropy.copy(), base_entropy.copy()]
        bad[place][7] = math.inf
        with pytest.raises(InputError, match=name):
            check_pair(*bad)
        if place:
            short = [nll, base_nll, entropy, base_entropy]
            short[place] = short[place][1:]
            with pytest.raises(InputError, match=f"`{name}` has shape"):
                relative_sums(tuning, *short)
    found = check_pair(nll, base_nll, entropy, base_entropy)
    assert [c.tolist() for c in found] == [c.tolist() for c in (nll, base_nll, entropy, base_entropy)]


SIZES = {0: 1, 1: 3, 2: 6, 3: 10}


def moved(tuning, **changes):
    """A tuning with other fields whose lambda follows from its t."""
    changed = replace(tuning, **changes)
    low, high = changed.interval_bits()
    return replace(changed, lam=changed.t / (high - low))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_every_degree_has_its_own_number_of_coefficients(chosen, degree):
    columns, tuning = chosen
    paid = relative_tune_bits(degree) + CLAIM.shared_bits
    coefficients = tuple(0.125 - k / 64 for k in range(SIZES[degree]))
    coded = moved(tuning, degree=degree, coefficients=coefficients, tune_bits=paid)
    sums = relative_sums(coded, *columns)
    assert certify_relative(coded, sums, CLAIM).value > 0
    for wrong in ((*coefficients, 0.0), coefficients[1:], *((0.0,) * n for d, n in SIZES.items() if d != degree)):
        with pytest.raises(MismatchError, match="are paid"):
            certify_relative(replace(coded, coefficients=wrong), sums, CLAIM)
    with pytest.raises(MismatchError, match="pays"):
        certify_relative(replace(coded, tune_bits=paid - 1e-6), sums, CLAIM)
    h, h0 = columns[2].astype(float) / math.log(2), columns[3].astype(float) / math.log(2)
    guess = sum(c * h ** (d - j) * h0**j for c, (d, j) in zip(coefficients, powers(degree), strict=True))
    reference = relative_bound(
        columns[0],
        columns[1],
        guess,
        vocab_size=V,
        alpha=coded.alpha,
        base_alpha=coded.base_alpha,
        lam=coded.lam,
        floor_bits=coded.y0,
        code_length_bits=0.0,
        tune_bits=0.0,
        delta=0.5,
    )
    assert sums.excess.mean(0, "value") == pytest.approx(reference - math.log(2) / (coded.lam * SIZE), abs=1e-11)


def powers(degree):
    return [(d, j) for d in range(degree + 1) for j in range(d + 1)]


@pytest.mark.parametrize("guess", [-60.0, 60.0])
def test_guesses_of_an_excess_are_clipped(chosen, guess):
    columns, tuning = chosen
    extreme = replace(tuning, degree=0, coefficients=(guess,))
    low, high = tuning.interval_bits()
    end = low if guess < 0 else high
    clipped = replace(tuning, degree=0, coefficients=(end,))
    found, expected = (relative_sums(each, *columns).excess for each in (extreme, clipped))
    for name in ("value", "loss", "square"):
        assert found.total(0, name) == expected.total(0, name)
    assert math.isfinite(found.total(0, "value"))


@pytest.mark.parametrize("y0", [-30.0, -1.0, 2.0])
def test_the_largest_value_of_an_excess_is_the_formulas(chosen, y0):
    """The highest excess against the lowest forecast, in 50 digits."""
    _, tuning = chosen
    low, high = excess_interval_bits(alpha=tuning.alpha, base_alpha=tuning.base_alpha, vocab_size=V)
    coded = moved(tuning, y0=y0, t=0.75)
    assert coded.interval_bits() == (max(low, y0), high)
    with mpmath.workdps(50):
        lam, lowest = mpmath.mpf(coded.lam), mpmath.mpf(max(low, y0))
        exact = lowest - mpmath.log(1 - lam * (mpmath.mpf(high) - lowest)) / lam
    assert coded.highest_excess_bits == pytest.approx(float(exact), rel=1e-12)


def test_tokens_that_nobody_could_score_are_all_there_is(chosen):
    columns, tuning = chosen
    low, high = tuning.interval_bits()
    none = relative_sums(tuning, *(c[:0] for c in columns), worst_case=4)
    assert none.excess.num_tokens == 4
    expected = (4 * tuning.highest_excess_bits, 4 * high, 4 * (high - low) ** 2)
    assert [none.excess.total(0, name) for name in ("value", "loss", "square")] == pytest.approx(expected, rel=1e-12)
    nothing = relative_sums(tuning, *(c[:0] for c in columns))
    assert nothing.excess.shards.tolist() == [[[0.0, 0.0, 0.0]]]


def test_an_alpha_outside_the_grid_is_refused_even_with_its_own_stake(chosen):
    columns, tuning = chosen
    sums = relative_sums(tuning, *columns)
    with pytest.raises(MismatchError, match=r"alpha 0\.1"):
        certify_relative(moved(tuning, alpha=0.1), sums, CLAIM)


def test_a_pilot_of_all_windows_needs_all_tokens(chosen):
    columns, _ = chosen
    plan = SamplingPlan(400, 30, 400)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), CLAIM, plan)
    for sampling in (None, plan):
        with pytest.raises(MismatchError, match="the sums hold 11970 tokens"):
            parts_of(tuning, columns, CLAIM, sampling, SIZE - 30)


def test_delta_and_the_protocol_are_split_between_excess_and_base():
    claim = replace(CLAIM, code_split={"artifact": 170.0, "protocol": 30.0})
    excess, base = excess_claim(claim), base_claim(claim)
    assert (excess.delta, base.delta) == (0.025, 0.025)
    assert (excess.code_length_bits, base.code_length_bits) == (200.0, 30.0)
    assert dict(base.code_split) == {"protocol": 30.0}
    assert base_claim(CLAIM).code_length_bits == 0.0
    assert base.num_lines == claim.num_lines
    for degree, count in SIZES.items():
        bits = 2 * math.log2(40) + math.log2(64) + 4 + 16 * (count + 1) + claim.shared_bits
        for sampled, delta in ((False, 0.025), (True, 0.0125)):
            kappa = kappa_nats(code_length_bits=200.0, tune_bits=bits, delta=delta)
            assert excess_kappa(degree, claim, sampled=sampled) == pytest.approx(kappa, rel=1e-14)


def test_a_line_with_control_variates_says_what_the_pilot_fixed(chosen):
    columns, _ = chosen
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), CLAIM, PLAN)
    _, full = parts_of(tuning, columns, CLAIM, PLAN)
    features = (full.excess.windows[0] + full.base.windows[0])[:, None]
    controlled = replace(PLAN, controls=ControlVariates(features, np.full(400, 30), np.arange(400)))
    line, half = parts_of(tuning, columns, CLAIM, controlled, SIZE // 2)
    path = relative_path(tuning, half, CLAIM, controlled)
    assert line.parameters["control_variates"] == list(path.beta)
    assert len(path.beta) == 1
    plain, _ = parts_of(tuning, columns, CLAIM, PLAN, SIZE // 2)
    assert "control_variates" not in plain.parameters
    assert line.terms["sampling_slack"] <= plain.terms["sampling_slack"]
