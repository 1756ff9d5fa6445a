"""Printed lines: terms that add up, prices that are paid, and claims that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds import Claim, Evidence, SamplingPlan, certify, choose_tunings, format_bound, line_sums, round_up
from tokenbound.bounds.codes import kappa_nats
from tokenbound.bounds.theorems import azuma_bound, kl_error_bound, kl_grid_bound
from tokenbound.errors import InputError, MismatchError

V, SIZE = 300, 20_000
RNG = np.random.default_rng(0)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.0, SIZE), 5.5).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
RANK = np.floor(NLL * 3).astype(np.int32)
SPLIT = {"artifact": 900.0, "protocol": 1.0, "tokenizer": 99.0}
CLAIM = Claim(V, V - 44, 1000.0, 0.05, SIZE, code_split=SPLIT)


def lines_of(claim: Claim, rank=RANK, entropy=ENTROPY):
    evidence = Evidence.from_losses(NLL, entropy, rank, vocab_size=V, top_k=claim.top_k)
    tunings = choose_tunings(evidence, claim)
    return certify(tunings, line_sums(tunings, NLL, entropy, rank), claim)


def test_terms_add_up_to_the_printed_value():
    for line in lines_of(CLAIM):
        parts = ("empirical", "variance", "artifact", "protocol", "tokenizer", "tune", "delta", "sampling_slack")
        total = math.fsum(line.terms[name] for name in parts)
        assert total <= line.value <= total + 2e-9
        assert line.terms["complexity"] == pytest.approx(
            sum(line.terms[name] for name in ("artifact", "protocol", "tokenizer", "tune", "delta"))
        )
        kappa = kappa_nats(code_length_bits=1000.0, tune_bits=line.tune_bits, delta=0.05)
        assert line.kappa_nats == pytest.approx(kappa)
        json.dumps(line.to_dict())


def test_every_line_pays_for_the_others_and_for_earlier_trials():
    """Quoting the smallest of K lines, each at delta, cannot be expressed: log2 K is in every line's tuning."""
    many = {(line.method, line.top_k): line for line in lines_of(CLAIM)}
    assert len(many) == CLAIM.num_lines == 5
    alone = lines_of(replace(CLAIM, methods=("kl",), top_k=(10,)))[0]
    assert many["kl", 10].tune_bits == pytest.approx(alone.tune_bits + math.log2(5))
    tenth = lines_of(replace(CLAIM, methods=("kl",), top_k=(10,), trial=10))[0]
    assert tenth.tune_bits == pytest.approx(alone.tune_bits + 7)
    relative_too = replace(CLAIM, num_bases=1)
    assert relative_too.shared_bits == pytest.approx(math.log2(6) + 1)


def test_kl_line_is_the_grid_bound_and_never_the_inverse():
    for line in lines_of(CLAIM)[2:]:
        error = float(np.mean(line.top_k <= RANK))
        assert line.empirical == error
        paid = {"code_length_bits": 1000.0, "tune_bits": line.tune_bits, "delta": 0.05, "num_tokens": SIZE}
        value, lam = kl_grid_bound(error, **paid)
        assert value <= line.value <= value + 2e-9
        finer = min(kl_error_bound(error, lam=lam * 2**x, **paid) for x in np.linspace(-0.9, 0.9, 181))
        assert line.value >= finer
        assert line.tune_bits >= math.log2(20)


def test_azuma_is_the_any_time_form_unless_m_was_declared():
    """Fixed-m Azuma with an m that depends on the data cannot be expressed: it needs the declaration."""
    any_m = lines_of(replace(CLAIM, methods=("azuma",)))[0]
    assert any_m.parameters["form"] == "any m"
    wrong = lines_of(replace(CLAIM, methods=("azuma",), declared_tokens=SIZE + 1))[0]
    assert wrong == any_m
    fixed = lines_of(replace(CLAIM, methods=("azuma",), declared_tokens=SIZE))[0]
    assert fixed.parameters["form"] == "fixed m"
    assert fixed.value < any_m.value
    reference = azuma_bound(
        NLL,
        vocab_size=V,
        alpha=fixed.parameters["alpha"],
        code_length_bits=1000.0,
        tune_bits=fixed.tune_bits,
        delta=0.05,
    )
    assert reference <= fixed.value <= reference + 2e-9


def test_holdout_pays_no_code_but_all_tuning():
    holdout = lines_of(replace(CLAIM, prior="holdout"))
    code = lines_of(CLAIM)
    for free, paid in zip(holdout, code, strict=True):
        assert free.value < paid.value
        assert free.kappa_nats == pytest.approx(free.tune_bits * math.log(2) + math.log(20))
        assert free.terms["artifact"] == free.terms["tokenizer"] == 0
        assert free.tune_bits >= CLAIM.shared_bits


def test_missing_ranks_and_entropies_are_explained():
    claim = replace(CLAIM, has_rank=False, has_entropy=False)
    lines = lines_of(claim, rank=None, entropy=None)
    assert len(lines) == 5
    for line in lines[2:]:
        assert line.value is None
        assert "`rank`" in line.note
        assert line.vacuous
    assert lines[0].parameters["forecast_degree"] == 0
    assert lines[0].tune_bits >= math.log2(5) + 1, (
        "lines named before scoring count in K even if they cannot be computed"
    )


