"""Training a smoothing head on the bound itself.

Of tokens whose hidden states, losses and entropies are known, the bounds with an alpha column (see
`tokenbound.bounds.exact`) are smooth functions of the head. Freedman's is minimised over head, forecast (a polynomial
of the entropy) and lambda together,

    mean(Y_i - ln(1 + lambda (Y_i - l_i)) / lambda) + kappa / (lambda m),   lambda (B - y0') = t < 1

and azuma's, whose best lambda is known, over the head: mean(l_i) + sqrt(mean(D_i^2) kappa / (2 m)). Both for each of
some lower limits alpha_min. What comes out is only a head: the bounds are later evaluated as of any model, and tuned
anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tokenbound.bounds.constants import MAX_DEGREE
from tokenbound.models.smoothing_head import SmoothingHead, squash

Objective = Literal["freedman", "azuma"]
"""Which bound a head is trained on."""

ALPHA_MINS = (2.0**-3, 2.0**-4, 2.0**-5, 0.75 * 2.0**-5, 2.0**-6, 2.0**-7, 2.0**-9, 2.0**-11)
"""Lower limits that are tried; the bound's range grows by an octave from each to the next, as many bits."""
STEPS = 60
"""Of L-BFGS: the problem is smooth and has some hundred unknowns."""
START = -2.0
"""Bias at the start: an eighth of the way from alpha_min to 1/2."""


@dataclass(frozen=True)
class SmoothingTask:
    """Known tokens, and the corpus that they stand for."""

    hidden: torch.Tensor
    """[N, d] last hidden states."""
    nll: torch.Tensor
    """[N] nats."""
    entropy: torch.Tensor
    """[N] nats."""
    vocab_size: int
    """V."""
    kappa_nats: float
    """What the artifact costs, tuning and confidence included."""
    num_tokens: int
    """m of the corpus."""


def train_head(
    task: SmoothingTask, objective: Objective, *, alpha_mins: Sequence[float] = ALPHA_MINS, steps: int = STEPS
) -> SmoothingHead:
    """The head with the smallest bound, over the given lower limits.

    Args:
        task: what is known.
        objective: which bound.
        alpha_mins: lower limits to try, of the package's grid.
        steps: of L-BFGS on all tokens at once, for each.
    """
    trained = [_train_one(task, objective, alpha_min, steps) for alpha_min in alpha_mins]
    return min(trained, key=lambda found: found[0])[1]


def _train_one(task: SmoothingTask, objective: Objective, alpha_min: float, steps: int) -> tuple[float, SmoothingHead]:
    """The bound in bits and the head that reaches it, at one lower limit."""
    scale = task.hidden.std(0).clamp(min=1e-6)
    inputs = (task.hidden / scale).double()
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.full((), START, dtype=torch.float64, requires_grad=True)
    bound = FreedmanObjective(task, alpha_min) if objective == "freedman" else AzumaObjective(task)
    free = [weight, bias, *bound.double().parameters()]
    optimizer: Any = torch.optim.LBFGS(free, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = bound(squash(inputs @ weight + bias, alpha_min))
        torch.autograd.backward(value)
        return value.detach()

    optimizer.step(closure)
    reached = float(closure())
    return reached, SmoothingHead((weight.detach() / scale)[None], bias.detach()[None], alpha_min).requires_grad_(False)


class FreedmanObjective(nn.Module):
    """The freedman bound of the tokens in bits, with its forecast and its stake."""

    def __init__(self, task: SmoothingTask, alpha_min: float) -> None:
        """Begin with a forecast of half a bit and the entropy.

        Args:
            task: what is known of the tokens.
            alpha_min: lower limit of the alphas.
        """
        super().__init__()
        self.task, size = task, task.vocab_size
        self.floor = -math.log2(1 - alpha_min + alpha_min / size)
        self.distance = math.log2(size / alpha_min) - self.floor
        self.powers = (task.entropy.double() / math.log(size))[:, None] ** torch.arange(MAX_DEGREE + 1)
        start = torch.zeros(MAX_DEGREE + 1)
        start[:2] = torch.tensor([0.5, math.log2(size)])
        self.coefficients, self.stake = nn.Parameter(start.double()), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, alpha: torch.Tensor) -> torch.Tensor:
        """Alphas [N] to the bound."""
        loss, low, high = smoothed(self.task, alpha)
        forecast = torch.minimum(torch.maximum(self.powers @ self.coefficients, low), high)
        stake = torch.sigmoid(self.stake) / self.distance
        value = forecast - torch.log1p(stake * (forecast - loss)) / stake
        return value.mean() + self.task.kappa_nats / (stake * self.task.num_tokens)


class AzumaObjective(nn.Module):
    """The azuma bound with predictable ranges in bits, at its best lambda."""

    def __init__(self, task: SmoothingTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, alpha: torch.Tensor) -> torch.Tensor:
        """Alphas [N] to the bound."""
        loss, low, high = smoothed(self.task, alpha)
        rate = self.task.kappa_nats / (2 * self.task.num_tokens)
        return loss.mean() + ((high - low).square().mean() * rate).sqrt()


def smoothed(task: SmoothingTask, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [N] in bits at these alphas, and their intervals."""
    size = task.vocab_size
    loss = -torch.log2((1 - alpha) * torch.exp(-task.nll.double().clamp(min=0)) + alpha / size)
    return loss, -torch.log2(1 - alpha + alpha / size), torch.log2(size / alpha)
