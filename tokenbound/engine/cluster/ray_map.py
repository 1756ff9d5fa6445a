"""Ordered parallel maps over Ray tasks, and over actors that keep something between items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import ray
from ray.util import ActorPool

A = TypeVar("A")
B = TypeVar("B")

IN_FLIGHT_PER_CPU = 2
"""Tasks submitted ahead of the oldest unfinished one, per processor: bounds the results held at once."""


def ray_map(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Like ``map``, as Ray tasks; results come in the order of the items.

    A task that dies with its node is repeated by Ray, so `function` must be pure or overwrite what it wrote.
    """
    task: Any = ray.remote(_call)  # Ray's own types lose the generic function
    shared = ray.put(function)
    limit = IN_FLIGHT_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(task.remote(shared, item))
        if len(waiting) >= limit:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _call(function: Callable[[A], B], item: A) -> B:
    return function(item)


ACTOR_RETRIES = 3
"""How often an actor may die with its node and be started again, and an item be tried."""


def ray_pool(
    make: Callable[[], Callable[[A], B]], items: Iterable[A], *, actors: int, num_cpus: float = 1, num_gpus: float = 0
) -> Iterator[B]:
    """Like ``map(make(), items)`` on a pool of actors, each of which calls `make` once; in the order of the items.

    Args:
        make: Builds what is slow to build, a model on its device say, before an actor's first item.
        items: What to map. As with `ray_map`, an item may be tried again.
        actors: Their number.
        num_cpus: Processors of each.
        num_gpus: GPUs of each.
    """
    retries = {"max_restarts": ACTOR_RETRIES, "max_task_retries": ACTOR_RETRIES}
    kind: Any = ray.remote(_Worker)  # Ray's own types lose the generic class
    kind, shared = kind.options(num_cpus=num_cpus, num_gpus=num_gpus, **retries), ray.put(make)
    workers = [kind.remote(shared) for _ in range(actors)]
    try:
        yield from ActorPool(workers).map(lambda actor, item: actor.call.remote(item), list(items))
    finally:
        for worker in workers:  # at once, not when the last reference to them goes: what comes next needs their place
            ray.kill(worker)


class _Worker(Generic[A, B]):
    """Builds its function at the first item: an error there is that item's, and comes out as it is."""

    def __init__(self, make: Callable[[], Callable[[A], B]]) -> None:
        self._make = make
        self._function: Callable[[A], B] | None = None

    def call(self, item: A) -> B:
        """Map one item."""
        if self._function is None:
            self._function = self._make()
        return self._function(item)
