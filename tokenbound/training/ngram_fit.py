"""Fitting a back-off n-gram model: counting, pruning, and the levels that are coded.

The model of a context c with parent p (c without its oldest symbol) is

    P(x | c) = (w(c, x) + E(c) P(x | p)) / (W(c) + E(c)),   W(c) = sum_x w(c, x)

with w(c, x) = 0 unless x is an entry of c; below the empty context P is uniform. Pruning follows Stolcke 1998 (arXiv
cs/0006025): an entry stays if the bits that it saves on the corpus are worth `rate` times the bits that it costs. The
weights are counts less what the parent gives anyway, E(c) minimises the loss on the corpus; both are rounded to half
octaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.ngram_codec import MAX_LEVEL, NgramTree, Order, TreeSource, read_tree
from tokenbound.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ENTRY_BITS = 6.0
"""What an entry costs, flags of its absent neighbours included; measured, and only a guide for pruning."""
CONTEXT_BITS = 16.0
"""What a context costs besides its entries."""
ESCAPES = range(-24, 3)
"""Levels of an escape, relative to its context's, that are tried."""
ROUNDS = 2
"""Weights and escapes are fitted in turn so often."""


@dataclass(frozen=True)
class Counts:
    """N-grams of one length as numbers in base V, oldest symbol first, rising; and how often each occurs."""

    keys: Ints
    counts: Ints


def check_order(vocab_size: int, order: int) -> None:
    """Require that an n-gram fits into 63 bits.

    Raises:
        InputError: it does not.
    """
    if vocab_size ** (order + 1) >= 1 << 63:
        most = next(k for k in range(64) if vocab_size ** (k + 2) >= 1 << 63)
        raise InputError(f"family.order {order}: with {vocab_size} ids it is {most} at most")


def count_ngrams(ids: NDArray[np.integer], order: int, vocab_size: int) -> Counts:
    """All n-grams of order + 1 symbols of a stream; the first `order` ids are only context."""
    stream = ids.astype(np.int64)
    keys = np.zeros(max(0, len(stream) - order), np.int64)
    for place in range(order + 1):
        keys = keys * vocab_size + stream[place : place + len(keys)]
    return Counts(*np.unique(keys, return_counts=True))


def merge_counts(parts: Sequence[Counts]) -> Counts:
    """The counts of several streams together."""
    return _summed(np.concatenate([part.keys for part in parts]), np.concatenate([part.counts for part in parts]))


def _summed(keys: Ints, counts: Ints) -> Counts:
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    return Counts(keys[first], np.add.reduceat(counts, first) if len(first) else counts)


