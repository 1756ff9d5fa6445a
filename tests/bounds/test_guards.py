"""Printed numbers are on the safe side of exact ones, and every line pays what it says: in mpmath, independently."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds import (
    Claim,
    Evidence,
    Line,
    RelativeEvidence,
    SamplingPlan,
    Tuning,
    azuma_anytime_bound,
    certify,
    certify_document,
    choose_document,
    choose_relative,
    choose_tunings,
    document_sums,
    freedman_bound,
    line_sums,
    loss_interval_bits,
)
from tokenbound.bounds.coded import require_coded, require_forecast
from tokenbound.bounds.constants import ALPHA_GRID, ALPHA_SLOPES, BUDGET_GRID, T_GRID
from tokenbound.bounds.rounding import arithmetic_guard, format_bound, round_up
from tokenbound.bounds.search import as_float16
from tokenbound.bounds.smoothing import alpha_levels, entropy_level
from tokenbound.errors import InputError, MismatchError

mp = mpmath.mpf
V, SIZE = 300, 600
RNG = np.random.default_rng(11)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.2, SIZE), 5.6).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
RANK = np.floor(NLL * 3).astype(np.int32)
DOCUMENT = np.arange(SIZE) // 7
METHODS = ("freedman", "azuma", "kl", "document")


def claimed(**changes: Any) -> Claim:
    fields = {"methods": METHODS, "top_k": (1, 5), "num_documents": int(DOCUMENT[-1]) + 1, **changes}
    return Claim(V, V, fields.pop("code", 40.0), fields.pop("delta", 0.05), SIZE, **fields)


def lines_of(claim: Claim, rounding: Callable[[float], float] = round_up) -> list[tuple[Tuning, Line]]:
    """Every line of a claim about the losses above, with its tuning."""
    evidence = Evidence.from_losses(NLL, ENTROPY, RANK, vocab_size=V, top_k=claim.top_k)
    tunings = choose_tunings(evidence, claim)
    lines = certify(tunings, line_sums(tunings, NLL, ENTROPY, RANK), claim, rounding=rounding)
    document = choose_document(evidence, claim)
    last = certify_document(document, document_sums(document, NLL, DOCUMENT), claim, rounding=rounding)
    return [*zip(tunings, lines, strict=True), (document, last)]


# ------------------------------------------------------------------------------- the same lines, in 50 digits


def elias_delta(n: int) -> int:
    """Length of the code word, which is built here."""
    length = f"{n:b}"
    return 2 * len(f"{len(length):b}") - 1 + len(length) - 1


def exact_loss(nll: float, alpha: Any, vocab: int = V) -> Any:
    return -mpmath.log((1 - mp(alpha)) * mpmath.exp(-mp(nll)) + mp(alpha) / vocab, 2)


def exact_interval(alpha: Any, vocab: int = V) -> tuple[Any, Any]:
    return -mpmath.log(1 - mp(alpha) + mp(alpha) / vocab, 2), mpmath.log(vocab / mp(alpha), 2)


def exact_alpha(alpha: float, slope: int, entropy_nats: float, vocab: int = V) -> Any:
    """alpha(H) from its description: 64 levels of H / log2 V, octaves in proportion, capped at one half."""
    level = min(max(int(mp(entropy_nats) / mpmath.log(vocab) * 64), 0), 63)
    share = mp(level) / 63
    octaves = slope * share if slope >= 0 else -slope * (1 - share)
    return max(min(mp(alpha) * mp(2) ** octaves, mp(1) / 2), mp(alpha))


def exact_betting(tuning: Tuning, nll: float, entropy: float) -> Any:
    """z = Y - ln(1 + lambda (Y - l)) / lambda of one token, its forecast clipped to the token's own interval."""
    alpha = exact_alpha(tuning.alpha, tuning.alpha_slope, entropy, tuning.vocab_size)
    low, high = exact_interval(alpha, tuning.vocab_size)
    bits = mp(entropy) / mpmath.log(2)
    guess = mpmath.fsum(mp(c) * bits**power for power, c in enumerate(tuning.coefficients))
    forecast = min(max(guess, low, mp(tuning.y0)), high)
    loss = exact_loss(nll, alpha, tuning.vocab_size)
    return forecast - mpmath.log(1 + mp(tuning.lam) * (forecast - loss)) / mp(tuning.lam)


