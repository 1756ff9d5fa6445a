"""The Ray Data graph: one row is one shard, read on CPU tasks, scored on an actor pool, committed by CPU tasks."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext

from tokenbound.config.run import HowConfig
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.evaluate.stages import CommitShard, ReadShard, ReplicaSpec, ScoreShard
from tokenbound.errors import TokenboundError

logger = logging.getLogger(__name__)

MIN_TASKS = 2
"""Reading and committing are short and reserve no processor: Ray Data would otherwise keep a part of the cluster for
them, and replicas could not grow into it. So many of each run at once at least."""
CPUS_PER_TASK = 4
"""One more of each at once for so many processors: a token takes below a fiftieth of what scoring it takes, and every
process holds 200 MB."""

NEVER = -1.0
"""No pool is used less than this: replicas stay until every shard is given out, because building one is dear."""

SHUTDOWN_S = 20.0
"""How long Ray Data may take to stop. When its consumer fails it can wait for ever for a lock of its own."""


@dataclass(frozen=True)
class Placement:
    """How replicas are spread over the cluster."""

    replicas: int
    """How many to begin with."""
    device: str
    threads: int
    """CPU threads of each."""
    most: int
    """So many at most, as the cluster grows."""
    tasks: int
    """How many shards are read, and how many committed, at once."""
    gpus: int = 1
    """GPUs of each, where the device is one."""

    @property
    def actor_options(self) -> dict[str, Any]:
        """Ray resources of one replica."""
        return {"num_gpus": self.gpus, "num_cpus": 0} if self.device == "cuda" else {"num_cpus": self.threads}

    @property
    def pool(self) -> ActorPoolStrategy:
        """A pool that insisted on its size would not survive the loss of a node."""
        return ActorPoolStrategy(min_size=1, initial_size=self.replicas, max_size=self.most)


def replica_device(how: HowConfig) -> str:
    """Where replicas run: on GPUs if the cluster has some and nothing else was asked for."""
    return how.device if how.device != "auto" else ("cuda" if executor().resources().gpus else "cpu")


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
    resources, device = executor().resources(), replica_device(how)
    slots = resources.gpus // gpus if device == "cuda" else resources.cpus
    most = max(1, num_shards if how.replicas == "auto" else min(how.replicas, num_shards))
    replicas = min(most, how.replicas if device == "cuda" and how.replicas != "auto" else max(1, slots))
    threads = max(1, min(resources.cpus // replicas, resources.cpus_of_a_node)) if device == "cpu" else 1
    tasks = min(num_shards, max(MIN_TASKS, resources.cpus // CPUS_PER_TASK))
    return Placement(replicas, device, threads, most, tasks, gpus)


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
    shutdown_s: float = SHUTDOWN_S,
) -> Generator[dict[str, Any], None, None]:
    """Score and commit shards; yields ``{shard, tokens, unscored_windows}`` as each is committed.

    A shard whose actor dies is scored again by another; committing twice writes the same names. Whoever takes the rows
    closes the generator (`contextlib.closing`): an exception there then ends the graph, while Ray is still there.

    Args:
        shards: what to score.
        read: the first stage.
        replica: what the scoring actors are made from.
        commit: the last stage.
        placement: how many of each.
        shutdown_s: seconds that Ray Data may take to stop.

    Raises:
        TokenboundError: a stage refused its input.
        RuntimeError: the graph returned other rows than it was given.
    """
    _configure()
    rows = [{"shard": shard.number, "windows": np.ascontiguousarray(shard.windows).tobytes()} for shard in shards]
    stream: Iterable[dict[str, Any]] = executor().stream(
        rows,
        read=read,
        scorer=ScoreShard,
        replica=replica,
        commit=commit,
        tasks=placement.tasks,
        actors=placement.pool,
        actor_options=placement.actor_options,
    )
    found, pending = iter(stream), {shard.number for shard in shards}
    failure: TokenboundError | None = None
    try:
        with plain_errors():
            for row in found:
                if row["shard"] not in pending:
                    raise RuntimeError(f"shard {row['shard']} came back twice or was never asked for")
                pending.remove(row["shard"])
                yield row
    except TokenboundError as error:
        failure = error.with_traceback(None)
        failure.__context__ = None
    except GeneratorExit:
        logger.warning("scoring was broken off; %d shards under way or to come are not kept", len(pending))
        raise
    finally:
        _stop(found, shutdown_s)
    if failure is not None:
        # The objects of a failed graph hold each other, and with them its actors and their processors, which whatever
        # runs next would wait for: half the batch, or another model.
        gc.collect()
        raise failure
    if pending:
        raise RuntimeError(f"{len(pending)} shards went in and did not come out: {sorted(pending)[:5]}")


def _stop(rows: Iterator[dict[str, Any]], seconds: float) -> None:
    """Let Ray Data end what is still under way; a thread of its own waits, and is left behind where that never ends."""
    close = getattr(rows, "close", None)
    if close is None:
        return
    thread = threading.Thread(target=close, name="tokenbound-stop", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        logger.warning("Ray Data did not stop within %g s and is left behind", seconds)


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
