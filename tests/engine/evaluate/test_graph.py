"""How many replicas a run begins with and to how many it may grow; and that its graph ends, whatever fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from here_support import Cluster

from tokenbound.config.run import HowConfig
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.engine.cluster.session import Resources
from tokenbound.engine.evaluate.graph import Placement, Shard, place_replicas, score_shards

LAPTOP = Resources(cpus=2, gpus=0, cpus_of_a_node=2, gpus_of_a_node=0)
TWO_NODES = Resources(cpus=2, gpus=0, cpus_of_a_node=1, gpus_of_a_node=0)
GPUS = Resources(cpus=32, gpus=4, cpus_of_a_node=16, gpus_of_a_node=4)
NO_GPU_YET = Resources(cpus=8, gpus=0, cpus_of_a_node=8, gpus_of_a_node=0)


@pytest.mark.parametrize(
    ("resources", "asked", "shards", "expected"),
    [
        (LAPTOP, {}, 64, Placement(2, "cpu", 1, most=64, tasks=2)),
        (LAPTOP, {}, 1, Placement(1, "cpu", 2, most=1, tasks=1)),
        (LAPTOP, {"replicas": 1}, 64, Placement(1, "cpu", 2, most=1, tasks=2)),
        (LAPTOP, {"replicas": 8}, 64, Placement(2, "cpu", 1, most=8, tasks=2)),
        (TWO_NODES, {"replicas": 1}, 64, Placement(1, "cpu", 1, most=1, tasks=2)),  # no node has two processors
        (GPUS, {}, 64, Placement(4, "cuda", 1, most=64, tasks=8)),
        (GPUS, {}, 3, Placement(3, "cuda", 1, most=3, tasks=3)),
        (GPUS, {"device": "cpu"}, 64, Placement(32, "cpu", 1, most=64, tasks=8)),
        (NO_GPU_YET, {"device": "cuda"}, 64, Placement(1, "cuda", 1, most=64, tasks=2)),
        (NO_GPU_YET, {"device": "cuda", "replicas": 8}, 64, Placement(8, "cuda", 1, most=8, tasks=2)),
    ],
)
def test_replicas_fit_the_cluster_and_may_grow_with_it(
    resources: Resources, asked: dict[str, Any], shards: int, expected: Placement
) -> None:
    with use_executor(Cluster(resources)):
        assert place_replicas(HowConfig(output="runs/x", **asked), shards) == expected


class Endless(Executor):
    """A graph that stops only when it is allowed to."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def stream(self, rows: Any, **_: Any) -> Iterator[dict[str, Any]]:
        try:
            for row in rows:
                yield {"shard": row["shard"], "tokens": 1, "unscored_windows": 0}
        finally:
            self.stopped.wait(60)


def consume(rows: Any) -> None:
    with closing(rows):
        for _ in rows:
            "é".encode("ascii")


@pytest.mark.parametrize("stops", [True, False])
def test_an_exception_in_the_scoring_loop_never_hangs_a_run(stops: bool, caplog: pytest.LogCaptureFixture) -> None:
    stopped, started = threading.Event(), time.monotonic()
    if stops:
        stopped.set()
    shards: Any = [Shard(number, np.arange(2)) for number in range(3)]
    stages: Any = {"read": None, "replica": None, "commit": None, "placement": Placement(1, "cpu", 1, 1, 1)}
    with caplog.at_level(logging.WARNING), use_executor(Endless(stopped)):
        rows = score_shards(shards, **stages, shutdown_s=0.2)
        with pytest.raises(UnicodeEncodeError):
            consume(rows)
    stopped.set()
    assert time.monotonic() - started < 20
    assert "scoring was broken off; 2 shards under way or to come are not kept" in caplog.text
    assert ("Ray Data did not stop" in caplog.text) is not stops
