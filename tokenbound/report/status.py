"""How far a run is, from its directory alone: what is committed, what each replica does, what was lost on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from tokenbound.errors import IncompleteError
from tokenbound.report.words import duration
from tokenbound.store.attempts import Attempt, Attempts, all_attempts
from tokenbound.store.run import CERTIFICATE, CommitRecord, RunDirectory


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica since the last start of the run."""

    replica: str
    """Address of its node and number of its process."""
    shards: int
    """Shards that it began last and that are committed."""
    tokens: int
    """Tokens in them."""
    tokens_per_s: float | None
    """Between the beginnings of its first and last shard; None before the second."""
    shard: int | None
    """What it scores at the moment, or scored when it died; None where all that it began is committed."""
    began: float
    """When it began its last shard, seconds since 1970."""


@dataclass(frozen=True)
class LostReplica:
    """A shard that had to be begun again, because its replica died."""

    shard: int
    replica: str
    began: float


@dataclass(frozen=True)
class RunStatus:
    """What the files of a run say about its progress."""

    certificate: bool
    shards_committed: int
    tokens_scored: int
    num_tokens: int
    tokens_per_s: float | None
    """As the run said last, since its last start."""
    retries: int
    """Shards begun again since the last start of the run."""
    out_of_memory_halvings: int
    unscored_windows: int
    """Windows without finite losses."""
    failure: str | None
    """Why the run ended, if it did and was not started again."""
    replicas: Sequence[ReplicaStatus]
    lost: Sequence[LostReplica]


def run_status(run: RunDirectory) -> RunStatus:
    """Read how far a run is.

    Raises:
        IncompleteError: there is no plan: the run has not begun.
        MismatchError: a commit record is damaged.
    """
    if not run.exists("plan.json"):
        raise IncompleteError(f"{run.uri} has no plan.json: no run has begun there")
    plan, records, attempts = run.plan(), run.committed(), _of_last_start(all_attempts(run))
    events = run.progress()
    lost = [
        LostReplica(shard, each.replica, each.began) for shard, found in attempts.items() for each in found.begun[:-1]
    ]
    return RunStatus(
        certificate=run.exists(CERTIFICATE),
        shards_committed=len(records),
        tokens_scored=sum(record.tokens for record in records.values()),
        num_tokens=int(plan["num_tokens"]),
        tokens_per_s=next((event["tokens_per_s"] for event in reversed(events) if "tokens_per_s" in event), None),
        retries=len(lost),
        out_of_memory_halvings=sum(event.get("event") == "out_of_memory" for event in events),
        unscored_windows=sum(record.unscored_windows for record in records.values()),
        failure=str(events[-1].get("reason")) if events and events[-1].get("event") == "failed" else None,
        replicas=_replicas(attempts, records),
        lost=sorted(lost, key=lambda each: each.began),
    )


def _of_last_start(attempts: Mapping[int, Attempts]) -> dict[int, Attempts]:
    begun = {shard: found for shard, found in attempts.items() if found.begun}
    if not begun:
        return {}
    last = max(begun.values(), key=lambda found: found.begun[-1].began).session
    return {shard: found for shard, found in begun.items() if found.session == last}


def _replicas(attempts: Mapping[int, Attempts], records: Mapping[int, CommitRecord]) -> list[ReplicaStatus]:
    begun: dict[str, list[tuple[Attempt, int]]] = {}
    for shard, found in attempts.items():
        begun.setdefault(found.begun[-1].replica, []).append((found.begun[-1], shard))
    return [
        _replica(name, sorted(mine, key=lambda each: each[0].began), records) for name, mine in sorted(begun.items())
    ]


def _replica(name: str, begun: list[tuple[Attempt, int]], records: Mapping[int, CommitRecord]) -> ReplicaStatus:
    """The status of a replica from its shards in the order in which it began them."""
    tokens = [records[shard].tokens if shard in records else 0 for _, shard in begun]
    (first, _), (last, newest) = begun[0], begun[-1]
    seconds = last.began - first.began
    return ReplicaStatus(
        replica=name,
        shards=sum(shard in records for _, shard in begun),
        tokens=sum(tokens),
        tokens_per_s=sum(tokens[:-1]) / seconds if seconds > 0 else None,
        shard=None if newest in records else newest,
        began=last.began,
    )


def status_view(name: str, status: RunStatus) -> RenderableType:
    """A status for a terminal."""
    state = "certified" if status.certificate else "not finished"
    speed = "" if status.certificate or status.tokens_per_s is None else f", {status.tokens_per_s:,.0f} tokens/s"
    line = (
        f"{name}: {state}; {status.shards_committed:,} shards committed, {status.tokens_scored:,} of "
        f"{status.num_tokens:,} tokens scored{speed}"
    )
    troubles = [
        f"{count:,} {what}"
        for count, what in (
            (status.retries, "shards begun again"),
            (status.out_of_memory_halvings, "batches halved for want of memory"),
            (status.unscored_windows, "windows without finite losses"),
        )
        if count
    ]
    parts: list[RenderableType] = [line]
    if status.replicas and not status.certificate:
        parts.append(_replica_table(status.replicas))
    parts += [f"lost: {each.replica}, with shard {each.shard} since {_clock(each.began)}" for each in status.lost]
    if troubles:
        parts.append("; ".join(troubles))
    if status.failure is not None and not status.certificate:
        parts.append(f"ended: {status.failure}")
    return Group(*parts)


def _replica_table(replicas: Sequence[ReplicaStatus]) -> Table:
    """One line for each replica; 80 columns hold an address of IPv4 and a billion tokens."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("replica", "shards", "tokens", "tokens/s", "at work on"):
        table.add_column(name, justify="left" if name in ("replica", "at work on") else "right", overflow="fold")
    for each in replicas:
        table.add_row(
            each.replica,
            f"{each.shards:,}",
            f"{each.tokens:,}",
            "" if each.tokens_per_s is None else f"{each.tokens_per_s:,.0f}",
            "" if each.shard is None else f"shard {each.shard} for {duration(max(0.0, time.time() - each.began))}",
        )
    return table


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S UTC")
