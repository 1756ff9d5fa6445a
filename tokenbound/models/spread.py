"""One replica over several GPUs: whole layers one after the other, placed by accelerate from the memory at hand.

Only the arithmetic's place changes: a batch runs through the first GPU's layers, then the next one's. GPUs of one kind
compute the same losses as one of them would.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from tokenbound.errors import InputError
from tokenbound.models.fusion import fuse_norms
from tokenbound.models.memory import replica_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPU_SHARE = 0.9
"""Of a GPU's memory, what a replica can use: the rest is the runtime's, and fragments."""

MORE_GPUS = 4
"""Whole layers waste room at the end of each GPU: so many more than memory alone asks for are tried, less one."""


def gpus_by_memory(weights_bytes: int, working_bytes: int, gpu_bytes: int) -> int:
    """How many GPUs hold a replica if weights could be cut anywhere; working memory is needed on each.

    Args:
        weights_bytes: of the whole replica.
        working_bytes: activations and a chunk of logits, which each GPU must have room for in its turn.
        gpu_bytes: memory of one GPU.

    Example:
        >>> gpus_by_memory(141 * 10**9, 4 * 10**9, 80 * 10**9), gpus_by_memory(10**9, 10**9, 80 * 10**9)
        (3, 1)
    """
    room = GPU_SHARE * gpu_bytes - working_bytes
    if room <= 0:  # no number of GPUs helps; halving the batch does
        return math.ceil((weights_bytes + working_bytes) / (GPU_SHARE * gpu_bytes))
    return max(1, math.ceil(weights_bytes / room))


def gpus_for(
    model: PreTrainedModel, *, weights_bytes: int, working_bytes: int, gpu_bytes: int, dtype: torch.dtype
) -> int:
    """The fewest GPUs of one size over whose memory the layers of a model can be laid.

    Args:
        model: a causal LM of transformers on the meta device.
        weights_bytes: of the whole replica.
        working_bytes: see `gpus_by_memory`.
        gpu_bytes: memory of one GPU.
        dtype: of the weights.
    """
    first = gpus_by_memory(weights_bytes, working_bytes, gpu_bytes)
    if first == 1:
        return 1
    for count in range(first, first + MORE_GPUS):
        with suppress(InputError):
            plan_devices(model, [gpu_bytes] * count, working_bytes=working_bytes, dtype=dtype)
            return count
    return first


def plan_devices(
    model: PreTrainedModel, memory_bytes: Sequence[int], *, working_bytes: int, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Which module goes to which GPU: in the order of the model, no layer divided, one GPU filled after the other.

    Args:
        model: a causal LM of transformers; one on the meta device serves.
        memory_bytes: free memory of each GPU.
        working_bytes: kept free on each, for activations and logits.
        dtype: of the weights, where the model is not yet in it.

    Returns:
        Names of modules to numbers of GPUs, as accelerate takes it.

    Raises:
        InputError: the model does not fit.
    """
    from accelerate import infer_auto_device_map

    room = {index: max(0, int(GPU_SHARE * free) - working_bytes) for index, free in enumerate(memory_bytes)}
    closed = sorted(getattr(model, "_no_split_modules", None) or ())
    with _quiet_accelerate():
        found: dict[str, Any] = infer_auto_device_map(
            model, max_memory=dict(room), no_split_module_classes=closed, dtype=dtype
        )
    if not set(found.values()) <= set(room):
        raise InputError(
            f"the weights do not fit into {len(room)} GPUs with {sum(room.values()):,} bytes for them; raise "
            "how.gpus_per_replica or lower what.windows.batch"
        )
    return found


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Plans are also made where there is no GPU, which accelerate would say for each of them."""
    chatty = logging.getLogger("accelerate.utils.modeling")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            chatty.setLevel(level)


def spread_model(model: PreTrainedModel, devices: Mapping[str, Any]) -> PreTrainedModel:
    """Move each part of a model to its device and let tensors follow from part to part.

    Args:
        model: a causal LM of transformers, on the host.
        devices: as `plan_devices` gives it.
    """
    from accelerate import dispatch_model

    fuse_norms(model)  # before hooks hold them: what is exchanged must not depend on the number of GPUs
    first = next(iter(devices.values()))
    spread: PreTrainedModel = dispatch_model(model, dict(devices), main_device=first, force_hooks=True)
    return spread


def spread_over_gpus(
    model: PreTrainedModel,
    architecture: Mapping[str, Any],
    *,
    gpus: int,
    dtype: torch.dtype,
    batch: int,
    length: int,
    place: Callable[[PreTrainedModel, dict[str, int]], PreTrainedModel] = spread_model,
) -> PreTrainedModel:
    """Spread a model over the first GPUs that this process sees, by their free memory; `place` puts its layers there.

    Raises:
        InputError: it does not fit.
    """
    needed = replica_memory(architecture, dtype=dtype, batch=batch, length=length, device="cuda")
    free = [torch.cuda.mem_get_info(index)[0] for index in range(gpus)]
    devices = plan_devices(model, free, working_bytes=needed.activations_bytes + needed.logits_bytes)
    return place(model, devices)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether `spread_model` placed this model: it must not be moved any more."""
    return getattr(model, "hf_device_map", None) is not None
