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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.coder import COUNT_UNIT, Ints, Pass, ReadingPass, WritingPass
from tokenbound.compression.container import ArtifactError, Reader, block, varint
from tokenbound.compression.dtypes import tensor_bytes

if TYPE_CHECKING:
    import torch

MAX_LEVEL = 100
"""Half octaves: a count of 2^50."""
MAX_ORDER = 16
MAX_VOCABULARY = 1 << 24
MAX_NUMBERS = (1 << 31) - 1
"""Of a sequence with its header: places are held in 32 bits."""
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


Part = tuple[Ints, Ints, Ints]
"""Owners, symbols and expected levels of consecutive candidates."""


@dataclass(frozen=True)
class Candidates:
    """What the sequence says something of next: rows of candidates, made part by part and never held as a whole."""

    count: int
    """How many there are."""
    num_rows: int
    spans: Callable[[Ints], tuple[Ints, Ints]]
    """Consecutive rows to the first place of each and the number of its places."""
    look: Callable[[Ints, Ints], tuple[Ints, Ints]]
    """Rows and places to symbols and expected levels."""

    def parts(self, sizes: Iterable[int], *, lookup_rows: int = _MAX_BLOCK) -> Iterator[Part]:
        """All candidates in order, in parts of these sizes; the owner of a candidate is its row.

        Args:
            sizes: Candidates of each part.
            lookup_rows: Rows whose spans are asked for at once.
        """
        row = done = 0
        for size in sizes:
            owners, places = _none(0), _none(0)
            while len(owners) < size:
                rows = np.arange(row, min(row + lookup_rows, self.num_rows))
                first, counts = self.spans(rows)
                ends = np.cumsum(counts)
                stop = min(done + size - len(owners), int(ends[-1]))
                flat = np.arange(done, stop)
                inside = np.searchsorted(ends, flat, side="right")
                owners = np.concatenate([owners, rows[inside]])
                places = np.concatenate([places, (first + counts - ends)[inside] + flat])
                finished = int(np.searchsorted(ends, stop, side="right"))
                row, done = row + finished, stop - (int(ends[finished - 1]) if finished else 0)
            yield owners, *self.look(owners, places)


class Source(Protocol):
    """Where the sequence comes from: a tensor, a code, or a tree that is to be written."""

    @property
    def left(self) -> int:
        """How many numbers may still come; nothing longer is allocated."""

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""

    def take(self, kind: int, order: int, candidates: Candidates) -> NDArray[np.integer]:
        """The next numbers of the sequence, one for each candidate.

        Args:
            kind: `CONTEXT`, `ESCAPE`, `ENTRY` or `DEEP_ENTRY`.
            order: Length of the contexts.
            candidates: Rows are parents (of contexts), else contexts; the symbols of escapes are zeros.
        """


# Walking through the sequence. Symbols and levels are held together in 32 bits, and of the orders only the last two and
# the first two, so that decoding takes no more memory beside its result than the result itself.

Packed = NDArray[np.uint32]
"""Symbol << 8 | level; rising where symbols are."""


def _pack(symbols: Ints, levels: Ints) -> Packed:
    return (symbols << 8 | levels).astype(np.uint32)


def _symbols(packed: Packed) -> Ints:
    return (packed >> 8).astype(np.int64)


def _levels(packed: Packed) -> Ints:
    return (packed & 0xFF).astype(np.int64)


