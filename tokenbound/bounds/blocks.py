"""Losses in blocks: what an evaluator sees while it passes over every token, and what it gives back.

A block is small enough for the cache. All lines are evaluated on it before the next is loaded, so that the exponential
of the losses and the columns are read once for all of them, into buffers that every block uses again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.columns import Floats, check_entropy, check_length
from tokenbound.bounds.constants import BLOCK_TOKENS, LN2, PRODUCT_GROUP
from tokenbound.bounds.smoothing import check_alpha, check_nll
from tokenbound.errors import InputError


class TokenSums(NamedTuple):
    """Sums over the tokens of a block, for one line."""

    value: float
    """Of z_i, which the bound averages."""
    loss: float
    """Of the smoothed losses l_i in bits, or of the errors e_i."""
    square: float = 0.0
    """Of (Y_i - l_i)^2 in bits squared, where there is a forecast Y_i."""


class Evaluator(Protocol):
    """One line at its grid point, evaluated block by block."""

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """Sums over a block.

        Args:
            block: the losses.
            per_token: where given, [T] room for every token's z_i: a sampled run needs the sums of its windows.
        """

    def worst(self) -> TokenSums:
        """What a token without a finite loss counts as: the largest values that any token can have."""


class Unavailable:
    """Evaluates a line that cannot be computed; its sums are zero and never read."""

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """Nothing."""
        if per_token is not None:
            per_token.fill(0.0)
        return self.worst()

    def worst(self) -> TokenSums:
        """Nothing."""
        return TokenSums(0.0, 0.0)


@dataclass(frozen=True)
class Columns:
    """The checked columns of some losses, [T] each."""

    nll: NDArray[np.floating]
    entropy: NDArray[np.floating] | None
    rank: NDArray[np.integer] | None
    alpha: Floats | None
    clip: bool
    """Whether any loss lies in [-1e-5, 0) and counts as 0."""

    @classmethod
    def checked(
        cls, nll: ArrayLike, entropy: ArrayLike | None, rank: ArrayLike | None, alpha: ArrayLike | None
    ) -> Columns:
        """Columns of one length with finite values.

        Raises:
            InputError: they are not.
        """
        losses = check_nll(nll)
        size = losses.size
        return cls(
            losses,
            None if entropy is None else check_entropy(entropy, size),
            None if rank is None else check_length(np.asarray(rank), size, "rank"),
            None if alpha is None else check_alpha(check_length(np.asarray(alpha), size, "alpha")),
            clip=bool(size and losses.min() < 0),
        )

    @property
    def size(self) -> int:
        """T."""
        return int(self.nll.size)


class Block:
    """One block of losses. What an evaluator writes into `scratch` lasts until the next evaluator runs."""

    def __init__(self) -> None:
        """Buffers, used again by every block that is loaded."""
        self._likelihood, self._entropy_bits = np.empty(BLOCK_TOKENS), np.empty(BLOCK_TOKENS)
        self._scratch = [np.empty(BLOCK_TOKENS) for _ in range(3)]
        self.size = 0
        self.nll_sum = 0.0

    def load(self, columns: Columns, start: int) -> None:
        """Take the tokens from ``start`` on.

        Sets:
            likelihood: [T] exp(-nll).
            entropy_bits: [T] predictive entropies, or None.
            rank: [T] ranks, or None.
            alpha: [T] weights of a smoothing head, or None.
            scratch: three [T] buffers of an evaluator's own.
            nll_sum: summed nll in nats, unclipped.
        """
        nll = columns.nll[start : start + BLOCK_TOKENS]
        self.size = nll.size
        self.likelihood = self._likelihood[: self.size]
        np.negative(nll, out=self.likelihood)
        self.nll_sum = -float(self.likelihood.sum())
        if columns.clip:
            np.minimum(self.likelihood, 0.0, out=self.likelihood)
        np.exp(self.likelihood, out=self.likelihood)
        self.entropy_bits: Floats | None = None
        if columns.entropy is not None:
            self.entropy_bits = self._entropy_bits[: self.size]
            entropy = columns.entropy[start : start + self.size]
            np.multiply(entropy, 1 / LN2, out=self.entropy_bits, dtype=np.float64)
        self.rank = None if columns.rank is None else columns.rank[start : start + self.size]
        self.alpha = None if columns.alpha is None else columns.alpha[start : start + self.size]
        self.scratch = tuple(buffer[: self.size] for buffer in self._scratch)

    def head_alphas(self, alpha_min: float) -> Floats:
        """The weights of the model's smoothing head, none below ``alpha_min``.

        Raises:
            InputError: the losses have none, or one lies below.
        """
        if self.alpha is None:
            raise InputError("this model has a smoothing head: its `alpha` column is needed")
        if float(self.alpha.min()) < alpha_min:
            raise InputError(
                f"an alpha of {self.alpha.min()} lies below alpha_min {alpha_min}, which the bound is built on"
            )
        return self.alpha


def log_of_product(factors: Floats) -> float:
    """Ln of the product of positive factors near 1, one logarithm per group of factors."""
    grouped = factors.size - factors.size % PRODUCT_GROUP
    products = np.multiply.reduce(factors[:grouped].reshape(PRODUCT_GROUP, -1), axis=0)
    np.log(products, out=products)
    return float(products.sum()) + float(np.log(factors[grouped:]).sum())


def required(value: float | None, name: str) -> float:
    """A field of a tuning that its line needs.

    Raises:
        InputError: it is missing.
    """
    if value is None:
        raise InputError(f"the tuning lacks `{name}`")
    return value
