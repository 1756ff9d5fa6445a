"""What the searches find against every point of their grids, evaluated over the losses; and the curves of a report.

A search cannot make a bound wrong: its result is charged, checked and evaluated exactly. Here it is seen to be good.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    Line,
    RelativeEvidence,
    Tuning,
    certify,
    certify_document,
    certify_relative,
    choose_document,
    choose_relative,
    choose_tunings,
    document_sums,
    line_sums,
    relative_sums,
)
from tokenbound.bounds.codes import relative_tune_bits
from tokenbound.bounds.constants import ALPHA_GRID, AZUMA_LAMBDA_GRID, T_GRID
from tokenbound.bounds.curves import EvidenceView
from tokenbound.bounds.lines import bound_named
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.relative_search import excess_kappa
from tokenbound.bounds.smoothing import loss_interval_bits, smoothed_loss_bits
from tokenbound.bounds.theorems import excess_interval_bits

V, SIZE, LEAST = 300, 6000, 2.0**-6
RNG = np.random.default_rng(2)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.0, SIZE), 5.5).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
RANK = np.floor(NLL * 3).astype(np.int32)
ALPHA = RNG.uniform(LEAST, 0.4, SIZE)
DOCUMENT = np.arange(SIZE) // 20
CODES = [10.0, 300.0, 3000.0]


def certified(claim: Claim) -> tuple[Evidence, list[Line]]:
    alpha = ALPHA if claim.has_alpha else None
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, alpha, vocab_size=V, top_k=claim.top_k)
    tunings = choose_tunings(evidence, claim)
    return evidence, list(certify(tunings, line_sums(tunings, NLL, ENTROPY, RANK, alpha), claim))


def near(found: float | None, best: float, empirical: float, share: float) -> None:
    """Not better than the best of its grid, and within a share of the gap."""
    assert found is not None
    assert best - 1e-9 <= found <= best + share * (best - empirical)


@pytest.mark.parametrize("code", CODES)
def test_the_stake_of_a_heads_azuma_is_the_best_of_its_grid(code: float) -> None:
    claim = Claim(V, V, code, 0.05, SIZE, methods=("azuma",), has_alpha=True, alpha_min=LEAST)
    azuma = token_bound("azuma")
    grid = [Tuning("azuma", V, alpha=LEAST, alpha_column=True, lam=lam) for lam in AZUMA_LAMBDA_GRID]
    tunings = [azuma.charged(tuning, claim) for tuning in grid]
    sums = line_sums(tunings, NLL, None, None, ALPHA)
    values = [
        certify((tuning,), sums.select(slice(i, i + 1)), claim)[0].value or math.inf for i, tuning in enumerate(tunings)
    ]
    _, (line,) = certified(claim)
    near(line.value, min(values), line.empirical or 0.0, 0.005)


@pytest.mark.parametrize("code", CODES)
def test_the_alpha_of_documents_is_nearly_the_best_of_its_grid(code: float) -> None:
    """Chosen as if every document had the mean loss of the tokens: it may miss the best by a little."""
    claim = Claim(V, V, code, 0.05, SIZE, methods=("azuma", "document"), num_documents=int(DOCUMENT[-1]) + 1)
    chosen = choose_document(Evidence.from_losses(NLL, ENTROPY, vocab_size=V), claim)
    lines = [
        certify_document(tuning, document_sums(tuning, NLL, DOCUMENT), claim)
        for tuning in (chosen, *(replace(chosen, alpha=alpha) for alpha in ALPHA_GRID))
    ]
    best = min(line.value or math.inf for line in lines[1:])
    near(lines[0].value, best, lines[0].empirical or 0.0, 0.01)


def relative_value(columns: tuple[np.ndarray, ...], alphas: tuple[float, float], claim: Claim) -> float:
    """The best excess line of two smoothings with a constant forecast, over every t."""
    excess = smoothed_loss_bits(columns[0], alpha=alphas[0], vocab_size=V)
    excess = excess - smoothed_loss_bits(columns[1], alpha=alphas[1], vocab_size=V)
    low, high = excess_interval_bits(alpha=alphas[0], base_alpha=alphas[1], vocab_size=V)
    kappa = excess_kappa(0, claim, sampled=False)
    best = math.inf
    for t in T_GRID[::2]:
        lam = t / (high - low)
        mean = np.mean(excess.mean() - np.log1p(lam * (excess.mean() - excess)) / lam)
        best = min(best, float(mean) + kappa / (lam * SIZE))
    return best


@pytest.mark.parametrize("code", [100.0, 2000.0])
def test_a_relative_line_is_as_good_as_all_pairs_of_alphas(code: float) -> None:
    """The sum of both lines' best, each with the same base alpha, searched over a grid of pairs."""
    nll = np.maximum(NLL + RNG.normal(-0.03, 0.2, SIZE) * (RNG.random(SIZE) < 0.3), 0).astype(np.float32)
    columns = (nll, NLL, ENTROPY, ENTROPY)
    claim = Claim(V, V, code, 0.05, SIZE, methods=("freedman",), num_bases=1)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim)
    line = certify_relative(tuning, relative_sums(tuning, *columns), claim)
    excess = min(relative_value(columns, (a, b), claim) for a in ALPHA_GRID[12::4] for b in ALPHA_GRID[12::4])
    gap = excess - line.terms["excess_empirical"]
    alone = Claim(V, V, 0.0, 0.025, SIZE, methods=("freedman",))
    tunings = choose_tunings(Evidence.from_losses(NLL, ENTROPY, vocab_size=V), alone)
    (base,) = certify(tunings, line_sums(tunings, NLL, ENTROPY), alone)
    assert (line.value or math.inf) <= excess + (base.value or 0.0) + 0.1 * gap
    assert tuning.tune_bits == relative_tune_bits(tuning.degree) + claim.shared_bits


