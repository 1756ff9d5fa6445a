"""Commit records and plans: typed, with known fields alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from losses_support import make_losses

from tokenbound.errors import MismatchError
from tokenbound.store.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(str(tmp_path))
    found.commit(0, make_losses([4, 4]), {"sums": {"square": 2**90}}, "a" * 64)
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"note": 7}, "field 'note'"),
        ({"tokens": "8"}, "field 'tokens'"),
        ({"tokens": True}, "field 'tokens'"),
        ({"tokens": 8.0}, "field 'tokens'"),
        ({"tokens": -8}, "field 'tokens'"),
        ({"windows": 2**63}, "field 'windows'"),
        ({"sha256": "../x"}, "field 'sha256'"),
        ({"batch": 0}, "field 'batch'"),
        ({"evidence": []}, "field 'evidence'"),
        ({"file": "../other/losses/00000.parquet"}, "is not the losses file of shard 0"),
        ({"file": "losses/00001.parquet"}, "is not the losses file of shard 0"),
        ({"shard": 1}, "speaks of shard 1"),
        ({"evidence": {"sums": 2**200}}, "does not fit"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_field(run: RunDirectory, change: dict[str, Any], reason: str) -> None:
    assert run.record(0).evidence == {"sums": {"square": 2**90}}
    tree = run.read_json("shards/00000.json", integer_bits=128)
    run.write_json("shards/00000.json", {**tree, **change})
    with pytest.raises(MismatchError, match=reason) as caught:
        run.record(0)
    assert "shards/00000.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_with_a_field_twice_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    path = tmp_path / "shards/00000.json"
    path.write_text(path.read_text().replace('"shard":0', '"shard":0,"shard":0'))
    with pytest.raises(MismatchError, match="the key 'shard' is given twice"):
        run.record(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"note": 7}, "field 'note': unknown key"),
        ({"num_tokens": "8"}, "field 'num_tokens'"),
        ({"segments": [["a"], "b"]}, r"field 'segments.1'"),
        ({"shard_tokens": 0}, "field 'shard_tokens'"),
    ],
)
def test_a_plan_that_is_not_one_is_refused_by_field(run: RunDirectory, change: dict[str, Any], reason: str) -> None:
    run.write_json("plan.json", {"num_tokens": 8})
    assert run.plan() == {"num_tokens": 8}
    run.write_json("plan.json", {"num_tokens": 8, **change})
    with pytest.raises(MismatchError, match=reason):
        run.plan()


def test_a_damaged_line_of_progress_is_left_out(run: RunDirectory, tmp_path: Path) -> None:
    lines = ['{"event": "start", "event": "end"}', '{"tokens_per_s": NaN}', json.dumps({"event": "start"})]
    (tmp_path / "progress.jsonl").write_text("\n".join(lines))
    assert run.progress() == [{"event": "start"}]
