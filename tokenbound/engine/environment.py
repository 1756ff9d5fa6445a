"""What scored a shard: versions, device and settings that may move a loss in its last digits.

They are no part of what names a run, so a run may be resumed after an update. That they were chosen without regard to
the tokens is declared; each commit record says what they were.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from tokenbound.store.run import CommitRecord, canonical_json

PACKAGES = ("tokenbound", "torch", "transformers", "numpy")


def scoring_environment(*, device: str, compiled: bool, threads: int) -> dict[str, Any]:
    """What this process scores with.

    Args:
        device: `cpu` or `cuda`.
        compiled: whether the passes over the logits are fused.
        threads: CPU threads of the replica.

    >>> scoring_environment(device="cpu", compiled=False, threads=2)["threads"]
    2
    """
    return {
        **{name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": _device_name(device),
        "compile": compiled,
        "threads": threads,
    }


def _device_name(device: str) -> str:
    if device != "cuda":
        return platform.machine()
    import torch

    return str(torch.cuda.get_device_name())


def scoring_environments(records: Iterable[CommitRecord]) -> list[dict[str, Any]]:
    """The distinct environments of some shards, in the order of their first shard, and how many each scored.

    The number of threads is in the records alone: it says how many replicas shared a machine, which changes with every
    start, and a certificate does not depend on that.

    Args:
        records: of all shards, in order; those that older versions committed say nothing.

    >>> scoring_environments([])
    []
    """
    found: dict[bytes, dict[str, Any]] = {}
    for record in records:
        known = {name: value for name, value in (record.environment or {}).items() if name != "threads"}
        found.setdefault(canonical_json(known), {"shards": 0, **known})["shards"] += 1
    return list(found.values())
