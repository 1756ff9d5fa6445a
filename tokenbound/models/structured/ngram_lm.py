"""The k-th order Markov model: back-off n-grams as a causal language model, for comparison with neural ones.

See `tokenbound.compression.ngram_codec` for the tree and `tokenbound.training.ngram_fit` for how it is fitted. A window
of tokens is looked up at once: each position goes down the tree from the empty context, one older token at a time; then
the distributions are mixed on the way back up, from the shortest context to the longest that the tree holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tokenbound.compression.ngram_codec import NgramTree, Order, TensorSource, read_tree
from tokenbound.errors import InputError

NUMBERS = "ngrams"
"""Name of the tensor that holds the tree."""


class MarkovConfig:
    """What the scorer asks of a model's config."""

    model_type = "markov"

    def __init__(self, vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order

    def get_text_config(self) -> MarkovConfig:
        """Itself: there is no other part."""
        return self


class MarkovModel(nn.Module):
    """Logits are log-probabilities, [B, L] ids to [B, L, V]. No positions limit its windows."""

    def __init__(self, tree: NgramTree) -> None:
        """Turn levels into shares of probability.

        Args:
            tree: contexts of length 0 .. order.
        """
        super().__init__()
        self.config = MarkovConfig(tree.vocab_size, len(tree.orders) - 1)
        for length, order in enumerate(tree.orders):
            self._register(length, order, tree.vocab_size)
        uniform = torch.full((1, tree.vocab_size), 1 / tree.vocab_size)
        self.register_buffer("root", self._mix(0, uniform, torch.zeros(1, dtype=torch.int64)))
        self.embedding = nn.Embedding(tree.vocab_size, 1, _weight=self.root.T.clone())  # type: ignore[operator]
        self.embedding.requires_grad_(False)

    def _register(self, length: int, order: Order, vocab_size: int) -> None:
        weights = 2.0 ** (torch.from_numpy(order.level).double() / 2)
        owners = torch.from_numpy(order.owners())
        escapes = 2.0 ** (torch.from_numpy(order.escape).double() / 2)
        totals = escapes.index_add(0, owners, weights)
        values = {
            "keys": torch.from_numpy(order.keys(vocab_size)),
            "starts": torch.from_numpy(order.starts),
            "symbols": torch.from_numpy(order.entry),
            "shares": (weights / totals[owners]).float(),
            "escapes": (escapes / totals).float(),
        }
        for name, value in values.items():
            self.register_buffer(f"{name}_{length}", value, persistent=False)

    def _at(self, name: str, length: int) -> torch.Tensor:
        found: torch.Tensor = getattr(self, f"{name}_{length}")
        return found

    def get_input_embeddings(self) -> nn.Embedding:
        """A stand-in with a row for each id: its unigram probability."""
        return self.embedding

    def get_output_embeddings(self) -> None:
        """There is no output matrix: the logits are the model's own."""

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Log-probabilities of the token behind each position, float32 [B, L, V]."""
        mixed = self.root.expand(input_ids.numel(), -1).clone()  # type: ignore[operator]
        contexts = torch.zeros_like(input_ids)
        for length in range(1, self.config.order + 1):
            contexts = self._lengthen(contexts, input_ids, length)
            rows = (contexts.flatten() >= 0).nonzero().squeeze(1)
            mixed[rows] = self._mix(length, mixed[rows], contexts.flatten()[rows])
        return SimpleNamespace(logits=mixed.log_().view(*input_ids.shape, -1))

    def _lengthen(self, contexts: torch.Tensor, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Contexts [B, L] one token longer; -1 where the tree or the window has none."""
        keys = self._at("keys", length)
        older = torch.roll(ids, length - 1, dims=1)
        wanted = contexts * self.config.vocab_size + older
        if not len(keys):
            return torch.full_like(contexts, -1)
        places = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        known = (keys[places] == wanted) & (contexts >= 0)
        known[:, : length - 1] = False
        return torch.where(known, places, -1)

    def _mix(self, length: int, shorter: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """Distributions [N, V] of contexts [N], from those of the contexts one token shorter."""
        starts = self._at("starts", length)
        first, counts = starts[contexts], starts[contexts + 1] - starts[contexts]
        mixed = shorter * self._at("escapes", length)[contexts].unsqueeze(1)
        rows = torch.repeat_interleave(torch.arange(len(contexts), device=contexts.device), counts)
        within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        places = first[rows] + within
        mixed[rows, self._at("symbols", length)[places]] += self._at("shares", length)[places]
        return mixed


def decode_markov(architecture: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> MarkovModel:
    """The model that an artifact holds.

    Raises:
        InputError: other tensors than the tree's, or a tree of another vocabulary or order than the architecture's.
    """
    if set(tensors) != {NUMBERS}:
        raise InputError(f"a markov artifact holds the one tensor {NUMBERS!r}, this one {sorted(tensors)[:5]}")
    source = TensorSource(tensors[NUMBERS].numpy())
    tree = read_tree(source)
    source.finish()
    if tree.vocab_size != architecture.get("vocab_size"):
        raise InputError(f"the tree has {tree.vocab_size} ids, the architecture {architecture.get('vocab_size')}")
    return MarkovModel(tree)
