"""The reducer's benchmark in small: it writes, reduces, agrees with DuckDB and measures."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

benchmark = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reduce_ledger.py"))))

TOKENS = 1_000_000


@pytest.mark.usefixtures("ray_session")
def test_a_million_tokens(tmp_path: Path) -> None:
    row = benchmark.measure(f"{tmp_path}/run", TOKENS, 1)
    assert row.tokens == TOKENS
    assert 0 < row.reduce.wall_s < 60
    assert 50e6 < row.peak_pss_bytes <= row.peak_rss_bytes
    files = list(tmp_path.glob("run/losses/*.parquet"))
    assert len(files) == len(benchmark.shard_sizes(TOKENS)) == 64
    assert 7 * TOKENS < sum(file.stat().st_size for file in files) < 10 * TOKENS
    assert len(benchmark.markdown([row]).splitlines()) == 3


def test_the_losses_are_neither_constant_nor_alike() -> None:
    first, second = (benchmark.draw_losses(shard, 20_000) for shard in (0, 1))
    assert first.nll.std() > 0.5
    assert not (first.nll == second.nll).any()
    assert 0.3 < (first.rank == 0).mean() < 0.8
    assert second.window_id[0] == first.window_id[-1] + 1
