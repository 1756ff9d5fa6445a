"""Training on the grid: every step sees rounded weights, and pays for their code.

    minimise   loss(q(w) s) + weight * bits(q(w)),    q(w) = round(w / s),

by the straight-through estimator: rounding counts as the identity in the backward pass (Bengio et al. 2013, arXiv
1308.3432). Steps s = sqrt(2)^(base + row + column) are trained too, their exponents rounded in the same way (Esser et
al. 2020, arXiv 1902.08153, for the gradient of a step). `bits` is what the artifact's coder would need, smoothly: a
two-sided geometric law for each integer, its mean magnitude the product of its row's and its column's (the coder's
contexts follow the same two means). With the weight at the slope of a bound in the code length, this is training on
the bound itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tokenbound.compression.codecs.uniform import MAX_EXPONENT, MIN_EXPONENT, Grid

LEAST_MEAN = 2.0**-8
"""Mean magnitude below which a row counts as this: the coder's contexts end there."""


def round_through(values: torch.Tensor) -> torch.Tensor:
    """Rounded forward, the identity backward."""
    return values + (values.round() - values).detach()


def geometric_bits(integers: torch.Tensor) -> torch.Tensor:
    """Code length of a matrix or vector of integers in bits, differentiable in their magnitudes.

    Under P(q) = (1 - r)/(1 + r) r^|q| the mean magnitude is 2r/(1 - r^2). The means are fitted, so by the envelope
    theorem they need no gradient of their own.
    """
    sizes = integers.abs()
    with torch.no_grad():
        mean = sizes.mean().clamp(min=LEAST_MEAN)
        if sizes.ndim == 2:
            mean = sizes.mean(1, keepdim=True) * sizes.mean(0, keepdim=True) / mean
        mean = mean.clamp(min=LEAST_MEAN)
        ratio = ((1 + mean * mean).sqrt() - 1) / mean
    return (torch.log2((1 + ratio) / (1 - ratio)) - sizes * torch.log2(ratio)).sum()


class TrainedGrid(nn.Module):
    """The steps of one tensor, as they are trained."""

    def __init__(self, grid: Grid) -> None:
        """Start from a grid's exponents; its integers are not used."""
        super().__init__()
        self.base = nn.Parameter(torch.tensor(float(grid.base)))
        rows, columns = (
            None if part is None else nn.Parameter(torch.from_numpy(part).float()) for part in (grid.rows, grid.columns)
        )
        self.rows, self.columns = rows, columns

    def exponents(self) -> torch.Tensor:
        """Half octaves of the steps; broadcasts against the tensor."""
        total = round_through(self.base)
        if self.rows is not None:
            total = total + round_through(self.rows)[:, None]
        if self.columns is not None:
            total = total + round_through(self.columns)
        return total.clamp(MIN_EXPONENT, MAX_EXPONENT)

    def forward(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounded weights, and their code length in bits."""
        matrix = weights.flatten(1) if weights.ndim > 2 else weights
        steps = torch.exp2(self.exponents() / 2)
        integers = round_through(matrix / steps)
        return (integers * steps).view_as(weights), geometric_bits(integers)

    @torch.no_grad()
    def finish(self, weights: torch.Tensor) -> Grid:
        """The grid that a tensor has now."""
        matrix = weights.flatten(1) if weights.ndim > 2 else weights
        integers = (matrix / torch.exp2(self.exponents() / 2)).round()
        rows, columns = (
            None if part is None else part.round().to(torch.int64).cpu().numpy() for part in (self.rows, self.columns)
        )
        return Grid(integers.to(torch.int32).cpu().numpy(), int(self.base.round()), rows, columns)


@dataclass
class GridOutput:
    """What the training loop needs of a forward pass: logits [B, L, V], and what is added to the mean loss."""

    logits: torch.Tensor
    penalty_nats: torch.Tensor


class GridModel(nn.Module):
    """A causal language model whose parameters are rounded in every forward pass.

    Args:
        model: Called as `model(input_ids=...)`, returning `.logits`.
        grids: By name in the artifact; where the steps of a parameter start. All others are frozen.
        nats_per_bit: What a bit of code costs in mean loss.
        coded: What the artifact calls the parameters; None if it calls them as the model does.
    """

    def __init__(
        self,
        model: nn.Module,
        grids: Mapping[str, Grid],
        nats_per_bit: float,
        coded: Mapping[str, str] | None = None,
    ) -> None:
        """Freeze what has no grid."""
        super().__init__()
        self.model = model
        coded = coded or {name: name for name, _ in model.named_parameters()}
        self.coded = {name: coded[name] for name in sorted(coded) if coded[name] in grids}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.coded)
        self.grids = nn.ModuleList(TrainedGrid(grids[name]) for name in self.coded.values())
        self.nats_per_bit = nats_per_bit

    def forward(self, input_ids: torch.Tensor) -> GridOutput:
        """Ids [B, L] to logits of the rounded model [B, L, V], and the price of its code."""
        rounded = {name: grid(weights) for name, weights, grid in self._trained()}
        tensors = {name: values for name, (values, _) in rounded.items()}
        out = functional_call(self.model, tensors, kwargs={"input_ids": input_ids})
        bits = torch.stack([bits for _, bits in rounded.values()]).sum()
        return GridOutput(out.logits, bits * self.nats_per_bit)

    def finish(self) -> dict[str, Grid]:
        """The grids as trained, by name in the artifact."""
        return {self.coded[name]: grid.finish(weights) for name, weights, grid in self._trained()}

    def _trained(self) -> Iterator[tuple[str, torch.Tensor, Any]]:
        parameters = dict(self.model.named_parameters())
        for name, grid in zip(self.coded, self.grids, strict=True):
            yield name, parameters[name], grid
