"""A back-off n-gram model as one integer tensor, and its code.

The model is a tree of contexts. The root is the empty context; the children of context p are longer contexts a p, with
one older symbol a in front. Each context holds levels: of its own count, of an escape, and of some symbols, its
entries. A level L stands for a count of 2^(L/2). The entries of a context are among those of its parent, so the set of
n-grams is closed under leaving out the oldest symbol; and where a p is a context, the pair (a, first of p) is an entry
of the context a. So everything new is one flag, and a level, for each of a few candidates that the decoder knows:

    for each order: for each parent and each candidate a, 0 or 1 + level of the new context's count
                    for each new context, the level of its escape
                    for each new context and each entry of its parent, 0 or 1 + level

That sequence, behind the vocabulary size, the order and the level of the number of tokens, is the tensor. Its code is
adaptive: each number is coded relative to what it would be if the context changed nothing, in the context of that
expectation. Integers throughout, so it decodes alike everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import COUNT_UNIT, Ints, Pass, ReadingPass, WritingPass
from tokenbound.compression.container import ArtifactError, Reader, block, varint

MAX_LEVEL = 100
"""Half octaves: a count of 2^50."""
MAX_ORDER = 16
MAX_VOCABULARY = 1 << 24
HEADER = 3
"""Numbers before the sequence: V, order, level of the number of tokens."""

CONTEXT, ESCAPE, ENTRY, DEEP_ENTRY = range(4)
"""What a number of the sequence is; entries of contexts longer than one symbol are counted apart."""
_EXPECTATIONS = 48
"""Buckets of expected levels of each kind."""
_LOWEST = -8
"""Expected levels below this (1/16 of a token) count as this."""
_ALPHABET = 2 + 4 * MAX_LEVEL
_PRIOR_WEIGHT = 16
_FIRST_BLOCK = 128
_MAX_BLOCK = 1 << 15


@dataclass(frozen=True)
class Order:
    """The contexts of one length, sorted by parent and symbol, and their entries, sorted by symbol within each."""

    parent: Ints
    """[C] index of the context without its oldest symbol, among those one shorter."""
    symbol: Ints
    """[C] the oldest symbol."""
    total: Ints
    """[C] level of the context's count."""
    escape: Ints
    """[C] level of the weight of the parent's prediction."""
    starts: Ints
    """[C + 1] where each context's entries begin."""
    entry: Ints
    """[E] symbols."""
    level: Ints
    """[E] levels of their counts."""

    def keys(self, vocab_size: int) -> Ints:
        """[C] parent * V + symbol, rising."""
        return self.parent * vocab_size + self.symbol

    def owners(self) -> Ints:
        """[E] the context of each entry."""
        return np.repeat(np.arange(len(self.parent)), np.diff(self.starts))


@dataclass(frozen=True)
class NgramTree:
    """Contexts of length 0 .. order."""

    vocab_size: int
    orders: tuple[Order, ...]

    @property
    def num_levels(self) -> int:
        """Levels in all: what counting has chosen."""
        return sum(2 * len(order.parent) + len(order.entry) for order in self.orders)


class Source(Protocol):
    """Where the sequence comes from: a tensor, a code, or a tree that is to be written."""

    @property
    def left(self) -> int:
        """How many numbers may still come; nothing longer is allocated."""

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""

    def take(self, kind: int, order: int, owners: Ints, symbols: Ints, expected: Ints) -> Ints:
        """The next numbers of the sequence, int64, one for each candidate.

        Args:
            kind: `CONTEXT`, `ESCAPE`, `ENTRY` or `DEEP_ENTRY`.
            order: Length of the contexts.
            owners: Parent (of contexts), else context of each candidate.
            symbols: Symbol of each candidate; of escapes zeros.
            expected: Level that the shorter context predicts.
        """


def read_tree(source: Source) -> NgramTree:
    """Walk through the sequence and build the tree.

    Raises:
        ArtifactError: a number that the writer does not write.
    """
    vocab_size, depth, total = source.header()
    if not (2 <= vocab_size <= MAX_VOCABULARY and 0 <= depth <= MAX_ORDER and 0 <= total <= MAX_LEVEL):
        raise ArtifactError(f"artifact: an n-gram model with V = {vocab_size}, order {depth} and level {total}")
    symbols = np.arange(vocab_size)
    uniform = np.broadcast_to(np.int64(total - 2 * (vocab_size.bit_length() - 1)), vocab_size)
    owners = np.broadcast_to(np.int64(0), vocab_size)
    root = _read_entries(source, 0, _none(1), _none(1), np.array([total]), owners, symbols, uniform)
    orders = [root]
    for order in range(1, depth + 1):
        orders.append(_read_order(source, order, orders, total))
    return NgramTree(vocab_size, tuple(orders))


def _none(count: int) -> Ints:
    return np.zeros(count, np.int64)


