"""What a run tells Prometheus through Ray: counters and gauges, each tagged with the run directory.

Ray exports them with its own on every node (`ray start --metrics-export-port`), where `ray[default]` is installed: the
extra `cluster`. `workflows/observability/grafana.json` is a dashboard of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

from ray.util.metrics import Counter, Gauge

from tokenbound.store.retry import observers

logger = logging.getLogger(__name__)

P = ParamSpec("P")

COUNTERS = {
    "shards_committed": "Shards with a commit record.",
    "tokens_scored": "Tokens in committed shards.",
    "shard_retries": "Shards begun again after an actor died.",
    "out_of_memory_halvings": "Batches halved for want of memory.",
    "storage_retries": "Operations on a store tried again.",
}
GAUGES = {"tokens_per_second": "Speed since this start of the run."}
TAGS = {"storage_retries": ("operation",)}
"""Tags of the metrics that have others than `run`."""


def exported_names() -> set[str]:
    """Names under which Prometheus finds them.

    >>> sorted(exported_names())[0]
    'ray_tokenbound_out_of_memory_halvings_total'
    """
    return {f"ray_tokenbound_{name}_total" for name in COUNTERS} | {f"ray_tokenbound_{name}" for name in GAUGES}


@cache
def _counter(name: str) -> Counter:
    return Counter(f"tokenbound_{name}", description=COUNTERS[name], tag_keys=TAGS.get(name, ("run",)))


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"tokenbound_{name}", description=GAUGES[name], tag_keys=("run",))


def _harmless(count: Callable[P, None]) -> Callable[P, None]:
    """Log the first failure of a counter and go on: what is told to a monitor never stops a run."""
    failed = False

    @wraps(count)
    def counted(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal failed
        try:
            count(*args, **kwargs)
        except Exception as error:  # Ray and its exporters raise many kinds
            if not failed:
                logger.warning("metrics of this run are incomplete: %s", " ".join(str(error).split()))
            failed = True

    return counted


def _tag(run: str) -> str:
    r"""A run directory as a tag: Ray encodes tags as ASCII.

    >>> _tag("runs/demo"), _tag("runs/démo")
    ('runs/demo', 'runs/d\\xe9mo')
    """
    return run.encode("ascii", "backslashreplace").decode("ascii")


@_harmless
def count_shard(run: str, tokens: int, tokens_per_s: float) -> None:
    """A shard was committed."""
    tags = {"run": _tag(run)}
    _counter("shards_committed").inc(1, tags)
    if tokens:
        _counter("tokens_scored").inc(tokens, tags)
    _gauge("tokens_per_second").set(tokens_per_s, tags)


@_harmless
def count_retry(run: str) -> None:
    """A shard is begun again because its actor died."""
    _counter("shard_retries").inc(1, {"run": _tag(run)})


@_harmless
def count_halving(run: str) -> None:
    """A batch did not fit into memory and was halved."""
    _counter("out_of_memory_halvings").inc(1, {"run": _tag(run)})


@_harmless
def count_storage_retry(operation: str) -> None:
    """An object store failed for the moment; the operation is one of `store/remote.py`."""
    _counter("storage_retries").inc(1, {"operation": operation})


observers.append(count_storage_retry)
