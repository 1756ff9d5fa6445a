"""The binary decisions of each token from one pass over its probabilities: log-odds, levels, cells.

Shape legend: R rows, C tokens of a chunk, V vocabulary, B blocks of S leaves, D decisions above the blocks, H inside
them (S = 2^H), J = D + H decisions of a token at most.

A head has exp(logit - max) of every id in the cache when it sums them. The blocks' sums are taken there, at one more
read; the masses of all ranges follow for a whole chunk, from the leaves to the root. Nothing is subtracted, so a small
mass keeps all its digits, and the order of the sums depends neither on the target nor on other rows: the leaves of a
block as torch adds them, then left child plus right; inside the target's block pairs, fours, eights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenbound.bounds.decisions import LEVEL_STEP, LEVELS, MAX_LEVEL, DecisionTree


@dataclass(frozen=True, eq=False)
class TreeTensors:
    """A decision tree on a device."""

    block_ids: int
    """S."""
    order: torch.Tensor | None
    """[V] id of each leaf; None where leaf i is id i."""
    merges: tuple[tuple[slice, torch.Tensor, torch.Tensor], ...]
    """By height: where the masses of these nodes go, and the numbers of their left and right children. Nodes are
    numbered anew, so that those of one height lie together."""
    left: torch.Tensor
    """[B, D] left children of the nodes on the way to each block; 0 behind the last."""
    right: torch.Tensor
    """[B, D] right children."""
    inner_left: torch.Tensor
    """[S, H] left children of the nodes on the way to each place of a block, among its 2 + 4 + .. + S ranges."""
    leaf: torch.Tensor
    """[V] leaf of each id."""
    first_cell: torch.Tensor
    """int16 [V, J] the cell of each decision of each id at level 0; -1 where there is none."""

    @property
    def sums_neighbours(self) -> bool:
        """Whether blocks are runs of ids, which a compiled head can sum."""
        return self.order is None and self.block_ids > 1

    @property
    def num_decisions(self) -> int:
        """J."""
        return self.first_cell.shape[1]

    def sum_blocks(self, weights_RV: torch.Tensor, out: torch.Tensor) -> None:
        """Write the sums of blocks into [R, B]."""
        ordered = weights_RV if self.order is None else weights_RV.index_select(1, self.order)
        if self.block_ids == 1:
            out.copy_(ordered)
            return
        rows, size = ordered.shape
        whole = size // self.block_ids
        torch.sum(ordered[:, : whole * self.block_ids].view(rows, whole, self.block_ids), -1, out=out[:, :whole])
        if whole < out.shape[1]:
            torch.sum(ordered[:, whole * self.block_ids :], 1, out=out[:, whole])

    def target_block(self, weights_RV: torch.Tensor, targets: torch.Tensor, *, fill: float = 0.0) -> torch.Tensor:
        """[R, S] values in the block of each target; `fill` behind the last leaf."""
        places = torch.arange(self.block_ids, device=targets.device)
        leaves = (self.leaf[targets] // self.block_ids * self.block_ids).unsqueeze(1) + places
        last = weights_RV.shape[1] - 1
        ids = leaves.clamp(max=last)
        values = weights_RV.gather(1, ids if self.order is None else self.order[ids])
        return values.masked_fill_(leaves > last, fill)

    def log_odds(self, blocks_RB: torch.Tensor, own_RS: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-odds ln(right / left) of each decision of each target.

        Args:
            blocks_RB: from `sum_blocks`.
            own_RS: from `target_block`.
            targets: [R] ids.

        Returns:
            float32 [R, J], nats. Infinite where one side has no mass, NaN where neither has; where there is no decision
            anything.
        """
        rows, blocks = blocks_RB.shape
        leaves = self.leaf[targets]
        block, place = leaves // self.block_ids, leaves % self.block_ids
        masses = blocks_RB.new_empty(2 * blocks - 1, rows)  # the rows of a node lie together
        masses[:blocks] = blocks_RB.t()
        for into, left, right in self.merges:
            torch.add(masses.index_select(0, left), masses.index_select(0, right), out=masses[into])
        column = torch.arange(rows, device=targets.device).unsqueeze(1)
        above = masses[self.right[block], column] / masses[self.left[block], column]
        if self.block_ids == 1:
            return above.log_()
        ranges, left = _ranges(own_RS), self.inner_left[place]
        return torch.cat([above, ranges.gather(1, left + 1) / ranges.gather(1, left)], 1).log_()


