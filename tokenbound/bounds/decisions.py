"""A token as a sequence of binary decisions: the tree, the levels of its probabilities, and tables of counts.

The ids 0..V-1 are the leaves of a binary tree. A token is then the decisions on the way from the root to its leaf: at
each node, left (0) or right (1). A decision exists where both children hold an id. The model gives each decision a
probability, the mass of the right child's ids among the node's. Its log-odds are rounded to a fixed grid, and the
rounded value *is* the hypothesis's probability: a decision is one of 255 levels and an outcome, a cell, and a table of
counts by cell is the exact evidence of any number of tokens.

The tree is a constant of the package given V, or it is made from code lengths of the ids, which are then paid for. It
must not look at the model's predictions or at the context: along a Huffman tree of the predictions themselves every
decision would be nearly a fair coin, its loss one bit whatever happens, and a bound on it would be true and empty.

Where V is large, runs of 16 leaves are blocks with a balanced tree inside, and the tree above the blocks halves the
weight of its range as well as a split between blocks can. So a head needs the sums of 16 probabilities and a tree over
V / 16 numbers.
"""

from __future__ import annotations

import heapq
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.columns import Floats, Ints, WindowDecisions, pack, unpack
from tokenbound.bounds.smoothing import check_vocab_size
from tokenbound.errors import InputError, MismatchError

TreeName = Literal["zipf", "balanced", "counts"]
TREES: Final[tuple[TreeName, ...]] = get_args(TreeName)
TREE_BITS: Final = 2
"""Names the tree; there is room for one more kind."""

SMALL_VOCABULARY: Final = 2048
"""Up to this V every leaf is a block of its own."""

BLOCK_IDS: Final = 16
"""Leaves of a block above it."""

LEVEL_STEP: Final = 0.125
"""Width of a level in nats of log-odds. Rounding costs h^2 / 96 nats at a fair decision and less at any other:
together below 0.001 bit per token."""

MAX_LEVEL: Final = 127
"""Log-odds are cut off at 127 levels, 15.9 nats: a probability of 1.3e-7."""

LEVELS: Final = 2 * MAX_LEVEL + 1
CELLS: Final = 2 * LEVELS
"""A cell is outcome * LEVELS + level + MAX_LEVEL."""

MAX_TREE_IDS: Final = 1 << 20
"""Ids that a tree may have, several times as many as any vocabulary: a forged certificate must not ask for more."""

_LENGTH_LETTERS: Final = "-" + string.ascii_uppercase + string.ascii_lowercase
"""Spells code lengths in JSON, one letter each: A is 1. Compressed text would depend on the library that made it."""

MAX_CODE_LENGTH: Final = 40
"""No id of a tree from counts has a longer code word; a longer one would need more than 10^8 tokens."""

_RAREST: Final = 24
_ZIPF_OFFSET: Final = 10
_WEIGHT_UNIT: Final = 1 << MAX_CODE_LENGTH
"""Weights are integers, so that every machine splits at the same places."""
_DEEPEST: Final = 128
"""Two splits leave at most half of the weight of a range that can be split further, so no block lies so deep."""


