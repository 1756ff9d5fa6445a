"""What a run's directory says while the run goes on, on disks and on object stores alike."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from losses_support import make_losses
from rich.console import Console

from tokenbound.errors import IncompleteError
from tokenbound.report.status import LostReplica, ReplicaStatus, RunStatus, run_status, status_view
from tokenbound.store.attempts import Attempt, Attempts, write_attempts
from tokenbound.store.run import RunDirectory

FIRST, SECOND = "10.0.0.1/71", "10.0.0.2/72"


def commit(run: RunDirectory, shard: int, tokens: int) -> None:
    run.commit(shard, make_losses([tokens]), {}, "f")


def begin(run: RunDirectory, shard: int, *begun: tuple[str, float], session: str = "now") -> None:
    write_attempts(run, shard, Attempts(session, tuple(Attempt(replica, at) for replica, at in begun)))


@pytest.fixture
def run(anywhere: str) -> RunDirectory:
    """A run in its second start: two replicas at work, one shard begun again after the first replica died."""
    found = RunDirectory(anywhere)
    found.write_json("plan.json", {"num_tokens": 1000})
    for shard, tokens in ((0, 100), (1, 200), (2, 300)):
        commit(found, shard, tokens)
    begin(found, 0, ("10.0.0.9/1", 50.0), ("10.0.0.9/2", 60.0), session="before")
    begin(found, 1, (FIRST, 100.0))
    begin(found, 2, (FIRST, 110.0), (SECOND, 130.0))
    begin(found, 3, (SECOND, 150.0))
    return found


def test_replicas_retries_and_losses_since_the_last_start(run: RunDirectory) -> None:
    run.log_progress(event="start", replicas=2)
    run.log_progress(event="out_of_memory", batch=2)
    run.log_progress(event="progress", tokens_per_s=12.5)
    status = run_status(run)
    assert (status.shards_committed, status.tokens_scored, status.num_tokens) == (3, 600, 1000)
    assert status.replicas == [
        ReplicaStatus(FIRST, shards=1, tokens=200, tokens_per_s=None, shard=None, began=100.0),
        ReplicaStatus(SECOND, shards=1, tokens=300, tokens_per_s=15.0, shard=3, began=150.0),
    ]
    assert status.lost == [LostReplica(2, FIRST, 110.0)]
    assert (status.retries, status.out_of_memory_halvings, status.unscored_windows) == (1, 1, 0)
    assert (status.tokens_per_s, status.certificate, status.failure) == (12.5, False, None)
    console = Console(record=True, width=100, force_terminal=False)
    console.print(status_view("here", status))
    shown = console.export_text()
    assert "here: not finished; 3 shards committed, 600 of 1,000 tokens scored, 12 tokens/s" in shown
    assert f"{SECOND}" in shown
    assert "shard 3 for " in shown
    assert f"lost: {FIRST}, with shard 2 since 00:01:50 UTC" in shown
    assert "1 shards begun again; 1 batches halved for want of memory" in shown


def test_eighty_columns_hold_a_large_run() -> None:
    big = ReplicaStatus("192.168.100.200/4194303", 9_999, 9_876_543_210, 98_765.4, 65_535, time.time() - 4000)
    status = RunStatus(False, 9_999, 10**10, 10**12, 1e6, 0, 0, 0, None, [big, replace(big, shard=None)], [])
    console = Console(record=True, width=80, force_terminal=False)
    console.print(status_view("here", status), soft_wrap=True)
    (row,) = [line for line in console.export_text().splitlines() if "shard 65535" in line]
    assert " ".join(row.split()) == "192.168.100.200/4194303 9,999 9,876,543,210 98,765 shard 65535 for 67 min"


def test_every_writer_of_events_is_heard(run: RunDirectory) -> None:
    """Two processes, or two starts, that write at once; on a disk a crash may cut a line."""
    run.log_progress(event="start")
    RunDirectory(run.uri).log_progress(event="failed", reason="the store failed")
    if (run.filesystem.type_name) == "local":
        with open(run.path("progress.jsonl"), "a") as stream:  # noqa: PTH123
            stream.write('{"event": "prog')
    assert [event["event"] for event in run.progress()] == ["start", "failed"]
    assert run_status(run).failure == "the store failed"


def test_attempts_that_cannot_be_read_are_no_attempts(run: RunDirectory) -> None:
    run.write(run.shard_file("attempts", 3), b"{")
    run.write(run.shard_file("attempts", 2), b'{"session": "now", "count": 1}')
    assert [each.replica for each in run_status(run).replicas] == [FIRST]


def test_a_run_that_has_not_begun_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"plan\.json"):
        run_status(RunDirectory(str(tmp_path)))
