"""Matrices under static tables: written-out decoding, sizes beside the adaptive coder's, hostile streams."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ans_support import AnsDecoder
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression import integers
from tokenbound.compression.container import ArtifactError, Reader, block, varint
from tokenbound.compression.integers import decode_vector, encode_vector
from tokenbound.compression.matrices import (
    MIN_SIDE,
    SHORT_BYTES,
    STATIC,
    STATIC_ELEMENTS,
    decode_matrix,
    encode_matrix,
    encode_static,
)
from tokenbound.compression.static import CUT_ELEMENTS, decode_tables, read_bits
from tokenbound.compression.symbols import BLOCK_ELEMENTS, BitReader, blocks, join_integers, low_bit_counts


def uneven(shape: tuple[int, int], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers and the exponents of steps that make some rows' and columns' larger."""
    draw = np.random.default_rng(seed)
    rows, columns = (np.rint(draw.normal(size=size)).astype(np.int64) for size in shape)
    scale = spread * 2 ** (-(rows[:, None] + columns[None, :]) / 2)
    return np.rint(draw.normal(size=shape) * scale).astype(np.int32), rows, columns


def written_out(data: bytes, shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Decode element by element, as the format's description says."""
    reader = Reader(data, "a matrix")
    tag, max_bits = reader.take(2)
    assert tag == 0x40
    classes = []
    for count, exponents in zip(shape, (rows, columns), strict=True):
        found = decode_vector(reader.block(), count) - 2 * exponents
        classes.append((found - found.min()).tolist())
    sums = max(classes[0]) + max(classes[1]) + 1
    begins = read_bits(reader, sums - 1).tolist()
    tables = decode_tables(reader)
    raw, ans = BitReader(reader.block()), AnsDecoder(bytes(reader.take(reader.remaining)))
    tokens = np.full(shape, 255, np.uint8)
    segment: list[tuple[int, int]] = []
    last = 0

    def read(places: list[tuple[int, int]]) -> None:
        for place, token in zip(places, ans.read(tables[last], len(places)), strict=True):
            tokens[place] = token

    for total in range(sums):
        for row_class in sorted(set(classes[0])):
            high = [row for row, value in enumerate(classes[0]) if value == row_class]
            wide = [column for column, value in enumerate(classes[1]) if value == total - row_class]
            height = max(1, CUT_ELEMENTS // max(1, len(wide)))
            for start in range(0, len(high), height) if wide else ():
                table = sum(begins[:total])
                if table != last or len(segment) >= CUT_ELEMENTS:
                    read(segment)
                    segment = []
                last = table
                segment += [(row, column) for row in high[start : start + height] for column in wide]
    read(segment)
    assert ans.is_empty
    values = np.empty(shape, np.int64)
    for cut in blocks(shape):
        flat = tokens[cut].reshape(-1)
        values[cut] = join_integers(flat, max_bits, raw.take(low_bit_counts(flat, max_bits))).reshape(tokens[cut].shape)
    raw.finish()
    return values


@pytest.mark.parametrize("spread", [0.3, 1.5, 30.0])
def test_streams_are_what_the_format_says(spread: float) -> None:
    shape = (65, 90)
    values, rows, columns = uneven(shape, spread)
    coded = encode_static(values, rows, columns)
    assert np.array_equal(written_out(coded, shape, rows, columns), values)
    assert np.array_equal(decode_matrix(coded, shape, rows, columns), values)


def test_long_rectangles_are_cut_as_the_format_says() -> None:
    shape = (70, 4000)
    values = np.random.default_rng(0).integers(-1, 2, shape)
    zeros = np.zeros(70, np.int64), np.zeros(4000, np.int64)
    assert np.array_equal(written_out(encode_static(values, None, None), shape, *zeros), values)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(64, 64), (64, 300), (301, 65), (130, 131)]),
    st.sampled_from(["int8", "int16", "int32", "int64"]),
    st.floats(-3, 31),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_matrix_survives(shape: tuple[int, int], dtype: str, log_size: float, known: bool, seed: int) -> None:
    limit = min(np.iinfo(dtype).max, (1 << 31) - 1)
    draw = np.random.default_rng(seed)
    scale = 2.0**log_size * np.exp(draw.normal(size=(shape[0], 1)) + draw.normal(size=(1, shape[1])))
    values = np.rint(draw.standard_cauchy(shape) * scale).clip(-limit, limit).astype(dtype)
    exponents = [draw.integers(-20, 20, size) if known else None for size in shape]
    assert np.array_equal(decode_matrix(encode_static(values, *exponents), shape, *exponents), values)


