"""kfac, gptq and e8: what they promise on models made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.calibration import Calibration, MatrixSums, collect_calibration
from tokenbound.compression.codecs import lattice
from tokenbound.compression.codecs.uniform import Grid, decode_grid, encode_grid, grid_values, steps_of
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.quantizers import e8, feedback
from tokenbound.compression.rate import choose_rate
from tokenbound.config.compress import (
    CompressSettings,
    E8Settings,
    GptqSettings,
    KfacSettings,
    RoundToNearestSettings,
)
from tokenbound.errors import InputError


def correlated(columns: int, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, columns, generator=make).double()
    scales = torch.logspace(0, -2, columns).double()
    return (basis * scales) @ basis.T


def layer_calibration(rows: int, columns: int) -> Calibration:
    moment = correlated(columns) * 100
    weights = torch.logspace(0, -1, rows).double()
    sums = MatrixSums(weights / weights.sum() * moment.trace(), moment, seen=100)
    return Calibration(tokens=100, matrices={"up.weight": sums})


def cost(calibration: Calibration, error: torch.Tensor) -> float:
    curvature = calibration.curvature("up.weight")
    assert curvature is not None
    error = error.double()
    return float(((error @ curvature.moment) * error).sum(1) @ curvature.rows)


def test_the_inverse_factor_inverts() -> None:
    moment = correlated(24)
    factor = feedback.inverse_factor(moment, 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24).double(), atol=1e-6, rtol=0)
    assert torch.equal(factor, factor.triu())
    singular = torch.ones(8, 8)
    assert torch.isfinite(feedback.inverse_factor(singular, 0.0)).all()
    assert torch.equal(feedback.inverse_factor(torch.zeros(3, 3)), torch.eye(3).double())


@pytest.mark.parametrize("width", [1, 8])
def test_feedback_leaves_exactly_the_conditional_cost(width: int) -> None:
    make = torch.Generator().manual_seed(3)
    weights, moment = torch.randn(5, 150, generator=make).double(), correlated(150)
    factor = feedback.inverse_factor(moment, 0.0)
    out = torch.zeros_like(weights)

    def rounder(columns: torch.Tensor, start: int) -> torch.Tensor:
        out[:, start : start + columns.shape[1]] = columns.round()
        return columns.round()

    seen = feedback.round_with_feedback(weights, factor, rounder, width)
    error = weights - out
    if width == 1:
        claimed = ((seen - out).square() * feedback.conditional_variances(factor)).sum()
        assert float(claimed) == pytest.approx(float(((error @ moment) * error).sum()), rel=1e-6)
    plain = weights - weights.round()
    assert float(((error @ moment) * error).sum()) < 0.8 * float(((plain @ moment) * plain).sum())


def test_kfac_costs_less_than_one_step_without_feedback_at_the_same_size() -> None:
    weights = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    calibration = layer_calibration(96, 64)
    data = encode_artifact({}, {"up.weight": weights}, KfacSettings(rate=0.1), calibration=calibration)
    best = cost(calibration, decode_artifact(data).tensors["up.weight"] - weights)
    for step in (0.5, 0.7, 1.0, 1.4, 2.0):
        plain = encode_artifact({}, {"up.weight": weights}, RoundToNearestSettings(step=step))
        if len(plain) <= len(data) * 1.03:
            assert best < 0.7 * cost(calibration, decode_artifact(plain).tensors["up.weight"] - weights)
            return
    pytest.fail("no plain artifact of comparable size")


def test_rate_trades_bytes_for_cost() -> None:
    weights = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    calibration = layer_calibration(96, 64)
    sizes, costs = [], []
    for rate in (0.01, 0.03, 0.1, 0.3):
        data = encode_artifact({}, {"up.weight": weights}, KfacSettings(rate=rate), calibration=calibration)
        sizes.append(len(data))
        costs.append(cost(calibration, decode_artifact(data).tensors["up.weight"] - weights))
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)


@pytest.mark.parametrize("chosen", [KfacSettings(rate=1e-4), GptqSettings(bits=4, group=8), E8Settings(bits=4)])
def test_methods_carry_a_real_model_of_embeddings_conv1d_norms_and_biases(chosen: CompressSettings) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=16, vocab_size=40)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(1))
    calibration = collect_calibration(model, [ids])
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    tensors["extra.inv_freq"] = torch.linspace(0, 1, 5)
    data = encode_artifact({}, tensors, chosen, calibration=calibration)
    assert data == encode_artifact({}, tensors, chosen, calibration=calibration)
    decoded = decode_artifact(data).tensors
    assert {name: value.shape for name, value in decoded.items()} == {n: v.shape for n, v in tensors.items()}
    before = model(ids).logits
    model.load_state_dict({**decoded, "lm_head.weight": decoded["transformer.wte.weight"]}, strict=False)
    model.tie_weights()
    change = (model(ids).logits - before).norm() / before.norm()
    assert 0 < change < 0.2
    codecs = {row.name: row.codec for row in inspect_artifact(data, compare=True).tensors}
    expected = {"kfac": "uniform", "gptq": "groups", "e8": "lattice"}[chosen.method]
    assert codecs["transformer.h.0.attn.c_attn.weight"] == expected
    assert codecs["transformer.wte.weight"] == ("uniform" if chosen.method == "kfac" else "float16")


@pytest.mark.parametrize("chosen", [KfacSettings(), GptqSettings(), E8Settings()])
def test_methods_that_need_a_calibration_say_so(chosen: CompressSettings) -> None:
    with pytest.raises(InputError, match="needs a calibration"):
        encode_artifact({}, {"w": torch.randn(8, 8)}, chosen)


def test_what_calibration_never_saw_is_not_rounded_away() -> None:
    weights = {"expert.weight": torch.randn(32, 16), "steps": torch.arange(5)}
    decoded = decode_artifact(encode_artifact({}, weights, KfacSettings(rate=1e3), calibration=Calibration(tokens=1)))
    error = (decoded.tensors["expert.weight"] - weights["expert.weight"]).abs().max()
    assert error < 0.1 * weights["expert.weight"].std()
    assert torch.equal(decoded.tensors["steps"], weights["steps"])


def test_grids_survive_the_wire() -> None:
    rng = np.random.default_rng(0)
    grid = Grid(
        rng.integers(-9, 9, (7, 5)).astype(np.int32), -13, rng.integers(-3, 3, 7), rng.integers(-3, 3, 5), shrink=9
    )
    back = decode_grid(memoryview(encode_grid(grid)), (7, 5))
    assert np.array_equal(grid_values(back), grid_values(grid))
    scaled = grid.integers - np.sign(grid.integers) * 9 / 64
    steps = 2.0 ** ((-13 + grid.rows[:, None] + grid.columns[None, :]) / 2)
    np.testing.assert_allclose(grid_values(grid), scaled * steps, rtol=3e-7)


def test_steps_are_the_same_bits_everywhere() -> None:
    exponents = np.array([-240, -3, -1, 0, 1, 2, 7, 200])
    bits = [0x03800000, 0x3EB504F3, 0x3F3504F3, 0x3F800000, 0x3FB504F3, 0x40000000, 0x413504F3, 0x71800000]
    assert steps_of(exponents).view(np.uint32).tolist() == bits


def test_e8p_is_the_lattice_it_says() -> None:
    index = np.arange(256, dtype=np.uint8).repeat(256)
    signs = np.tile(np.arange(256, dtype=np.uint8), 256)
    points = lattice.decode_e8p(index, signs)
    assert len(np.unique(points, axis=0)) == 1 << 16
    shifted = points - np.where(signs >> 7, 0.25, -0.25)[:, None]
    assert (shifted.sum(1) % 2 == 0).all()
    assert (shifted % 1 == 0.5).all()
    targets = np.random.default_rng(1).normal(size=(40, 8))
    nearest = lattice.decode_e8p(*e8.nearest_e8p(targets))
    best = np.square(targets[:, None, :] - points[None, ::1, :].astype(np.float32)).sum(2).min(1)
    np.testing.assert_allclose(np.square(targets - nearest).sum(1), best, rtol=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.094), (3, 0.031), (4, 0.0093)])
def test_lattice_error_on_gaussian_weights(bits: int, error: float) -> None:
    targets = np.random.default_rng(0).normal(size=(4000, 8)) * e8._SCALES[bits]
    points = e8.quantize_points(targets, bits)[1]
    assert np.square(points - targets).mean() / e8._SCALES[bits] ** 2 < error


@pytest.mark.parametrize("size", [1, 2, 8, 24, 172, 257])
def test_mixing_is_orthonormal_and_undone(size: int) -> None:
    values = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    mixed = lattice.mix(values)
    np.testing.assert_allclose(lattice.mix(mixed, inverse=True), values, atol=2e-6)
    np.testing.assert_allclose(np.square(mixed).sum(1), np.square(values).sum(1), rtol=1e-5)


def test_choose_rate_finds_the_minimum_and_keeps_its_record() -> None:
    asked: list[float] = []

    def evaluate(rate: float) -> float:
        asked.append(rate)
        return (np.log(rate) - np.log(2e-3)) ** 2

    search = choose_rate(evaluate, 1e-4, 1e-1, tolerance=0.02, max_tries=40)
    assert search.rate == pytest.approx(2e-3, rel=0.02)
    assert [rate for rate, _ in search.tried] == asked
    assert search.value == min(value for _, value in search.tried)
    with pytest.raises(InputError, match="finite"):
        choose_rate(lambda rate: float("nan"), 1, 2)
    with pytest.raises(InputError, match="low < high"):
        choose_rate(evaluate, 2, 1)


def test_modules_unknown_to_calibration_still_get_a_step() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.mixer = nn.Parameter(torch.randn(6, 3, 9, generator=torch.Generator().manual_seed(0)))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bld,dkv->blv", self.embed(ids), self.mixer)

    model = Odd()
    calibration = collect_calibration(model, [torch.randint(0, 9, (4, 8))])
    coded = encode_artifact({}, dict(model.state_dict()), KfacSettings(rate=0.05), calibration=calibration)
    error = decode_artifact(coded).tensors["mixer"] - model.mixer
    assert 0 < error.abs().max() < 1


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("shrink", [0, 9])
@pytest.mark.parametrize(("with_rows", "with_columns"), [(True, True), (True, False), (False, True), (False, False)])
def test_grid_values_are_one_product_each(dtype: type, shrink: int, with_rows: bool, with_columns: bool) -> None:
    draw = np.random.default_rng(0)
    limit = min(np.iinfo(dtype).max, (1 << 30) - 1)
    integers = draw.integers(-limit, limit, (40, 30)).astype(dtype)
    integers[:, :5] = draw.integers(-3, 4, (40, 5))
    rows = draw.integers(-9, 9, 40) if with_rows else None
    columns = draw.integers(-9, 9, 30) if with_columns else None
    exponents = -7 - 12 + (0 if rows is None else rows[:, None]) + (0 if columns is None else columns[None, :])
    wide = integers.astype(np.int64)
    expected = (64 * wide - np.sign(wide) * shrink).astype(np.float32) * steps_of(np.broadcast_to(exponents, (40, 30)))
    assert np.array_equal(grid_values(Grid(integers, -7, rows, columns, shrink)), expected)
