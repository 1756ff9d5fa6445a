"""Matrices of integers as coded streams: small ones by the adaptive coder (`integers`), large ones under static tables.

In a large matrix every row and every column has a class, which says on a log scale how large its values are (the
encoder's classes are a quarter of an octave wide), and the sum of both classes chooses an element's table. Rows and
columns are sorted by class, so that elements with one sum are a few rectangles, coded as whole vectors. Classes are
sent beside what known exponents of grid steps predict. Tokens and raw bits are those of `symbols`.

    static    0x40 | bits of the largest magnitude | row classes | column classes | where tables begin | tables | raw
              bits (a block) | segments
    classes   of rows, and of columns: class + 2 * exponent, as `integers.encode_vector` in a block. What is used is
              the class less the least of all rows (columns), so that each side has a class 0
    begin     for each sum of classes from 1 to the largest possible, one bit: whether another table begins there
    tables    `static.encode_tables`, of tokens, as many as begin
    segments  `static`: the sums in rising order, of each the rows' classes in rising order. The rectangle of two
              classes is cut into parts of whole rows, as many as 2^17 elements allow and at least one, and consecutive
              parts under one table are joined to a segment while it has fewer than 2^17. Rows and columns of one class
              stand in their order in the matrix
    raw bits  of large tokens, in the order of `symbols.blocks` over the matrix as it is

An adaptive stream begins with a byte that has neither 0x40 nor 0x20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression import integers
from tokenbound.compression.coder import Ints
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.integers import MAX_SEEN, decode_vector, encode_vector
from tokenbound.compression.static import (
    CUT_ELEMENTS,
    MAX_TABLES,
    SYMBOLS,
    SegmentReader,
    SegmentWriter,
    Table,
    decode_tables,
    encode_tables,
    fit_table,
    read_bits,
)
from tokenbound.compression.symbols import (
    DIRECT_BITS,
    MAX_BITS,
    BitReader,
    BitWriter,
    Cut,
    TokenBytes,
    alphabet_size,
    blocks,
    low_bit_counts,
    low_bits_of,
    narrow_values,
    tokens_of,
)

STATIC = 0x40
STATIC_ELEMENTS = 1 << 18
"""Matrices of at least so many elements are coded under static tables."""
SHORT_BYTES = 1 << 11
"""Codes of up to this many bytes, of which classes and tables are a good part, are held against the adaptive ones."""
MAX_SUMS = 256
"""Sums of classes that a matrix may have."""
CLASSES_PER_OCTAVE = 4
EXPONENT_CLASSES = CLASSES_PER_OCTAVE // 2
"""Classes by which a half octave of the grid step lowers what is expected."""
WIDEST = 6 * CLASSES_PER_OCTAVE
"""How far the encoder lets a row's or column's class lie from that of the mean."""
MIN_SIDE = 64
"""Rows and columns that a matrix under static tables has at least, so that classes take little beside its elements."""
MIN_RECTANGLE = 64
"""Elements that a matrix has at least for each pair of classes."""
SAMPLE = 1 << 18
"""Elements by which it is decided whether classes are worth sending."""
LEVEL_BITS = 3.5
"""What a symbol's level in a table costs, roughly; to choose by."""


def encode_matrix(
    values: NDArray[Any], row_exponents: Ints | None = None, column_exponents: Ints | None = None
) -> bytes:
    """Code a matrix of integers below 2^31 in magnitude; the arguments are those of `integers.encode_matrix`.

    >>> decode_matrix(encode_matrix(np.array([[1, -2], [300, 0]])), (2, 2)).tolist()
    [[1, -2], [300, 0]]
    """
    if values.size < STATIC_ELEMENTS or min(values.shape) < MIN_SIDE:
        return integers.encode_matrix(values, row_exponents, column_exponents)
    coded = encode_static(values, row_exponents, column_exponents)
    if len(coded) > SHORT_BYTES:
        return coded
    return min(coded, integers.encode_matrix(values, row_exponents, column_exponents), key=len)


def decode_matrix(
    data: bytes | memoryview,
    shape: tuple[int, int],
    row_exponents: Ints | None = None,
    column_exponents: Ints | None = None,
) -> NDArray[np.int32]:
    """Inverse of `encode_matrix` with the same exponents.

    Raises:
        ArtifactError: the bytes are not such a stream of this shape.
    """
    return integers.assembled(matrix_parts(data, shape, row_exponents, column_exponents), shape)


def matrix_parts(
    data: bytes | memoryview,
    shape: tuple[int, int],
    row_exponents: Ints | None = None,
    column_exponents: Ints | None = None,
) -> Iterator[tuple[Cut, NDArray[np.signedinteger[Any]]]]:
    """As `decode_matrix`, in parts that cover the matrix: rows and columns, and their values."""
    if len(data) and data[0] == STATIC:
        return static_parts(data, shape, row_exponents, column_exponents)
    return integers.matrix_parts(data, shape, row_exponents, column_exponents)


