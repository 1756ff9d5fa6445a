"""What a run tells Prometheus through Ray: counters and gauges, each tagged with the run directory.

Ray exports them with its own on every node (`ray start --metrics-export-port`), under the prefix `ray_`, where
`ray[default]` is installed: the extra `cluster`. Useful queries: `sum by (run) (ray_tokenbound_tokens_per_second)`,
`increase(ray_tokenbound_shard_retries_total[1h])`.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge

from tokenbound.store.retry import observers

TAGS = ("run",)


@cache
def _counter(name: str, words: str, tags: tuple[str, ...] = TAGS) -> Counter:
    return Counter(f"tokenbound_{name}", description=words, tag_keys=tags)


@cache
def _gauge(name: str, words: str) -> Gauge:
    return Gauge(f"tokenbound_{name}", description=words, tag_keys=TAGS)


def count_shard(run: str, tokens: int, tokens_per_s: float) -> None:
    """A shard was committed."""
    tags = {"run": run}
    _counter("shards_committed", "Shards with a commit record.").inc(1, tags)
    if tokens:
        _counter("tokens_scored", "Tokens in committed shards.").inc(tokens, tags)
    _gauge("tokens_per_second", "Speed since this start of the run.").set(tokens_per_s, tags)


def count_retry(run: str) -> None:
    """A shard is begun again because its actor died."""
    _counter("shard_retries", "Shards begun again after an actor died.").inc(1, {"run": run})


def count_halving(run: str) -> None:
    """A batch did not fit into memory and was halved."""
    _counter("out_of_memory_halvings", "Batches halved for want of memory.").inc(1, {"run": run})


def count_storage_retry(operation: str) -> None:
    """An object store failed for the moment; the operation is one of `store/remote.py`."""
    _counter("storage_retries", "Operations on a store tried again.", ("operation",)).inc(1, {"operation": operation})


observers.append(count_storage_retry)
