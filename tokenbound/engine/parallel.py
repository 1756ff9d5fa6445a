"""Ordered parallel maps over Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

A = TypeVar("A")
B = TypeVar("B")

IN_FLIGHT_PER_CPU = 2
"""Tasks submitted ahead of the oldest unfinished one, per processor: bounds the results held at once."""


def ray_map(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Like ``map``, as Ray tasks; results come in the order of the items.

    A task that dies with its node is repeated by Ray, so `function` must be pure or overwrite what it wrote.
    """
    task = ray.remote(_call)
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
