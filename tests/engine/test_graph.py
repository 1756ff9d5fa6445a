"""How many replicas a run begins with, and to how many it may grow."""

from __future__ import annotations

from typing import Any

import pytest

from tokenbound.config import HowConfig
from tokenbound.engine import graph
from tokenbound.engine.cluster import Resources
from tokenbound.engine.graph import TASK_CPUS, WAITING, Placement, place_replicas

LAPTOP = Resources(cpus=2, gpus=0, cpus_of_a_node=2, gpus_of_a_node=0, grows=False)
TWO_NODES = Resources(cpus=2, gpus=0, cpus_of_a_node=1, gpus_of_a_node=0, grows=True)
LARGE = Resources(cpus=64, gpus=0, cpus_of_a_node=64, gpus_of_a_node=0, grows=True)
GPUS = Resources(cpus=32, gpus=4, cpus_of_a_node=16, gpus_of_a_node=4, grows=True)
NO_GPU_YET = Resources(cpus=8, gpus=0, cpus_of_a_node=8, gpus_of_a_node=0, grows=True)


@pytest.mark.parametrize(
    ("resources", "asked", "shards", "expected"),
    [
        (LAPTOP, {}, 64, Placement(2, "cpu", 1, 0.9, most=2)),
        (LAPTOP, {}, 1, Placement(1, "cpu", 2, 1.8, most=1)),
        (LAPTOP, {"replicas": 1}, 64, Placement(1, "cpu", 2, 1.8, most=1)),
        (LAPTOP, {"replicas": 8}, 64, Placement(2, "cpu", 1, 0.9, most=2)),
        (TWO_NODES, {}, 64, Placement(2, "cpu", 1, 0.9, most=64)),
        (TWO_NODES, {"replicas": 1}, 64, Placement(1, "cpu", 1, 0.9, most=1)),  # no node has two processors
        (LARGE, {}, 200, Placement(64, "cpu", 1, 0.9875, most=200)),
        (GPUS, {}, 64, Placement(4, "cuda", 1, 0.05, most=64)),
        (GPUS, {}, 3, Placement(3, "cuda", 1, 0.05, most=3)),
        (NO_GPU_YET, {"device": "cuda"}, 64, Placement(1, "cuda", 1, 0.05, most=64)),
        (NO_GPU_YET, {"device": "cuda", "replicas": 8}, 64, Placement(1, "cuda", 1, 0.05, most=8)),
    ],
)
def test_replicas_fit_the_cluster_and_may_grow_with_it(
    resources: Resources, asked: dict[str, Any], shards: int, expected: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "cluster_resources", lambda: resources)
    assert place_replicas(HowConfig(output="runs/x", **asked), shards) == expected


@pytest.mark.parametrize("cpus", [1, 2, 4, 9, 16, 64, 192])
def test_a_full_node_has_room_for_tasks_and_for_no_other_replica(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Resources(cpus=cpus, gpus=0, cpus_of_a_node=cpus, gpus_of_a_node=0, grows=True)
    monkeypatch.setattr(graph, "cluster_resources", lambda: found)
    placement = place_replicas(HowConfig(output="runs/x"), 1000)
    assert placement.replicas == cpus
    assert cpus - cpus * placement.cpus + 1e-9 >= 2 * TASK_CPUS
    assert cpus - cpus * placement.cpus < placement.cpus


def test_some_replicas_wait_for_nodes_that_join() -> None:
    pool = Placement(4, "cuda", 1, 0.05, most=1000).pool
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 4 + WAITING, 1000)
    pool = Placement(4, "cuda", 1, 0.05, most=4).pool
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 4, 4)
