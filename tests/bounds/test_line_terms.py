"""The parts of a printed line, one by one: their signs, their order, and what a line says of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    Line,
    SamplingPlan,
    Tuning,
    certify,
    choose_tunings,
    kappa_nats,
    line_sums,
)
from tokenbound.bounds.lines import bound_named
from tokenbound.bounds.lines.base import Setting, plain_row_name, separate_bound, token_bound
from tokenbound.bounds.printing import Measured
from tokenbound.bounds.rounding import round_up
from tokenbound.bounds.search import SlackModel
from tokenbound.bounds.smoothing import loss_interval_bits
from tokenbound.bounds.theorems import azuma_anytime_gap, kl_error_bound
from tokenbound.errors import InputError

V, SIZE, LEAST = 300, 3000, 2.0**-6
RNG = np.random.default_rng(4)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.0, SIZE), 5.5).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
RANK = np.floor(NLL * 3).astype(np.int32)
ALPHA = RNG.uniform(LEAST, 0.4, SIZE)
CLAIM = Claim(V, V, 100.0, 0.05, SIZE, top_k=(1,))
HEAD = replace(CLAIM, methods=("freedman", "azuma"), has_alpha=True, alpha_min=LEAST)


def certified(claim: Claim, sampling: SamplingPlan | None = None, **more: Any) -> list[tuple[Tuning, Line]]:
    alpha = ALPHA if claim.has_alpha else None
    windows = [10] * (SIZE // 10)
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, alpha, vocab_size=V, top_k=(1,), window_lengths=windows)
    tunings = choose_tunings(evidence, claim, sampling)
    sums = line_sums(tunings, NLL, ENTROPY, RANK, alpha, window_lengths=windows)
    return list(zip(tunings, certify(tunings, sums, claim, sampling, **more), strict=True))


def test_the_range_is_azumas_variance_and_the_code_its_complexity() -> None:
    tuning, line = certified(replace(CLAIM, methods=("azuma",)))[0]
    low, high = loss_interval_bits(alpha=tuning.alpha or 0, vocab_size=V)
    j = line.parameters["m0_index"]
    gap = azuma_anytime_gap(high - low, line.kappa_nats, SIZE, j)
    assert (line.terms["variance"], line.terms["complexity"]) == pytest.approx(gap, rel=1e-13)
    assert gap[0] != pytest.approx(gap[1], rel=1e-6), "or the test could not tell them apart"
    assert line.parameters["loss_range_bits"] == high - low
    assert line.parameters["form"] == "any m"
    _, fixed = certified(replace(CLAIM, methods=("azuma",), declared_tokens=SIZE))[0]
    assert fixed.terms["variance"] == fixed.terms["complexity"]
    assert fixed.parameters["form"] == "fixed m"


def test_the_range_of_a_heads_tokens_is_its_variance() -> None:
    for tuning, line in certified(HEAD):
        kappa = kappa_nats(code_length_bits=100.0, tune_bits=line.tune_bits, delta=0.05)
        assert line.kappa_nats == pytest.approx(kappa, rel=1e-14)
        assert line.terms["complexity"] == pytest.approx(kappa / ((tuning.lam or 0) * SIZE), rel=1e-13)
        total = line.terms["empirical"] + line.terms["variance"] + line.terms["complexity"]
        assert total <= (line.value or 0) <= total + 2e-9
        assert line.terms["variance"] > 0
        assert line.parameters["alpha_from"] == "column"
        assert line.parameters["lambda"] == tuning.lam
        assert line.parameters["alpha"] == LEAST


@pytest.mark.parametrize(("alphas", "word"), [("any", "grid"), ("constant", "constant"), ("entropy", "entropy")])
def test_a_line_says_where_its_smoothing_comes_from(alphas: Any, word: str) -> None:
    tuning, line = certified(replace(CLAIM, methods=("freedman",), alphas=alphas))[0]
    assert line.parameters["alpha_from"] == word
    if alphas != "any":
        assert (tuning.alpha_slope == 0) == (alphas == "constant")


def test_freedmans_gap_is_measured_against_the_oracles() -> None:
    for claim in (CLAIM, HEAD):
        _, line = certified(claim)[0]
        gap = line.terms["variance"] + line.terms["complexity"]
        assert line.terms["gap_over_oracle"] == pytest.approx(gap / line.terms["oracle_gap"], rel=1e-13)
        assert line.terms["gap_over_oracle"] > 1


def test_forecasts_without_entropies_are_noted() -> None:
    assert certified(replace(CLAIM, methods=("freedman",)))[0][1].note == ""
    claim = replace(CLAIM, methods=("freedman",), has_entropy=False)
    tunings = choose_tunings(Evidence.from_losses(NLL, vocab_size=V), claim)
    (line,) = certify(tunings, line_sums(tunings, NLL), claim)
    assert line.note == "forecasts and smoothing are constant: the losses have no `entropy` column"


@pytest.mark.parametrize(("step", "vacuous"), [(0.0, True), (-1e-9, False), (1e-9, True)])
def test_what_a_guess_achieves_is_vacuous(step: float, vacuous: bool) -> None:
    guess = math.log2(V)
    _, line = certified(replace(CLAIM, methods=("azuma",)), rounding=lambda value: guess + step)[0]
    assert line.vacuous is vacuous
    assert ("vacuous" in line.note) is vacuous


@pytest.mark.parametrize(
    ("method", "claim"), [("freedman", CLAIM), ("azuma", CLAIM), ("freedman", HEAD), ("azuma", HEAD)]
)
@pytest.mark.parametrize("declared", [None, SIZE])
def test_slack_is_added_to_what_was_measured(method: str, claim: Claim, declared: int | None) -> None:
    """Both are means of z_i: what was seen, and how far the rest may lie above it."""
    claim = replace(claim, declared_tokens=declared)
    tuning = next(tuning for tuning, _ in certified(claim) if tuning.method == method)
    bound = token_bound(method)
    without = bound.value(tuning, Measured(2.0, 2.1, 0.0, 0.5, True), claim)
    slack = bound.value(tuning, Measured(2.0, 2.1, 0.25, 0.5, True), claim)
    assert slack.value == pytest.approx(without.value + 0.25, abs=1e-12)
    assert (slack.variance, slack.complexity, slack.tune_bits) == (
        without.variance,
        without.complexity,
        without.tune_bits,
    )
    higher = bound.value(tuning, Measured(2.0, 2.6, 0.0, 0.5, True), claim)
    assert higher.value == pytest.approx(without.value + 0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("measured", "slack", "error"), [(0.3, 0.0, 0.3), (0.3, 0.2, 0.5), (0.9, 0.4, 1.0), (0.0, -1e-17, 0.0)]
)
def test_an_errors_slack_ends_at_one(measured: float, slack: float, error: float) -> None:
    claim = replace(CLAIM, methods=("kl",))
    bound = token_bound("kl")
    tuning = bound.charged(Tuning("kl", V, top_k=1), claim)
    found = bound.value(tuning, Measured(measured, measured, slack, 0.0, True), claim)
    lam = float(str(found.parameters["lambda"]))
    paid = {"code_length_bits": 100.0, "tune_bits": tuning.tune_bits, "delta": 0.025, "num_tokens": SIZE}
    expected = kl_error_bound(error, lam=lam, **paid)  # type: ignore[arg-type]
    assert found.value == pytest.approx(min(expected, 1.0), rel=1e-12)
    assert found.parameters["uncapped"] == round_up(expected)
    free = -math.expm1(-lam * error) / -math.expm1(-lam) - error
    assert found.variance == pytest.approx(free, abs=1e-12)
    assert error + found.variance + found.complexity == pytest.approx(found.value, abs=1e-12)


def test_measured_of_a_full_run_has_no_slack() -> None:
    assert Measured(1.0, 2.0) == Measured(1.0, 2.0, 0.0, 0.0, False, {})


def test_an_error_needs_its_k_and_its_ranks() -> None:
    with pytest.raises(InputError, match="lacks `top_k`"):
        token_bound("kl").evaluator(Tuning("kl", V))
    with pytest.raises(InputError, match="top-1 error needs the `rank` column"):
        line_sums([Tuning("kl", V, top_k=1)], [0.5])


@pytest.mark.parametrize(
    ("name", "flags", "columns"),
    [
        # is_method, bounds_risk, stands_alone, shares_pass, counts_documents, smooths_by_head
        ("freedman", (True, True, True, True, False, True), ()),
        ("azuma", (True, True, True, True, False, True), ()),
        ("kl", (True, False, True, True, False, False), ("rank",)),
        ("document", (True, False, False, False, True, False), ("document",)),
        ("relative", (False, True, True, False, False, False), ("entropy", "base_nll", "base_entropy")),
    ],
)
def test_what_a_bound_says_of_itself(name: str, flags: tuple[bool, ...], columns: tuple[str, ...]) -> None:
    """K, the line that is quoted, and what may stand alone follow from these."""
    bound = bound_named(name)
    found = (bound.is_method, bound.bounds_risk, bound.stands_alone)
    assert (*found, bound.shares_pass, bound.counts_documents, bound.smooths_by_head) == flags
    assert bound.columns == columns
    if name not in ("document", "relative"):
        assert bound.objection(Setting("packed", sampled=True, times_grown=3)) is None


def test_a_bound_of_another_kind_is_not_found() -> None:
    for name in ("document", "relative", "nothing"):
        with pytest.raises(InputError, match="no bound that is evaluated token by token"):
            token_bound(name)
    for name in ("freedman", "nothing"):
        with pytest.raises(InputError, match="no bound with a pass of its own"):
            separate_bound(name)
    assert separate_bound("relative").name == "relative"
    assert Setting("packed", sampled=False).times_grown == 0


@pytest.mark.parametrize(("column", "has"), [("rank", "has_rank"), ("entropy", "has_entropy")])
def test_a_bound_without_its_column_cannot_be_computed(column: str, has: str) -> None:
    class Needs(type(token_bound("azuma"))):  # type: ignore[misc]
        columns = (column,)

    bound, evidence = Needs(), Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=(1,))
    assert bound.missing(CLAIM) is None
    assert bound.tuned(evidence, CLAIM, SlackModel(), None).unavailable is None
    without = replace(CLAIM, **{has: False})
    assert f"`{column}`" in (bound.missing(without) or "")
    tuning = bound.tuned(evidence, without, SlackModel(), None)
    assert (tuning.unavailable, tuning.tune_bits) == (
        bound.missing(without),
        pytest.approx(math.log2(40) + CLAIM.shared_bits),
    )
    other = replace(CLAIM, **{"has_rank" if has == "has_entropy" else "has_entropy": False})
    assert bound.missing(other) is None


def test_a_line_may_be_measured_against_another_guess() -> None:
    azuma, measured = token_bound("azuma"), Measured(2.0, 2.0)
    tuning = azuma.charged(Tuning("azuma", V, alpha=0.125), CLAIM)
    found = azuma.value(tuning, measured, CLAIM)
    for guess in (0.5, 40.0):
        line = azuma.printed_line(None, found, measured, CLAIM, guess=guess)
        assert (line.random_guess, line.vacuous) == (guess, guess == 0.5)
    assert azuma.printed_line(None, found, measured, CLAIM).random_guess == math.log2(V)


def test_a_line_without_a_better_name_is_called_by_its_bound() -> None:
    line = certified(replace(CLAIM, methods=("azuma",)))[0][1]
    assert plain_row_name(line) == "azuma"
    assert plain_row_name(replace(line, top_k=7)) == "azuma, top-7 error"


def test_coefficients_of_control_variates_are_shown_where_there_are_some() -> None:
    assert Measured(1.0, 1.0, beta=(0.5, -0.25)).parameters == {"control_variates": [0.5, -0.25]}
    assert Measured(1.0, 1.0).parameters == {}
