"""What is printed was paid for: a tuning that the code cannot name, or that pays less than its word, is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
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
    loss_interval_bits,
    relative_sums,
)
from tokenbound.bounds.coded import require_coded, require_paid, require_stake
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.relative_search import base_claim
from tokenbound.errors import InputError, MismatchError

V, SIZE = 300, 4000
RNG = np.random.default_rng(0)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.0, SIZE), 5.5).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
RANK = np.floor(NLL * 3).astype(np.int32)
ALPHA = RNG.uniform(2.0**-6, 0.4, SIZE)
BASE_NLL = NLL + np.float32(0.1)
CLAIM = Claim(V, V, 300.0, 0.05, SIZE, methods=("freedman", "azuma", "kl", "document"), top_k=(1,), num_documents=400)
DOCUMENT = np.arange(SIZE) // 10
TUNINGS = choose_tunings(Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=(1,)), CLAIM)
HEAD_CLAIM = Claim(V, V, 300.0, 0.05, SIZE, methods=("freedman", "azuma"), has_alpha=True, alpha_min=2.0**-6)
HEAD = choose_tunings(Evidence.from_losses(NLL, ENTROPY, alpha=ALPHA, vocab_size=V), HEAD_CLAIM)
DELTA_CLAIM = Claim(V, V, 300.0, 0.05, SIZE, methods=("freedman",), num_bases=1)
PAIR = (NLL, BASE_NLL, ENTROPY, ENTROPY)
RELATIVE = choose_relative(RelativeEvidence.from_losses(*PAIR), DELTA_CLAIM)


def certified(line: int, **forged: Any) -> None:
    tunings = [replace(tuning, **forged) if i == line else tuning for i, tuning in enumerate(TUNINGS)]
    certify(tunings, line_sums(tunings, NLL, ENTROPY, RANK), CLAIM)


def moved(t: float, y0: float | None = None) -> dict[str, float]:
    """A freedman tuning with another t, consistent in itself."""
    low, high = loss_interval_bits(alpha=TUNINGS[0].alpha, vocab_size=V)
    floor = TUNINGS[0].y0 if y0 is None else y0
    return {"t": t, "lam": t / (high - max(low, floor)), "y0": floor}


def test_what_the_package_chooses_is_coded() -> None:
    for tunings, claim in ((TUNINGS, CLAIM), (HEAD, HEAD_CLAIM), ((RELATIVE.base,), base_claim(DELTA_CLAIM))):
        for tuning in tunings:
            require_coded(tuning, claim)
    certified(0)


@pytest.mark.parametrize("share", [0.999, 0.0])
@pytest.mark.parametrize("line", [0, 1, 2])
def test_an_unpaid_tuning_is_refused(line: int, share: float) -> None:
    with pytest.raises(MismatchError, match="whose code word has"):
        certified(line, tune_bits=share * TUNINGS[line].tune_bits)


def test_the_price_holds_lines_and_trials() -> None:
    sums = line_sums(TUNINGS, NLL, ENTROPY, RANK)
    for dearer in ({"trial": 2}, {"num_bases": 1}, {"top_k": (1, 10)}):
        claim = replace(CLAIM, **dearer)
        with pytest.raises(MismatchError):
            certify(TUNINGS, sums, claim)
    certify(TUNINGS, sums, CLAIM)


@pytest.mark.parametrize(
    ("line", "forged", "field"),
    [
        (0, {"alpha": 0.1}, "alpha 0.1"),
        (0, {"alpha_slope": 3}, "alpha"),
        (0, moved(0.3), "t 0.3"),
        (0, {"lam": 2 * TUNINGS[0].lam}, "lambda"),
        (0, {"y0": 0.1}, "lambda"),
        (0, moved(0.5, y0=0.1), "y0 0.1"),
        (0, moved(0.5, y0=float("nan")), "y0 nan"),
        (0, {"coefficients": (0.1, *TUNINGS[0].coefficients[1:])}, "coefficient 0.1"),
        (0, {"coefficients": (*TUNINGS[0].coefficients, 0.0)}, "are paid"),
        (0, {"degree": TUNINGS[0].degree - 1}, "are paid"),
        (0, {"vocab_size": 256}, "V = 256"),
        (1, {"alpha": 0.1}, "alpha 0.1"),
        (1, {"alpha_slope": 2}, "alpha_slope"),
        (2, {"vocab_size": 256}, "V = 256"),
    ],
)
def test_a_tuning_outside_the_code_is_refused(line: int, forged: dict[str, Any], field: str) -> None:
    with pytest.raises((MismatchError, InputError), match=field):
        certified(line, **forged)


@pytest.mark.parametrize("t", [1.0, 1.5])
def test_a_stake_of_one_or_more_is_refused(t: float) -> None:
    with pytest.raises(InputError, match="below 1"):
        certified(0, **moved(t))


def test_degree_four_has_no_word() -> None:
    with pytest.raises(InputError, match="degree"):
        certified(0, degree=4, coefficients=(0.0,) * 5)


@pytest.mark.parametrize(
    ("line", "forged"), [(0, {"alpha": 2.0**-5}), (1, {"lam": 0.1}), (1, {"alpha": 2.0**-5}), (0, {"tune_bits": 1.0})]
)
def test_a_heads_tuning_is_checked_too(line: int, forged: dict[str, Any]) -> None:
    tunings = [replace(tuning, **forged) if i == line else tuning for i, tuning in enumerate(HEAD)]
    sums = line_sums(HEAD, NLL, ENTROPY, None, ALPHA)
    with pytest.raises(MismatchError):
        certify(tunings, sums, HEAD_CLAIM)
    certify(HEAD, sums, HEAD_CLAIM)


@pytest.mark.parametrize(
    "forged",
    [
        {"alpha": 0.1},
        {"base_alpha": 0.25},
        {"tune_bits": 10.0},
        {"lam": 0.9 * RELATIVE.lam},
        {"t": 0.3},
        {"coefficients": (*RELATIVE.coefficients, 0.0)},
        {"coefficients": (0.1, *RELATIVE.coefficients[1:])},
        {"base": replace(RELATIVE.base, tune_bits=1.0)},
        {"base": replace(RELATIVE.base, alpha_slope=1)},
        {"base": replace(RELATIVE.base, t=0.3)},
    ],
)
def test_both_parts_of_a_relative_line_are_checked(forged: dict[str, Any]) -> None:
    sums = relative_sums(RELATIVE, *PAIR)
    with pytest.raises(MismatchError):
        certify_relative(replace(RELATIVE, **forged), sums, DELTA_CLAIM)
    certify_relative(RELATIVE, sums, DELTA_CLAIM)


@pytest.mark.parametrize("forged", [{"alpha": 0.1}, {"tune_bits": 3.0}])
def test_a_document_line_is_checked(forged: dict[str, Any]) -> None:
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=(1,))
    tuning = choose_document(evidence, CLAIM)
    certify_document(tuning, document_sums(tuning, NLL, DOCUMENT), CLAIM)
    forgery = replace(tuning, **forged)
    with pytest.raises(MismatchError):
        certify_document(forgery, document_sums(forgery, NLL, DOCUMENT), CLAIM)


@pytest.mark.parametrize(("alpha", "y0"), [(0.5, -4.0), (0.5, 0.0), (2.0**-7, 0.0)])
def test_a_floor_below_the_smallest_loss_does_not_widen_the_range(alpha: float, y0: float) -> None:
    """y0' = max(A, y0): where y0 lies below A, lambda is t / (B - A), and nothing else is its code word."""
    low, high = loss_interval_bits(alpha=alpha, vocab_size=V)
    tuning = replace(TUNINGS[0], alpha=alpha, alpha_slope=0, t=0.5, y0=y0)
    assert low > y0
    require_coded(replace(tuning, lam=0.5 / (high - low)), CLAIM)
    with pytest.raises(MismatchError, match="lambda"):
        require_coded(replace(tuning, lam=0.5 / (high - y0)), CLAIM)