def levels_of(log_odds: torch.Tensor) -> torch.Tensor:
    """int16 levels of log-odds in nats: the nearest, the even one of two, 0 for NaN."""
    scaled = (log_odds * (1 / LEVEL_STEP)).round_().clamp_(-MAX_LEVEL, MAX_LEVEL)
    return scaled.nan_to_num_(0.0).to(torch.int16)


def _ranges(own_RS: torch.Tensor) -> torch.Tensor:
    """[R, 2 + 4 + .. + S] masses of the ranges inside a block, the largest first."""
    parts = [own_RS]
    while parts[0].shape[1] > 2:
        parts.insert(0, parts[0][:, 0::2] + parts[0][:, 1::2])
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class ChunkMasses:
    """What the decisions of a chunk of tokens follow from."""

    tree: TreeTensors
    blocks: torch.Tensor
    """[C, B] masses of the blocks."""
    own: torch.Tensor
    """[C, S] probabilities in the block of each target."""

    @classmethod
    def empty(cls, tree: TreeTensors, tokens: int) -> ChunkMasses:
        """Room for so many tokens."""

        def room(width: int) -> torch.Tensor:
            return torch.empty(tokens, width, dtype=torch.float32, device=tree.leaf.device)

        return cls(tree, room(len(tree.left)), room(tree.block_ids))

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
            rest = logits_RV[:, count * self.tree.block_ids :] - peak_R1
            torch.sum(rest.exp_(), 1, out=self.blocks[:, count])
        self.own.copy_(self.tree.target_block(logits_RV, targets, fill=-torch.inf).sub_(peak_R1).exp_())

    def log_odds(self, targets: torch.Tensor) -> torch.Tensor:
        """Float32 [C, J] log-odds of the decisions; see `TreeTensors.log_odds`."""
        return self.tree.log_odds(self.blocks, self.own, targets)

    def cells(self, targets: torch.Tensor) -> torch.Tensor:
        """int16 [C, J] cells of the decisions; -1 where there is none."""
        first = self.tree.first_cell[targets]
        return torch.where(first < 0, first, first + levels_of(self.log_odds(targets)))


@cache
def tree_tensors(tree: DecisionTree, device: torch.device) -> TreeTensors:
    """A tree on a device, made once for each of both."""
    blocks = tree.num_blocks
    height = np.zeros(2 * blocks - 1, np.int64)
    for node, (left, right) in enumerate(tree.children, blocks):
        height[node] = 1 + max(height[left], height[right])
    order = np.argsort(height, kind="stable")  # blocks have height 0 and keep their numbers
    number = np.empty_like(order)
    number[order] = np.arange(order.size)

    def on_device(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    merges = []
    for _, group in groupby(order[blocks:], key=lambda node: height[node]):
        nodes = np.array([*group])
        into = slice(int(number[nodes[0]]), int(number[nodes[-1]]) + 1)
        left, right = number[tree.children[nodes - blocks]].T
        merges.append((into, on_device(left), on_device(right)))
    on_way = np.zeros((*tree.path.shape, 2), np.int64)
    on_way[tree.path >= 0] = number[tree.children[tree.path[tree.path >= 0] - blocks]]
    outcomes = tree.outcomes(np.arange(tree.vocab_size)).astype(np.int16)
    return TreeTensors(
        tree.block_ids,
        None if tree.order is None else on_device(tree.order.astype(np.int64)),
        tuple(merges),
        on_device(on_way[..., 0]),
        on_device(on_way[..., 1]),
        on_device(_inner_left(tree)),
        on_device(tree.leaf.astype(np.int64)),
        on_device(np.where(outcomes < 0, outcomes, outcomes * np.int16(LEVELS) + np.int16(MAX_LEVEL))),
    )


def _inner_left(tree: DecisionTree) -> NDArray[np.int64]:
    """[S, H] left ranges, as `_ranges` numbers them, of the decisions of each place in a block."""
    place = np.arange(tree.block_ids)
    found, first = np.zeros((tree.block_ids, len(tree.halves)), np.int64), 0
    for column, half in enumerate(tree.halves):
        found[:, column] = first + place // (2 * half) * 2
        first += tree.block_ids // half
    return found
