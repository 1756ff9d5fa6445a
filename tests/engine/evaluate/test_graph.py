"""How many replicas a run begins with, and to how many it may grow."""

from __future__ import annotations

from typing import Any

import pytest
from here_support import Cluster

from tokenbound.config.run import HowConfig
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.cluster.session import Resources
from tokenbound.engine.evaluate.graph import Placement, place_replicas

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