def _read_order(source: Source, order: int, orders: list[Order], tokens: int) -> Order:
    parents, symbols, expected = _candidates(orders, tokens, source.left)
    found = _checked(source.take(CONTEXT, order, parents, symbols, expected), MAX_LEVEL + 1)
    kept = found > 0
    parent, symbol, total = parents[kept], symbols[kept], found[kept] - 1
    above = orders[-1]
    owners, places = spread(above.starts, parent, source.left)
    expectation = above.level[places] + total[owners] - above.total[parent][owners]
    return _read_entries(source, order, parent, symbol, total, owners, above.entry[places], expectation)


def _candidates(orders: list[Order], tokens: int, limit: int) -> tuple[Ints, Ints, Ints]:
    """(parent, symbol, expected level) of every context that may be one longer than the last."""
    above = orders[-1]
    if len(orders) == 1:
        return _none(len(above.entry)), above.entry, above.level
    oldest, pairs = above.symbol, orders[1]
    # Pairs (a, b) by b: the contexts b ... may be lengthened by a.
    by_second = np.argsort(pairs.entry, kind="stable")
    starts = np.searchsorted(pairs.entry[by_second], np.arange(int(orders[0].entry.max(initial=0)) + 2))
    owners, places = spread(starts, oldest, limit)
    first = pairs.symbol[pairs.owners()[by_second[places]]]
    single = np.full(int(orders[0].entry.max(initial=0)) + 1, tokens)
    single[orders[0].entry] = orders[0].level
    expected = pairs.level[by_second[places]] + above.total[owners] - single[oldest[owners]]
    return owners, first, expected


def spread(starts: Ints, chosen: Ints, limit: int) -> tuple[Ints, Ints]:
    """For rows of a ragged array: which of `chosen` each place belongs to, and the places, row after row.

    Raises:
        ArtifactError: there are more than `limit`.
    """
    counts = starts[chosen + 1] - starts[chosen]
    if int(counts.sum()) > limit:
        raise ArtifactError("artifact: an n-gram model is longer than its shape says")
    owners = np.repeat(np.arange(len(chosen)), counts)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return owners, starts[chosen][owners] + within


def _read_entries(
    source: Source, order: int, parent: Ints, symbol: Ints, total: Ints, owners: Ints, symbols: Ints, expected: Ints
) -> Order:
    rows = np.arange(len(parent))
    escape = _checked(source.take(ESCAPE, order, rows, _none(len(rows)), total), MAX_LEVEL)
    found = _checked(source.take(DEEP_ENTRY if order > 1 else ENTRY, order, owners, symbols, expected), MAX_LEVEL + 1)
    kept = found > 0
    starts = np.searchsorted(owners[kept], np.arange(len(parent) + 1))
    return Order(parent, symbol, total, escape, starts, symbols[kept], found[kept] - 1)


def _checked(values: Ints, largest: int) -> Ints:
    if values.size and not 0 <= values.min() <= values.max() <= largest:
        raise ArtifactError(f"artifact: a level of an n-gram model lies outside 0..{largest}")
    return values


# Sources


class TensorSource:
    """The sequence as a tensor holds it."""

    def __init__(self, numbers: NDArray[Any]) -> None:
        self._numbers, self._place = numbers.astype(np.int64, copy=False), HEADER

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""
        if len(self._numbers) < HEADER:
            raise ArtifactError("artifact: an n-gram model without its header")
        first, second, third = self._numbers[:HEADER].tolist()
        return first, second, third

    @property
    def left(self) -> int:
        """Numbers not yet taken."""
        return len(self._numbers) - self._place

    def take(self, kind: int, order: int, owners: Ints, symbols: Ints, expected: Ints) -> Ints:
        """The next numbers."""
        start, self._place = self._place, self._place + len(expected)
        if self._place > len(self._numbers):
            raise ArtifactError("artifact: the sequence of an n-gram model ends too early")
        return self._numbers[start : self._place]

    def finish(self) -> None:
        """Require that nothing is left."""
        if self._place != len(self._numbers):
            raise ArtifactError("artifact: an n-gram model has numbers behind its end")


class TreeSource:
    """The sequence of a tree, looked up; `numbers` collects it."""

    def __init__(self, tree: NgramTree, tokens: int) -> None:
        self._tree = tree
        self._parts = [np.array([tree.vocab_size, len(tree.orders) - 1, tokens], np.int64)]

    @property
    def left(self) -> int:
        """No limit: the tree is there already."""
        return 1 << 62

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""
        first, second, third = self._parts[0].tolist()
        return first, second, third

    def take(self, kind: int, order: int, owners: Ints, symbols: Ints, expected: Ints) -> Ints:
        """The tree's numbers for these candidates."""
        level = self._tree.orders[order]
        if kind == ESCAPE:
            found = level.escape
        elif kind == CONTEXT:
            found = self._look_up(level.keys(self._tree.vocab_size), level.total, owners, symbols)
        else:
            found = self._look_up(level.owners() * self._tree.vocab_size + level.entry, level.level, owners, symbols)
        self._parts.append(found)
        return found

    def _look_up(self, keys: Ints, levels: Ints, owners: Ints, symbols: Ints) -> Ints:
        wanted = owners * self._tree.vocab_size + symbols
        if not len(keys):
            return _none(len(wanted))
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[places] == wanted, levels[places] + 1, 0)

    def numbers(self) -> NDArray[np.int32]:
        """All numbers that were asked for, header first."""
        return np.concatenate(self._parts).astype(np.int32)


