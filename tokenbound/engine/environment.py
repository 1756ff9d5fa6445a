"""What scored a shard: versions, device and settings that may move a loss in its last digits.

They are no part of what names a run, so a run may be resumed after an update. That they were chosen without regard to
the tokens is declared; each commit record says what they were.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

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
