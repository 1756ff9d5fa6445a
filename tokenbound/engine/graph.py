"""The Ray Data graph: one row is one shard, read on CPU tasks, scored on an actor pool, committed by CPU tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext

from tokenbound.config import HowConfig
from tokenbound.engine.cluster import cluster_resources, plain_errors
from tokenbound.engine.scoring import CommitShard, ReadShard, ReplicaSpec, ScoreShard

logger = logging.getLogger(__name__)

TASK_CPUS = 0.05
"""Reading and committing are short: they must always find room beside the replicas."""

SPARE_SHARE, SPARE_CPUS = 0.1, 0.8
"""What CPU replicas leave of a node for the tasks above: a tenth, and never room for another replica."""

WAITING = 16
"""Replicas that wait for room on nodes that join. Ray Data itself grows a pool only into a third of what is free, which
on a small node is none; and an autoscaler learns from them that more nodes are wanted."""

NEVER = -1.0
"""No pool is used less than this: replicas stay until every shard is given out, because building one is dear."""


@dataclass(frozen=True)
class Placement:
    """How replicas are spread over the cluster."""

    replicas: int
    """How many find room at the start, or are the first to wait for a GPU."""
    device: str
    threads: int
    """CPU threads of each."""
    cpus: float
    """Processors that each reserves."""
    most: int
    """So many at most, as the cluster grows."""
    gpus: int = 1
    """GPUs of each, where the device is one."""

    @property
    def actor_options(self) -> dict[str, Any]:
        """Ray resources of one replica."""
        if self.device == "cuda":
            return {"num_gpus": self.gpus, "num_cpus": self.cpus}
        return {"num_cpus": self.cpus}

    @property
    def pool(self) -> ActorPoolStrategy:
        """Replicas at work and waiting; a pool that insisted on its size would not survive the loss of a node."""
        waiting = min(WAITING, self.most - self.replicas)
        return ActorPoolStrategy(min_size=1, initial_size=self.replicas + waiting, max_size=self.most)


def replica_device(how: HowConfig) -> str:
    """Where replicas run: on GPUs if the cluster has some and nothing else was asked for."""
    return how.device if how.device != "auto" else ("cuda" if cluster_resources().gpus else "cpu")


def place_replicas(how: HowConfig, num_shards: int, gpus: int = 1) -> Placement:
    """Replicas for so many shards: one per so many GPUs, else one per processor with the threads divided fairly.

    Two one-thread replicas score about 10 % faster than one of two threads. Nodes that join later get replicas of their
    own, up to the number that was asked for. GPUs that were asked for and are not there yet are waited for: that is
    how an autoscaler learns of them.

    Args:
        how: the user's wishes.
        num_shards: more replicas than shards have nothing to do.
        gpus: over which one replica is spread.
    """
    resources, device = cluster_resources(), replica_device(how)
    slots = resources.gpus // gpus if device == "cuda" else resources.cpus
    wanted = min(num_shards, how.replicas if how.replicas != "auto" else num_shards if resources.grows else slots)
    replicas = max(1, min(wanted, slots))
    most = max(replicas, wanted) if resources.grows else replicas
    if device == "cuda":
        return Placement(replicas, device, 1, TASK_CPUS, most, gpus)
    threads = max(1, min(resources.cpus // replicas, resources.cpus_of_a_node))
    share = 1 - min(SPARE_SHARE, SPARE_CPUS / resources.cpus_of_a_node)
    return Placement(replicas, device, threads, round(threads * share, 4), most)


@dataclass(frozen=True)
class Shard:
    """A planned piece of work."""

    number: int
    windows: NDArray[np.int64]
    """Ids of its windows, in the order in which they are recorded."""


def score_shards(
    shards: Sequence[Shard],
    *,
    read: ReadShard,
    replica: ReplicaSpec,
    commit: CommitShard,
    placement: Placement,
) -> Iterator[dict[str, Any]]:
    """Score and commit shards; yields ``{shard, tokens, unscored_windows}`` as each is committed.

    A shard whose actor dies is scored again by another; committing twice writes the same names.

    Raises:
        TokenboundError: a stage refused its input.
        RuntimeError: the graph returned other rows than it was given.
    """
    _configure()
    rows = [{"shard": shard.number, "windows": np.ascontiguousarray(shard.windows).tobytes()} for shard in shards]
    graph = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(read, num_cpus=TASK_CPUS)
        .map(
            ScoreShard,
            fn_constructor_args=(replica,),
            compute=placement.pool,
            **placement.actor_options,
        )
        .map(commit, num_cpus=TASK_CPUS)
    )
    pending = {shard.number for shard in shards}
    with plain_errors():
        for row in graph.iter_rows():
            if row["shard"] not in pending:
                raise RuntimeError(f"shard {row['shard']} came back twice or was never asked for")
            pending.remove(row["shard"])
            yield row
    if pending:
        raise RuntimeError(f"{len(pending)} shards went in and did not come out: {sorted(pending)[:5]}")


def _configure() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.max_errored_blocks = 0
    context.actor_task_retry_on_errors = False
    context.execution_options.preserve_order = False
    context.autoscaling_config.actor_pool_util_downscaling_threshold = NEVER
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
