from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from losses_support import make_losses, with_base, with_decisions

from tokenbound.errors import MismatchError
from tokenbound.store.losses import Losses, from_parquet, iter_parquet, to_parquet


def assert_same(left: Losses, right: Losses) -> None:
    for name in left.__dict__.keys() - {"tables"}:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert (left.tables is None) == (right.tables is None)
    if left.tables is not None and right.tables is not None:
        for name in ("cell", "count", "offsets"):
            ours, theirs = getattr(left.tables, name), getattr(right.tables, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("unscored", [(), (1,), (0, 3), (0, 1, 2)])
def test_round_trip_keeps_every_bit(unscored: tuple[int, ...]) -> None:
    losses = make_losses([5, 0, 9, 32], unscored=unscored)
    assert_same(from_parquet(to_parquet(losses)), losses)
    assert_same(from_parquet(to_parquet(with_base(losses))), with_base(losses))
    assert_same(from_parquet(to_parquet(with_decisions(losses))), with_decisions(losses))


def test_same_losses_give_the_same_bytes() -> None:
    assert to_parquet(make_losses([8] * 40)) == to_parquet(make_losses([8] * 40))


def test_unscored_windows_are_null_on_disk_and_keep_their_targets(tmp_path: Path) -> None:
    import duckdb
    import polars

    path = tmp_path / "x.parquet"
    path.write_bytes(to_parquet(make_losses([3, 4, 5], unscored=(1,))))
    frame = polars.read_parquet(path)
    assert frame["nll"].is_null().to_list() == [False, True, False]
    assert frame["rank"].list.len().to_list() == [3, 4, 5]
    query = f"select count(*), sum(len(nll)), max(list_max(rank)) from '{path}'"
    assert duckdb.sql(query).fetchall() == [(3, 8, 257)]


def test_real_sized_shard_takes_at_most_ten_bytes_per_token() -> None:
    generator = np.random.default_rng(0)
    total = 1 << 17
    losses = make_losses([512] * 256)
    realistic = Losses(
        losses.window_id,
        losses.offsets,
        losses.unscored,
        document=np.repeat(np.arange(total // 1000 + 1), 1000)[:total],
        position=(np.arange(total) % 1000).astype(np.int32),
        nll=generator.gamma(1.0, 1.5, total).astype(np.float32),
        entropy=generator.gamma(2.0, 0.7, total).astype(np.float32),
        rank=np.minimum(generator.geometric(0.3, total) - 1, 256).astype(np.int32),
        token=(generator.zipf(1.5, total) % 257).astype(np.int32),
    )
    assert len(to_parquet(realistic)) <= 10 * total


def test_pieces_have_the_tables_of_their_windows() -> None:
    losses = with_decisions(make_losses([8] * 40))
    pieces = [*iter_parquet(to_parquet(losses), origin="x", piece_tokens=64)]
    assert len(pieces) > 3
    tables = [piece.tables for piece in pieces]
    for name in ("cell", "count"):
        np.testing.assert_array_equal(np.concatenate([getattr(t, name) for t in tables]), getattr(losses.tables, name))
    assert all(len(t.offsets) == len(piece.window_id) + 1 for t, piece in zip(tables, pieces, strict=True))
    assert_same(losses.head(7), from_parquet(to_parquet(losses.head(7))))
    assert losses.head(7).tables.offsets.size == 8


def test_a_table_takes_at_most_a_kilobyte_per_window() -> None:
    losses = make_losses([512] * 64)
    beside = with_decisions(losses, decisions=13, spread=6.0)
    assert len(beside.tables.cell) / 64 > 300  # different cells of a window
    assert (len(to_parquet(beside)) - len(to_parquet(losses))) / 64 <= 1024


def damaged_tables(**columns: pa.Array) -> bytes:
    table = pq.read_table(pa.BufferReader(to_parquet(with_decisions(make_losses([4, 4])))))
    for name, column in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, column) if column is not None else table.remove_column(place)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "columns",
    [
        {"decision_count": None},
        {"decision_cell": None},
        {"decision_count": pa.array([[1], [2]], pa.list_(pa.int32()))},
        {"decision_count": pa.array([None, [2]], pa.list_(pa.int32()))},
        {"decision_cell": pa.array([None, None], pa.list_(pa.int16()))},
        {"decision_count": pa.array([[1.5], [2.0]], pa.list_(pa.float64()))},
        {"decision_count": pa.array(["x", "y"])},
        {"decision_cell": pa.array([[1, None], [2, 3]], pa.list_(pa.int16()))},
        {"decision_cell": pa.array([[1], [70_000]], pa.list_(pa.int32()))},
    ],
)
def test_damaged_tables_are_refused(columns: dict[str, pa.Array | None]) -> None:
    data = damaged_tables(**columns)
    with pytest.raises(MismatchError, match=r"x: .*(tables of decisions|decision_c)"):
        from_parquet(data, origin="x")
    assert from_parquet(data, ("nll",), origin="x").tables is None


def test_a_subset_of_columns_is_read() -> None:
    losses = make_losses([4, 4])
    read = from_parquet(to_parquet(losses), ("nll", "rank"))
    np.testing.assert_array_equal(read.nll, losses.nll)
    assert read.token is None
    assert read.document.size == 0


def test_the_token_column_may_be_left_out() -> None:
    losses = make_losses([4])
    private = Losses(**{**losses.__dict__, "token": None})
    assert from_parquet(to_parquet(private)).token is None


def test_head_cuts_windows() -> None:
    losses = make_losses([3, 4, 5])
    assert_same(losses.head(3), losses)
    assert losses.head(2).num_tokens == 7


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all" * 10])
def test_damaged_files_are_named(data: bytes) -> None:
    with pytest.raises(MismatchError, match=r"losses/00003\.parquet"):
        from_parquet(data, origin="losses/00003.parquet")


def test_lists_of_different_lengths_are_refused() -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    losses = make_losses([3, 4])
    sink = io.BytesIO()
    table = pq.read_table(pa.BufferReader(to_parquet(losses)))
    shifted = pa.array([[0, 1], [0, 1, 2, 3, 4]], pa.list_(pa.int32()))
    pq.write_table(table.set_column(table.schema.get_field_index("rank"), "rank", shifted), sink)
    with pytest.raises(MismatchError, match="rank"):
        from_parquet(sink.getvalue())
