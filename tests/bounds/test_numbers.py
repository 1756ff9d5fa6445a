"""Reference values computed in 50-digit arithmetic, and the same formulas once more in mpmath here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    RelativeEvidence,
    Tuning,
    certify_relative,
    choose_relative,
    line_sums,
    loss_interval_bits,
    relative_sums,
)
from tokenbound.bounds.codes import artifact_code_length_bits, elias_delta_bits
from tokenbound.bounds.constants import T_GRID
from tokenbound.bounds.rounding import arithmetic_guard
from tokenbound.bounds.sampling import total_upper_bounds
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_bound,
    azuma_predictable_bound,
    document_bound,
    freedman_bound,
    kl_error_bound,
    kl_grid_bound,
    paper_error_bound,
    paper_subsample_bound,
    relative_bound,
)

NUMBERS: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "numbers.json").read_text())
REL = 1e-9


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=f"{name}-{i}") for i, case in enumerate(NUMBERS[name])]


def common(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": case["vocab_size"],
        "alpha": case["alpha"],
        "code_length_bits": case["code_length_bits"],
        "tune_bits": case["tune_bits"],
        "delta": case["delta"],
        "num_tokens": case["m"],
        "sampling_slack_bits": 0.0,
    }


@pytest.mark.parametrize("case", cases("elias_delta"))
def test_elias_delta(case):
    assert elias_delta_bits(case["n"]) == case["bits"]


@pytest.mark.parametrize("case", cases("azuma"))
def test_azuma(case):
    assert artifact_code_length_bits(case["artifact_bytes"]) == case["code_length_bits"]
    assert azuma_bound(case["nll_nats"], **common(case)) == pytest.approx(float(case["bound_bits"]), rel=REL)


@pytest.mark.parametrize("case", cases("freedman"))
def test_freedman(case):
    value = freedman_bound(case["nll_nats"], case["forecast_bits"], lam=case["lambda"], **common(case))
    assert value == pytest.approx(float(case["bound_bits"]), rel=REL)


@pytest.mark.parametrize("case", cases("relative"))
def test_relative(case):
    value = relative_bound(
        case["nll_nats"],
        case["base_nll_nats"],
        case["forecast_bits"],
        base_alpha=case["base_alpha"],
        lam=case["lambda"],
        **common(case),
    )
    assert value == pytest.approx(float(case["excess_bits"]), rel=REL)


@pytest.mark.parametrize("case", cases("kl"))
def test_kl(case):
    value = kl_error_bound(
        case["error"],
        code_length_bits=case["code_length_bits"],
        tune_bits=case["tune_bits"],
        delta=case["delta"],
        num_tokens=case["m"],
        lam=case["lambda"],
    )
    assert value == pytest.approx(float(case["bound"]), rel=REL)


@pytest.mark.parametrize("case", cases("paper_subsample"))
def test_paper_subsample(case):
    value = paper_subsample_bound(
        case["error"],
        loss_range_bits=case["D"],
        code_length_bits=case["code_length_bits"],
        num_tokens=case["m"],
        num_sampled=case["n"],
        delta=case["delta"],
    )
    assert value == pytest.approx(float(case["bound"]), rel=REL)


# An independent path: the formulas written out in arbitrary precision, one token at a time.

mp = mpmath.mpf


def mp_loss(nll: float, alpha: float, vocab: int) -> Any:
    return -mpmath.log((1 - mp(alpha)) * mpmath.exp(-max(mp(nll), mp(0))) + mp(alpha) / vocab, 2)


def mp_interval(alpha: float, vocab: int) -> tuple[Any, Any]:
    return -mpmath.log(1 - mp(alpha) + mp(alpha) / vocab, 2), mpmath.log(vocab / mp(alpha), 2)


def mp_kappa(code: float, tune: float, delta: float) -> Any:
    return mpmath.log(2) * (mp(code) + mp(tune)) - mpmath.log(mp(delta))


def mp_betting(values: list[Any], forecasts: list[Any], lam: float, kappa: Any, m: int) -> Any:
    total = mp(0)
    for x, y in zip(values, forecasts, strict=True):
        d = mp(lam) * (y - x)
        total += x + (d - mpmath.log(1 + d)) / mp(lam)
    return total / len(values) + kappa / (mp(lam) * m)


@pytest.fixture(params=range(8))
def drawn(request):
    """Random losses with float32 edges among them, and random parameters."""
    rng = np.random.default_rng(request.param)
    nll = np.concatenate([rng.exponential(2.0, 40), [0.0, 1e-7, 80.0, -1e-6, 700.0]]).astype(np.float32)
    return {
        "nll": nll,
        "base": rng.exponential(2.0, nll.size).astype(np.float32),
        "forecast": rng.normal(3.0, 4.0, nll.size),
        "vocab": int(rng.choice([2, 257, 50257, 128256])),
        "alpha": float(10 ** rng.uniform(-8, -0.4)),
        "base_alpha": float(10 ** rng.uniform(-8, -0.4)),
        "t": float(rng.uniform(1e-4, 0.98)),
        "code": float(rng.integers(0, 10**6)),
        "tune": float(rng.uniform(0, 100)),
        "delta": float(rng.uniform(0.001, 0.5)),
    }


def paid(drawn: dict[str, Any]) -> dict[str, Any]:
    return {"code_length_bits": drawn["code"], "tune_bits": drawn["tune"], "delta": drawn["delta"]}


def test_azuma_forms_against_mpmath(drawn):
    with mpmath.workdps(40):
        low, high = mp_interval(drawn["alpha"], drawn["vocab"])
        kappa, m = mp_kappa(drawn["code"], drawn["tune"], drawn["delta"]), drawn["nll"].size
        mean = sum(mp_loss(x, drawn["alpha"], drawn["vocab"]) for x in drawn["nll"].tolist()) / m
        fixed = (high - low) * mpmath.sqrt(kappa / (2 * m))
        m0 = mp(2) ** (mp(17) / 4)
        anytime = fixed * (mpmath.sqrt(m / m0) + mpmath.sqrt(m0 / m)) / 2
        lam = mp(drawn["t"])
        predictable = lam * (high - low) ** 2 / 8 + kappa / (lam * m)
    keywords = {"vocab_size": drawn["vocab"], "alpha": drawn["alpha"], **paid(drawn)}
    assert azuma_bound(drawn["nll"], **keywords) == pytest.approx(float(mean + fixed), rel=REL)
    assert azuma_anytime_bound(drawn["nll"], m0_index=17, **keywords) == pytest.approx(float(mean + anytime), rel=REL)
    value = azuma_predictable_bound(drawn["nll"], lam=drawn["t"], **keywords)
    assert value == pytest.approx(float(mean + predictable), rel=REL)


def test_freedman_with_predictable_alpha_and_floor_against_mpmath(drawn):
    vocab, nll = drawn["vocab"], drawn["nll"]
    rng = np.random.default_rng(nll.size)
    alphas = drawn["alpha"] + (0.5 - drawn["alpha"]) * rng.random(nll.size)
    low, high = (float(x) for x in mp_interval(drawn["alpha"], vocab))
    floor = low + 0.1 * (high - low)
    lam = drawn["t"] / (high - floor)
    with mpmath.workdps(40):
        losses = [mp_loss(x, a, vocab) for x, a in zip(nll.tolist(), alphas.tolist(), strict=True)]
        intervals = [mp_interval(a, vocab) for a in alphas.tolist()]
        forecasts = [
            min(max(mp(y), a, mp(floor)), b) for y, (a, b) in zip(drawn["forecast"].tolist(), intervals, strict=True)
        ]
        kappa = mp_kappa(drawn["code"], drawn["tune"], drawn["delta"])
        expected = float(mp_betting(losses, forecasts, lam, kappa, nll.size))
    value = freedman_bound(
        nll,
        drawn["forecast"],
        vocab_size=vocab,
        alpha=alphas,
        alpha_min=drawn["alpha"],
        floor_bits=floor,
        lam=lam,
        **paid(drawn),
    )
    assert value == pytest.approx(expected, rel=REL)


def test_relative_against_mpmath(drawn):
    vocab = drawn["vocab"]
    with mpmath.workdps(40):
        low, high = mp_interval(drawn["alpha"], vocab)
        base_low, base_high = mp_interval(drawn["base_alpha"], vocab)
        lam = float(drawn["t"] / (high - base_low - low + base_high))
        excess = [
            mp_loss(x, drawn["alpha"], vocab) - mp_loss(y, drawn["base_alpha"], vocab)
            for x, y in zip(drawn["nll"].tolist(), drawn["base"].tolist(), strict=True)
        ]
        forecasts = [min(max(mp(y), low - base_high), high - base_low) for y in drawn["forecast"].tolist()]
        kappa = mp_kappa(drawn["code"], drawn["tune"], drawn["delta"])
        expected = float(mp_betting(excess, forecasts, lam, kappa, len(excess)))
    value = relative_bound(
        drawn["nll"],
        drawn["base"],
        drawn["forecast"],
        vocab_size=vocab,
        alpha=drawn["alpha"],
        base_alpha=drawn["base_alpha"],
        lam=lam,
        **paid(drawn),
    )
    assert value == pytest.approx(expected, rel=REL)


def test_error_and_document_bounds_against_mpmath(drawn):
    error, m, lam = drawn["t"], 12345, 0.25
    document = np.sort(np.random.default_rng(1).integers(0, 6, drawn["nll"].size))
    with mpmath.workdps(40):
        kappa = mp_kappa(drawn["code"], drawn["tune"], drawn["delta"])
        kl = (1 - mpmath.exp(-mp(lam) * mp(error) - kappa / m)) / (1 - mpmath.exp(-mp(lam)))
        paper = mp(error) + mpmath.sqrt(kappa / (2 * m))
        losses = [mp_loss(x, drawn["alpha"], drawn["vocab"]) for x in drawn["nll"].tolist()]
        means = [
            mpmath.fsum(x for x, d in zip(losses, document, strict=True) if d == k) / int((document == k).sum())
            for k in np.unique(document)
        ]
        low, high = mp_interval(drawn["alpha"], drawn["vocab"])
        documents = mpmath.fsum(means) / len(means) + (high - low) * mpmath.sqrt(kappa / (2 * len(means)))
    assert kl_error_bound(error, num_tokens=m, lam=lam, **paid(drawn)) == pytest.approx(float(kl), rel=REL)
    assert paper_error_bound(error, num_tokens=m, **paid(drawn)) == pytest.approx(float(paper), rel=REL)
    value = document_bound(drawn["nll"], document, vocab_size=drawn["vocab"], alpha=drawn["alpha"], **paid(drawn))
    assert value == pytest.approx(float(documents), rel=REL)


def test_errors_over_the_grid_against_mpmath(drawn):
    error = drawn["t"]
    with mpmath.workdps(40):
        kappa = mp_kappa(drawn["code"] / 1000, drawn["tune"], drawn["delta"])
        values = {}
        for exponent in range(-14, 6):
            lam = mp(2) ** exponent
            values[exponent] = (1 - mpmath.exp(-lam * mp(error) - kappa / 54321)) / (1 - mpmath.exp(-lam))
        best = min(values, key=values.__getitem__)
    paid_bits = {**paid(drawn), "code_length_bits": drawn["code"] / 1000}
    value, lam = kl_grid_bound(error, num_tokens=54321, **paid_bits)
    assert value == pytest.approx(min(float(values[best]), 1.0), rel=REL)
    assert lam == 2.0**best


def test_predictable_azuma_against_mpmath(drawn):
    """Each token has its own range; lambda multiplies the mean of the squares."""
    nll, vocab, lam = drawn["nll"], drawn["vocab"], drawn["t"]
    alphas = np.random.default_rng(3).uniform(drawn["alpha"], 0.5, nll.size)
    with mpmath.workdps(40):
        kappa, total = mp_kappa(drawn["code"], drawn["tune"], drawn["delta"]), mp(0)
        for x, a in zip(nll.tolist(), alphas.tolist(), strict=True):
            low, high = mp_interval(a, vocab)
            total += mp_loss(x, a, vocab) + mp(lam) * (high - low) ** 2 / 8
        expected = float(total / nll.size + kappa / (mp(lam) * nll.size))
    value = azuma_predictable_bound(nll, vocab_size=vocab, alpha=alphas, lam=lam, **paid(drawn))
    assert value == pytest.approx(expected, rel=REL)


def test_the_sampling_sequence_against_mpmath():
    """The mixture's root by bisection in 40 digits: the largest total that the draws do not refute."""
    rng = np.random.default_rng(4)
    values, forecasts, units = rng.uniform(0, 0.3, 16), rng.uniform(0.2, 0.4, 16), 60
    stakes = np.stack([rng.uniform(0.5, 1, 16) * scale for scale in (0.3, 0.8, 1.2)], axis=1)
    bounds = total_upper_bounds(
        values, num_units=units, highest=1.0, log_inverse_delta=1.5, forecasts=forecasts, stakes=stakes
    )

    def log_wealth(total, n):
        """Ln of the mean over the sequences of prod (1 + s (Y - X)) exp(-s (Y - M)), M the mean of what was left."""
        sequences = [mp(1)] * stakes.shape[1]
        for i, (x, y) in enumerate(zip(values[:n].tolist(), forecasts.tolist(), strict=False)):
            mean_left = (total - mpmath.fsum(values[:i].tolist())) / (units - i)
            for k, stake in enumerate(stakes[i].tolist()):
                sequences[k] *= (1 + mp(stake) * (mp(y) - x)) * mpmath.exp(-mp(stake) * (mp(y) - mean_left))
        return mpmath.log(mpmath.fsum(sequences) / len(sequences))

    with mpmath.workdps(40):
        for n in (2, 9, 16):
            root = mpmath.findroot(
                lambda total, n=n: log_wealth(total, n) - mp(1.5), (mp(1), mp(300)), solver="anderson"
            )
            assert bounds[n - 1] == pytest.approx(min(float(root), values[:n].sum() + units - n), rel=1e-10)
    assert bounds[-1] < values.sum() + units - 16 - 1, "the sequence must have said more than what is certain"


