"""The binary decisions of each token from one pass over its probabilities: log-odds, levels, cells.

Shape legend: R rows, V vocabulary, B blocks of `BLOCK_IDS` ids, D decisions above the blocks, J = D + 4 decisions.

A head has exp(logit - max) of every id in the cache when it sums them. The blocks' sums are taken there, at one more
read; the masses of all ranges follow for a whole chunk, from the leaves to the root. Nothing is subtracted, so a small
mass keeps all its digits, and the order of the sums depends neither on the target nor on other rows: 16 neighbours as
torch adds them, then left child plus right; inside the target's block pairs, fours, eights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np
import torch

from tokenbound.bounds.decisions import (
    BLOCK_DECISIONS,
    BLOCK_IDS,
    LEVEL_STEP,
    LEVELS,
    MAX_LEVEL,
    DecisionTree,
)

_HALVES = (8, 4, 2, 1)
"""Ids on either side of the decisions inside a block."""


@dataclass(frozen=True, eq=False)
class TreeMasses:
    """A decision tree's tables on a device; takes probabilities apart into decisions."""

    tree: DecisionTree
    merges: tuple[tuple[slice, torch.Tensor, torch.Tensor], ...]
    """By height: where the masses of these nodes go, and the numbers of their left and right children. Nodes are
    numbered anew, so that those of one height lie together."""
    left: torch.Tensor
    """[B, D] left children of the nodes on the way to each block; 0 behind the last."""
    right: torch.Tensor
    """[B, D] right children."""
    inner_left: torch.Tensor
    """[16, 4] left children of the nodes on the way to each place of a block, among its 2 + 4 + 8 + 16 ranges."""
    inner_right: torch.Tensor
    """[16, 4] right children."""
    first_cell: torch.Tensor
    """int16 [V, J] the cell of each decision of each id at level 0; -1 where there is none."""

    @property
    def num_decisions(self) -> int:
        """J."""
        return self.first_cell.shape[1]

    def sum_blocks(self, weights_RV: torch.Tensor, out: torch.Tensor) -> None:
        """Write sums over 16 ids into [R, B]."""
        rows, size = weights_RV.shape
        whole = size // BLOCK_IDS
        torch.sum(weights_RV[:, : whole * BLOCK_IDS].view(rows, whole, BLOCK_IDS), -1, out=out[:, :whole])
        if size % BLOCK_IDS:
            torch.sum(weights_RV[:, whole * BLOCK_IDS :], 1, out=out[:, whole])

    def target_block(self, weights_RV: torch.Tensor, targets: torch.Tensor, *, fill: float = 0.0) -> torch.Tensor:
        """[R, 16] values in the block of each target; `fill` behind the last id."""
        places = torch.arange(BLOCK_IDS, device=targets.device)
        ids = (targets // BLOCK_IDS * BLOCK_IDS).unsqueeze(1) + places
        last = self.tree.vocab_size - 1
        return weights_RV.gather(1, ids.clamp(max=last)).masked_fill_(ids > last, fill)

    def log_odds(self, blocks_RB: torch.Tensor, own_R16: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-odds ln(right / left) of each decision of each target.

        Args:
            blocks_RB: from `sum_blocks`.
            own_R16: from `target_block`.
            targets: [R] ids.

        Returns:
            float32 [R, J], nats. Infinite where one side has no mass, NaN where neither has; where there is no decision
            anything.
        """
        rows, blocks = blocks_RB.shape
        block, place = targets // BLOCK_IDS, targets % BLOCK_IDS
        masses = blocks_RB.new_empty(2 * blocks - 1, rows)  # the rows of a node lie together
        masses[:blocks] = blocks_RB.t()
        for into, left, right in self.merges:
            torch.add(masses.index_select(0, left), masses.index_select(0, right), out=masses[into])
        column = torch.arange(rows, device=targets.device).unsqueeze(1)
        ranges = _ranges(own_R16)
        odds = own_R16.new_empty(rows, self.left.shape[1] + BLOCK_DECISIONS)
        above, inside = odds[:, :-BLOCK_DECISIONS], odds[:, -BLOCK_DECISIONS:]
        torch.div(masses[self.right[block], column], masses[self.left[block], column], out=above)
        torch.div(ranges.gather(1, self.inner_right[place]), ranges.gather(1, self.inner_left[place]), out=inside)
        return odds.log_()


@dataclass(frozen=True, eq=False)
class ChunkMasses:
    """What the decisions of a chunk of tokens follow from."""

    tree: TreeMasses
    blocks: torch.Tensor
    """[C, B] masses of the blocks."""
    own: torch.Tensor
    """[C, 16] probabilities in the block of each target."""

    @classmethod
    def empty(cls, tree: TreeMasses, tokens: int) -> ChunkMasses:
        """Room for so many tokens."""
        device = tree.first_cell.device
        blocks = torch.empty(tokens, tree.tree.num_blocks, dtype=torch.float32, device=device)
        return cls(tree, blocks, torch.empty(tokens, BLOCK_IDS, dtype=torch.float32, device=device))

    def part(self, some: slice) -> ChunkMasses:
        """Of some of the tokens."""
        return ChunkMasses(self.tree, self.blocks[some], self.own[some])

    def take(self, weights_RV: torch.Tensor, targets: torch.Tensor) -> None:
        """Sum the probabilities [R, V], in any unit, of these tokens."""
        self.tree.sum_blocks(weights_RV, self.blocks)
        self.own.copy_(self.tree.target_block(weights_RV, targets))

    def take_sums(
        self, whole_RB: torch.Tensor, logits_RV: torch.Tensor, peak_R1: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """Keep sums over the whole blocks that were taken elsewhere, of exp(logit - peak)."""
        count = whole_RB.shape[1]
        self.blocks[:, :count] = whole_RB
        if count < self.blocks.shape[1]:
            torch.sum((logits_RV[:, count * BLOCK_IDS :] - peak_R1).exp_(), 1, out=self.blocks[:, count])
        self.own.copy_(self.tree.target_block(logits_RV, targets, fill=-torch.inf).sub_(peak_R1).exp_())

    def log_odds(self, targets: torch.Tensor) -> torch.Tensor:
        """Float32 [C, J] log-odds of the decisions; see `TreeMasses.log_odds`."""
        return self.tree.log_odds(self.blocks, self.own, targets)

    def cells(self, targets: torch.Tensor) -> torch.Tensor:
        """int16 [C, J] cells of the decisions; -1 where there is none."""
        first = self.tree.first_cell[targets]
        return torch.where(first < 0, first, first + levels_of(self.log_odds(targets)))


def levels_of(log_odds: torch.Tensor) -> torch.Tensor:
    """int16 levels of log-odds in nats: the nearest, the even one of two, 0 for NaN."""
    scaled = (log_odds * (1 / LEVEL_STEP)).round_().clamp_(-MAX_LEVEL, MAX_LEVEL)
    return scaled.nan_to_num_(0.0).to(torch.int16)


def _ranges(own_R16: torch.Tensor) -> torch.Tensor:
    """[R, 30] masses of the two eights, four fours, eight pairs and sixteen ids of a block."""
    parts = [own_R16]
    while parts[0].shape[1] > 2:
        parts.insert(0, parts[0][:, 0::2] + parts[0][:, 1::2])
    return torch.cat(parts, 1)


@cache
def tree_masses(tree: DecisionTree, device: torch.device) -> TreeMasses:
    """The tables of a tree on a device, made once for each of both."""
    blocks = tree.num_blocks
    height = np.zeros(2 * blocks - 1, np.int64)
    for node, (left, right) in enumerate(tree.children, blocks):
        height[node] = 1 + max(height[left], height[right])
    order = np.argsort(height, kind="stable")  # blocks have height 0 and keep their numbers
    number = np.empty_like(order)
    number[order] = np.arange(order.size)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    merges = []
    for _, group in groupby(order[blocks:], key=lambda node: height[node]):
        nodes = np.array([*group])
        into = slice(int(number[nodes[0]]), int(number[nodes[-1]]) + 1)
        left, right = number[tree.children[nodes - blocks]].T
        merges.append((into, on_device(left), on_device(right)))
    on_way = number[tree.children[np.maximum(tree.path - blocks, 0)]] if blocks > 1 else np.zeros((1, 0, 2), np.int64)
    on_way = np.where(tree.path[..., None] < 0, 0, on_way)
    inner_left, inner_right = _inner_children()
    outcomes = tree.outcomes(np.arange(tree.vocab_size))
    first_cell = np.where(outcomes < 0, -1, outcomes.astype(np.int16) * LEVELS + MAX_LEVEL)
    return TreeMasses(
        tree,
        tuple(merges),
        on_device(on_way[..., 0]),
        on_device(on_way[..., 1]),
        on_device(inner_left),
        on_device(inner_right),
        on_device(first_cell.astype(np.int16)),
    )


def _inner_children() -> tuple[np.ndarray, np.ndarray]:
    """[16, 4] each: left and right ranges, as `_ranges` numbers them, of the decisions of each place in a block."""
    place = np.arange(BLOCK_IDS)
    left, first = [], 0
    for half in _HALVES:
        left.append(first + place // (2 * half) * 2)
        first += BLOCK_IDS // half
    return np.stack(left, 1), np.stack(left, 1) + 1