class CodedSource:
    """The sequence inside a code: writes that of another source, or reads."""

    def __init__(self, coder: Pass, header: tuple[int, int, int], limit: int, given: Source | None = None) -> None:
        self._coder, self._header, self.left, self._given = coder, header, limit, given
        self._done = 0
        self.parts: list[NDArray[np.int32]] = []

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""
        return self._header

    def take(self, kind: int, order: int, owners: Ints, symbols: Ints, expected: Ints) -> Ints:
        """Code the next numbers, relative to what is expected."""
        self.left -= len(expected)
        if self.left < 0:
            raise ArtifactError("artifact: an n-gram model is longer than its shape says")
        known = None if self._given is None else self._given.take(kind, order, owners, symbols, expected)
        flagged = 0 if kind == ESCAPE else 1
        found = np.empty(len(expected), np.int32)
        for start, stop in self._blocks(len(expected)):
            cut = slice(start, stop)
            centre = np.clip(expected[cut], 0, MAX_LEVEL)
            buckets = (kind * _EXPECTATIONS + np.clip(expected[cut] - _LOWEST, 0, _EXPECTATIONS - 1)).astype(np.uint8)
            tokens = None if known is None else _relative(known[cut], centre, flagged)
            coded = self._coder.code(tokens, buckets)
            found[cut] = _absolute(coded.astype(np.int64), centre, flagged)
        self.parts.append(found)
        return found.astype(np.int64)

    def _blocks(self, count: int) -> Iterator[tuple[int, int]]:
        """Blocks that grow as the models learn."""
        start = 0
        while start < count:
            stop = min(count, start + min(_MAX_BLOCK, max(_FIRST_BLOCK, self._done // 8)))
            self._done += stop - start
            yield start, stop
            start = stop


def _relative(numbers: Ints, centre: Ints, flagged: int) -> NDArray[np.int32]:
    """0 stays where it is a flag; a level becomes its distance from the centre, in the order 0, 1, -1, 2, ..."""
    distance = numbers - flagged - centre
    folded = flagged + np.where(distance > 0, 2 * distance - 1, -2 * distance)
    return np.where((numbers == 0) & (flagged == 1), 0, folded).astype(np.int32)


def _absolute(tokens: Ints, centre: Ints, flagged: int) -> Ints:
    folded = tokens - flagged
    distance = np.where(folded % 2 == 1, (folded + 1) // 2, -(folded // 2))
    return np.where((tokens == 0) & (flagged == 1), 0, centre + distance + flagged)


def _prior() -> Ints:
    """Starting counts of every bucket: a flag is as likely as not, a distance half as likely each two steps."""
    row = np.ones(_ALPHABET, np.int64)
    row[0] += _PRIOR_WEIGHT * COUNT_UNIT // 2
    weights = np.array([1 << max(0, 20 - step) for step in range(_ALPHABET - 1)], np.int64)
    row[1:] += weights * (_PRIOR_WEIGHT * COUNT_UNIT // 2) // int(weights.sum())
    return np.tile(row, (4 * _EXPECTATIONS, 1))


# The codec


def encode_ngrams(numbers: NDArray[Any]) -> bytes:
    """Code a tensor.

    Args:
        numbers: int [n], from `TreeSource.numbers`.

    Raises:
        ArtifactError: it is no n-gram model.
    """
    given = TensorSource(numbers)
    header, coder = given.header(), WritingPass(_prior())
    read_tree(CodedSource(coder, header, len(numbers) - HEADER, given))
    given.finish()
    return b"".join(varint(number) for number in header) + block(coder.finish())


def decode_ngrams(payload: memoryview, count: int) -> NDArray[np.int32]:
    """The inverse of `encode_ngrams`, in memory proportional to `count`.

    Raises:
        ArtifactError: a payload that the encoder does not write.
    """
    reader = Reader(payload, "an n-gram model")
    header = (reader.varint(MAX_VOCABULARY), reader.varint(MAX_ORDER), reader.varint(MAX_LEVEL))
    if count < HEADER + header[0]:
        raise ArtifactError(f"artifact: an n-gram model of {header[0]} symbols cannot have {count} numbers")
    data = reader.block()
    reader.finish()
    source = CodedSource(ReadingPass(_prior(), data), header, count - HEADER)
    read_tree(source)
    numbers = np.concatenate([np.array(header, np.int32), *source.parts])
    if len(numbers) != count:
        raise ArtifactError(f"artifact: an n-gram model has {len(numbers)} numbers, its shape says {count}")
    return numbers
