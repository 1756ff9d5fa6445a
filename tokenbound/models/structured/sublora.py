"""Low-rank updates in a random subspace (SubLoRA: Lotfi et al. 2023, arXiv 2312.17173).

    theta = theta0 + P w,   W = W0 + (alpha / r) B A,   (A, B) = theta

theta holds all factors; A starts random and B at zero. P is block diagonal, one block for each layer; within a block
every entry of theta is plus or minus one coordinate of w, both at random, and every coordinate stands for as many
entries as any other, to within one. So the columns of P are orthogonal and, within a layer, nearly of one length, and
a product with P costs one pass over theta (one nonzero in each row, as in Uni-LoRA, Li et al. 2025, arXiv 2506.00799;
random subspaces: Li et al. 2018, arXiv 1804.08838). Trained parameters of all updates together: `dimension`, divided
among the layers in proportion to their factors. W0, theta0 and P come from the seed and are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.config.family import SubloraFamily
from tokenbound.errors import InputError
from tokenbound.models.structured.counter import random_groups, random_signs, uniform_weights
from tokenbound.models.structured.layers import is_transposed, layer_shape, linear_layers, replace_layers
from tokenbound.models.structured.lora import Tensors, check_rank, freeze, frozen_matrices, merge_updates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COORDINATES = ".coordinates"


def divide_dimension(layers: Mapping[str, nn.Module], family: SubloraFamily) -> dict[str, int]:
    """Coordinates of each layer: in proportion to its factors, at least one, `dimension` together.

    Raises:
        InputError: the dimension is above the number of factor entries, or below the number of layers.
    """
    sizes = {name: family.rank * sum(layer_shape(layer)) for name, layer in layers.items()}
    total, dimension = sum(sizes.values()), family.dimension
    if not len(sizes) <= dimension <= total:
        raise InputError(
            f"family.dimension {dimension} must lie between the number of layers, {len(sizes)}, and the number of "
            f"factor entries, {total}"
        )
    spare, shares, used, seen = dimension - len(sizes), {}, 0, 0
    for name, size in sizes.items():
        seen += size
        shares[name] = 1 + spare * seen // total - used
        used = spare * seen // total
    return shares


class Projection:
    """theta0 and P of one layer, from the seed and the layer's name."""

    def __init__(self, name: str, shape: tuple[int, int], family: SubloraFamily, dimension: int) -> None:
        self.outputs, self.inputs, self.rank = *shape, family.rank
        count, seed = self.rank * sum(shape), family.seed
        start = uniform_weights(seed, f"{name}.theta0", (self.rank * self.inputs,), float(self.inputs) ** -0.5)
        self.start = torch.zeros(count)
        self.start[: len(start)] = torch.from_numpy(start)
        self.groups = torch.from_numpy(random_groups(seed, f"{name}.groups", count, dimension))
        self.signs = torch.from_numpy(random_signs(seed, f"{name}.signs", count))


def factors_of(theta: torch.Tensor, rank: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, inputs] and B [outputs, rank] out of theta."""
    return theta[: rank * inputs].view(rank, inputs), theta[rank * inputs :].view(-1, rank)


class SubspaceLoraLinear(nn.Module):
    """A frozen linear layer with an update of which only `coordinates` [1, d] is trained."""

    def __init__(self, layer: nn.Module, name: str, family: SubloraFamily, dimension: int) -> None:
        """Take the place of a linear layer; its weight (frozen by the caller) and bias are kept."""
        super().__init__()
        self.weight, self.bias, self.transposed = layer.weight, layer.bias, is_transposed(layer)
        projection = Projection(name, layer_shape(layer), family, dimension)
        self.rank, self.inputs, self.scaling = family.rank, projection.inputs, family.alpha / family.rank
        weight: Any = layer.weight
        self.coordinates = nn.Parameter(torch.zeros(1, dimension, device=weight.device, dtype=weight.dtype))
        self.register_buffer("start", projection.start.to(weight.device), persistent=False)
        self.register_buffer("groups", projection.groups.to(weight.device), persistent=False)
        self.register_buffer("signs", projection.signs.to(weight.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        theta = torch.addcmul(self.start, self.coordinates[0].index_select(0, self.groups), self.signs)  # type: ignore[arg-type]
        first, second = factors_of(theta, self.rank, self.inputs)
        weight: Any = self.weight
        out = nn.functional.linear(x, weight.T if self.transposed else weight, self.bias)  # type: ignore[arg-type]
        return out + (x @ first.T) @ (second.T * self.scaling)


def attach_sublora(model: PreTrainedModel, family: SubloraFamily) -> None:
    """Freeze a model's matrices and give the chosen ones updates in a random subspace, in place.

    Raises:
        InputError: a rank above a layer's dimension, a subspace that does not fit, or an unknown layer.
    """
    layers = linear_layers(model, family.layers)
    check_rank(layers, family.rank)
    shares = divide_dimension(layers, family)
    freeze(model, frozen_matrices(model, layers, others=family.others), family.seed)
    replace_layers(
        model, {name: SubspaceLoraLinear(layer, name, family, shares[name]) for name, layer in layers.items()}
    )


def merge_sublora(blank: PreTrainedModel, family: SubloraFamily, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The plain model's tensors from the trained ones; `blank` gives names and shapes.

    Raises:
        InputError: coordinates are missing or of another number than the family says.
    """
    shares = divide_dimension(linear_layers(blank, family.layers), family)

    def factors(name: str, layer: nn.Module, rest: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        coordinates = rest.pop(name + COORDINATES, None)
        if coordinates is None or coordinates.shape != (1, shares[name]):
            raise InputError(f"the artifact's coordinates of {name!r} are missing or not [1, {shares[name]}]")
        projection = Projection(name, layer_shape(layer), family, shares[name])
        theta = projection.start + coordinates[0].float()[projection.groups] * projection.signs
        return factors_of(theta, family.rank, projection.inputs)

    return merge_updates(blank, family, tensors, factors)