class Grams:
    """The n-grams of one length with their contexts and their parents."""

    def __init__(self, counts: Counts, length: int, vocab_size: int, parents: Grams | None) -> None:
        self.keys, self.counts = counts.keys, counts.counts.astype(np.float64)
        self.symbols = self.keys % vocab_size
        contexts = self.keys // vocab_size
        self.starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
        self.context_keys = contexts[self.starts]
        self.context = np.repeat(np.arange(len(self.starts)), np.diff(np.append(self.starts, len(self.keys))))
        self.totals = np.add.reduceat(self.counts, self.starts)
        if parents is None:
            return
        without_oldest = vocab_size**length
        self.parent_gram = np.searchsorted(parents.keys, self.keys % without_oldest)
        self.parent_context = np.searchsorted(parents.context_keys, self.context_keys % (without_oldest // vocab_size))

    def per_context(self, values: Floats) -> Floats:
        """Sums over the n-grams of each context."""
        sums: Floats = np.add.reduceat(values, self.starts)
        return sums


def build_grams(counts: Counts, order: int, vocab_size: int) -> list[Grams]:
    """N-grams of 1 .. order + 1 symbols, from the longest."""
    by_length = [counts]
    for length in range(order, 0, -1):
        longer = by_length[-1]
        by_length.append(_summed(longer.keys % vocab_size**length, longer.counts))
    grams: list[Grams] = []
    for length, found in enumerate(reversed(by_length)):
        grams.append(Grams(found, length, vocab_size, grams[-1] if grams else None))
    return grams


@dataclass(frozen=True)
class Fitted:
    """What fitting gives."""

    tree: NgramTree
    tokens: int
    """Level of the number of tokens."""
    loss_bits: float
    """Mean loss on the counted tokens, each in its whole context."""


def fit_tree(grams: list[Grams], vocab_size: int, rate: float) -> Fitted:
    """The tree at a pruning rate.

    Args:
        grams: from `build_grams`.
        vocab_size: V.
        rate: bits of loss on the corpus that a bit of code must save.
    """
    kept = prune(grams, vocab_size, rate)
    orders: list[Order] = []
    places = np.zeros(1, np.int64)
    probabilities = np.full(len(grams[0].keys), 1 / vocab_size)
    for length, (gram, (entries, contexts)) in enumerate(zip(grams, kept, strict=True)):
        if length:
            probabilities = probabilities[gram.parent_gram]
        weight, escape = _fit_levels(gram, entries, probabilities)
        rows, places = _ordered(gram, contexts, places, length, vocab_size)
        orders.append(_order(gram, entries, weight, escape, rows, places, length, vocab_size))
        probabilities = _mixed(gram, _weights(weight, entries), 2.0 ** (escape / 2), probabilities)
        renumbered = np.full(len(gram.context_keys), -1)
        renumbered[rows] = np.arange(len(rows))
        places = renumbered
    longest = grams[-1].counts
    loss = -float(longest @ np.log2(probabilities)) / float(longest.sum())
    return Fitted(NgramTree(vocab_size, tuple(orders)), int(_level(grams[0].totals)[0]), loss)


def tree_numbers(fitted: Fitted) -> NDArray[np.int32]:
    """The tree as the tensor that an artifact holds."""
    source = TreeSource(fitted.tree, fitted.tokens)
    read_tree(source)
    return source.numbers()


def prune(grams: list[Grams], vocab_size: int, rate: float) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Which n-grams are entries and which contexts are kept, for each length, closed as the code needs it."""
    codable = _codable(grams, vocab_size)
    found: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
    wanted = np.zeros(len(grams[-1].keys), np.bool_)
    asked = np.zeros(len(grams[-1].context_keys), np.bool_)
    pairs: list[Ints] = []
    for length in range(len(grams) - 1, 0, -1):
        gram, above = grams[length], grams[length - 1]
        if length == 1 and pairs:
            needed = np.searchsorted(gram.keys, np.unique(np.concatenate(pairs)))
            wanted[needed] = True
            asked[gram.context[needed]] = True
        entries, contexts = _worth(gram, above, wanted, asked, codable[length], rate)
        found.append((entries, contexts))
        if length > 1:
            pairs.append(gram.context_keys[contexts] // vocab_size ** (length - 2))
        wanted = np.zeros(len(above.keys), np.bool_)
        wanted[gram.parent_gram[entries]] = True
        asked = np.zeros(len(above.context_keys), np.bool_)
        asked[gram.parent_context[contexts]] = True
        asked[above.context[wanted]] = True
    root = (np.ones(len(grams[0].keys), np.bool_), np.ones(1, np.bool_))
    return [root, *reversed(found)]


def _codable(grams: list[Grams], vocab_size: int) -> list[NDArray[np.bool_]]:
    """Contexts, for each length, that the code can name: what makes them longer has been counted as an n-gram itself.

    The first symbols of a stream are contexts that nothing was counted for: one may stand nowhere else.
    """
    found = [np.ones(1, np.bool_)]
    for length, gram in enumerate(grams[1:], 1):
        known = np.isin(gram.context_keys // vocab_size ** (length - 1), grams[0].keys)
        if length > 1:
            known &= np.isin(gram.context_keys // vocab_size ** (length - 2), grams[1].keys)
        found.append(known & found[-1][gram.parent_context])
    return found


def _worth(
    gram: Grams,
    above: Grams,
    wanted: NDArray[np.bool_],
    asked: NDArray[np.bool_],
    codable: NDArray[np.bool_],
    rate: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Entries and contexts whose saving is worth their price, and those that longer contexts need."""
    own = gram.counts / gram.totals[gram.context]
    parent = above.counts[gram.parent_gram] / above.totals[above.context[gram.parent_gram]]
    saved = gram.counts * np.log2(own / parent)
    entries = wanted | (saved > rate * ENTRY_BITS)
    left_own = np.maximum(1 - gram.per_context(np.where(entries, own, 0.0)), 0.0)
    left_parent = np.maximum(1 - gram.per_context(np.where(entries, parent, 0.0)), 1e-12)
    rest = gram.totals * left_own * np.log2(np.maximum(left_own, 1e-12) / left_parent)
    gain = gram.per_context(np.where(entries, saved, 0.0)) + rest
    price = rate * (CONTEXT_BITS + ENTRY_BITS * gram.per_context(entries.astype(np.float64)))
    contexts = codable & (asked | (gain > price))
    return entries & contexts[gram.context], contexts


def _level(values: Floats) -> Ints:
    """Half octaves, rounded."""
    return np.asarray(np.clip(np.rint(2 * np.log2(np.maximum(values, 1.0))), 0, MAX_LEVEL), np.int64)


def _weights(levels: Ints, entries: NDArray[np.bool_]) -> Floats:
    return np.where(entries, 2.0 ** (levels / 2), 0.0)


def _fit_levels(gram: Grams, entries: NDArray[np.bool_], parent: Floats) -> tuple[Ints, Ints]:
    """Levels of the weights of all n-grams and of the escapes of all contexts."""
    weight = _level(gram.counts)
    escape = _best_escape(gram, _weights(weight, entries), parent)
    for _ in range(ROUNDS):
        given = (2.0 ** (escape / 2))[gram.context] * parent
        weight = _level(np.maximum(gram.counts - given, gram.counts / 8))
        escape = _best_escape(gram, _weights(weight, entries), parent)
    return weight, escape


def _best_escape(gram: Grams, weights: Floats, parent: Floats) -> Ints:
    """The level of each context's escape that gives its n-grams the smallest loss."""
    centre = _level(gram.totals)
    best, choice = np.full(len(centre), -np.inf), np.zeros(len(centre), np.int64)
    for step in ESCAPES:
        levels = np.clip(centre + step, 0, MAX_LEVEL)
        likelihood = gram.per_context(gram.counts * np.log(_mixed(gram, weights, 2.0 ** (levels / 2), parent)))
        better = likelihood > best
        best[better], choice[better] = likelihood[better], levels[better]
    return choice


def _mixed(gram: Grams, weights: Floats, escape: Floats, parent: Floats) -> Floats:
    """P(x | c) of every n-gram."""
    total = gram.per_context(weights) + escape
    return np.asarray((weights + escape[gram.context] * parent) / total[gram.context])


def _ordered(gram: Grams, contexts: NDArray[np.bool_], places: Ints, length: int, vocab_size: int) -> tuple[Ints, Ints]:
    """Kept contexts sorted by their parent's place and their oldest symbol, and the places of their parents."""
    rows = np.flatnonzero(contexts)
    if not length:
        return rows, np.zeros(1, np.int64)
    parent = places[gram.parent_context[rows]]
    oldest = gram.context_keys[rows] // vocab_size ** (length - 1)
    order = np.lexsort((oldest, parent))
    return rows[order], parent[order]


def _order(
    gram: Grams,
    entries: NDArray[np.bool_],
    weight: Ints,
    escape: Ints,
    rows: Ints,
    parents: Ints,
    length: int,
    vocab_size: int,
) -> Order:
    """One length of the tree, its contexts in the order of `rows`."""
    rank = np.full(len(gram.context_keys), -1)
    rank[rows] = np.arange(len(rows))
    chosen = np.flatnonzero(entries)
    owner = rank[gram.context[chosen]]
    chosen = chosen[np.argsort(owner, kind="stable")]
    symbol = gram.context_keys[rows] // vocab_size ** (length - 1) if length else np.zeros(1, np.int64)
    starts = np.searchsorted(np.sort(owner), np.arange(len(rows) + 1))
    return Order(parents, symbol, _level(gram.totals[rows]), escape[rows], starts, gram.symbols[chosen], weight[chosen])
