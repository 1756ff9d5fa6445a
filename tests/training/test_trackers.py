"""Metrics of training in trackers: the real ones where they are installed."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from tokenbound.errors import InputError
from tokenbound.training.trackers import open_trackers, require_trackers

SETTINGS = {"tokens": 4096, "seed": 7}


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would plot: a session start with a step makes all before it, from that step on, void."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
    return found


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    for steps, loss in ((range(1, 6), 2.0), (range(4, 8), 3.0)):
        with open_trackers(["tensorboard"], tmp_path, SETTINGS, steps[0]) as (tracker,):
            for step in steps:
                tracker.log({"loss_bits": loss}, step)
    found = scalars(tmp_path / "tensorboard")
    assert [found["loss_bits", step] for step in range(1, 8)] == [2, 2, 2, 3, 3, 3, 3]
    assert b"seed: 7" in b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    for steps in (range(1, 4), range(4, 6)):
        with open_trackers(["mlflow"], tmp_path / "checkpoints", SETTINGS, steps[0]) as (tracker,):
            for step in steps:
                tracker.log({"loss_bits": 2.0 + step, "tokens": 64.0 * step}, step)
    client = mlflow.tracking.MlflowClient()
    (run,) = client.search_runs(["0"])
    history = client.get_metric_history(run.info.run_id, "loss_bits")
    assert [(metric.step, metric.value) for metric in history] == [(step, 2.0 + step) for step in range(1, 6)]
    assert run.data.params["seed"] == "7"
    assert run.info.run_name == "checkpoints"


def test_a_tracker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers(["tensorboard"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"how\.log: mlflow needs the package mlflow"):
        require_trackers(["mlflow"])
