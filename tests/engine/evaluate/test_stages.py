"""The stages without a cluster."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.engine.cluster.progress import TokenProgress, describe_speed, told
from tokenbound.engine.cluster.session import _user_error, plain_errors
from tokenbound.engine.evaluate.run import _warn_of_a_wrong_tokenizer
from tokenbound.engine.evaluate.stages import (
    CommitShard,
    ReadShard,
    ReplicaSpec,
    ScoreShard,
    WindowSpec,
    count_attempt,
    open_plan,
)
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store.run import RunDirectory


@pytest.fixture
def corpus_root(tmp_path: Path, text_folder: Path) -> str:
    config = CorpusConfig(
        source="text", paths=(str(text_folder),), tokenizer="bytes", tokenizer_is="given", add_bos=False, add_eos=True
    )
    return prepare_corpus(config, str(tmp_path / "corpus")).root


def artifact(checkpoint: Path, folder: Path) -> str:
    from tokenbound.compression.artifact import encode_artifact
    from tokenbound.config.compress import LosslessSettings
    from tokenbound.models.checkpoint import read_checkpoint

    loaded = read_checkpoint(checkpoint)
    data = encode_artifact(loaded.architecture, loaded.tensors, LosslessSettings())
    (folder / "a.tokenbound").write_bytes(data)
    return str(folder / "a.tokenbound")


def test_the_stages_carry_a_shard_from_ids_to_a_record(corpus_root: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = WindowSpec(32, "document", 16, 1)
    plan = open_plan(corpus_root, spec)[1]
    windows = np.arange(5, 16, dtype=np.int64)
    row = ReadShard(corpus_root, spec)({"shard": 2, "windows": windows.tobytes()})
    scored = ScoreShard(ReplicaSpec(artifact(tiny_checkpoint, tmp_path), "float32", 4, 32, "cpu", 1))(row)
    assert scored["lengths"].tolist() == plan.windows(windows).num_targets.tolist()
    run = RunDirectory(str(tmp_path / "run"))
    done = CommitShard(run.uri, "f", (1,), store_tokens=True)(scored)
    losses = run.losses(run.record(2))
    assert done == {"shard": 2, "tokens": losses.num_tokens, "unscored_windows": 0}
    assert losses.window_id.tolist() == windows.tolist()
    assert np.isfinite(losses.nll).all()


def test_a_window_without_finite_losses_goes_to_quarantine(tmp_path: Path) -> None:
    nan = np.float32(np.nan)
    row = {
        "shard": 0,
        "windows": np.arange(2, dtype=np.int64).tobytes(),
        "vocab_size": 257,
        "lengths": np.array([2, 3]),
        "unscored": np.array([True, False]),
        "nll": np.array([1.0, nan, 1.0, 2.0, 3.0], np.float32),
        "entropy": np.ones(5, np.float32),
        "rank": np.zeros(5, np.int32),
        "token": np.zeros(5, np.int32),
        "document": np.zeros(5, np.int64),
        "position": np.arange(5, dtype=np.int32),
        "environment": "",
    }
    run = RunDirectory(str(tmp_path))
    assert CommitShard(run.uri, "f", (1,), store_tokens=False)(row)["unscored_windows"] == 1
    assert run.read_json("quarantine/00000.json")[0]["window_id"] == 0
    losses = run.losses(run.record(0))
    assert losses.unscored.tolist() == [True, False]
    assert losses.rank[:2].tolist() == [257, 257]
    assert losses.token is None


def test_a_user_error_inside_a_task_comes_out_as_itself() -> None:
    inner = MismatchError("the corpus changed")
    outer = RuntimeError("task failed")
    outer.__cause__ = inner
    assert _user_error(outer) is inner
    assert _user_error(RuntimeError("other")) is None


def in_a_task(cause: Exception) -> Exception:
    """What Ray raises in the driver for an exception in a task."""
    import ray

    error: Exception = ray.exceptions.RayTaskError("write", "Traceback ...", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "runs/x/losses: No space left on device; make room or choose another disk, and run it again"),
        (errno.EROFS, "runs/x/losses: Read-only file system; choose a place that you may write to"),
        (errno.EFBIG, "runs/x/losses: File too large; raise the limit of file sizes (ulimit -f), and run it again"),
    ],
)
def test_a_full_disk_under_a_worker_is_one_line(number: int, says: str) -> None:
    cause = OSError(number, os.strerror(number), "runs/x/losses")
    with pytest.raises(InputError, match=f"^{re.escape(says)}$"), plain_errors():
        raise in_a_task(cause)
    with pytest.raises(InputError, match=re.escape(says.partition(": ")[2])), plain_errors():
        raise in_a_task(OSError(f"Arrow failed: [Errno {number}] {os.strerror(number)}"))
    ours = ZeroDivisionError()
    ours.__context__ = cause
    with pytest.raises(ZeroDivisionError), plain_errors():  # a mistake of the program, while the disk's was handled
        raise ours


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "WorkerCrashedError", "ActorDiedError", "OutOfDiskError"])
def test_a_worker_that_the_machine_ended_is_one_line(kind: str) -> None:
    import ray

    error = getattr(ray.exceptions, kind)
    with pytest.raises(IncompleteError, match=r"run the same command again to resume$"), plain_errors():
        raise error("died") if kind in ("OutOfMemoryError", "OutOfDiskError") else error()


def test_progress_counts_resumed_tokens_as_done_but_not_as_speed() -> None:
    with TokenProgress(100, done_tokens=50, interval_s=0) as progress:
        assert progress.speed == 0
        progress.advance(50)
        assert progress.done == 100
    assert "tokens/s" in describe_speed(1, 2, 3.0)


def test_the_time_left_does_not_count_the_start_of_the_replicas(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    caplog.set_level("INFO", logger="tokenbound")
    with TokenProgress(10_000, interval_s=30, clock=lambda: clock[0]) as progress:
        for now in (400.0, 430.0, 460.0):  # the first shard comes late, the others every 30 seconds
            clock[0] = now
            progress.advance(1000)
    first, second, third = (record.message for record in caplog.records)
    assert first == "scoring: 1.0k / 10.0k tokens", "no time left is promised while only the start is known"
    assert second.endswith("4 min left")
    assert progress.speed == pytest.approx(1000 / 30)
    assert third.endswith("3 min left")


def test_long_steps_say_how_far_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tokenbound")
    assert list(told(iter("abc"), "calibrating", 3, interval_s=0)) == ["a", "b", "c"]
    assert [record.message for record in caplog.records] == [f"calibrating: {done} of 3 parts" for done in (1, 2)]
    caplog.clear()
    assert list(told(iter("abc"), "calibrating", 3)) == ["a", "b", "c"]
    assert not caplog.records


@pytest.mark.parametrize(("loss", "warned"), [(7.9, 0), (12.2, 1)])
def test_a_loss_above_guessing_is_remarked(loss: float, warned: int, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_a_wrong_tokenizer(loss, 8.0)
    assert ["is what.corpus.tokenizer the model's own?" in r.message for r in caplog.records] == [True] * warned


def test_ids_outside_the_vocabulary_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    inputs = np.full((1, 32), 300)
    score = ScoreShard(ReplicaSpec(artifact(tiny_checkpoint, tmp_path), "float32", 4, 32, "cpu", 1))
    with pytest.raises(InputError, match="300"):
        score({"inputs": inputs, "targets": inputs, "mask": inputs > 0})


def test_a_shard_that_keeps_killing_its_actor_ends_the_run(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    for _ in range(3):
        count_attempt(run, 7, "first", retries=2)
    with pytest.raises(IncompleteError, match="shard 7 lost its actor 3 times"):
        count_attempt(run, 7, "first", retries=2)
    count_attempt(run, 7, "second", retries=2)


def test_compiling_is_refused_early_without_a_compiler(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    inputs = np.zeros((1, 32), np.int64)
    score = ScoreShard(ReplicaSpec(artifact(tiny_checkpoint, tmp_path), "float32", 4, 32, "cpu", 1, compile=True))
    with pytest.raises(InputError, match="no C"):
        score({"shard": 0, "inputs": inputs, "targets": inputs, "mask": inputs >= 0})


FAULTS = """
import resource, sys, torch
from tokenbound.engine.evaluate.stages import settle_on_cpu
torch.set_num_threads(1)
if sys.argv[1] == "settled":
    settle_on_cpu(1)
def work():
    for _ in range(20):
        torch.ones(12_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_scoring_process_keeps_the_memory_that_a_batch_frees() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("settled", "as it comes")
    }
    assert faults["settled"] < faults["as it comes"] / 10, faults