def exact_bound(tuning: Tuning, line: Line, claim: Claim) -> tuple[Any, Any]:
    """(bound, kappa) of one line in exact arithmetic: nothing is taken from the line but its grid point."""
    shared = mpmath.log(claim.num_lines, 2) + elias_delta(claim.trial)
    alphas = mpmath.log(40, 2)

    def kappa(tune: Any) -> Any:
        return mpmath.log(2) * (mp(claim.paid_code_bits) + tune + shared) - mpmath.log(mp(claim.delta))

    if tuning.method == "kl":
        paid = kappa(mpmath.log(20, 2))
        error, lam = mp(int((tuning.top_k <= RANK).sum())) / SIZE, mp(line.parameters["lambda"])
        return min((1 - mpmath.exp(-lam * error - paid / SIZE)) / (1 - mpmath.exp(-lam)), mp(1)), paid
    if tuning.method == "freedman":
        paid = kappa(mpmath.log(40 * 8 * 64, 2) + 2 + 2 + 16 * (len(tuning.coefficients) + 1))
        pairs = zip(NLL.tolist(), ENTROPY.tolist(), strict=True)
        total = mpmath.fsum(exact_betting(tuning, nll, entropy) for nll, entropy in pairs)
        return total / SIZE + paid / (mp(tuning.lam) * SIZE), paid
    low, high = exact_interval(tuning.alpha)
    losses = [exact_loss(nll, tuning.alpha) for nll in NLL.tolist()]
    if tuning.method == "document":
        paid, count = kappa(alphas), claim.num_documents
        means = [mpmath.fsum(x for x, d in zip(losses, DOCUMENT, strict=True) if d == k) for k in range(count)]
        means = [total / int((k == DOCUMENT).sum()) for k, total in enumerate(means)]
        return mpmath.fsum(means) / count + (high - low) * mpmath.sqrt(paid / (2 * count)), paid
    mean = mpmath.fsum(losses) / SIZE
    if claim.declared_tokens == SIZE:
        paid = kappa(alphas)
        return mean + (high - low) * mpmath.sqrt(paid / (2 * SIZE)), paid
    j = line.parameters["m0_index"]
    paid, m0 = kappa(alphas + elias_delta(j)), mp(2) ** (mp(j) / 4)
    looser = (mpmath.sqrt(SIZE / m0) + mpmath.sqrt(m0 / SIZE)) / 2
    return mean + (high - low) * mpmath.sqrt(paid / (2 * SIZE)) * looser, paid