@dataclass(frozen=True)
class _Walked:
    """One order of the tree as it is walked through."""

    contexts: Packed
    """[C] the oldest symbol, and the level of the count."""
    ends: NDArray[np.int32]
    """[C] where each context's entries end."""
    entries: Packed
    """[E]"""

    def spans(self, rows: NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Where the entries of contexts begin, and how many there are."""
        first = np.where(rows > 0, self.ends[rows - 1], 0).astype(np.int64)
        return first, self.ends[rows] - first


Seen = Callable[[NDArray[np.int32], NDArray[np.integer], _Walked], None]
"""Told of every order: parents and escapes of its contexts, and the rest."""


def read_tree(source: Source) -> NgramTree:
    """Walk through the sequence and build the tree.

    Raises:
        ArtifactError: a number that the writer does not write.
    """
    orders: list[Order] = []

    def see(parents: NDArray[np.int32], escapes: NDArray[np.integer], found: _Walked) -> None:
        starts = np.concatenate([_none(1), found.ends.astype(np.int64)])
        contexts, entries = found.contexts, found.entries
        wide = (parents.astype(np.int64), _symbols(contexts), _levels(contexts), escapes.astype(np.int64))
        orders.append(Order(*wide, starts, _symbols(entries), _levels(entries)))

    _walk(source, see)
    return NgramTree(source.header()[0], tuple(orders))


def _walk(source: Source, see: Seen | None = None) -> None:
    """Take every number of the sequence; what nobody sees and no later order needs is not kept."""
    vocab_size, depth, total = source.header()
    if not (2 <= vocab_size <= MAX_VOCABULARY and 0 <= depth <= MAX_ORDER and 0 <= total <= MAX_LEVEL):
        raise ArtifactError(f"artifact: an n-gram model with V = {vocab_size}, order {depth} and level {total}")
    level = total - 2 * (vocab_size.bit_length() - 1)
    uniform = Candidates(
        vocab_size,
        1,
        lambda rows: (_none(1), np.array([vocab_size])),
        lambda rows, places: (places, np.full(len(places), level)),
    )
    empty_context = np.array([total], np.uint32)
    orders = [_read_entries(source, 0, np.zeros(1, np.int32), empty_context, uniform, see, is_last=not depth)]
    for order in range(1, depth + 1):
        parents, contexts = _read_contexts(source, order, _longer(orders, source.left))
        entries = _inherited(orders[-1], parents, contexts, source.left)
        found = _read_entries(source, order, parents, contexts, entries, see, is_last=order == depth)
        orders = [*orders[:2], found]


def _none(count: int) -> Ints:
    return np.zeros(count, np.int64)


def _limited(count: int, limit: int) -> int:
    """A number of candidates.

    Raises:
        ArtifactError: there are more than `limit`.
    """
    if count > limit:
        raise ArtifactError("artifact: an n-gram model is longer than its shape says")
    return count


def _count(counts_of: Callable[[Ints], Ints], num_rows: int) -> int:
    """The sum of the counts of all rows."""
    return sum(int(counts_of(rows).sum()) for rows in _blocks_of(num_rows))


def _blocks_of(count: int) -> Iterator[Ints]:
    for start in range(0, count, _MAX_BLOCK):
        yield np.arange(start, min(start + _MAX_BLOCK, count))


def _sizes(count: int) -> Iterator[int]:
    return (min(_MAX_BLOCK, count - start) for start in range(0, count, _MAX_BLOCK))


def _longer(orders: list[_Walked], limit: int) -> Candidates:
    """Every context that may be one longer than the last: what lengthens it, and what level is expected."""
    root, above = orders[0], orders[-1]
    if len(orders) == 1:
        return Candidates(len(root.entries), 1, root.spans, lambda rows, places: _unpacked(root.entries[places]))
    columns = _Columns.of(orders[1], above, limit)

    def look(rows: Ints, places: Ints) -> tuple[Ints, Ints]:
        oldest = above.contexts[rows]
        single = root.entries[_find(root.entries, oldest)]
        symbols, levels = _unpacked(columns.pairs[places])
        return symbols, levels + _levels(oldest) - _levels(single)

    return Candidates(columns.count, len(above.contexts), lambda rows: columns.spans(above.contexts[rows]), look)


def _unpacked(packed: Packed) -> tuple[Ints, Ints]:
    return _symbols(packed), _levels(packed)


def _find(rising: Packed, wanted: Packed) -> NDArray[np.intp]:
    """Where the symbols of `wanted` stand; the next larger symbol's place, or the last, where one is missing."""
    return np.minimum(np.searchsorted(rising, wanted & np.uint32(0xFFFFFF00)), len(rising) - 1)


@dataclass(frozen=True)
class _Columns:
    """Pairs (a, b) by b: the contexts b ... may be lengthened by a."""

    second: Packed
    """Contexts of one symbol: b is their symbol."""
    starts: Ints
    """Where the pairs of each b begin, one more than there are contexts."""
    pairs: Packed
    """a, and the level of the pair, for each b that is asked for."""
    count: int
    """Pairs of all contexts to be lengthened."""

    def spans(self, contexts: Packed) -> tuple[Ints, Ints]:
        """First place and number of the pairs of contexts, by their oldest symbol."""
        column = _find(self.second, contexts)
        return self.starts[column], self.starts[column + 1] - self.starts[column]

    @staticmethod
    def of(single: _Walked, above: _Walked, limit: int) -> _Columns:
        """The pairs that `above` asks for.

        Raises:
            ArtifactError: its contexts have more than `limit` of them.
        """
        asked = np.zeros(len(single.contexts), np.bool_)
        for rows in _blocks_of(len(above.contexts)):
            asked[_find(single.contexts, above.contexts[rows])] = True
        starts = _none(len(asked) + 1)
        for _, columns, _ in _pairs_of(single, asked):
            starts[1:] += np.bincount(columns, minlength=len(asked))
        np.cumsum(starts, out=starts)
        found = _Columns(single.contexts, starts, np.zeros(0, np.uint32), 0)
        count = _limited(_count(lambda rows: found.spans(above.contexts[rows])[1], len(above.contexts)), limit)
        pairs, filled = np.empty(int(starts[-1]), np.uint32), starts.copy()
        for owners, columns, levels in _pairs_of(single, asked):
            order = np.argsort(columns, kind="stable")
            columns, counts = columns[order], np.bincount(columns, minlength=len(asked))
            within = np.arange(len(columns)) - (np.cumsum(counts) - counts)[columns]
            pairs[filled[columns] + within] = _pack(_symbols(single.contexts[owners[order]]), levels[order])
            filled[:-1] += counts
        return _Columns(single.contexts, starts, pairs, count)


def _pairs_of(single: _Walked, asked: NDArray[np.bool_]) -> Iterator[Part]:
    """Of the pairs whose second symbol is asked for: the context that is the first, that which is the second, level."""
    every = Candidates(len(single.entries), len(single.contexts), single.spans, lambda rows, places: (places, places))
    for owners, places, _ in every.parts(_sizes(every.count)):
        entries = single.entries[places]
        columns = _find(single.contexts, entries)
        kept = asked[columns] & (single.contexts[columns] >> 8 == entries >> 8)
        yield owners[kept], columns[kept], _levels(entries[kept])


def _read_contexts(source: Source, order: int, candidates: Candidates) -> tuple[NDArray[np.int32], Packed]:
    """Parents and symbols of the new contexts."""
    found = _checked(source.take(CONTEXT, order, candidates), MAX_LEVEL + 1)
    # Each has an escape and an entry or more.
    count = _limited(2 * int(np.count_nonzero(found)), source.left) // 2
    parents, contexts, filled = np.empty(count, np.int32), np.empty(count, np.uint32), 0
    for owners, kept, packed in _kept(candidates, found):
        cut = slice(filled, filled + len(packed))
        parents[cut], contexts[cut], filled = owners[kept], packed, cut.stop
    return parents, contexts


def _kept(candidates: Candidates, found: NDArray[np.integer]) -> Iterator[tuple[Ints, NDArray[np.bool_], Packed]]:
    """Part by part: owners, which of them are kept, and those packed."""
    start = 0
    for owners, symbols, _ in candidates.parts(_sizes(candidates.count)):
        numbers, start = found[start : start + len(owners)].astype(np.int64), start + len(owners)
        kept = numbers > 0
        yield owners, kept, _pack(symbols[kept], numbers[kept] - 1)


def _inherited(above: _Walked, parents: NDArray[np.int32], contexts: Packed, limit: int) -> Candidates:
    """The entries of each new context's parent, and the levels that the counts of both let expect."""
    count = _limited(_count(lambda rows: above.spans(parents[rows])[1], len(parents)), limit)

    def look(rows: Ints, places: Ints) -> tuple[Ints, Ints]:
        symbols, levels = _unpacked(above.entries[places])
        return symbols, levels + _levels(contexts[rows]) - _levels(above.contexts[parents[rows]])

    return Candidates(count, len(parents), lambda rows: above.spans(parents[rows]), look)


def _read_entries(
    source: Source,
    order: int,
    parents: NDArray[np.int32],
    contexts: Packed,
    candidates: Candidates,
    see: Seen | None,
    *,
    is_last: bool,
) -> _Walked:
    """Escapes and entries of new contexts; `parents` becomes where entries end, to spare the memory."""
    escapes = Candidates(
        len(contexts),
        len(contexts),
        lambda rows: (rows, np.ones(len(rows), np.int64)),
        lambda rows, places: (_none(len(rows)), _levels(contexts[rows])),
    )
    escape = _checked(source.take(ESCAPE, order, escapes), MAX_LEVEL)
    found = _checked(source.take(DEEP_ENTRY if order > 1 else ENTRY, order, candidates), MAX_LEVEL + 1)
    if is_last and see is None:
        return _Walked(contexts[:0], parents[:0], contexts[:0])
    kept_parents = None if see is None else parents.copy()
    entries, ends = np.empty(int(np.count_nonzero(found)), np.uint32), parents
    filled = row = 0
    for owners, kept, packed in _kept(candidates, found):
        ends[row : owners[0]] = filled  # the row that the last part ended in is whole now
        through = filled + np.cumsum(kept)
        whole = owners < owners[-1]
        ends[owners[whole]] = through[whole]  # of a row that stands several times its last place counts
        entries[filled : filled + len(packed)] = packed
        filled, row = filled + len(packed), int(owners[-1])
    ends[row:] = filled
    _require_entries(ends)
    walked = _Walked(contexts, ends, entries)
    if see is not None and kept_parents is not None:
        see(kept_parents, escape, walked)
    return walked


def _require_entries(ends: NDArray[np.int32]) -> None:
    before = 0
    for rows in _blocks_of(len(ends)):
        if (np.diff(ends[rows], prepend=before) < 1).any():
            raise ArtifactError("artifact: a context of an n-gram model has no entries")
        before = int(ends[rows[-1]])


def _checked(values: NDArray[np.integer], largest: int) -> NDArray[np.integer]:
    if values.size and not 0 <= values.min() <= values.max() <= largest:
        raise ArtifactError(f"artifact: a level of an n-gram model lies outside 0..{largest}")
    return values


# Sources


class TensorSource:
    """The sequence as a tensor holds it."""

    def __init__(self, numbers: NDArray[Any]) -> None:
        self._numbers, self._place = numbers, HEADER

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

    def take(self, kind: int, order: int, candidates: Candidates) -> NDArray[np.integer]:
        """The next numbers."""
        start, self._place = self._place, self._place + candidates.count
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
        """No limit but that of all sequences: the tree is there already."""
        return MAX_NUMBERS

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""
        first, second, third = self._parts[0].tolist()
        return first, second, third

    def take(self, kind: int, order: int, candidates: Candidates) -> NDArray[np.integer]:
        """The tree's numbers for these candidates."""
        level = self._tree.orders[order]
        if kind == ESCAPE:
            found = level.escape
        elif kind == CONTEXT:
            found = self._look_up(level.keys(self._tree.vocab_size), level.total, candidates)
        else:
            found = self._look_up(level.owners() * self._tree.vocab_size + level.entry, level.level, candidates)
        self._parts.append(found)
        return found

    def _look_up(self, keys: Ints, levels: Ints, candidates: Candidates) -> Ints:
        found, start = _none(candidates.count), 0
        if not len(keys):
            return found
        for owners, symbols, _ in candidates.parts(_sizes(candidates.count)):
            wanted = owners * self._tree.vocab_size + symbols
            places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found[start : start + len(wanted)] = np.where(keys[places] == wanted, levels[places] + 1, 0)
            start += len(wanted)
        return found

    def numbers(self) -> NDArray[np.int32]:
        """All numbers that were asked for, header first."""
        return np.concatenate(self._parts).astype(np.int32)


class CodedSource:
    """The sequence inside a code: writes that of another source, or reads.

    Args:
        coder: What writes or reads.
        header: V, order, level of the number of tokens.
        count: Length of the sequence with its header.
        given: What is written; None to read.
    """

    def __init__(self, coder: Pass, header: tuple[int, int, int], count: int, given: Source | None = None) -> None:
        if count > MAX_NUMBERS:
            raise ArtifactError(f"artifact: an n-gram model has at most {MAX_NUMBERS} numbers, not {count}")
        self._coder, self._header, self._given = coder, header, given
        self._place, self._done = HEADER, 0
        self.numbers = np.empty(count, np.int32)
        self.numbers[:HEADER] = header

    def header(self) -> tuple[int, int, int]:
        """V, order, level of the number of tokens."""
        return self._header

    @property
    def left(self) -> int:
        """Numbers not yet coded."""
        return len(self.numbers) - self._place

    def take(self, kind: int, order: int, candidates: Candidates) -> NDArray[np.integer]:
        """Code the next numbers, relative to what is expected."""
        start, stop = self._place, self._place + _limited(candidates.count, self.left)
        known = None if self._given is None else self._given.take(kind, order, candidates)
        flagged = 0 if kind == ESCAPE else 1
        for _, _, expected in candidates.parts(self._growing(candidates.count)):
            place = self._place - start
            centre = np.clip(expected, 0, MAX_LEVEL)
            buckets = (kind * _EXPECTATIONS + np.clip(expected - _LOWEST, 0, _EXPECTATIONS - 1)).astype(np.uint8)
            tokens = None if known is None else _relative(known[place : place + len(expected)], centre, flagged)
            coded = self._coder.code(tokens, buckets)
            self.numbers[self._place : self._place + len(expected)] = _absolute(coded, centre, flagged)
            self._place += len(expected)
        return self.numbers[start:stop]

    def _growing(self, count: int) -> Iterator[int]:
        """Sizes of blocks that grow as the models learn."""
        start = 0
        while start < count:
            size = min(count - start, _MAX_BLOCK, max(_FIRST_BLOCK, self._done // 8))
            start, self._done = start + size, self._done + size
            yield size


def _relative(numbers: NDArray[np.integer], centre: Ints, flagged: int) -> NDArray[np.int32]:
    """0 stays where it is a flag; a level becomes its distance from the centre, in the order 0, 1, -1, 2, ..."""
    distance = numbers.astype(np.int64) - flagged - centre
    folded = flagged + np.where(distance > 0, 2 * distance - 1, -2 * distance)
    return np.where((numbers == 0) & (flagged == 1), 0, folded).astype(np.int32)


def _absolute(tokens: NDArray[np.integer], centre: Ints, flagged: int) -> Ints:
    folded = tokens.astype(np.int64) - flagged
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
    _walk(CodedSource(coder, header, len(numbers), given))
    given.finish()
    return b"".join(varint(number) for number in header) + block(coder.finish())


def decode_ngrams(payload: memoryview, count: int) -> NDArray[np.int32]:
    """The inverse of `encode_ngrams`, in no more memory beside its result than the result takes.

    Raises:
        ArtifactError: a payload that the encoder does not write.
    """
    reader = Reader(payload, "an n-gram model")
    header = (reader.varint(MAX_VOCABULARY), reader.varint(MAX_ORDER), reader.varint(MAX_LEVEL))
    if count < HEADER + header[0]:
        raise ArtifactError(f"artifact: an n-gram model of {header[0]} symbols cannot have {count} numbers")
    data = reader.block()
    reader.finish()
    source = CodedSource(ReadingPass(_prior(), data), header, count)
    _walk(source)
    if source.left:
        raise ArtifactError(f"artifact: an n-gram model has {count - source.left} numbers, its shape says {count}")
    return source.numbers


def decode_tensor(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The numbers as a tensor.

    Raises:
        ArtifactError: a payload that the encoder does not write, or not one int32 row.
    """
    import torch

    if dtype != torch.int32 or len(shape) != 1:
        raise ArtifactError(f"artifact: an n-gram model is one int32 row, not {dtype} of {len(shape)} axes")
    return torch.from_numpy(decode_ngrams(payload, shape[0]))


def plain_numbers(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The numbers in plain bytes: what a general codec would be given."""
    return tensor_bytes(decode_tensor(payload, shape, dtype)).tobytes()