# --------------------------------------------------------------------------------------------- curves of a report


CLAIM = Claim(V, V, 300.0, 0.05, SIZE, top_k=(1,))
HEAD = replace(CLAIM, methods=("freedman", "azuma"), has_alpha=True, alpha_min=LEAST)


@pytest.mark.parametrize("claim", [CLAIM, HEAD])
def test_curves_pass_through_the_line_and_follow_it_to_a_larger_corpus(claim: Claim) -> None:
    """Up to a constant, by which a report moves them onto the printed value."""
    evidence, lines = certified(claim)
    view = EvidenceView(evidence, claim, None)
    _, larger = certified(claim.with_larger_corpus(8 * SIZE))
    for line, far in zip(lines, larger, strict=True):
        curves = bound_named(line.method).curves(line, view)
        gap = (line.value or 0.0) - (line.empirical or 0.0)
        fall = (line.value or 0.0) - (far.value or 0.0)
        assert curves.at_size(SIZE) - curves.at_size(8 * SIZE) == pytest.approx(fall, abs=0.05 * gap)
        assert curves.at_size(SIZE) > curves.at_size(2 * SIZE) > curves.at_size(8 * SIZE)


def test_curves_of_alpha_and_of_the_stake_are_lowest_at_what_was_chosen() -> None:
    evidence, (freedman, azuma, kl) = certified(CLAIM)
    view = EvidenceView(evidence, CLAIM, None)
    for line in (freedman, azuma):
        curves = bound_named(line.method).curves(line, view)
        assert curves.by_alpha is not None
        assert curves.by_alpha.x == ALPHA_GRID
        assert curves.by_alpha.x[curves.by_alpha.chosen] == line.parameters["alpha"]
        values = np.asarray(curves.by_alpha.values)
        gap = values.min() - (line.empirical or 0.0)
        assert values[curves.by_alpha.chosen] <= values.min() + 0.03 * gap
        assert values[0] > values.min() + 0.5 * gap, "a hundred-millionth is far from the best"
    stakes = bound_named("freedman").curves(freedman, view).by_stake
    assert stakes is not None
    assert stakes.x[stakes.chosen] == pytest.approx(freedman.parameters["lambda"], rel=1e-12)
    assert stakes.values[stakes.chosen] <= min(stakes.values) + 0.03 * (
        (freedman.value or 0) - (freedman.empirical or 0)
    )
    assert bound_named("kl").curves(kl, view).by_alpha is None


def test_a_curve_of_azuma_is_its_formula() -> None:
    evidence, (_, azuma, _) = certified(CLAIM)
    curves = bound_named("azuma").curves(azuma, EvidenceView(evidence, CLAIM, None))
    by_hand = []
    for alpha in ALPHA_GRID:
        low, high = loss_interval_bits(alpha=alpha, vocab_size=V)
        mean = smoothed_loss_bits(NLL, alpha=alpha, vocab_size=V).mean()
        by_hand.append(mean + (high - low) * math.sqrt(azuma.kappa_nats / (2 * SIZE)))
    assert curves.by_alpha is not None
    assert np.asarray(curves.by_alpha.values) == pytest.approx(by_hand, abs=0.02)  # the histogram's cells
    assert curves.at_size(SIZE) == min(curves.by_alpha.values)


def test_an_errors_curve_is_the_line_at_every_size() -> None:
    evidence, (*_, kl) = certified(CLAIM)
    curves = bound_named("kl").curves(kl, EvidenceView(evidence, CLAIM, None))
    assert curves.at_size(SIZE) == pytest.approx(kl.value, abs=2e-9)
    _, (*_, far) = certified(CLAIM.with_larger_corpus(50 * SIZE))
    assert curves.at_size(50 * SIZE) == pytest.approx(far.value, abs=2e-9)


def test_the_forecast_that_is_drawn_is_the_one_that_was_printed() -> None:
    _, (freedman, *_) = certified(CLAIM)
    entropies = np.linspace(0.0, 8.0, 9)
    low, high = loss_interval_bits(alpha=freedman.parameters["alpha"], vocab_size=V)
    drawn = bound_named("freedman").forecast_bits(freedman, entropies, V)
    guess = sum(c * entropies**power for power, c in enumerate(freedman.parameters["forecast_coefficients"]))
    expected = np.clip(guess, max(low, freedman.parameters["forecast_floor_bits"]), high)
    assert drawn == pytest.approx(expected, rel=1e-12)
