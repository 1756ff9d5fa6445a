"""Columns of losses at the edge of what is refused, and bytes as text."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from tokenbound.bounds.columns import (
    Piece,
    WindowDecisions,
    check_entropy,
    check_length,
    pack,
    unpack,
    window_sums,
    worst_case_windows,
)
from tokenbound.errors import InputError, MismatchError

COLUMNS = {"nll": np.array([1.0, 2.0, 3.0]), "rank": np.array([0, 1, 2])}


def test_a_piece_gives_the_columns_of_finite_tokens() -> None:
    failed = np.array([False, True, False])
    piece = Piece(COLUMNS, failed, None, 1)
    assert piece["nll"].tolist() == [1.0, 2.0, 3.0]
    assert piece.finite("nll").tolist() == [1.0, 3.0]
    found = piece.find("rank")
    assert found is not None
    assert found.tolist() == [0, 2]
    assert piece.find("entropy") is None
    for get in (piece.__getitem__, piece.finite):
        with pytest.raises(MismatchError, match="no column `entropy`"):
            get("entropy")
    assert Piece(COLUMNS, None, None, 0).finite("nll") is COLUMNS["nll"]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_a_column_has_one_value_per_token(shape: tuple[int, ...]) -> None:
    assert check_length(np.zeros(3), 3, "rank").size == 3
    with pytest.raises(InputError, match="`rank` has shape"):
        check_length(np.zeros(shape), 3, "rank")
    with pytest.raises(InputError, match="`entropy` has shape"):
        check_entropy(np.zeros(shape), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entropies_are_finite(bad: float) -> None:
    assert check_entropy([], 0).size == 0
    for fine in ([-1.0, 3.0], [-1.5e308, 1.5e308]):
        assert check_entropy(fine, 2).tolist() == fine
    for row in ([0.5, bad, 0.5], [bad, 1.0, 2.0]):
        with pytest.raises(InputError, match="`base_entropy` must be finite"):
            check_entropy(row, 3, "base_entropy")


def test_sums_of_windows() -> None:
    values = np.arange(1.0, 8.0)
    assert window_sums(values, np.array([2, 0, 1, 0, 4, 0])).tolist() == [3.0, 0.0, 3.0, 0.0, 22.0, 0.0]
    assert window_sums(values[:0], np.array([0, 0])).tolist() == [0.0, 0.0]
    assert window_sums(values[:0], np.array([], np.int64)).tolist() == []
    for lengths in ([6], [8], [8, -1], [-1, 8], [], [7, 1]):
        with pytest.raises(InputError, match="window_lengths add up"):
            window_sums(values, np.array(lengths, np.int64))
    with pytest.raises(InputError, match="window_lengths add up"):
        window_sums(values[:0], np.array([-2, 2]))


def test_failed_windows_are_marked_and_their_tokens_counted() -> None:
    lengths = np.array([3, 0, 5])
    assert worst_case_windows(None, lengths) == (None, 0)
    assert worst_case_windows(None, None) == (None, 0)
    failed, tokens = worst_case_windows([True, False, True], lengths)
    assert failed is not None
    assert (failed.tolist(), tokens) == ([True, False, True], 8)
    for bad in ([True], [[True, False, True]], 3):
        with pytest.raises(InputError, match="marks"):
            worst_case_windows(bad, lengths)


@pytest.mark.parametrize("bad", [[1, 2], True, np.True_, -1])
def test_without_windows_failed_tokens_are_a_number(bad: Any) -> None:
    assert worst_case_windows(0, None) == (None, 0)
    assert worst_case_windows(np.int64(7), None) == (None, 7)
    with pytest.raises(InputError, match="the number of tokens"):
        worst_case_windows(bad, None)


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_packed_bytes_come_back_and_no_more_than_allowed(size: int) -> None:
    data = bytes(range(256)) * 4
    text = pack(data[:size])
    assert unpack(text, size) == data[:size]
    assert unpack(text, size + 1) == data[:size]
    if size:
        with pytest.raises(ValueError, match="cut short or too long"):
            unpack(text, size - 1)


def test_damaged_text_is_refused() -> None:
    text = pack(b"a" * 1000)
    with pytest.raises(ValueError, match="cut short"):
        unpack(text[:12], 1000)
    for damaged in ("*" + text, "AAAA" + text):
        with pytest.raises((ValueError, zlib.error)):
            unpack(damaged, 1000)


def test_decisions_of_a_window_add_up() -> None:
    table = WindowDecisions(np.array([3, 5, 1], np.int16), np.array([2, 1, 4], np.int32), np.array([0, 2, 2, 3]))
    assert table.window_sums(np.array([1.0, 2.0, 4.0])).tolist() == [3.0, 0.0, 4.0]
    piece = Piece(COLUMNS, None, None, 0, table)
    assert piece.require_decisions() is table
    with pytest.raises(MismatchError, match="no table of decisions"):
        Piece(COLUMNS, None, None, 0).require_decisions()


@pytest.mark.parametrize(("count", "cells"), [(0, []), (1, [3, 5]), (2, [3, 5]), (3, [3, 5, 1])])
def test_the_decisions_of_the_first_windows(count: int, cells: list[int]) -> None:
    table = WindowDecisions(np.array([3, 5, 1], np.int16), np.array([2, 1, 4], np.int32), np.array([0, 2, 2, 3]))
    first = table.first(count)
    assert first.cell.tolist() == cells
    assert first.count.tolist() == [2, 1, 4][: len(cells)]
    assert first.offsets.tolist() == [0, 2, 2, 3][: count + 1]
