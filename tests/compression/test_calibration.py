"""Curvature against brute force, and against what quantization really does to a loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenbound.compression.calibration import collect_calibration, merge_calibrations
from tokenbound.errors import InputError


class TinyModel(nn.Module):
    """Embedding, norm-like gain, linear, tied head."""

    def __init__(self, vocabulary: int = 11, width: int = 6, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.cumsum(self.embed(ids), 1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.layer(hidden * self.gain)))


def batches(count: int = 3) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (4, 8), generator=make) for _ in range(count)]


def test_layer_sums_are_those_of_the_definition() -> None:
    model = TinyModel()
    (ids,) = batches(1)
    calibration = collect_calibration(model, [ids])
    hidden = (torch.cumsum(model.embed(ids), 1) / torch.arange(1, 9)[:, None] * model.gain).detach().flatten(0, 1)
    labels = torch.multinomial(
        torch.softmax(model(ids).detach().flatten(0, 1), -1), 1, generator=torch.Generator().manual_seed(0)
    ).squeeze(1)
    out = model.layer(hidden).detach().requires_grad_(True)
    logits = model.head(torch.tanh(out))
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), out)
    sums = calibration.matrices["layer.weight"]
    rows = (grad.square() * hidden.square().sum(1, keepdim=True)).sum(0)
    moment = (hidden * grad.square().sum(1, keepdim=True)).T @ hidden
    torch.testing.assert_close(sums.rows, rows.double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sums.moment, moment.double(), rtol=1e-4, atol=1e-9)
    assert calibration.tokens == sums.seen == 32


def test_trace_of_the_moment_is_the_sum_of_the_rows_also_for_tied_matrices() -> None:
    calibration = collect_calibration(TinyModel(), batches())
    assert set(calibration.matrices) == {"embed.weight", "layer.weight"}
    assert calibration.matrices["embed.weight"].is_embedding
    assert set(calibration.squares) == {"gain", "layer.bias"}
    for sums in calibration.matrices.values():
        assert float(sums.rows.sum()) == pytest.approx(float(sums.moment.trace()), rel=1e-5)


def test_predicted_cost_of_an_error_is_the_true_rise_of_the_expected_loss() -> None:
    """KL(model || perturbed model) against the quadratic form, over many label draws."""
    model = TinyModel(tied=False).double()
    ids = torch.randint(0, 11, (64, 8), generator=torch.Generator().manual_seed(5))
    calibration = merge_calibrations(collect_calibration(model, [ids], seed=seed) for seed in range(20))
    make = torch.Generator().manual_seed(2)
    for name in ("layer.weight", "embed.weight", "head.weight"):
        weight = model.get_parameter(name)
        curvature = calibration.curvature(name)
        assert curvature is not None
        predicted, actual = 0.0, 0.0
        for _ in range(20):
            error = 0.03 * torch.randn(weight.shape, generator=make).double()
            predicted += 0.5 * float(((error @ curvature.moment) * error).sum(1) @ curvature.rows)
            actual += divergence(model, weight, error, ids)
        assert predicted == pytest.approx(actual, rel=0.25), name


def divergence(model: nn.Module, weight: nn.Parameter, error: torch.Tensor, ids: torch.Tensor) -> float:
    with torch.no_grad():
        before = torch.log_softmax(model(ids), -1)
        weight += error
        after = torch.log_softmax(model(ids), -1)
        weight -= error
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_parts_add_up_and_masked_positions_do_not_count() -> None:
    model = TinyModel()
    whole = collect_calibration(model, batches(1))
    twice = merge_calibrations([whole, whole])
    assert twice.tokens == 2 * whole.tokens
    torch.testing.assert_close(twice.matrices["layer.weight"].rows, 2 * whole.matrices["layer.weight"].rows)
    (ids,) = batches(1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :5] = True
    masked = collect_calibration(model, [(ids, mask)])
    other = ids.clone()
    other[:, 5:] = 0
    assert masked.tokens == 20
    torch.testing.assert_close(
        masked.matrices["layer.weight"].moment,
        collect_calibration(model, [(other, mask)]).matrices["layer.weight"].moment,
    )


def test_the_model_is_left_as_it_was() -> None:
    model = TinyModel().train()
    model.gain.requires_grad_(False)
    collect_calibration(model, batches(1), names={"layer.weight"})
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["gain"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_tokens_and_broken_models_are_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        collect_calibration(TinyModel(), [])
    broken = TinyModel()
    with torch.no_grad():
        broken.layer.weight[0, 0] = float("nan")
    with pytest.raises((InputError, RuntimeError)):
        collect_calibration(broken, batches(1))
