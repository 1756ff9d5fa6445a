"""A head learns where the model errs, and its objectives are the bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenbound.training.smoothing_fit import AzumaObjective, FreedmanObjective, SmoothingTask, train_head

SIZE = 100


@pytest.fixture
def task() -> SmoothingTask:
    """Tokens of two kinds that a hidden coordinate tells apart: certain ones, and ones the model has no idea of."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 6, generator=generator)
    hopeless = hidden[:, 2] > 1
    nll = torch.where(hopeless, 9.0, 0.1) + 0.05 * torch.rand(4000, generator=generator)
    entropy = torch.full((4000,), 0.5)
    return SmoothingTask(hidden, nll, entropy, vocab_size=SIZE, kappa_nats=50.0, num_tokens=4000)


def test_a_head_smooths_where_the_model_errs(task: SmoothingTask) -> None:
    head = train_head(task, "azuma", alpha_mins=(2.0**-8,))
    alphas = head(task.hidden)
    hopeless = task.hidden[:, 2] > 1
    assert alphas[hopeless].mean() > 2.5 * alphas[~hopeless].mean()
    constants = [AzumaObjective(task)(torch.full((4000,), 2.0**-k)) for k in range(1, 12)]
    assert AzumaObjective(task)(alphas) < min(constants) - 0.1


def test_the_objectives_are_the_bounds(task: SmoothingTask) -> None:
    alpha = torch.linspace(0.02, 0.4, 4000)
    weights, nll = alpha.double().numpy(), task.nll.double().numpy()
    loss = -np.log2((1 - weights) * np.exp(-nll) + weights / SIZE)
    low, high = -np.log2(1 - weights + weights / SIZE), np.log2(SIZE / weights)
    lam = math.sqrt(8 * 50 / (4000 * np.mean((high - low) ** 2)))
    azuma = loss.mean() + lam * np.mean((high - low) ** 2) / 8 + 50 / (lam * 4000)
    assert AzumaObjective(task)(alpha).item() == pytest.approx(azuma, rel=1e-5)
    objective = FreedmanObjective(task, 2.0**-6)
    forecast = np.clip(0.5 + 0.5 / math.log(2), low, high)
    widest = math.log2(SIZE * 64) + math.log2(1 - 2.0**-6 + 2.0**-6 / SIZE)
    lam = 0.5 / widest
    freedman = np.mean(forecast - np.log1p(lam * (forecast - loss)) / lam) + 50 / (lam * 4000)
    assert objective(alpha).item() == pytest.approx(freedman, rel=1e-5)