CLAIMS = [
    claimed(),
    claimed(declared_tokens=SIZE, code=3.0, delta=0.3),
    claimed(trial=9, prior="holdout", methods=("azuma", "document", "freedman")),
    claimed(code=2.0, methods=("kl", "azuma", "document"), top_k=(1, 3, 200)),
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_line_is_its_theorem_and_pays_its_whole_word(claim: Claim) -> None:
    """Value and price of each line from the formulas alone: the code of azuma's j, K lines and the trial included."""
    with mpmath.workdps(50):
        for tuning, line in lines_of(claim):
            exact, kappa = exact_bound(tuning, line, claim)
            assert exact <= line.value <= exact + mp("2e-9"), line.method
            assert abs(mp(line.kappa_nats) - kappa) <= mp("1e-12") * kappa, line.method
            tune = (kappa + mpmath.log(mp(claim.delta))) / mpmath.log(2) - mp(claim.paid_code_bits)
            assert abs(mp(line.tune_bits) - tune) <= mp("1e-9"), line.method


@pytest.mark.parametrize("trial", [1, 7])
def test_azuma_pays_for_the_index_of_m0(trial: int) -> None:
    """The any-time form names its m0 = 2^(j/4) in the code: L_E(j) bits more than the form whose m was declared."""
    lines = {}
    for declared in (None, SIZE):
        claim = claimed(methods=("azuma",), trial=trial, declared_tokens=declared, has_entropy=False)
        tunings = choose_tunings(Evidence.from_losses(NLL, vocab_size=V), claim)
        lines[declared] = certify(tunings, line_sums(tunings, NLL), claim)[0]
    j = lines[None].parameters["m0_index"]
    assert j >= 20, "m0 is near m, so that its code is long"
    price = elias_delta(j)
    assert lines[None].tune_bits == pytest.approx(lines[SIZE].tune_bits + price, abs=1e-12)
    paid = price * math.log(2)
    assert lines[None].kappa_nats == pytest.approx(lines[SIZE].kappa_nats + paid, rel=1e-12)
    with mpmath.workdps(50):
        low, high = exact_interval(lines[None].parameters["alpha"])
        m0, kappa = mp(2) ** (mp(j) / 4), mp(lines[SIZE].kappa_nats) + price * mpmath.log(2)
        gap = (high - low) * mpmath.sqrt(kappa / (2 * SIZE)) * (mpmath.sqrt(SIZE / m0) + mpmath.sqrt(m0 / SIZE)) / 2
        assert lines[None].value - lines[None].empirical >= gap


def test_the_index_of_m0_is_the_best_that_its_price_allows() -> None:
    claim = claimed(methods=("azuma",), has_entropy=False)
    tunings = choose_tunings(Evidence.from_losses(NLL, vocab_size=V), claim)
    (line,) = certify(tunings, line_sums(tunings, NLL), claim)
    tune = line.tune_bits - elias_delta(line.parameters["m0_index"])
    shared = {"vocab_size": V, "alpha": tunings[0].alpha, "code_length_bits": 40.0, "delta": 0.05}
    values = [azuma_anytime_bound(NLL, m0_index=j, tune_bits=tune + elias_delta(j), **shared) for j in range(1, 80)]
    assert min(values) <= line.value <= min(values) + 2e-9


@pytest.mark.parametrize("sampled", [False, True])
def test_lines_of_a_smoothing_head_are_their_theorems(sampled: bool) -> None:
    """Each token has its own alpha: its own range in azuma's, its own interval in freedman's; no alpha is tuned."""
    least, m = 2.0**-6, SIZE * 2 if sampled else SIZE
    alphas = np.random.default_rng(3).uniform(least, 0.4, SIZE).astype(np.float32).astype(np.float64)
    claim = Claim(V, V, 40.0, 0.05, m, methods=("freedman", "azuma"), has_alpha=True, alpha_min=least, trial=2)
    plan, lengths = SamplingPlan(m // 10, 10, 20, trial=2) if sampled else None, [10] * (SIZE // 10)
    evidence = Evidence.from_losses(NLL, ENTROPY, alpha=alphas, vocab_size=V, window_lengths=lengths)
    tunings = list(choose_tunings(evidence, claim, plan))
    if sampled:
        tunings[0] = replace(tunings[0], budget=BUDGET_GRID[20])  # 2,048 bits, which no window exceeds
    sums = line_sums(tunings, NLL, ENTROPY, None, alphas, window_lengths=lengths)
    freedman, azuma = certify(tunings, sums, claim, plan)
    with mpmath.workdps(50):
        values: dict[str, list[Any]] = {"freedman": [], "azuma": []}
        lam, tuning = mp(tunings[1].lam), tunings[0]
        for nll, entropy, alpha in zip(NLL.tolist(), ENTROPY.tolist(), alphas.tolist(), strict=True):
            low, high = exact_interval(alpha)
            loss, bits = exact_loss(nll, alpha), mp(entropy) / mpmath.log(2)
            values["azuma"].append(loss + lam * (high - low) ** 2 / 8)
            guess = mpmath.fsum(mp(c) * bits**power for power, c in enumerate(tuning.coefficients))
            forecast = min(max(guess, low, mp(tuning.y0)), high)
            values["freedman"].append(forecast - mpmath.log(1 + mp(tuning.lam) * (forecast - loss)) / mp(tuning.lam))
        shared = 1 + elias_delta(2)  # log2 of two lines
        tune = {"azuma": mpmath.log(96, 2), "freedman": 10 + 16 * (len(tuning.coefficients) + 1) + 6 * sampled}
        for line, chosen in ((freedman, tuning), (azuma, tunings[1])):
            kappa = mpmath.log(2) * (40 + tune[line.method] + shared) - mpmath.log(mp(0.05) / (2 if sampled else 1))
            slack = mp(line.terms["sampling_slack"])
            exact = mpmath.fsum(values[line.method]) / SIZE + slack + kappa / (mp(chosen.lam) * m)
            assert exact <= line.value + mp("1e-13")
            assert line.value <= exact + mp("2e-9")
            assert abs(line.kappa_nats - kappa) < mp("1e-9")
            assert (slack > 0) == sampled


# ------------------------------------------------------------------------------------------ guards of rounding


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_rounded_up_is_already_above_the_exact_value(claim: Claim) -> None:
    """Nine decimals hide float64's own error nearly always; the allowance must cover it without their help."""
    below = 0
    with mpmath.workdps(50):
        for tuning, line in lines_of(claim, rounding=float):
            exact, _ = exact_bound(tuning, line, claim)
            assert line.value >= exact, line.method
            assert line.value <= exact + mp("1e-9"), "an allowance, not a surcharge"
            below += line.value - exact > 0
    assert below


@pytest.mark.parametrize("claim", CLAIMS)
def test_printed_bounds_have_nine_decimals(claim: Claim) -> None:
    for _, line in lines_of(claim):
        assert -Decimal(repr(line.value)).as_tuple().exponent <= 9


@pytest.mark.parametrize("size", [1e-3, 1.0, 15.0, 64.0])
def test_the_allowance_covers_the_sum_of_a_trillion_terms(size: float) -> None:
    """Pairwise sums of 2^40 terms: 40 roundings of 2^-53 and a few for each term, relative to the value."""
    for value in (size, -size):
        assert arithmetic_guard(value) >= 100 * 2.0**-53 * size
        assert arithmetic_guard(value) <= 1e-10
        assert arithmetic_guard(value, 0.1, 0.5) >= arithmetic_guard(value)


@given(t=st.sampled_from(T_GRID), distance=st.floats(0.5, 64), bits=st.floats(0, 64))
def test_the_allowance_covers_roundings_of_a_factor(t: float, distance: float, bits: float) -> None:
    """A factor 1 + d off by four roundings where it is smallest, 1 - t, and d off with losses of up to 64 bits."""
    lam = t / distance
    with mpmath.workdps(50):
        factor = mp(1) - mp(t)
        off = 4 * mp(2) ** -53 * (1 + mp(lam) * mp(bits))
        error = (mpmath.log(factor) - mpmath.log(factor - off)) / mp(lam) if off < factor else mpmath.inf
        assert arithmetic_guard(0.0, lam, t) >= error * (1 - mp("1e-9"))
        assert arithmetic_guard(0.0, lam, t) <= 20 * 4 * mp(2) ** -53 * (64 + 1 / mp(lam)) / factor


@given(st.floats(-1e6, 1e6), st.integers(0, 12))
def test_rounding_up_gives_the_nearest_decimal_above(value: float, decimals: int) -> None:
    """In exact fractions: not below the value, and at most one step of the last decimal above it."""
    step = Fraction(1, 10**decimals)
    ceiling = -((-Fraction(value)) // step) * step
    rounded = round_up(value, decimals)
    assert Fraction(rounded) >= Fraction(value)
    assert rounded in (float(ceiling), math.nextafter(float(ceiling), math.inf))
    assert Fraction(format_bound(value, decimals)) == ceiling


def test_rounding_up_by_default_is_to_nine_decimals_and_three_in_tables() -> None:
    assert round_up(2.00000000001) == 2.000000001
    assert round_up(-0.5) == -0.5
    assert format_bound(2.0000001) == "2.001"
    assert round_up(math.inf) == math.inf
    assert math.isnan(round_up(math.nan))


@pytest.mark.parametrize("error", [0.953125, 0.999, 1.0])
def test_an_error_rate_is_never_printed_above_one(error: float) -> None:
    """Where the bound is 1 but for float64's last digits, the allowance must not lift it over the cap."""
    rank = (np.arange(SIZE) < round(error * SIZE)).astype(np.int32)
    claim = Claim(V, V, 2.0 * SIZE, 0.05, SIZE, methods=("kl",), top_k=(1,), has_entropy=False)
    tunings = choose_tunings(Evidence.from_losses(NLL, None, rank, vocab_size=V, top_k=(1,)), claim)
    (line,) = certify(tunings, line_sums(tunings, NLL, None, rank), claim)
    assert error <= line.value <= 1.0
    assert line.vacuous


# -------------------------------------------------------------------------------------------- float16 as paid


def is_half(value: float) -> bool:
    """Whether IEEE 754's sixteen bits hold the value, by the standard library."""
    return bool(struct.unpack("<e", struct.pack("<e", value))[0] == value)


FLOAT32_ONLY = [
    float(np.float32(0.1)),
    1.0 + 2.0**-11,
    2.0**-25,
    2049.0,
    65500.0,
    -3.0 - 2.0**-20,
]


@pytest.mark.parametrize("value", FLOAT32_ONLY)
def test_a_float32_is_no_float16(value: float) -> None:
    """Sixteen bits were paid; a number that needs more is outside the code, as coefficient and as floor."""
    assert float(np.float32(value)) == value
    assert not is_half(value)
    with pytest.raises(MismatchError, match="coefficient"):
        require_forecast((1.0, value), 2, 0.5)
    with pytest.raises(MismatchError, match="y0"):
        require_forecast((1.0, 0.5), 2, value)
    require_forecast((1.0, float(np.float16(value))), 2, float(np.float16(value)))


@given(st.lists(st.floats(-65000, 65000), min_size=1, max_size=6))
def test_coefficients_are_rounded_to_sixteen_bits(values: list[float]) -> None:
    rounded = as_float16(np.array(values)).tolist()
    for value, half in zip(values, rounded, strict=True):
        assert half == struct.unpack("<e", struct.pack("<e", value))[0]
    require_forecast(tuple(rounded), len(values), rounded[0])


def test_a_coefficient_beyond_float16_becomes_infinite_and_is_refused() -> None:
    assert as_float16(np.array([1e6, -1e6])).tolist() == [math.inf, -math.inf]
    for bad in (math.inf, -math.inf, math.nan, None):
        with pytest.raises(MismatchError, match="y0"):
            require_forecast((1.0,), 1, bad)


@pytest.mark.parametrize("line", ["freedman", "relative"])
def test_what_is_chosen_is_sixteen_bits_wide(line: str) -> None:
    if line == "freedman":
        tuning: Any = lines_of(claimed())[0][0]
    else:
        columns = (NLL * np.float32(0.97), NLL, ENTROPY, ENTROPY)
        claim = Claim(V, V, 10.0, 0.05, SIZE, methods=("freedman",), num_bases=1)
        tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim)
        assert all(is_half(c) for c in (*tuning.base.coefficients, tuning.base.y0))
    assert all(is_half(c) for c in (*tuning.coefficients, tuning.y0))


# ---------------------------------------------------------------------------------------------------- alpha(H)


@pytest.mark.parametrize("slope", ALPHA_SLOPES)
@pytest.mark.parametrize("alpha", [ALPHA_GRID[0], ALPHA_GRID[17], ALPHA_GRID[30], 0.5])
def test_alpha_of_entropy_is_what_its_name_says(alpha: float, slope: int) -> None:
    """Both directions: a positive slope smooths more where the model is unsure, a negative one where it is sure."""
    entropies = (np.arange(64) + 0.5) / 64 * math.log(V)
    table = alpha_levels(alpha, slope)
    assert entropy_level(entropies, vocab_size=V).tolist() == list(range(64))
    with mpmath.workdps(50):
        for entropy, weight in zip(entropies.tolist(), table.tolist(), strict=True):
            assert abs(mp(weight) / exact_alpha(alpha, slope, entropy) - 1) < mp("1e-14")
    unsure, sure = table[-1], table[0]
    if slope > 0 and alpha < 0.5:
        assert unsure == min(alpha * 2.0**slope, 0.5)
        assert sure == alpha
    if slope < 0 and alpha < 0.5:
        assert sure == min(alpha * 2.0**-slope, 0.5)
        assert unsure == alpha


@pytest.mark.parametrize("slope", [-1, -3, -6, -8, 3, 5, 7, 9])
def test_a_slope_without_a_code_word_is_refused(slope: int) -> None:
    with pytest.raises(InputError, match="slope"):
        alpha_levels(0.01, slope)
    claim = claimed()
    freedman = lines_of(claim)[0][0]
    with pytest.raises(MismatchError, match="alpha_slope"):
        require_coded(replace(freedman, alpha_slope=slope), claim)


@pytest.mark.parametrize("slope", [s for s in ALPHA_SLOPES if s])
def test_azuma_has_a_constant_alpha(slope: int) -> None:
    """Its range and its price are those of one alpha; a slope of either sign is outside its code."""
    claim = claimed()
    azuma = lines_of(claim)[1][0]
    require_coded(azuma, claim)
    with pytest.raises(MismatchError, match="alpha_slope"):
        require_coded(replace(azuma, alpha_slope=slope), claim)


COEFFICIENTS = st.tuples(st.floats(-40, 40, width=16), st.floats(-40, 40, width=16))


@settings(max_examples=25)
@given(slope=st.sampled_from(ALPHA_SLOPES), coefficients=COEFFICIENTS, y0=st.sampled_from([-1.0, 0.125, 4.0]))
def test_forecasts_are_clipped_to_the_interval_of_their_own_token(
    slope: int, coefficients: tuple[float, float], y0: float
) -> None:
    """With alpha(H) each token has its own [A_i, B_i]; a guess outside it counts as the end of it, token by token."""
    alpha, t = 2.0**-7, 0.75
    low, high = loss_interval_bits(alpha=alpha, vocab_size=V)
    tuning = Tuning(
        "freedman",
        V,
        alpha=alpha,
        alpha_slope=slope,
        t=t,
        lam=t / (high - max(low, y0)),
        degree=1,
        coefficients=coefficients,
        y0=y0,
    )
    nll = np.array([0.0, 1e-3, 0.5, 3.0, 9.0, 80.0], np.float32).repeat(4)
    entropy = np.tile(np.array([0.01, 1.3, 3.1, 5.69], np.float32), 6)
    sums = line_sums([tuning], nll, entropy, window_lengths=np.ones(nll.size, np.int64))
    plain = line_sums([tuning], nll, entropy)
    alphas = alpha_levels(alpha, slope)[entropy_level(entropy, vocab_size=V)]
    paid = {"code_length_bits": 0.0, "tune_bits": 0.0, "delta": 0.5}
    guess = coefficients[0] + coefficients[1] * entropy.astype(float) / math.log(2)
    reference = freedman_bound(
        nll, guess, vocab_size=V, alpha=alphas, alpha_min=alpha, floor_bits=y0, lam=tuning.lam, **paid
    )
    with mpmath.workdps(50):
        exact = [exact_betting(tuning, x, h) for x, h in zip(nll.tolist(), entropy.tolist(), strict=True)]
        for found, expected in zip(sums.windows[0].tolist(), exact, strict=True):
            assert abs(mp(found) - expected) <= mp("1e-11")
        mean = mpmath.fsum(exact) / nll.size
    assert plain.mean(0, "value") == pytest.approx(float(mean), abs=1e-11)
    assert reference == pytest.approx(float(mean) + math.log(2) / (tuning.lam * nll.size), abs=1e-11)


def test_the_parts_of_an_error_line_are_the_transform_and_its_price() -> None:
    """`variance` is what the transform costs at kappa = 0; the rest of the gap is what kappa costs."""
    for tuning, line in lines_of(claimed(code=2.0, methods=("kl", "azuma", "document"), top_k=(1, 5))):
        if tuning.method == "kl" and line.value < 1:
            with mpmath.workdps(50):
                error, lam = mp(line.empirical), mp(line.parameters["lambda"])
                free = (1 - mpmath.exp(-lam * error)) / (1 - mpmath.exp(-lam)) - error
                assert abs(line.terms["variance"] - free) < mp("1e-12")
                assert abs(line.terms["complexity"] - (line.value - error - free)) < mp("2e-9")


def test_the_allowance_grows_with_the_value() -> None:
    for value in (1e-3, 1.0, 1e6):
        assert arithmetic_guard(value) == arithmetic_guard(-value) == pytest.approx(1e-12 * value, rel=1e-12, abs=0.0)
        assert arithmetic_guard(value, 0.25, 0.5) - arithmetic_guard(value) == pytest.approx(
            2.0**-51 * 68 / 0.5, rel=1e-3 + 1e-3 * value
        )