def test_vacuous_is_measured_against_the_tokenizer():
    strong = replace(CLAIM, code_length_bits=30 * SIZE, code_split={})
    for line in lines_of(strong):
        assert line.vacuous
        assert "vacuous" in line.note
        guess = math.log2(V - 44) if line.top_k is None else 1 - line.top_k / (V - 44)
        assert line.random_guess == pytest.approx(guess)
    assert not any(line.vacuous for line in lines_of(CLAIM))


def test_tokens_must_be_there_exactly_once():
    """Dropping failed windows cannot be expressed: the sums must hold the planned number of tokens."""
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=CLAIM.top_k)
    tunings = choose_tunings(evidence, CLAIM)
    short = line_sums(tunings, NLL[:-100], ENTROPY[:-100], RANK[:-100])
    with pytest.raises(MismatchError, match="19900"):
        certify(tunings, short, CLAIM)
    counted = line_sums(tunings, NLL[:-100], ENTROPY[:-100], RANK[:-100], worst_case=100)
    whole = line_sums(tunings, NLL, ENTROPY, RANK)
    for worst, plain in zip(certify(tunings, counted, CLAIM), certify(tunings, whole, CLAIM), strict=True):
        assert worst.value > plain.value
    with pytest.raises(MismatchError, match="lines"):
        certify(tunings[:2], line_sums(tunings[:2], NLL, ENTROPY, RANK), CLAIM)
    with pytest.raises(MismatchError, match="full run"):
        certify(tunings, whole, CLAIM.with_larger_corpus(10**6), SamplingPlan(10, 10, 1))


def fixed_tunings():
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=CLAIM.top_k)
    tunings = choose_tunings(evidence, CLAIM)
    return tunings, line_sums(tunings, NLL, ENTROPY, RANK)


FIXED = fixed_tunings()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(SIZE, 10**9), code=st.floats(0, 1e5), delta=st.floats(1e-6, 0.3), factor=st.floats(1.0, 100.0))
def test_certificates_are_monotone(m, code, delta, factor):
    base = Claim(V, V, code, delta, SIZE).with_larger_corpus(m)
    tunings, sums = FIXED
    value = [line.value for line in certify(tunings, sums, base)]
    for better in (
        replace(base, num_tokens=int(m * factor)),
        replace(base, code_length_bits=code / factor),
        replace(base, delta=min(delta * factor, 0.9)),
    ):
        # one part in a thousand: any-time Azuma moves between neighbouring m0
        assert all(b.value <= v * 1.001 for b, v in zip(certify(tunings, sums, better), value, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"tokenizer_vocab_size": 301},
        {"tokenizer_vocab_size": 1},
        {"delta": 1.0},
        {"num_tokens": 0},
        {"code_length_bits": math.nan},
        {"code_length_bits": -1.0},
        {"methods": ()},
        {"methods": ("azuma", "azuma")},
        {"methods": ("pac",)},
        {"top_k": ()},
        {"top_k": (0,)},
        {"top_k": (1, 1)},
        {"trial": 0},
        {"prior": "flat"},
        {"has_alpha": True},
        {"alpha_min": 0.1},
        {"has_alpha": True, "alpha_min": 1.5},
        {"code_split": {"artifact": 999.0}},
    ],
)
def test_impossible_claims_are_refused(bad):
    with pytest.raises(InputError):
        replace(CLAIM, **{"code_split": {}, **bad})


def test_a_what_if_is_never_smaller_than_the_data():
    with pytest.raises(InputError, match="larger"):
        CLAIM.with_larger_corpus(SIZE - 1)


@given(st.floats(-1e6, 1e6), st.integers(0, 12))
def test_rounding_never_lowers(value, decimals):
    rounded = round_up(value, decimals)
    assert rounded >= value
    assert rounded - value <= 10.0**-decimals + 1e-9
    assert float(format_bound(value, decimals)) >= value - abs(value) * 1e-15


def test_rounding_knows_numbers_of_any_size():
    for value in (1e20, 1.7e308, -1e25, 2.0**44 + 2.0**-8):
        assert round_up(value) == value
        assert float(format_bound(value)) >= value
    assert round_up(math.inf) == math.inf


def test_losses_that_a_forecast_meets_exactly_have_a_line():
    """The oracle gap is 0 then; what is printed stays a number."""
    nll = np.full(200, 80.0, np.float32)
    claim = Claim(V, V, 10.0, 0.05, 200, methods=("freedman",))
    tunings = choose_tunings(Evidence.from_losses(nll, np.zeros(200, np.float32), vocab_size=V), claim)
    exact = line_sums(tunings, nll, np.zeros(200, np.float32))
    exact.shards[..., 2] = 0.0
    line = certify(tunings, exact, claim)[0]
    assert line.terms["oracle_gap"] == 0
    assert "gap_over_oracle" not in line.terms
    json.dumps(line.to_dict(), allow_nan=False)


