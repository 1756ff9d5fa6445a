"""What the engine asks of a cluster, in one place: a session, its resources, and steps that run beside each other.

Every command of the engine takes these from `executor()`, which is Ray. `use_executor` puts another in its place: one
that runs every step in the calling process, say, where starting processes would take longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from tokenbound.engine.cluster import ray_map
from tokenbound.engine.cluster.address import RAY_TIMEOUT_S
from tokenbound.engine.cluster.session import Resources, cluster_resources, ray_session

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

A = TypeVar("A")
B = TypeVar("B")
Row = dict[str, Any]


class Executor:
    """Ray. A subclass may replace any of its methods."""

    def session(self, address: str | None = None, timeout_s: float = RAY_TIMEOUT_S) -> AbstractContextManager[None]:
        """What the steps of a command run in; see `ray_session`."""
        return ray_session(address, timeout_s)

    def resources(self) -> Resources:
        """What can run at once."""
        return cluster_resources()

    def smallest_gpu_bytes(self) -> int:
        """Memory of the smallest GPU, asked on every node that has some."""
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        asked = ray.remote(num_gpus=1, num_cpus=0)(_gpu_bytes)
        places = [ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(n["NodeID"], soft=False) for n in nodes]
        sizes: list[int] = ray.get([asked.options(scheduling_strategy=place).remote() for place in places])
        return min(sizes)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Like the built-in ``map``, as tasks; see `ray_map`."""
        return ray_map.ray_map(function, items)

    def pool(
        self,
        make: Callable[[], Callable[[A], B]],
        items: Iterable[A],
        *,
        actors: int,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> Iterator[B]:
        """Like ``map(make(), items)`` on actors, each of which calls `make` once; see `ray_pool`."""
        return ray_map.ray_pool(make, items, actors=actors, num_cpus=num_cpus, num_gpus=num_gpus)

    def stream(
        self,
        rows: Sequence[Mapping[str, object]],
        *,
        read: object,
        scorer: Callable[[A], object],
        replica: A,
        commit: object,
        tasks: int,
        actors: ActorPoolStrategy,
        actor_options: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Rows through three stages, each a callable from row to row, in the order in which they are done.

        Args:
            rows: One for each piece of work.
            read: The first stage, as tasks.
            scorer: Makes the second stage from `replica`, once in each actor.
            replica: What the actors are made from.
            commit: The last stage, as tasks.
            tasks: Number of tasks of the first, and of the last stage, at once.
            actors: Number of actors.
            actor_options: Resources of each.
        """
        compute = TaskPoolStrategy(tasks)
        graph = (
            ray.data.from_items(list(rows), override_num_blocks=len(rows))
            .map(_untyped(read), compute=compute, num_cpus=0)
            .map(_untyped(scorer), fn_constructor_args=(replica,), compute=actors, **dict(actor_options))
            .map(_untyped(commit), compute=compute, num_cpus=0)
        )
        return graph.iter_rows()

    def train(
        self,
        trainer: type[TorchTrainer],
        worker: Callable[[Row], None],
        settings: Row,
        *,
        scaling_config: ray.train.ScalingConfig,
        run_config: ray.train.RunConfig,
    ) -> ray.train.Result:
        """Run Ray Train's workers, each of which calls ``worker(settings)``, to the end."""
        built = trainer(worker, train_loop_config=settings, scaling_config=scaling_config, run_config=run_config)
        return built.fit()


def _untyped(stage: object) -> Callable[[Row], Row]:
    """A stage as Ray Data's types see it: they know neither typed rows nor classes."""
    return cast(Callable[[Row], Row], stage)


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


_RAY = Executor()
_used: ContextVar[Executor] = ContextVar("executor", default=_RAY)


def executor() -> Executor:
    """The one in use: Ray, unless `use_executor` says otherwise."""
    return _used.get()


@contextmanager
def use_executor(chosen: Executor) -> Iterator[None]:
    """Let the engine's commands in this thread run their steps on another executor."""
    token = _used.set(chosen)
    try:
        yield
    finally:
        _used.reset(token)
