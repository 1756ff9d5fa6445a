from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from losses_support import make_losses, with_base

from tokenbound.errors import MismatchError
from tokenbound.store.losses import Losses, from_parquet, to_parquet


def assert_same(left: Losses, right: Losses) -> None:
    for name in left.__dict__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


@pytest.mark.parametrize("unscored", [(), (1,), (0, 3), (0, 1, 2)])
def test_round_trip_keeps_every_bit(unscored: tuple[int, ...]) -> None:
    losses = make_losses([5, 0, 9, 32], unscored=unscored)
    assert_same(from_parquet(to_parquet(losses)), losses)
    assert_same(from_parquet(to_parquet(with_base(losses))), with_base(losses))


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