def test_sums_of_other_lines_than_the_tunings_are_refused():
    """A row too many or too few would put one line's losses under another's bound."""
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=CLAIM.top_k)
    tunings = choose_tunings(evidence, CLAIM)
    sums = line_sums(tunings, NLL, ENTROPY, RANK)
    for other in (line_sums([*tunings, tunings[-1]], NLL, ENTROPY, RANK), sums.select(slice(0, 4))):
        with pytest.raises(MismatchError, match=r"sums of . lines were given for 5 tunings"):
            certify(tunings, other, CLAIM)


def test_a_what_if_needs_a_token() -> None:
    larger = replace(CLAIM, num_tokens=1).with_larger_corpus(10**6)
    columns = (NLL[:1], ENTROPY[:1], RANK[:1])
    tunings = choose_tunings(Evidence.from_losses(*columns, vocab_size=V, top_k=CLAIM.top_k), larger)
    assert len(certify(tunings, line_sums(tunings, *columns), larger)) == 5
    with pytest.raises(MismatchError, match="no token"):
        certify(tunings, line_sums(tunings, NLL[:0], ENTROPY[:0], RANK[:0]), larger)


WHOLE_PLAN = SamplingPlan(SIZE // 100, 100, SIZE // 100)
"""A corpus so small that the pilot is all of it."""


def test_a_pilot_that_is_the_whole_corpus_leaves_no_slack() -> None:
    """Half of delta was set aside for the sampling all the same: the plan was made before."""
    evidence = Evidence.from_losses(
        NLL, ENTROPY, RANK, vocab_size=V, top_k=CLAIM.top_k, window_lengths=[100] * (SIZE // 100)
    )
    tunings = choose_tunings(evidence, CLAIM, WHOLE_PLAN)
    for window_lengths in (None, [100] * (SIZE // 100)):
        sums = line_sums(tunings, NLL, ENTROPY, RANK, window_lengths=window_lengths)
        for index, line in enumerate(certify(tunings, sums, CLAIM, WHOLE_PLAN)):
            assert line.terms["sampling_slack"] == 0.0
            assert line.terms["sample_mean"] == sums.mean(index, "value")
            assert not any(name.startswith("slack_at") for name in line.terms)
            kappa = kappa_nats(code_length_bits=1000.0, tune_bits=line.tune_bits, delta=0.025)
            assert line.kappa_nats == pytest.approx(kappa, rel=1e-14)
    short = line_sums(tunings, NLL[:-1], ENTROPY[:-1], RANK[:-1])
    with pytest.raises(MismatchError, match="exactly once"):
        certify(tunings, short, CLAIM, WHOLE_PLAN)


def test_a_full_run_has_no_terms_of_a_sample() -> None:
    for line in lines_of(CLAIM):
        assert line.terms["sampling_slack"] == 0.0
        assert not any(name.startswith(("sample_", "slack_at")) for name in line.terms)


@pytest.mark.parametrize(("plan", "delta"), [(None, 0.05), (WHOLE_PLAN, 0.025)])
def test_a_line_that_cannot_be_computed_names_its_kappa(plan: SamplingPlan | None, delta: float) -> None:
    claim = replace(CLAIM, methods=("kl",), top_k=(3,), has_rank=False)
    tunings = choose_tunings(
        Evidence.from_losses(NLL, ENTROPY, vocab_size=V, window_lengths=[100] * (SIZE // 100)), claim, plan
    )
    (line,) = certify(tunings, line_sums(tunings, NLL, ENTROPY), claim, plan)
    assert (line.value, line.empirical, line.top_k, line.vacuous) == (None, None, 3, True)
    assert line.random_guess == pytest.approx(1 - 3 / (V - 44))
    bits = math.log2(20) + 1.0  # lambda from its grid, and the code word of the first trial
    assert line.tune_bits == pytest.approx(bits, rel=1e-14)
    kappa = kappa_nats(code_length_bits=1000.0, tune_bits=bits, delta=delta)
    assert line.kappa_nats == pytest.approx(kappa, rel=1e-14)


def test_notes_say_what_a_number_is_not() -> None:
    assert [line.note for line in lines_of(CLAIM)] == [""] * 5
    larger = CLAIM.with_larger_corpus(10**6)
    what_if = "what-if: the same losses, a larger m (1000000 tokens); not a bound"
    assert [line.note for line in lines_of(larger)] == [what_if] * 5
    dear = replace(larger, code_length_bits=1e9, code_split={})
    for line in lines_of(dear):
        assert line.note == f"{what_if}; vacuous: not below a random guess ({line.random_guess:.4g})"


def test_a_guess_among_more_ids_than_there_are_is_never_wrong() -> None:
    claim = replace(CLAIM, methods=("kl",), top_k=(V - 45, V - 44, V - 43))
    guesses = [line.random_guess for line in lines_of(claim)]
    assert guesses == pytest.approx([1 / (V - 44), 0.0, 0.0], abs=1e-15)
