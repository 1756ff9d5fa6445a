"""How many GPUs a replica needs, from its predicted memory and that of the GPUs at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenbound.config.run import HowConfig, WhatConfig
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.evaluate.graph import replica_device
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

    from tokenbound.models.memory import ReplicaMemory


def replica_gpus(how: HowConfig, what: WhatConfig, architecture: Mapping[str, Any], batch: int) -> int:
    """GPUs over which a replica of this run is spread; 1 on a CPU.

    Raises:
        InputError: no node has so many.
    """
    if replica_device(how) != "cuda":
        return 1
    gpus, most = how.gpus_per_replica, executor().resources().gpus_of_a_node
    if gpus == "auto":
        # GPUs that an autoscaler has yet to bring cannot be asked for their memory.
        gpus = _gpus_by_memory(what, architecture, batch) if most else 1
    if 0 < most < gpus:
        raise InputError(
            f"how.gpus_per_replica: a replica takes {gpus} GPUs of one node, and no node has more than {most}; lower "
            "what.windows.batch, use a smaller what.model.dtype, or join nodes with more"
        )
    return gpus


def _gpus_by_memory(what: WhatConfig, architecture: Mapping[str, Any], batch: int) -> int:
    import torch

    from tokenbound.models.memory import replica_memory
    from tokenbound.models.quantized.schemes import scheme_of

    if architecture.get("model_type") == "markov" or scheme_of(architecture) is not None:
        return 1
    dtype, length = getattr(torch, what.model.dtype), what.windows.length
    memory = replica_memory(architecture, dtype=dtype, batch=batch, length=length, device="cuda")
    copies = 1 if what.model.base is None else 2  # a delta's base scores beside it
    return gpus_for_memory(architecture, memory, dtype=dtype, gpu_bytes=executor().smallest_gpu_bytes(), copies=copies)


def gpus_for_memory(
    architecture: Mapping[str, Any], memory: ReplicaMemory, *, dtype: torch.dtype, gpu_bytes: int, copies: int = 1
) -> int:
    """The fewest GPUs of one size that hold a replica, whole layers on each.

    Args:
        architecture: Hugging Face config as a dict.
        memory: as it was predicted.
        dtype: arithmetic of the body.
        gpu_bytes: memory of one GPU.
        copies: models that lie side by side.
    """
    from tokenbound.models.hf_model import blank_model
    from tokenbound.models.spread import gpus_by_memory, gpus_for

    working = memory.activations_bytes + memory.logits_bytes
    if gpus_by_memory(copies * memory.weights_bytes, working, gpu_bytes) == 1:
        return 1
    blank = blank_model(architecture)
    return copies * gpus_for(
        blank, weights_bytes=memory.weights_bytes, working_bytes=working, gpu_bytes=gpu_bytes, dtype=dtype
    )
