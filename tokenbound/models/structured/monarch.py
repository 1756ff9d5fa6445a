"""Linear layers whose matrix is a Monarch matrix (Dao et al. 2022, arXiv 2204.00595, section 3), also rectangular.

    W = P' L P R,   R = diag(R_1 .. R_k), R_i [q, n/k],   L = diag(L_1 .. L_k), L_j [m/k, q],   q = min(m, n)/k

for m outputs, n inputs and k blocks. P sends entry r*k + j of its input to entry r of block j, so that every block of
L sees every block of R; P' sends entry i of block j to output i*k + j. Parameters: q (m + n) = min(m, n) (m + n)/k,
for a square matrix and k = sqrt(n) blocks 2 n^1.5. In bounds: Lotfi et al. 2024 (arXiv 2407.18158).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.config.family import MonarchFamily
from tokenbound.errors import InputError
from tokenbound.models.structured.layers import layer_shape, linear_layers, new_parameter, replace_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MonarchLinear(nn.Module):
    """x -> W x + b as two batched matrix products, one block each."""

    def __init__(self, layer: nn.Module, blocks: int, name: str = "layer") -> None:
        """Take the place of a linear layer; its bias is kept.

        Raises:
            InputError: the blocks do not divide both sides, or are so many that some inputs reach no output.
        """
        super().__init__()
        self.outputs, self.inputs = layer_shape(layer)
        if self.outputs % blocks or self.inputs % blocks:
            raise InputError(
                f"family.blocks {blocks} does not divide both sides of {name} [{self.outputs}, {self.inputs}]; choose "
                "a common divisor"
            )
        middle = min(self.outputs, self.inputs) // blocks
        if blocks > middle:
            raise InputError(
                f"family.blocks {blocks} is more than the root of the smaller side of {name} "
                f"[{self.outputs}, {self.inputs}]: some outputs would not depend on some inputs"
            )
        self.first = new_parameter(layer, blocks, middle, self.inputs // blocks, std=(blocks / self.inputs) ** 0.5)
        self.second = new_parameter(layer, blocks, self.outputs // blocks, middle, std=middle**-0.5)
        self.bias: Any = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        blocks, middle, width = self.first.shape
        parts = x.reshape(-1, blocks, width).transpose(0, 1)  # [k, T, n/k]
        inner = torch.bmm(parts, self.first.transpose(1, 2)).transpose(0, 1)  # [T, k, q]
        inner = inner.reshape(-1, middle, blocks).permute(2, 0, 1).contiguous()  # [k, T, q]
        out = torch.bmm(inner, self.second.transpose(1, 2))  # [k, T, m/k]
        if out.requires_grad:  # its gradient goes into two products, which would each make a copy
            out.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        out = out.permute(1, 2, 0).reshape(*x.shape[:-1], self.outputs)
        return out if self.bias is None else out + self.bias

    def dense_matrix(self) -> torch.Tensor:
        """W [outputs, inputs], from the definition and not from `forward`, for checking."""
        blocks, middle, _ = self.first.shape
        block_diag: Any = torch.block_diag
        right, left = block_diag(*self.first), block_diag(*self.second)
        shuffle = torch.arange(blocks * middle).view(middle, blocks).T.reshape(-1)
        rows = torch.arange(self.outputs).view(blocks, -1).T.reshape(-1)
        matrix: torch.Tensor = (left @ right[shuffle])[rows]
        return matrix


def attach_monarch(model: PreTrainedModel, family: MonarchFamily) -> None:
    """Replace the chosen linear layers of a model, in place.

    Raises:
        InputError: a layer that does not fit; by name.
    """
    layers = linear_layers(model, family.layers)
    replace_layers(model, {name: MonarchLinear(layer, family.blocks, name) for name, layer in layers.items()})
