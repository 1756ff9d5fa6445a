"""Reference values computed in 50-digit arithmetic, and the same formulas once more in mpmath here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from tokenbound.bounds.codes import artifact_code_length_bits, elias_delta_bits
from tokenbound.bounds.theorems import (
    azuma_anytime_bound,
    azuma_bound,
    azuma_predictable_bound,
    document_bound,
    freedman_bound,
    kl_error_bound,
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
