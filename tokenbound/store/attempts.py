"""Who began each shard of a run, and when: one small object for each shard, rewritten whenever it is begun again.

Written by the replica that scores the shard, before it scores. Together with the commit records this says, while a run
goes on and on every kind of storage, what each replica has done, what it is doing, and which shards lost theirs.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.store.run import RunDirectory

FOLDER = "attempts"


@dataclass(frozen=True)
class Attempt:
    """A shard that was begun."""

    replica: str
    """Which replica began it."""
    began: float
    """When, in seconds since 1970 by the clock of its machine."""


@dataclass(frozen=True)
class Attempts:
    """All attempts at a shard since one start of the run, oldest first; all but the last lost their replica."""

    session: str = ""
    """Names the start of the run; empty where nobody has begun the shard."""
    begun: tuple[Attempt, ...] = ()


def read_attempts(run: RunDirectory, shard: int) -> Attempts:
    """The attempts at a shard since the last start that began it; none where what is there cannot be read.

    They decide nothing about a certificate, so one that is damaged is no reason to stop.
    """
    try:
        tree = run.read_json(run.shard_file(FOLDER, shard))
        begun = tuple(Attempt(str(item["replica"]), float(item["began"])) for item in tree["begun"])
        return Attempts(str(tree["session"]), begun)
    except (IncompleteError, MismatchError, KeyError, TypeError, ValueError):
        return Attempts()


def all_attempts(run: RunDirectory) -> dict[int, Attempts]:
    """The attempts at every shard that was ever begun."""
    shards = run.numbered(FOLDER)
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(shards, pool.map(lambda shard: read_attempts(run, shard), shards), strict=True))


def write_attempts(run: RunDirectory, shard: int, attempts: Attempts) -> None:
    """Keep the attempts at a shard."""
    run.write(run.shard_file(FOLDER, shard), json.dumps(asdict(attempts)).encode())
