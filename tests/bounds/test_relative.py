"""The relative line: a model given as a small delta on a base."""

from __future__ import annotations

import json
import math
from dataclasses import replace

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
from tokenbound.bounds.constants import RELATIVE_ROWS, RELATIVE_ROWS_PER_SHARD
from tokenbound.bounds.exact import highest_value
from tokenbound.bounds.lines.relative import relative_path
from tokenbound.bounds.relative_search import base_claim, excess_claim
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
