"""The two-pass coder against an ANS coder in Python integers, against entropy, and against damaged tables and words."""

from __future__ import annotations

import numpy as np
import pytest
from ans_support import AnsDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenbound.compression.coder import TOTAL
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.integers import encode_matrix
from tokenbound.compression.static import (
    MAX_LEVEL,
    PIECE,
    SegmentReader,
    Table,
    decode_tables,
    encode_segments,
    encode_tables,
    fit_table,
    level_weights,
)


def drawn(size: int, spread: float, seed: int = 0) -> np.ndarray:
    return np.rint(np.random.default_rng(seed).normal(size=size) * spread + 100).clip(0, 255).astype(np.uint8)


def table_for(data: np.ndarray) -> Table:
    return fit_table(np.bincount(data, minlength=256))


def entropy_bytes(data: np.ndarray) -> float:
    counts = np.unique(data, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def test_weights_are_powers_of_the_eighth_root_of_two() -> None:
    weights = level_weights()
    assert len(weights) == MAX_LEVEL + 1
    assert weights[0] == 0
    assert weights[1::8].tolist() == [1 << octave for octave in range(25)]
    assert all(int(w) ** 8 <= 1 << k < (int(w) + 1) ** 8 for k, w in enumerate(weights[1:]))


@pytest.mark.parametrize(("spread", "size", "paired"), [(0.5, 5001, True), (2.0, 30_000, True), (40.0, 5001, False)])
def test_constriction_codes_as_ans_coder_in_integers(spread: float, size: int, paired: bool) -> None:
    first, second = drawn(size, spread), drawn(size // 2, spread / 2, seed=1)
    tables = [table_for(first), table_for(second)]
    assert tables[0].paired == paired
    coded = encode_segments([(tables[0], first), (tables[1], second)])
    decoder = AnsDecoder(coded)
    assert decoder.read(tables[0], len(first)) == first.tolist()
    assert decoder.read(tables[1], len(second)) == second.tolist()
    assert decoder.is_empty


@pytest.mark.parametrize("spread", [0.3, 0.6, 2.0, 9.0, 60.0])
def test_segments_cost_little_more_than_their_entropy(spread: float) -> None:
    data = drawn(200_000, spread)
    table = table_for(data)
    size = len(encode_tables([table])) + len(encode_segments([(table, data)]))
    assert size <= 1.002 * entropy_bytes(data) + 0.6 * len(table.symbols) + 60


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int64, 256, elements=st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 1 << 34))))
def test_frequencies_of_any_counts_sum_to_the_total_and_survive(counts: np.ndarray) -> None:
    counts[7] += not counts.any()
    table = fit_table(counts)
    for paired in {table.paired, False}:
        again = decode_tables(Reader(encode_tables([Table(table.levels, paired)]), "tables"))[0]
        assert again.paired == paired
        assert np.array_equal(again.levels, table.levels)
        assert again.symbols.tolist() == np.flatnonzero(counts).tolist()
        assert again.frequencies.min() >= 1
        assert again.frequencies.sum() == (1 << 12 if paired else TOTAL)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, MAX_LEVEL), min_size=1, max_size=64))
def test_frequencies_of_any_pairs_are_positive(levels: list[int]) -> None:
    whole = np.zeros(256, np.uint8)
    whole[: len(levels)] = levels
    whole[0] = whole[0] or 1
    frequencies = Table(whole, paired=True).frequencies
    assert frequencies.min() >= 1
    assert frequencies.sum() == 1 << 12


@settings(max_examples=60, deadline=None)
@given(st.lists(hnp.arrays(np.uint8, st.integers(1, 400), elements=st.integers(0, 12)), min_size=1, max_size=5))
def test_any_segments_survive(parts: list[np.ndarray]) -> None:
    tables = [table_for(part) for part in parts]
    tables = [Table(table.levels, paired=place % 2 == 0) for place, table in enumerate(tables)]
    source = SegmentReader(encode_segments(zip(tables, parts, strict=True)), "segments")
    for table, part in zip(tables, parts, strict=True):
        assert np.array_equal(source.read(table, len(part)), part)
    source.finish()


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, 2 * PIECE, 2 * PIECE + 3])
@pytest.mark.parametrize("paired", [False, True])
def test_segments_of_several_pieces_survive(size: int, paired: bool) -> None:
    data = drawn(size, 1.5)
    table = Table(table_for(data).levels, paired)
    source = SegmentReader(encode_segments([(table, data)]), "segments")
    out = np.empty((size, 3), np.uint8)
    source.read_into(table, out[:, 1])
    assert np.array_equal(out[:, 1], data)
    source.finish()


def test_words_that_are_left_over_cut_off_or_no_words_are_refused() -> None:
    data = drawn(1000, 3.0)
    table = table_for(data)
    coded = encode_segments([(table, data)])
    for wrong, message in (
        (coded[:-1], "words"),
        (coded + b"\0\0\0\0", "words"),
        (b"\1\0\0\0" + coded, "mean nothing"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_all(wrong, table, len(data))


def read_all(coded: bytes, table: Table, count: int) -> None:
    source = SegmentReader(coded, "segments")
    source.read(table, count)
    source.finish()


def form(levels: list[list[int]], paired: list[bool]) -> bytes:
    whole = [np.array(row + [0] * (256 - len(row)), np.uint8) for row in levels]
    return encode_tables([Table(row, flag) for row, flag in zip(whole, paired, strict=True)])


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (b"\0" + b"\xff" * 32 + block(encode_matrix(np.zeros((0, 256), np.int64))), "not write"),
        (b"\xff\7", "at most 256"),
        (form([[9, 9], [0, 0]], [False, False]), "not write"),
        (form([[250, 9]], [False]), "levels beyond"),
        (form([[9] * 65], [True]), "not write"),
        (b"\1\x40" + form([[9, 9]], [False])[2:], "bits that mean nothing"),
        (form([[9, 9]], [False])[:-3], "wants"),
    ],
)
def test_wrong_tables_are_named(coded: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_tables(Reader(coded, "tables"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=90))
def test_hostile_tables_end_in_tables_or_a_clear_error(data: bytes) -> None:
    try:
        tables = decode_tables(Reader(data, "tables"))
    except ArtifactError:
        return
    assert all(len(table.symbols) for table in tables)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 90), st.booleans())
def test_hostile_words_end_in_symbols_or_a_clear_error(data: bytes, count: int, paired: bool) -> None:
    table = Table(table_for(drawn(3000, 2.0)).levels, paired)
    try:
        source = SegmentReader(data, "words")
        symbols = source.read(table, count)
        source.finish()
    except ArtifactError:
        return
    assert np.isin(symbols, table.symbols).all()
