"""A token as a sequence of binary decisions: the tree, the levels of its probabilities, and tables of counts.

The ids 0..V-1 are the leaves of a binary tree whose subtrees are ranges of ids. A token is then the decisions on the
way from the root to its leaf: at each node, left (0) or right (1). A decision exists where both children hold an id.
The model gives each decision a probability, the mass of the right child's ids among the node's. Its log-odds are
rounded to a fixed grid, and the rounded value *is* the hypothesis's probability: a decision is one of 255 levels and
an outcome, a cell, and a table of counts by cell is the exact evidence of any number of tokens.

The tree is a constant of the package given V, and its kind is coded. It must not look at the model's predictions or
at the context: along a Huffman tree of the predictions themselves every decision would be nearly a fair coin, its loss
one bit whatever happens, and a bound on it would be true and empty.

Runs of 16 ids are blocks with a balanced tree inside; the tree above the blocks halves the weight of its range as well
as a split between blocks can. So a head needs the sums of 16 probabilities and a tree over V / 16 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.columns import Floats, Ints, pack, unpack
from tokenbound.bounds.smoothing import check_vocab_size
from tokenbound.errors import InputError, MismatchError

TreeName = Literal["zipf", "balanced"]
TREES: Final[tuple[TreeName, ...]] = get_args(TreeName)
TREE_BITS: Final = 2
"""Names the tree. There is room for two more kinds."""

BLOCK_IDS: Final = 16
"""Ids of a block."""

BLOCK_DECISIONS: Final = 4
"""Decisions inside a block: eights, fours, pairs, ids."""

LEVEL_STEP: Final = 0.125
"""Width of a level in nats of log-odds. Rounding costs at most h^2/32 nats at a fair decision, h^2/96 on average, less
at any other: together below 0.001 bit per token."""

MAX_LEVEL: Final = 127
"""Log-odds are cut off at 127 levels, 15.9 nats: a probability of 1.3e-7."""

LEVELS: Final = 2 * MAX_LEVEL + 1
CELLS: Final = 2 * LEVELS
"""A cell is outcome * LEVELS + level + MAX_LEVEL."""

_ZIPF_OFFSET: Final = 10
_WEIGHT_UNIT: Final = 1 << 40
"""Zipf weights are integers, so that every machine splits at the same places."""


@dataclass(frozen=True, eq=False)
class DecisionTree:
    """An alphabetic binary tree over ids; nodes 0..B-1 are the blocks, B..2B-2 the inner nodes, the root is last."""

    name: TreeName
    vocab_size: int
    """V."""
    children: NDArray[np.int32]
    """[B - 1, 2] left and right child of inner node B + i; both have smaller numbers."""
    path: NDArray[np.int32]
    """[B, D] inner nodes from the root to each block, then -1."""
    turns: NDArray[np.int8]
    """[B, D] the outcome at each of them, then -1."""

    @property
    def num_blocks(self) -> int:
        """B, the last one ragged where V is no multiple of `BLOCK_IDS`."""
        return len(self.path)

    @property
    def depths(self) -> Ints:
        """[B] decisions above each block."""
        return np.count_nonzero(self.turns >= 0, axis=1).astype(np.int64)

    @property
    def max_decisions(self) -> int:
        """J: no token has more decisions."""
        return self.path.shape[1] + (BLOCK_DECISIONS if self.vocab_size >= BLOCK_IDS else _inner_depth(self.vocab_size))

    def num_decisions(self, ids: ArrayLike) -> Ints:
        """Decisions of each token.

        Args:
            ids: any shape, in [0, V).

        >>> decision_tree("balanced", 32).num_decisions([0, 31]).tolist()
        [5, 5]
        """
        found = np.asarray(ids, dtype=np.int64)
        block, place = np.divmod(found, BLOCK_IDS)
        counts = self.depths[block]
        in_block = np.minimum(self.vocab_size - block * BLOCK_IDS, BLOCK_IDS)
        for half in (8, 4, 2, 1):
            counts = counts + (place // (2 * half) * (2 * half) + half < in_block)
        return np.asarray(counts, dtype=np.int64)


def _inner_depth(size: int) -> int:
    return max(size - 1, 0).bit_length()


@cache
def decision_tree(name: TreeName, vocab_size: int) -> DecisionTree:
    """The tree of this name over V ids.

    Args:
        name: `zipf` halves the weights 1 / (id + 10), `balanced` the number of blocks.
        vocab_size: V.

    Raises:
        InputError: there is no tree of this name.

    >>> tree = decision_tree("zipf", 49_152)
    >>> tree.num_blocks, tree.max_decisions, tree.num_decisions([0, 700, 49_151]).tolist()
    (3072, 19, [7, 13, 19])
    """
    check_vocab_size(vocab_size)
    if name not in TREES:
        raise InputError(f"there is no decision tree {name!r}; choose among {', '.join(TREES)}")
    blocks = -(-vocab_size // BLOCK_IDS)
    if name == "balanced":
        weights = np.ones(blocks, dtype=np.int64)
    else:
        each = _WEIGHT_UNIT // (np.arange(blocks * BLOCK_IDS, dtype=np.int64) + _ZIPF_OFFSET)
        each[vocab_size:] = 0
        weights = np.maximum(each.reshape(blocks, BLOCK_IDS).sum(axis=1), 1)
    return _halving(name, vocab_size, weights)


def _halving(name: TreeName, vocab_size: int, weights: Ints) -> DecisionTree:
    """Split every range where the weights of its halves differ least, the lower place of two."""
    blocks = weights.size
    before = np.concatenate([[0], np.cumsum(weights)])
    ranges: list[tuple[int, int, int]] = []  # of inner nodes, parents first: first block, split, end
    waiting = [(0, blocks)]
    while waiting:
        low, high = waiting.pop()
        if high - low < 2:
            continue
        split = _middle(before, low, high)
        ranges.append((low, split, high))
        waiting += [(split, high), (low, split)]
    ranges.reverse()  # children first, the root last
    number = {(low, high): blocks + i for i, (low, _, high) in enumerate(ranges)}
    number |= {(i, i + 1): i for i in range(blocks)}
    children = [(number[low, split], number[split, high]) for low, split, high in ranges]
    steps: list[list[tuple[int, int]]] = [[] for _ in range(blocks)]
    for node, (low, split, high) in reversed([*enumerate(ranges, blocks)]):
        for block in range(low, high):
            steps[block].append((node, int(block >= split)))
    depth = max(map(len, steps))
    path, turns = np.full((blocks, depth), -1, np.int32), np.full((blocks, depth), -1, np.int8)
    for block, taken in enumerate(steps):
        for at, (node, turn) in enumerate(taken):
            path[block, at], turns[block, at] = node, turn
    return DecisionTree(name, vocab_size, np.array(children, np.int32).reshape(-1, 2), path, turns)


def _middle(before: Ints, low: int, high: int) -> int:
    """The split in (low, high) whose sides differ least in weight."""
    total = int(before[low] + before[high])
    at = int(np.searchsorted(2 * before[low + 1 : high], total)) + low + 1
    candidates = [split for split in (at - 1, at) if low < split < high]
    return min(candidates, key=lambda split: (abs(2 * int(before[split]) - total), split))


def level_of(log_odds: ArrayLike) -> NDArray[np.int64]:
    """The level of log-odds ln(p1 / p0); what is not a number is a fair coin.

    Args:
        log_odds: nats, any shape; infinities are the outermost levels.

    >>> level_of([0.0, 0.07, -3.0, float("inf"), float("nan")]).tolist()
    [0, 1, -24, 127, 0]
    """
    scaled = np.nan_to_num(np.asarray(log_odds, np.float64) / LEVEL_STEP, nan=0.0, posinf=MAX_LEVEL, neginf=-MAX_LEVEL)
    return np.clip(np.rint(scaled), -MAX_LEVEL, MAX_LEVEL).astype(np.int64)


def level_probabilities() -> Floats:
    """[LEVELS] the probability of the right child at each level."""
    levels = np.arange(-MAX_LEVEL, MAX_LEVEL + 1)
    return np.asarray(1.0 / (1.0 + np.exp(-levels * LEVEL_STEP)))


@dataclass(frozen=True, eq=False)
class DecisionTable:
    """How often each cell occurred; merges exactly."""

    counts: Ints
    """[2, LEVELS] by outcome and level."""
    num_tokens: int
    """Tokens whose decisions these are."""

    @classmethod
    def of_cells(cls, cells: ArrayLike, num_tokens: int, weights: ArrayLike | None = None) -> DecisionTable:
        """The table of some cells.

        Args:
            cells: any shape, in [0, CELLS); -1 is no decision.
            num_tokens: tokens that they are of.
            weights: of the same shape, how often each occurred.

        Raises:
            MismatchError: a cell outside the table, or a negative count.

        >>> DecisionTable.of_cells([[127, -1], [127, 382]], num_tokens=2).num_decisions
        3
        """
        flat = np.asarray(cells).reshape(-1).astype(np.int64, copy=False)
        counts = np.ones(flat.size, np.int64) if weights is None else np.asarray(weights).reshape(-1).astype(np.int64)
        counts, flat = counts[flat != -1], flat[flat != -1]
        if flat.size and not (flat.min() >= 0 and flat.max() < CELLS and counts.min() >= 0):
            raise MismatchError(f"decisions must be cells in [0, {CELLS}) with counts that are not negative")
        table = np.zeros(CELLS, np.int64)
        np.add.at(table, flat, counts)
        return cls(table.reshape(2, LEVELS), int(num_tokens))

    @property
    def num_decisions(self) -> int:
        """Decisions of all tokens."""
        return int(self.counts.sum())

    def __add__(self, other: DecisionTable) -> DecisionTable:
        """The table of both."""
        return DecisionTable(self.counts + other.counts, self.num_tokens + other.num_tokens)

    def __eq__(self, other: object) -> bool:
        """Whether all counts are the same."""
        same = isinstance(other, DecisionTable) and self.num_tokens == other.num_tokens
        return same and bool(np.array_equal(self.counts, other.counts))  # type: ignore[union-attr]

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, about a kilobyte."""
        return {"tokens": self.num_tokens, "counts": pack(np.ascontiguousarray(self.counts, dtype="<i8").tobytes())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecisionTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: counts that are cut short, damaged or negative.
        """
        counts = np.frombuffer(unpack(data["counts"], 8 * CELLS), dtype="<i8").astype(np.int64)
        tokens = data["tokens"]
        if counts.size != CELLS or counts.min() < 0 or type(tokens) is not int or tokens < 0:
            raise ValueError("a table of decisions does not have its counts")
        return cls(counts.reshape(2, LEVELS), tokens)