def test_a_relative_line_spends_delta_twice_over_against_mpmath():
    """R(h0) at delta_2 with no code, R(h) - R(h0) at delta_1 with the delta's; both pay K, the trial and ln M."""
    rng = np.random.default_rng(5)
    size, vocab = 400, 300
    base_entropy = np.minimum(rng.gamma(1.0, 1.2, size), 5.5).astype(np.float32)
    base_nll = rng.gamma(0.7, base_entropy / 0.7 + 0.02).astype(np.float32)
    columns = (base_nll * np.float32(0.97), base_nll, base_entropy * np.float32(0.98), base_entropy)
    claim = Claim(vocab, vocab, 200.0, 0.04, size, methods=("freedman", "azuma"), num_bases=5, trial=3)
    tuning = choose_relative(RelativeEvidence.from_losses(*columns), claim)
    line = certify_relative(tuning, relative_sums(tuning, *columns), claim)
    with mpmath.workdps(40):
        ln2, shared = mpmath.log(2), mpmath.log(3, 2) + 4
        grids = mpmath.log(64, 2) + 2 + 2
        terms = (tuning.degree + 1) * (tuning.degree + 2) // 2
        tune = 2 * mpmath.log(40, 2) + grids + 16 * terms + 16 + shared
        base_tune = mpmath.log(40 * 8, 2) + grids + 16 * (tuning.base.degree + 1) + 16 + shared
        kappa = ln2 * (200 + tune) + mpmath.log(2 / mp(0.04))
        base_kappa = ln2 * base_tune + mpmath.log(2 / mp(0.04)) + mpmath.log(5)
        low, high = mp_interval(tuning.alpha, vocab)
        base_low, base_high = mp_interval(tuning.base_alpha, vocab)
        losses = [mp_loss(x, tuning.alpha, vocab) for x in columns[0].tolist()]
        base_losses = [mp_loss(x, tuning.base_alpha, vocab) for x in columns[1].tolist()]
        h = [[mp(x) / ln2 for x in column.tolist()] for column in columns[2:]]
        powers = [(d - j, j) for d in range(tuning.degree + 1) for j in range(d + 1)]
        guess = [
            mpmath.fsum(mp(c) * a**i * b**j for c, (i, j) in zip(tuning.coefficients, powers, strict=True))
            for a, b in zip(*h, strict=True)
        ]
        forecasts = [min(max(y, low - base_high, mp(tuning.y0)), high - base_low) for y in guess]
        base_guess = [mpmath.fsum(mp(c) * b**i for i, c in enumerate(tuning.base.coefficients)) for b in h[1]]
        base_forecasts = [min(max(y, base_low, mp(tuning.base.y0)), base_high) for y in base_guess]
        excess = [a - b for a, b in zip(losses, base_losses, strict=True)]
        first = mp_betting(excess, forecasts, tuning.lam, kappa, size)
        second = mp_betting(base_losses, base_forecasts, tuning.base.lam, base_kappa, size)
        total = float(first + second)
    assert total <= line.value <= total + 2e-9
    assert 0 <= line.terms["excess"] - float(first) <= 2e-9
    assert 0 <= line.terms["base_bound"] - float(second) <= 2e-9


@pytest.mark.parametrize("vocab", [2, 50257, 1 << 20])
@pytest.mark.parametrize("t", [T_GRID[0], T_GRID[-1]])
def test_rounding_stays_within_its_allowance(vocab, t):
    """Where floats are worst: every token at an end of its range, the factor 1 + d as small as 1 - t."""
    for alpha in (2.0**-27, 0.5):
        low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab)
        for floor in (low, low + 0.98 * (high - low)):
            y0 = float(np.float16(floor))
            lam = t / (high - max(low, y0))
            tuning = Tuning("freedman", vocab, alpha=alpha, t=t, lam=lam, coefficients=(y0,), y0=y0)
            for nll in (0.0, 1e-7, 0.7, 80.0):
                value = line_sums([tuning], np.full(40, nll, np.float32)).mean(0, "value")
                with mpmath.workdps(40):
                    a, b = mp_interval(alpha, vocab)
                    forecast = min(max(mp(y0), a), b)
                    loss = mp_loss(float(np.float32(nll)), alpha, vocab)
                    exact = forecast - mpmath.log(1 + mp(lam) * (forecast - loss)) / mp(lam)
                    assert exact - mp(value) <= arithmetic_guard(value, lam, t)
