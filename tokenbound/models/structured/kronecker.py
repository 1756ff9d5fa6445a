"""Linear layers whose matrix is a sum of Kronecker products.

    W = sum_k A_k (x) B_k,   A_k [m1, n1], B_k [m2, n2],   m1 m2 = outputs, n1 n2 = inputs

m1 is the largest divisor of the outputs that is at most their square root, n1 of the inputs likewise. Parameters:
K (m1 n1 + m2 n2). With K = min(m1 n1, m2 n2) terms every matrix can be written so (Van Loan and Pitsianis 1993): K is
the rank of a rearrangement of W. In language models: Edalati et al. 2021 (arXiv 2110.08152); in bounds: Lotfi et al.
2024 (arXiv 2407.18158), with K = 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.config.family import KroneckerFamily
from tokenbound.errors import InputError
from tokenbound.models.structured.layers import layer_shape, linear_layers, new_parameter, replace_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split_size(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the smaller first.

    >>> split_size(384), split_size(7)
    ((16, 24), (1, 7))
    """
    small = next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)
    return small, size // small


class KroneckerLinear(nn.Module):
    """x -> W x + b without ever making W: two matrix products for all terms together, and nothing is rearranged.

    Cost for each token: K (n1 n2 m2 + n1 m1 m2) multiplications in place of n1 n2 m1 m2.
    """

    def __init__(self, layer: nn.Module, terms: int, name: str = "layer") -> None:
        """Take the place of a linear layer; its bias is kept.

        Raises:
            InputError: a side of the layer has no divisors, or there are more terms than the rank of any matrix.
        """
        super().__init__()
        self.outputs, self.inputs = layer_shape(layer)
        (m1, m2), (n1, n2) = split_size(self.outputs), split_size(self.inputs)
        if 1 in (m1, n1):
            raise InputError(
                f"family: {name} [{self.outputs}, {self.inputs}] has a prime side and no Kronecker factors; leave it "
                "out of family.layers"
            )
        if terms > (most := min(m1 * n1, m2 * n2)):
            raise InputError(f"family.terms {terms}: {name} [{self.outputs}, {self.inputs}] has rank {most} at most")
        self.left = new_parameter(layer, terms, m1, n1, std=(n1 * terms) ** -0.5)
        self.right = new_parameter(layer, terms, m2, n2, std=n2**-0.5)
        self.bias: Any = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        terms, m1, n1 = self.left.shape
        _, m2, n2 = self.right.shape
        inner = x.reshape(-1, n2) @ self.right.reshape(terms * m2, n2).T  # [T*n1, K*m2]
        inner = inner.view(-1, n1 * terms, m2)  # [T, n1*K, m2]
        left = self.left.permute(1, 2, 0).reshape(m1, n1 * terms)
        out = torch.bmm(left.expand(len(inner), -1, -1), inner)  # [T, m1, m2]
        out = out.view(*x.shape[:-1], self.outputs)
        return out if self.bias is None else out + self.bias

    def dense_matrix(self) -> torch.Tensor:
        """W [outputs, inputs], for checking."""
        return torch.stack([torch.kron(a, b) for a, b in zip(self.left, self.right, strict=True)]).sum(0)


def attach_kronecker(model: PreTrainedModel, family: KroneckerFamily) -> None:
    """Replace the chosen linear layers of a model, in place.

    Raises:
        InputError: a layer that does not fit; by name.
    """
    layers = linear_layers(model, family.layers)
    replace_layers(model, {name: KroneckerLinear(layer, family.terms, name) for name, layer in layers.items()})