# Classes


@dataclass(frozen=True)
class _Side:
    """The rows or the columns, sorted by class.

    Attributes:
        order: What stands at each place once sorted.
        classes: The classes that occur, in rising order, the least of them 0.
        edges: Where each of them begins, and the end.
    """

    order: NDArray[np.intp]
    classes: list[int]
    edges: list[int]

    @staticmethod
    def of(classes: Ints) -> _Side:
        classes = classes - classes.min()
        order = np.argsort(classes, kind="stable")
        present, starts = np.unique(classes[order], return_index=True)
        return _Side(order, present.tolist(), [*starts.tolist(), len(classes)])

    @property
    def places(self) -> NDArray[np.intp]:
        """Where each stands once sorted."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(self.order))
        return places

    @property
    def is_sorted(self) -> bool:
        """Whether the order is what it was."""
        return len(self.classes) < 2


Rectangle = tuple[slice, slice]


@dataclass(frozen=True)
class _Plan:
    """Which elements have which table.

    Attributes:
        rows: Sorted rows.
        columns: Sorted columns.
    """

    rows: _Side
    columns: _Side

    @property
    def sums(self) -> int:
        """How many sums of classes are possible."""
        return 1 + self.rows.classes[-1] + self.columns.classes[-1]

    @property
    def is_allowed(self) -> bool:
        """Whether there are few sums and few rectangles, so that no forged stream can take for ever."""
        elements = len(self.rows.order) * len(self.columns.order)
        rectangles = len(self.rows.classes) * len(self.columns.classes)
        return self.sums <= MAX_SUMS and rectangles * MIN_RECTANGLE <= elements

    def rectangles(self) -> list[tuple[int, Rectangle]]:
        """The sum and place of all rectangles, in the order of the format."""
        rows, columns = (
            [(value, slice(*edge)) for value, edge in zip(side.classes, pairwise(side.edges), strict=True)]
            for side in (self.rows, self.columns)
        )
        found = [(row + column, row, (high, wide)) for row, high in rows for column, wide in columns]
        return [(total, place) for total, _, place in sorted(found, key=lambda item: item[:2])]

    def segments(self, table_of: Ints) -> Iterator[tuple[int, list[Rectangle]]]:
        """The table and the parts of rectangles of each segment."""
        last, parts, size = 0, list[Rectangle](), 0
        for total, (rows, columns) in self.rectangles():
            table = int(table_of[total])
            width = columns.stop - columns.start
            height = max(1, CUT_ELEMENTS // width)
            for start in range(rows.start, rows.stop, height):
                if parts and (table != last or size >= CUT_ELEMENTS):
                    yield last, parts
                    parts, size = [], 0
                stop = min(start + height, rows.stop)
                parts.append((slice(start, stop), columns))
                last, size = table, size + (stop - start) * width
        if parts:
            yield last, parts


def _predicted(exponents: Ints | None, count: int) -> Ints:
    """What a class is sent beside."""
    return np.zeros(count, np.int64) if exponents is None else exponents.astype(np.int64) * EXPONENT_CLASSES


# Encoding


def encode_static(values: NDArray[Any], row_exponents: Ints | None, column_exponents: Ints | None) -> bytes:
    """Code a matrix of at least `MIN_SIDE` rows and columns under static tables; see `encode_matrix`."""
    max_bits = integers.bit_length(values)
    predicted = _predicted(row_exponents, values.shape[0]), _predicted(column_exponents, values.shape[1])
    sent = _choose_classes(values, max_bits, predicted)
    plan = _Plan(_Side.of(sent[0] - predicted[0]), _Side.of(sent[1] - predicted[1]))
    tokens, raw = _sorted_tokens(values, max_bits, plan)
    counts = _count(tokens, plan)
    table_of, tables = _fit_tables(counts)
    head = b"".join(
        [
            bytes([STATIC, max_bits]),
            block(encode_vector(sent[0])),
            block(encode_vector(sent[1])),
            np.packbits(np.diff(table_of) > 0).tobytes(),
            encode_tables(tables),
            block(raw),
        ]
    )
    writer = SegmentWriter()
    for table, parts in reversed(list(plan.segments(table_of))):
        writer.write(tables[table], np.concatenate([tokens[part].reshape(-1) for part in parts]))
    return head + writer.finish()


def _choose_classes(values: NDArray[Any], max_bits: int, predicted: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """What is sent of rows and of columns: measured classes or zeros, whichever promises the shorter code.

    Where the known exponents make more classes than the format allows, it is what makes all classes 0.
    """
    options = []
    for known, found in zip(predicted, _measured_classes(values), strict=True):
        choices = [np.zeros_like(known), *([found + known] if found.any() else [])]
        options.append([(sent, len(encode_vector(sent))) for sent in choices])
    pairs = [(rows, columns) for rows in options[0] for columns in options[1]]
    height = min(values.shape[0], isqrt(SAMPLE))
    width = min(values.shape[1], SAMPLE // height)
    rows, columns = (
        np.arange(count) * size // count for count, size in zip((height, width), values.shape, strict=True)
    )
    tokens = tokens_of(values[np.ix_(rows, columns)], max_bits).astype(np.intp)
    alphabet = alphabet_size(max_bits)

    def size(pair: tuple[tuple[Ints, int], tuple[Ints, int]]) -> float:
        row, column = (sent - known for (sent, _), known in zip(pair, predicted, strict=True))
        if not _Plan(_Side.of(row), _Side.of(column)).is_allowed:
            return inf
        sums = (row[rows] - row.min())[:, None] + (column[columns] - column.min())[None, :]
        counts = np.bincount((sums * alphabet + tokens).reshape(-1), minlength=MAX_SUMS * alphabet)
        entropy = float(_entropies(counts.reshape(-1, alphabet)).sum())
        return entropy / 8 * (values.size / tokens.size) + sum(length for _, length in pair)

    best, pair = min(((size(pair), pair) for pair in pairs), key=lambda item: item[0])
    return predicted if best == inf else (pair[0][0], pair[1][0])


def _measured_classes(values: NDArray[Any]) -> tuple[Ints, Ints]:
    """How far the mean magnitudes of rows and of columns lie from that of all, in classes."""
    rows, columns = (np.zeros(size, np.int64) for size in values.shape)
    for cut in blocks(values.shape):  # type: ignore[arg-type]
        part = values[cut]
        sizes = _sizes(part)
        rows[cut[0]] += sizes.sum(axis=1, dtype=np.int64)
        columns[cut[1]] += sizes.sum(axis=0, dtype=np.int64)
    total = max(1, int(rows.sum()))
    return _log_classes(rows * len(rows), total), _log_classes(columns * len(columns), total)


def _sizes(values: NDArray[Any]) -> NDArray[Any]:
    """Magnitudes as far as they are looked at."""
    if values.dtype == np.int8:
        narrow: NDArray[Any] = np.abs(values).view(np.uint8)  # as which even that of -128 is right
        return narrow
    sizes: Ints = np.minimum(np.abs(values.astype(np.int64)), MAX_SEEN)
    return sizes


def _log_classes(sums: Ints, total: int) -> Ints:
    """round(log2(sum / total) * `CLASSES_PER_OCTAVE`), within limits."""
    logs = np.log2(np.maximum(sums, 1) / total)
    classes: Ints = np.clip(np.rint(logs * CLASSES_PER_OCTAVE), -WIDEST, WIDEST).astype(np.int64)
    return classes


def _sorted_tokens(values: NDArray[Any], max_bits: int, plan: _Plan) -> tuple[TokenBytes, bytes]:
    """Tokens of the matrix with its rows and columns sorted, and all raw bits."""
    tokens = np.empty(values.shape, np.uint8)
    row_places, column_places = plan.rows.places, plan.columns.places
    raw = BitWriter()
    for rows, columns in blocks(values.shape):  # type: ignore[arg-type]
        part = values[rows, columns]
        found = tokens_of(part, max_bits)
        raw.add(*low_bits_of(part.reshape(-1), found.reshape(-1), max_bits))
        if part.shape[1] == values.shape[1]:
            tokens[row_places[rows]] = found if plan.columns.is_sorted else np.take(found, plan.columns.order, axis=1)
        else:
            tokens[row_places[rows][:, None], column_places[columns]] = found
    return tokens, raw.finish()


def _count(tokens: TokenBytes, plan: _Plan) -> Ints:
    """How often each token occurs under each sum [sums, 256]."""
    counts = np.zeros((plan.sums, SYMBOLS), np.int64)
    for total, (rows, columns) in plan.rectangles():
        height = max(1, CUT_ELEMENTS // (columns.stop - columns.start))
        for start in range(rows.start, rows.stop, height):
            part = tokens[start : min(start + height, rows.stop), columns]
            counts[total] += np.bincount(part.reshape(-1), minlength=SYMBOLS)
    return counts


def _entropies(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Empirical entropy of each row of counts, in bits; an estimate to choose by, never part of a code."""
    sums = counts.sum(axis=-1, keepdims=True)
    bits: NDArray[np.float64] = -(counts * np.log2(np.maximum(counts, 1) / np.maximum(sums, 1))).sum(axis=-1)
    return bits


