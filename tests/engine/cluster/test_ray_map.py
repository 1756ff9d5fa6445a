"""Maps over Ray: order, what an actor keeps, and actors that die."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray

from tokenbound.engine.cluster.ray_map import ray_pool
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.errors import InputError

pytestmark = pytest.mark.usefixtures("ray_session")


def make(folder: Path, fault: str) -> Callable[[int], int]:
    """Squares; leaves a file each time it is built, and fails as it is told."""
    built = len(list(folder.iterdir()))
    (folder / str(built)).touch()
    if fault == "refuse":
        raise InputError("this model cannot be read")

    def square(item: int) -> int:
        if fault == "die" and item == 3 and not built:
            os._exit(1)
        return item * item

    return square


@pytest.mark.parametrize("fault", ["", "die"])
def test_a_pool_keeps_order_builds_once_and_replaces_the_dead(tmp_path: Path, fault: str) -> None:
    found = list(ray_pool(partial(make, tmp_path, fault), range(7), actors=1, num_cpus=1))
    assert found == [item * item for item in range(7)]
    assert len(list(tmp_path.iterdir())) == (2 if fault else 1)


def test_the_actors_of_one_pool_make_room_for_those_of_the_next(tmp_path: Path) -> None:
    every = int(ray.cluster_resources()["CPU"])
    kept = []
    for _ in range(3):
        pool = ray_pool(partial(make, tmp_path, ""), [1, 2], actors=every, num_cpus=1)
        kept.append(pool)
        assert list(pool) == [1, 4]


def test_the_error_of_building_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"), plain_errors():
        list(ray_pool(partial(make, tmp_path, "refuse"), [1], actors=1, num_cpus=1))
