"""What a corpus says of its own windows: code lengths of their tokens under n-grams of the corpus itself.

A sampled run takes from the sum of each window what these numbers explain (:mod:`tokenbound.bounds.controls`), so they
are needed of every window, and have to be cheap: two streaming passes. The first counts n-grams, each order in a table
of its own into which they are hashed; the second gives every token the probability

    p_n(x | context) = (c_n - 1 + b p_{n-1}) / (c_{n-1} - 1 + b),    p_0 = 1 / V,

c_n the count of the n-gram that ends in it, c_{n-1} that of its context: one occurrence, the token's own, is left out.
The counts are of the whole corpus, before and behind the token, and contexts run on over documents: a control variate
may be any function of the corpus. Equal hashes only blur it.

Every number is an integer or a single IEEE operation in float32, and code lengths are read from a table in units of
1/256 bit. So the sums of a window are the same to the last digit on every machine, however the work was divided.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from io import BytesIO
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenbound.corpus.prepared import Manifest, PreparedCorpus
from tokenbound.corpus.windows import CorpusPlan, SegmentPlan, TargetPlan
from tokenbound.errors import MismatchError
from tokenbound.store.filesystem import read_bytes, resolve, write_bytes
from tokenbound.store.uri import join

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

KIND: Final = "ngrams-1"
"""Names this way of making features; another way gets another name."""

FOLDER = "features"
"""Of a prepared corpus."""

SMALL_VOCABULARY = 1 << 9
"""Up to so many ids, bytes for example, orders 2 to 4 are used, above it 1 to 3."""
MAX_TABLE_BITS, MIN_TABLE_BITS = 27, 16
"""A table has 2^27 cells at most, half a gigabyte, however large the corpus is."""
BACK_OFF = 8.0
"""b: weight of the shorter context, in occurrences."""
UNITS_PER_BIT = 256
BLOCK_TOKENS = 1 << 15
"""Tokens held at once: their buffers fit the cache of a core."""
PART_TOKENS = 1 << 23
"""About how many tokens one task of the second pass reads."""

_MULTIPLIER, _MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_MANTISSA_BITS, _LOWEST_EXPONENT = 12, 40
"""Code lengths are looked up by the first bits of a float32 mantissa; none exceeds 40 bits."""


class Run(Protocol):
    """Something that maps a function over items, in order."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """The results, in the order of the items."""


@dataclass(frozen=True)
class FeatureRule:
    """What decides the features of a prepared corpus."""

    tokens_sha256: str
    length: int
    context: str
    stride: int
    orders: tuple[int, ...]
    """Of the n-grams whose code lengths are kept."""
    table_bits: int
    """Log2 of the cells of each table."""
    kind: Literal["ngrams-1"] = KIND

    @classmethod
    def of(cls, manifest: Manifest, *, length: int, context: str, stride: int | None) -> FeatureRule:
        """Orders by the vocabulary, tables by the number of tokens."""
        highest = 4 if manifest.vocab_size <= SMALL_VOCABULARY else 3
        bits = min(max((manifest.tokens - 1).bit_length(), MIN_TABLE_BITS), MAX_TABLE_BITS)
        return cls(
            manifest.tokens_sha256,
            length,
            context,
            length if stride is None else stride,
            tuple(range(highest - 2, highest + 1)),
            bits,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns.

        >>> FeatureRule("", 512, "packed", 512, (2, 3, 4), 20).names
        ('tokens', 'bits_2', 'bits_3', 'bits_4')
        """
        return ("tokens", *(f"bits_{order}" for order in self.orders))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Features:
    """The features of all windows of a corpus, as they are stored."""

    table: NDArray[np.int64]
    """[N, 1 + orders]: scored tokens of each window, and their code length under each order in 1/256 bit."""
    data: bytes
    """The table as a NumPy file, whose digest certificates name."""

    @classmethod
    def of(cls, table: NDArray[np.integer]) -> Features:
        """Features and their stored form."""
        stream = BytesIO()
        stored = np.ascontiguousarray(table, dtype="<i8")
        np.save(stream, stored, allow_pickle=False)
        return cls(stored, stream.getvalue())

    @classmethod
    def parse(cls, data: bytes, origin: str) -> Features:
        """The inverse.

        Raises:
            MismatchError: the bytes are no table of features.
        """
        try:
            table = np.load(BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            table = np.zeros(0)
        if table.ndim != 2 or table.shape[1] < 2 or table.dtype != np.dtype("<i8"):
            raise MismatchError(f"{origin} is not a table of features; restore it or delete the run")
        return cls(table, data)

    @property
    def sha256(self) -> str:
        """Digest of the stored form."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] scored tokens of each window."""
        return self.table[:, 0].astype(np.int64)


def corpus_features(root: str, rule: FeatureRule, run: Run = map) -> Features:
    """The features of a prepared corpus, computed where they are not kept beside it already.

    Args:
        root: of the prepared corpus.
        rule: what they are.
        run: how functions are mapped over orders and parts of the corpus.
    """
    name = join(root, FOLDER, rule.digest[:32])
    kept = _kept(name)
    if kept is not None:
        return kept
    found = compute_features(root, rule, run)
    try:
        write_bytes(*resolve(f"{name}.npy"), found.data)
        write_bytes(*resolve(f"{name}.sha256"), found.sha256.encode())
    except OSError as error:  # the corpus may be shared where this user only reads; the run keeps its own copy
        logger.warning("the features are not kept beside the corpus (%s); the next run computes them again", error)
    return found


def _kept(name: str) -> Features | None:
    """Features that were computed before; None where there are none, or they are not whole."""
    try:
        digest, data = (read_bytes(*resolve(f"{name}.{ending}")) for ending in ("sha256", "npy"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Features.parse(data, f"{name}.npy") if hashlib.sha256(data).hexdigest().encode() == digest else None


def compute_features(
    root: str,
    rule: FeatureRule,
    run: Run = map,
    *,
    block_tokens: int = BLOCK_TOKENS,
    part_tokens: int = PART_TOKENS,
) -> Features:
    """The same, always computed.

    Args:
        root: of the prepared corpus.
        rule: what they are.
        run: how functions are mapped over orders and parts of the corpus.
        block_tokens: tokens held at once.
        part_tokens: about how many tokens one task of the second pass reads.
    """
    corpus = PreparedCorpus(root)
    count = partial(count_ngrams, corpus, rule, block_tokens=block_tokens)
    tables = tuple(run(count, range(1, rule.orders[-1] + 1)))
    plan = _plan(corpus, rule)
    parts = [part for index, segment in enumerate(plan.segments) for part in _parts(index, segment, part_tokens)]
    rows = list(run(partial(window_features, corpus, rule, tables, block_tokens=block_tokens), parts))
    return Features.of(np.concatenate(rows))


def _plan(corpus: PreparedCorpus, rule: FeatureRule) -> CorpusPlan:
    context: Any = rule.context
    return corpus.plan(length=rule.length, context=context, stride=rule.stride)


@dataclass(frozen=True, eq=False)
class _Part:
    """Consecutive windows of one segment."""

    segment: int
    starts: NDArray[np.int64]
    """[W] stream index of the first token that each window predicts."""
    ends: NDArray[np.int64]
    """[W] stream index behind the last one."""
    tokens: NDArray[np.int64]
    """[W] tokens between them that are scored."""


def _parts(index: int, segment: SegmentPlan | TargetPlan, part_tokens: int) -> Iterator[_Part]:
    first = 0
    while first < segment.num_windows:
        fitting = segment.windows_within(segment.targets_before(first) + part_tokens)
        stop = min(max(fitting, first + 1), segment.num_windows)
        start, num_inputs, first_target, tokens = segment.locate(np.arange(first, stop))
        yield _Part(index, start + first_target + 1, start + num_inputs + 1, tokens)
        first = stop


def count_ngrams(
    corpus: PreparedCorpus, rule: FeatureRule, order: int, *, block_tokens: int = BLOCK_TOKENS
) -> NDArray[np.uint32]:
    """[cells] how often each n-gram of one order occurs, by its hash. Memory is the table and a block of tokens.

    Args:
        corpus: whose.
        rule: for the size of the table.
        order: n.
        block_tokens: tokens held at once.
    """
    table = np.zeros(_cells(corpus.manifest, rule, order), np.uint32)
    for segment, record in enumerate(corpus.manifest.segments):
        for start in range(0, record.tokens, block_tokens):
            first = max(start - order + 1, 0)
            ids = corpus.read_ids(segment, first, min(start + block_tokens, record.tokens))
            *_, cells = _hashes(ids, order, table.size)
            np.add.at(table, cells, np.uint32(1))
    return table


def _cells(manifest: Manifest, rule: FeatureRule, order: int) -> int:
    """Cells of a table; single ids are counted exactly."""
    return 1 << (manifest.rule.max_id.bit_length() if order == 1 else rule.table_bits)


def _hashes(ids: NDArray[np.integer], orders: int, cells: int | Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """For each order n, [T - n + 1] the cell of the n-gram that ends in each id from the n-th on."""
    sizes = [cells] * orders if isinstance(cells, int) else cells
    wide = ids.astype(np.uint64)
    yield ids.astype(np.int64)
    keys, wide = wide + np.uint64(1), wide + np.uint64(1)
    for order in range(2, orders + 1):
        # The id before the n - 1 others comes in front: key_n(i) = key_{n-1}(i) + id(i - n + 1) M^{n-1}.
        wide = wide[:-1] * _MULTIPLIER
        keys = keys[1:] + wide
        mixed = keys * _MIXER
        mixed ^= mixed >> np.uint64(32)
        mixed *= _MULTIPLIER
        mixed >>= np.uint64(64 - (sizes[order - 1].bit_length() - 1))
        yield mixed.view(np.int64)


def window_features(
    corpus: PreparedCorpus,
    rule: FeatureRule,
    tables: Sequence[NDArray[np.uint32]],
    part: _Part,
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> NDArray[np.int64]:
    """[W, 1 + orders] the features of some windows.

    Args:
        corpus: whose.
        rule: which orders.
        tables: of orders 1, 2, ..
        part: the windows.
        block_tokens: tokens held at once.
    """
    sums = np.zeros((len(part.starts), len(rule.orders)), np.int64)
    ends, context = part.ends, len(tables)
    for start in range(int(part.starts[0]), int(ends[-1]), block_tokens):
        stop, first = min(start + block_tokens, int(ends[-1])), max(start - context, 0)
        ids, scored = corpus.read_ids(part.segment, first, stop), corpus.targets_between(part.segment, start, stop)
        low, high = np.searchsorted(ends, start, side="right"), np.searchsorted(part.starts, stop, side="left")
        begin, end = (np.clip(edge[low:high] - start, 0, stop - start) for edge in (part.starts, ends))
        for column, lengths in enumerate(_code_lengths(ids, corpus.manifest.vocab_size, tables, rule.orders)):
            own = lengths[start - first :] if scored is None else np.where(scored, lengths[start - first :], 0)
            running = np.concatenate([[0], np.cumsum(own, dtype=np.int64)])
            sums[low:high, column] += running[end] - running[begin]
    return np.column_stack([part.tokens, sums])


def _code_lengths(
    ids: NDArray[np.integer], vocab_size: int, tables: Sequence[NDArray[np.uint32]], orders: Sequence[int]
) -> Iterator[NDArray[np.int32]]:
    """For each order, [T] the code length of each id in 1/256 bit; exact from the n-th id on."""
    weight, total = np.float32(BACK_OFF), np.float32(tables[0].sum(dtype=np.uint64))
    prediction = np.full(len(ids), np.float32(1 / vocab_size))
    contexts = np.full(len(ids), total)
    for order, cells in enumerate(_hashes(ids, len(tables), [table.size for table in tables]), 1):
        # As many ids as the order has less one have no n-gram here: they keep the prediction of the order below.
        counts = tables[order - 1][cells].astype(np.float32)
        counts -= np.float32(1)
        shorter, longer = contexts[: counts.size], prediction[order - 1 :]
        longer *= weight
        longer += counts
        longer /= np.maximum(shorter - np.float32(1), np.float32(0)) + weight
        np.minimum(longer, np.float32(1), out=longer)
        contexts = counts + np.float32(1)
        if order in orders:
            yield _lengths_of(prediction)


def _lengths_of(probabilities: NDArray[np.float32]) -> NDArray[np.int32]:
    """[T] -log2 in 1/256 bit, by a table over exponent and mantissa."""
    places = probabilities.view(np.int32) >> (23 - _MANTISSA_BITS)
    places -= (127 - _LOWEST_EXPONENT) << _MANTISSA_BITS
    np.maximum(places, 0, out=places)
    found: NDArray[np.int32] = _length_table()[places]
    return found


@cache
def _length_table() -> NDArray[np.int32]:
    exponents = np.arange(-_LOWEST_EXPONENT, 1)[:, None]
    mantissas = 1 + (np.arange(1 << _MANTISSA_BITS) + 0.5) / (1 << _MANTISSA_BITS)
    lengths = np.rint(-UNITS_PER_BIT * (exponents + np.log2(mantissas)))
    return np.maximum(lengths, 0).astype(np.int32).reshape(-1)