def _fit_tables(counts: Ints) -> tuple[Ints, list[Table]]:
    """Which table each sum has, and the tables: neighbours share one unless two save more than the second costs."""
    groups = [[total] for total in np.flatnonzero(counts.any(axis=1)).tolist()]
    found = [counts[group].sum(axis=0) for group in groups]
    costs = [_table_bits(row) for row in found]
    joint = [_table_bits(a + b) for a, b in pairwise(found)]
    while len(groups) > 1:
        gains = [costs[i] + costs[i + 1] - joint[i] for i in range(len(joint))]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] <= 0 and len(groups) <= MAX_TABLES:
            break
        groups[best] += groups.pop(best + 1)
        found[best] = found[best] + found.pop(best + 1)
        costs[best : best + 2] = [joint.pop(best)]
        for near in (best - 1, best):
            if 0 <= near < len(joint):
                joint[near] = _table_bits(found[near] + found[near + 1])
    begins = np.zeros(len(counts), np.int64)
    begins[[group[0] for group in groups[1:]]] = 1
    return np.cumsum(begins), [fit_table(row) for row in found]


def _table_bits(counts: Ints) -> float:
    return float(_entropies(counts)) + LEVEL_BITS * int((counts > 0).sum())


# Decoding


def static_parts(
    data: bytes | memoryview, shape: tuple[int, int], row_exponents: Ints | None, column_exponents: Ints | None
) -> Iterator[tuple[Cut, NDArray[np.signedinteger[Any]]]]:
    """Inverse of `encode_static`, in parts.

    Raises:
        ArtifactError: the bytes are not such a stream of this shape.
    """
    reader = Reader(data, "an integer stream")
    _, max_bits = reader.take(2)
    if max_bits > MAX_BITS or min(shape) < MIN_SIDE:
        raise ArtifactError("artifact: an integer stream has a header that the encoder does not write")
    exponents = (row_exponents, column_exponents)
    plan = _Plan(*(_read_side(reader, count, known) for count, known in zip(shape, exponents, strict=True)))
    if not plan.is_allowed:
        raise ArtifactError("artifact: an integer stream has more classes than the encoder makes")
    table_of = np.concatenate([[0], np.cumsum(read_bits(reader, plan.sums - 1))]).astype(np.int64)
    tables = decode_tables(reader)
    if len(tables) != 1 + int(table_of[-1]):
        raise ArtifactError(f"artifact: an integer stream has {len(tables)} tables where {1 + table_of[-1]} begin")
    if max(int(table.symbols[-1]) for table in tables) >= alphabet_size(max_bits):
        raise ArtifactError(f"artifact: an integer stream has tokens of more than {max_bits} bits")
    raw = BitReader(reader.block())
    tokens = _read_tokens(SegmentReader(reader.take(reader.remaining), reader.what), shape, plan, table_of, tables)
    yield from _values(tokens, raw, max_bits, plan)