@dataclass(frozen=True, eq=False)
class DecisionTree:
    """A binary tree over ids: nodes 0..B-1 are the blocks, B..2B-2 the inner nodes, of which the last is the root."""

    name: TreeName
    vocab_size: int
    """V."""
    block_ids: int
    """Leaves of a block, a power of two, with a balanced tree inside."""
    order: NDArray[np.int32] | None
    """[V] id of each leaf from left to right; None where leaf i is id i."""
    children: NDArray[np.int32]
    """[B - 1, 2] left and right child of inner node B + i; both have smaller numbers."""
    path: NDArray[np.int32]
    """[B, D] inner nodes from the root to each block, then -1."""
    turns: NDArray[np.int8]
    """[B, D] the outcome at each of them, then -1."""

    @property
    def num_blocks(self) -> int:
        """B; the last one is ragged where V is no multiple of `block_ids`."""
        return len(self.path)

    @cached_property
    def leaf(self) -> NDArray[np.int32]:
        """[V] leaf of each id, counted from the left."""
        leaves = np.arange(self.vocab_size, dtype=np.int32)
        if self.order is None:
            return leaves
        places = np.empty_like(leaves)
        places[self.order] = leaves
        return places

    @property
    def halves(self) -> tuple[int, ...]:
        """Leaves under either child at each depth inside a block, from its root: 8, 4, 2, 1."""
        return tuple(1 << k for k in reversed(range(self.block_ids.bit_length() - 1)))

    @cached_property
    def depth(self) -> NDArray[np.int64]:
        """[V] decisions of each id."""
        block, place = np.divmod(self.leaf.astype(np.int64), self.block_ids)
        counts: NDArray[np.int64] = np.count_nonzero(self.turns >= 0, axis=1).astype(np.int64)[block]
        left = self.vocab_size - block * self.block_ids  # leaves from the block's first to the last of all
        for half in self.halves:
            counts += place // (2 * half) * (2 * half) + half < left
        return np.asarray(counts)

    @property
    def max_decisions(self) -> int:
        """J: no token has more decisions."""
        return int(self.depth.max())

    def outcomes(self, ids: ArrayLike) -> NDArray[np.int8]:
        """The decisions of each token: 0 left, 1 right, -1 where there is none.

        Args:
            ids: any shape, in [0, V).

        Returns:
            [..., J] with J = D and the depth of a block: those above the blocks, then those inside.

        >>> decision_tree("balanced", 5).outcomes([0, 2, 4]).tolist()
        [[0, 0, -1], [1, 0, -1], [1, 1, 1]]
        """
        block, place = np.divmod(self.leaf[np.asarray(ids, dtype=np.int64)].astype(np.int64)[..., None], self.block_ids)
        halves = np.array(self.halves, dtype=np.int64)
        right = block * self.block_ids + place // (2 * halves) * (2 * halves) + halves
        inside = np.where(right < self.vocab_size, place // halves & 1, -1).astype(np.int8)
        return np.concatenate([self.turns[block[..., 0]], inside], axis=-1)

    def num_decisions(self, ids: ArrayLike) -> Ints:
        """Decisions of each token.

        Args:
            ids: any shape, in [0, V).

        >>> decision_tree("balanced", 32).num_decisions([0, 31]).tolist()
        [5, 5]
        """
        return np.asarray(self.depth[np.asarray(ids, dtype=np.int64)])


@cache
def decision_tree(name: TreeName, vocab_size: int, lengths: bytes | None = None) -> DecisionTree:
    """The tree of this name over V ids.

    Args:
        name: `zipf` halves the weights 1 / (id + 10), `balanced` the number of ids, `counts` the weights 2^-length.
        vocab_size: V.
        lengths: of `counts`, the code length of each id as one byte (see :func:`code_lengths`). Leaves are then
            ordered by length and id, and a tree without blocks is the canonical Huffman tree of these lengths.

    Raises:
        InputError: there is no tree of this name, or lengths that are no complete prefix code.

    >>> tree = decision_tree("zipf", 49_152)
    >>> tree.num_blocks, tree.max_decisions, tree.num_decisions([0, 700, 49_151]).tolist()
    (3072, 19, [7, 13, 19])
    >>> decision_tree("counts", 4, bytes([1, 3, 3, 2])).num_decisions([0, 1, 2, 3]).tolist()
    [1, 3, 3, 2]
    """
    check_vocab_size(vocab_size)
    if vocab_size > MAX_TREE_IDS:
        raise InputError(f"a tree of decisions has at most {MAX_TREE_IDS:,} ids, got {vocab_size:,}")
    if name not in TREES or (lengths is None) == (name == "counts"):
        raise InputError(
            f"there is no decision tree {name!r}{' with' if lengths else ' without'} code lengths; choose among "
            f"{', '.join(TREES)}, of which `counts` alone has lengths"
        )
    order: NDArray[np.int32] | None = None
    if lengths is not None:
        weights = _length_weights(lengths, vocab_size)
        order = np.argsort(-weights, kind="stable").astype(np.int32)
        weights = weights[order]
    elif name == "balanced":
        weights = np.ones(vocab_size, dtype=np.int64)
    else:
        weights = _WEIGHT_UNIT // (np.arange(vocab_size, dtype=np.int64) + _ZIPF_OFFSET)
    size = 1 if vocab_size <= SMALL_VOCABULARY else BLOCK_IDS
    return DecisionTree(name, vocab_size, size, order, *_halving(_block_sums(weights, size)))


@dataclass(frozen=True)
class TreeChoice:
    """The tree along which the decisions of a run are scored, as it is chosen before: all but V."""

    name: TreeName
    lengths: bytes | None = None
    """Of `counts`: the code length of each id."""

    def over(self, vocab_size: int) -> DecisionTree:
        """The tree over V ids; the same object for the same arguments."""
        return decision_tree(self.name, vocab_size, self.lengths)

    def to_dict(self) -> dict[str, str]:
        """Plain JSON data."""
        spelt = None if self.lengths is None else "".join(_LENGTH_LETTERS[length] for length in self.lengths)
        return {"name": self.name, **({} if spelt is None else {"lengths": spelt})}

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> TreeChoice:
        """The inverse of :meth:`to_dict`.

        Raises:
            MismatchError: a name that no tree has, or code lengths that are damaged, or where there are none.

        >>> list(TreeChoice.from_dict({"name": "counts", "lengths": "ACCB"}).lengths or b"")
        [1, 3, 3, 2]
        """
        name, spelt = data.get("name"), data.get("lengths")
        if name not in TREES or isinstance(spelt, str) != (name == "counts"):
            raise MismatchError(f"tree {name!r}: choose among {', '.join(TREES)}, of which `counts` alone has lengths")
        found = [_LENGTH_LETTERS.find(letter) for letter in spelt or ""]
        if any(not 1 <= length <= MAX_CODE_LENGTH for length in found):
            raise MismatchError(f"tree {name!r}: its code lengths are damaged; each is a letter, A for 1")
        return cls(name, None if spelt is None else bytes(found))


def _length_weights(lengths: bytes, vocab_size: int) -> Ints:
    """[V] weights 2^-length in units of 2^-40."""
    found = np.frombuffer(lengths, np.uint8).astype(np.int64)
    if found.size != vocab_size or found.max() > MAX_CODE_LENGTH:  # a length of 0 could not be part of a complete code
        raise InputError(f"a tree needs {vocab_size} code lengths from 1 to {MAX_CODE_LENGTH}")
    weights = _WEIGHT_UNIT >> found
    if int(weights.sum()) != _WEIGHT_UNIT:
        raise InputError("the code lengths of a tree must be those of a complete prefix code: their 2^-length add to 1")
    return np.asarray(weights, dtype=np.int64)


def _block_sums(weights: Ints, size: int) -> Ints:
    padded = np.zeros(-(-weights.size // size) * size, np.int64)
    padded[: weights.size] = weights
    return np.asarray(padded.reshape(-1, size).sum(axis=1), dtype=np.int64)


def _halving(weights: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int8]]:
    """Split every range of blocks where the weights of its halves differ least, at the lower place of two.

    Returns:
        Children, path and turns of a `DecisionTree`.
    """
    blocks = weights.size
    before = np.concatenate([[0], np.cumsum(weights)])
    ranges: list[tuple[int, int, int]] = []  # of inner nodes, parents first: first block, split, end
    waiting = [(0, blocks)]
    while waiting:
        low, high = waiting.pop()
        if high - low > 1:
            split = _middle(before, low, high)
            ranges.append((low, split, high))
            waiting += [(split, high), (low, split)]
    ranges.reverse()  # children first, the root last
    number = {(i, i + 1): i for i in range(blocks)}
    number |= {(low, high): blocks + i for i, (low, _, high) in enumerate(ranges)}
    children = [(number[low, split], number[split, high]) for low, split, high in ranges]
    depth = np.zeros(blocks, np.int64)
    path, turns = np.full((blocks, _DEEPEST), -1, np.int32), np.full((blocks, _DEEPEST), -1, np.int8)
    for node, (low, split, high) in reversed([*enumerate(ranges, blocks)]):
        at = int(depth[low])  # all blocks of a range have the same nodes above it
        path[low:high, at] = node
        turns[low:split, at], turns[split:high, at] = 0, 1
        depth[low:high] += 1
    deepest = int(depth.max())
    return np.array(children, np.int32).reshape(-1, 2), path[:, :deepest].copy(), turns[:, :deepest].copy()


def _middle(before: Ints, low: int, high: int) -> int:
    """The split in (low, high) whose sides differ least in weight."""
    total = int(before[low] + before[high])
    at = int(np.searchsorted(2 * before[low + 1 : high], total)) + low + 1
    candidates = [split for split in (at - 1, at) if low < split < high]
    return min(candidates, key=lambda split: (abs(2 * int(before[split]) - total), split))


def code_lengths(counts: ArrayLike) -> bytes:
    """Huffman code lengths of ids that occurred so often, each counted once more.

    Args:
        counts: [V] integers, V >= 2.

    Returns:
        One byte per id, for :func:`decision_tree`. Ties are broken by id, so equal counts give equal bytes.

    >>> list(code_lengths([900, 40, 30, 200]))
    [1, 3, 3, 2]
    """
    weights = np.asarray(counts, dtype=np.int64) + 1
    floor = int(weights.sum()) >> _RAREST  # a Huffman code of weights above 2^-24 has no word of more than 36 bits
    heap = [(max(int(weight), floor), i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = np.zeros(2 * len(heap) - 1, np.int64)
    for node in range(len(heap), len(parent)):
        (left_weight, left), (right_weight, right) = heapq.heappop(heap), heapq.heappop(heap)
        parent[left] = parent[right] = node
        heapq.heappush(heap, (left_weight + right_weight, node))
    depth = np.zeros(len(parent), np.uint8)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: weights.size].tobytes()


@cache
def tree_code_bits(lengths: bytes | None) -> float:
    """Length in bits of the code word that names a tree: its kind, and code lengths one after the other.

    Each length is coded with the Krichevsky-Trofimov estimate of its frequency among those before it, a distribution
    over 40 symbols, so that the probabilities of all sequences of V lengths add to 1.

    >>> tree_code_bits(None), round(tree_code_bits(bytes([1, 3, 3, 2])), 2)
    (2.0, 22.11)
    """
    seen = np.zeros(MAX_CODE_LENGTH + 1, np.int64)
    nats = 0.0
    for i, length in enumerate(lengths or b""):
        nats -= math.log((seen[length] + 0.5) / (i + 0.5 * MAX_CODE_LENGTH))
        seen[length] += 1
    return TREE_BITS + nats / math.log(2)


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

    def as_window(self) -> WindowDecisions:
        """The same counts as of one window.

        >>> DecisionTable.of_cells([7, 300, 7], num_tokens=2).as_window().count.tolist()
        [2, 1]
        """
        counts = self.counts.reshape(-1)
        cells = np.flatnonzero(counts)
        return WindowDecisions(cells.astype(np.int16), counts[cells].astype(np.int32), np.array([0, cells.size]))

    @property
    def num_decisions(self) -> int:
        """Decisions of all tokens."""
        return int(self.counts.sum())

    def __add__(self, other: DecisionTable) -> DecisionTable:
        """The table of both."""
        return DecisionTable(self.counts + other.counts, self.num_tokens + other.num_tokens)

    def __eq__(self, other: object) -> bool:
        """Whether all counts are the same."""
        if not isinstance(other, DecisionTable):
            return NotImplemented
        return self.num_tokens == other.num_tokens and bool(np.array_equal(self.counts, other.counts))

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