@pytest.mark.parametrize("value", [0, 1, -1, 15, -16, 127, -128, (1 << 31) - 1, -(1 << 31) + 1])
@pytest.mark.parametrize("shape", [(64, BLOCK_ELEMENTS + 7), (3000, 100)])
def test_constant_and_nearly_constant_matrices_survive(shape: tuple[int, int], value: int) -> None:
    values = np.full(shape, value, np.int32)
    for odd in (value, 3):
        values[5, 7] = odd
        assert np.array_equal(decode_matrix(encode_matrix(values), shape), values)


def test_transposed_and_strided_views_are_coded_as_what_they_show() -> None:
    values = uneven((600, 700), 1.0)[0].clip(-127, 127).astype(np.int8)
    for view in (values.T, values[::2, ::-1]):
        assert encode_static(view, None, None) == encode_static(np.ascontiguousarray(view), None, None)


def test_small_and_narrow_matrices_keep_their_adaptive_bytes() -> None:
    for shape in ((511, 512), (MIN_SIDE - 1, STATIC_ELEMENTS // 32)):
        values, rows, columns = uneven(shape, 1.0)
        assert encode_matrix(values, rows, columns) == integers.encode_matrix(values, rows, columns)
    values, rows, columns = uneven((512, 512), 1.0)
    assert encode_matrix(values, rows, columns)[0] == STATIC


def test_a_nearly_empty_matrix_takes_whatever_is_shorter() -> None:
    values = np.zeros((512, 512), np.int8)
    values[3, 3] = 1
    coded = encode_matrix(values)
    assert len(coded) == len(integers.encode_matrix(values)) < len(encode_static(values, None, None)) < SHORT_BYTES
    assert np.array_equal(decode_matrix(coded, values.shape), values)


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "fine": lambda draw, shape: draw.normal(size=shape) * 30,
    "heavy-tailed": lambda draw, shape: draw.standard_t(2, size=shape) / 2,
    "biased": lambda draw, shape: draw.normal(size=shape) * 0.8 + 0.4,
    "sparse": lambda draw, shape: draw.normal(size=shape) * (draw.random(shape) < 0.05),
    "ternary": lambda draw, shape: draw.integers(-1, 2, shape),
    "outlying columns": lambda draw, shape: draw.normal(size=shape) * np.where(draw.random(shape[1]) < 0.01, 20, 0.7),
    "uneven": lambda draw, shape: uneven(shape, 1.0, int(draw.integers(99)))[0],
    "in blocks": lambda draw, shape: (
        draw.normal(size=shape)
        * np.kron(np.exp(0.8 * draw.normal(size=(8, 16))), np.ones((shape[0] // 8, shape[1] // 16)))
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_large_matrices_are_no_more_than_a_hundredth_longer(family: str) -> None:
    shape = (512, 1024)
    values = np.rint(FAMILIES[family](np.random.default_rng(1), shape)).clip(-9999, 9999).astype(np.int16)
    coded = encode_matrix(values)
    assert coded[0] == STATIC
    assert np.array_equal(decode_matrix(coded, shape), values)
    assert len(coded) <= 1.01 * len(integers.encode_matrix(values))


def test_known_steps_need_no_classes() -> None:
    values, rows, columns = uneven((512, 512), 2.0)
    known, unknown = len(encode_static(values, rows, columns)), len(encode_static(values, None, None))
    assert known < unknown < 1.02 * known
    assert known <= 1.01 * len(integers.encode_matrix(values, rows, columns))


# Hostile streams

SHAPE = (64, 80)
VALUES, ROWS, COLUMNS = uneven(SHAPE, 6.0)
CODED = encode_static(VALUES, ROWS, COLUMNS)


def parts() -> tuple[bytes, bytes, bytes, bytes]:
    """Header, classes of rows, classes of columns, rest."""
    reader = Reader(CODED, "")
    return bytes(reader.take(2)), bytes(reader.block()), bytes(reader.block()), bytes(reader.take(reader.remaining))


def forged(*, head: bytes = b"", rows: np.ndarray | None = None, rest: bytes | None = None) -> bytes:
    begin, old_rows, columns, old_rest = parts()
    row_block = old_rows if rows is None else encode_vector(rows)
    return (head or begin) + block(row_block) + block(columns) + (old_rest if rest is None else rest)


def shifted(rows: int) -> np.ndarray:
    sent = decode_vector(parts()[1], SHAPE[0]).copy()
    sent[0] += rows
    return sent


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        (CODED, (63, 80), "header"),
        (CODED, (64, 63), "header"),
        (bytes([STATIC, 32]) + CODED[2:], SHAPE, "header"),
        (bytes([STATIC]), SHAPE, "wants"),
        (forged(rows=shifted(300)), SHAPE, "further apart"),
        (forged(rows=2 * ROWS + 255 * (np.arange(64) == 5)), SHAPE, "more classes"),
        (forged(rows=2 * ROWS + np.arange(64)), SHAPE, "more classes"),
        (bytes([STATIC, 2]) + CODED[2:], SHAPE, "tokens of more than 2 bits"),
        (CODED[:-1], SHAPE, "coded in words"),
        (CODED[:-8] + CODED[-4:], SHAPE, "mean nothing|raw bits"),
    ],
)
def test_wrong_streams_are_named(data: bytes, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_matrix(data, shape, ROWS[: shape[0]], COLUMNS[: shape[1]])


def test_tables_must_be_as_many_as_begin_and_raw_bits_as_many_as_are_needed() -> None:
    rest = Reader(parts()[3], "")
    sums = 1 + sum(
        int(np.ptp(decode_vector(sent, size) - 2 * known))
        for sent, size, known in zip(parts()[1:3], SHAPE, (ROWS, COLUMNS), strict=True)
    )
    begins = bytearray(rest.take((sums + 6) // 8))
    after = bytes(rest.take(rest.remaining))
    wrong = bytes(begins[:1] + bytes([begins[1] ^ 1]) + begins[2:]) + after
    with pytest.raises(ArtifactError, match=r"tables where \d+ begin"):
        decode_matrix(forged(rest=wrong), SHAPE, ROWS, COLUMNS)
    tables = Reader(after, "")
    decode_tables(tables)
    size = tables.position
    raw = bytes(tables.block())
    cut = bytes(begins) + after[:size] + block(raw[:-1]) + after[size + len(varint(len(raw))) + len(raw) :]
    with pytest.raises(ArtifactError, match="raw bits"):
        decode_matrix(forged(rest=cut), SHAPE, ROWS, COLUMNS)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_streams_end_in_values_or_a_clear_error(data: st.DataObject) -> None:
    body = bytearray(CODED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1) | st.integers(0, 200))
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if kind == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            body.insert(at, data.draw(st.integers(0, 255)))
        else:
            del body[at]
    try:
        values = decode_matrix(bytes(body), SHAPE, ROWS, COLUMNS)
    except ArtifactError:
        return
    assert values.shape == SHAPE


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=120))
def test_hostile_streams_end_in_values_or_a_clear_error(data: bytes) -> None:
    try:
        values = decode_matrix(bytes([STATIC]) + data, SHAPE)
    except ArtifactError:
        return
    assert values.shape == SHAPE