def _read_side(reader: Reader, count: int, exponents: Ints | None) -> _Side:
    classes = decode_vector(reader.block(), count) - _predicted(exponents, count)
    if int(np.ptp(classes)) >= MAX_SUMS:
        raise ArtifactError(f"artifact: an integer stream has classes further apart than {MAX_SUMS}")
    return _Side.of(classes)


def _read_tokens(
    source: SegmentReader, shape: tuple[int, int], plan: _Plan, table_of: Ints, tables: list[Table]
) -> TokenBytes:
    """Tokens of the sorted matrix."""
    tokens = np.empty(shape, np.uint8)
    for table, parts in plan.segments(table_of):
        sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in parts]
        segment, start = source.read(tables[table], sum(sizes)), 0
        for part, size in zip(parts, sizes, strict=True):
            target = tokens[part]
            target[:] = segment[start : start + size].reshape(target.shape)
            start += size
    source.finish()
    return tokens


def _values(
    tokens: TokenBytes, raw: BitReader, max_bits: int, plan: _Plan
) -> Iterator[tuple[Cut, NDArray[np.signedinteger[Any]]]]:
    """Values of the matrix as it was before it was sorted."""
    row_places, column_places = plan.rows.places, plan.columns.places
    for rows, columns in blocks(tokens.shape):  # type: ignore[arg-type]
        if plan.columns.is_sorted:
            part = tokens[row_places[rows], columns]
        elif columns.stop - columns.start == tokens.shape[1]:
            part = np.take(tokens[row_places[rows]], column_places, axis=1)
        else:
            part = tokens[row_places[rows][:, None], column_places[columns]]
        if max_bits <= DIRECT_BITS:
            yield (rows, columns), (part - np.uint8((1 << max_bits) - 1)).view(np.int8)
        else:
            flat = part.reshape(-1)
            low = raw.take(low_bit_counts(flat, max_bits))
            yield (rows, columns), narrow_values(flat, max_bits, low).reshape(part.shape)
    raw.finish()