@pytest.mark.parametrize("method", ["freedman", "azuma"])
def test_a_line_that_cannot_be_computed_pays_but_names_no_grid_point(method: str) -> None:
    bound = token_bound(method)
    tuning = bound.charged(Tuning(method, V, unavailable="no column"), CLAIM)
    require_coded(tuning, CLAIM)
    with pytest.raises(MismatchError, match="pays"):
        require_coded(replace(tuning, tune_bits=tuning.tune_bits - 1e-6), CLAIM)
    with pytest.raises(MismatchError, match="alpha None"):
        require_coded(replace(tuning, unavailable=None), CLAIM)


def test_a_stake_that_is_missing_is_refused() -> None:
    require_stake(0.5, 0.125, 4.0)
    for t, lam in ((0.5, None), (None, 0.125), (None, None)):
        with pytest.raises(MismatchError):
            require_stake(t, lam, 4.0)


def test_a_price_may_be_off_by_its_rounding_alone() -> None:
    require_paid("azuma", 10.0 - 0.9e-9, 10.0)
    require_paid("azuma", 11.0, 10.0)
    for paid in (10.0 - 1.1e-9, 9.0, float("nan")):
        with pytest.raises(MismatchError, match="pays"):
            require_paid("azuma", paid, 10.0)


def test_the_alpha_of_a_head_is_the_claimed_one_even_with_its_own_stake() -> None:
    for line, tuning in enumerate(HEAD):
        for alpha in (2.0**-5, 2.0**-7, None):
            low, high = loss_interval_bits(alpha=alpha or 0.5, vocab_size=V)
            stake = {"lam": tuning.t / (high - max(low, tuning.y0))} if line == 0 else {}
            with pytest.raises(MismatchError, match="alpha"):
                require_coded(replace(tuning, alpha=alpha, **stake), HEAD_CLAIM)
