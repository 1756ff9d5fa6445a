"""Token-level smoothing: a linear head on the last hidden state predicts how far each prediction is smoothed.

    alpha(x_<i) = alpha_min (alpha_max / alpha_min)^sigmoid(w h_i + b),   alpha_max = 1/2

So alpha lies in [alpha_min, 1/2] whatever the weights are, and depends on the tokens before i alone. The head is Lotfi
et al. 2024's (arXiv 2407.18158, section 4.3), with bounds that do not need the tokens to be independent. Weights and
alpha_min are in the artifact and paid for there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokenbound.bounds.constants import ALPHA_GRID, ALPHA_MAX
from tokenbound.errors import InputError

SMOOTHING = "tokenbound_smoothing"
"""Key of an architecture that says alpha_min; absent for a model without a head."""
WEIGHT, BIAS = f"{SMOOTHING}.weight", f"{SMOOTHING}.bias"


class SmoothingHead(nn.Module):
    """The head, always in float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, alpha_min: float) -> None:
        """Keep the head's numbers.

        Args:
            weight: [1, d].
            bias: [1].
            alpha_min: a member of the package's grid of smoothing weights, so exact in float32.
        """
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        self.alpha_min = alpha_min

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [N, d] to alphas [N], float32 in [alpha_min, 1/2]."""
        return squash(hidden.float() @ self.weight[0] + self.bias, self.alpha_min)


def squash(values: torch.Tensor, alpha_min: float) -> torch.Tensor:
    """Any numbers to alphas in [alpha_min, 1/2], evenly on a logarithmic scale."""
    octaves = math.log2(ALPHA_MAX / alpha_min)
    return (alpha_min * torch.exp2(values.sigmoid() * octaves)).clamp(alpha_min, ALPHA_MAX)


def alpha_min_of(architecture: Mapping[str, Any]) -> float | None:
    """The lower limit of a smoothing head's alphas; None for a model without one.

    Raises:
        InputError: it is not in the package's grid.
    """
    if SMOOTHING not in architecture:
        return None
    settings = architecture[SMOOTHING]
    found = settings.get("alpha_min") if isinstance(settings, Mapping) else None
    if found not in ALPHA_GRID:
        raise InputError(f"{SMOOTHING}.alpha_min {found!r} of the architecture is not in the grid of this version")
    return float(found)


def take_head(
    architecture: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], SmoothingHead | None]:
    """A model's own architecture and tensors, and its smoothing head if it has one.

    Raises:
        InputError: the head's tensors are missing or of another shape.
    """
    alpha_min = alpha_min_of(architecture)
    if alpha_min is None:
        return dict(architecture), dict(tensors), None
    weight, bias = tensors.get(WEIGHT), tensors.get(BIAS)
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        raise InputError(f"the architecture has a smoothing head, but its tensors {WEIGHT} and {BIAS} are not there")
    plain = {name: tensor for name, tensor in tensors.items() if name not in (WEIGHT, BIAS)}
    return without_head(architecture), plain, SmoothingHead(weight, bias, alpha_min)


def without_head(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture of the model alone."""
    return {key: value for key, value in architecture.items() if key != SMOOTHING}
