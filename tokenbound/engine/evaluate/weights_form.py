"""How the replicas of a run hold their weights: what was asked for, or the first form that fits the memory at hand."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenbound.config.run import HowConfig, WhatConfig
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.evaluate.gpu_count import replica_gpus
from tokenbound.engine.evaluate.graph import Placement, place_replicas
from tokenbound.errors import InputError

if TYPE_CHECKING:
    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.models.forms import Choice, Form, FormNeeds, LayerSizes, Room
    from tokenbound.models.memory import ReplicaMemory

logger = logging.getLogger(__name__)

PLAINLY_DENSE = 8
"""Decoded weights that fit so many times for every replica are dense without a closer look."""


def place_replicas_in_form(
    how: HowConfig, what: WhatConfig, artifact: ArtifactFile, batch: int, *, shards: int, shard_tokens: int
) -> tuple[Form, Placement]:
    """How replicas hold their weights, and how they are spread over the cluster.

    Args:
        how: the user's wishes.
        what: the protocol.
        artifact: the model.
        batch: windows of a forward pass.
        shards: that are to be scored.
        shard_tokens: of each.

    Raises:
        InputError: no node has the GPUs that a replica takes, or the model cannot be held as it was asked for.
    """
    dense = place_replicas(how, shards)
    if how.weights == "dense" or (how.weights == "auto" and _is_plainly_dense(artifact, dense)):
        return "dense", place_replicas(how, shards, replica_gpus(how, what, artifact.architecture, batch))
    choice = _choice(how, what, artifact, batch, shard_tokens, dense)
    logger.info("how.weights: %s takes %s: %s", how.weights, choice.form, choice.why)
    gpus = replica_gpus(how, what, artifact.architecture, batch) if choice.form == "dense" else 1
    return choice.form, placed(choice, how, shards, gpus)


def _choice(
    how: HowConfig, what: WhatConfig, artifact: ArtifactFile, batch: int, shard_tokens: int, dense: Placement
) -> Choice:
    from tokenbound.models.forms import Choice

    if how.weights in ("packed", "streamed"):
        return Choice(how.weights, True, "asked for")
    return choose(artifact_needs(artifact, what, batch, device=dense.device, shard_tokens=shard_tokens), dense)


def check_form(how: HowConfig, what: WhatConfig, architecture: Mapping[str, Any]) -> None:
    """Refuse a form that a model cannot be held in, before anything is prepared.

    Raises:
        InputError: it has no list of layers, or is scored on a base; the message says what to set.
    """
    if how.weights not in ("packed", "streamed"):
        return
    from tokenbound.models.blocks import require_layers

    if what.model.base is not None:
        raise InputError(f"how.weights: {how.weights}: a model on a base is scored dense; set how.weights: dense")
    require_layers(architecture, how.weights)


def form_here(how: HowConfig, artifact: ArtifactFile) -> Form:
    """The form for one replica in this process, which a certificate is verified by: streamed where dense would not fit.

    Args:
        how: of the run's config.
        artifact: the model.
    """
    if how.weights != "auto":
        return how.weights
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if artifact.base is not None or PLAINLY_DENSE * artifact.decoded_bytes <= memory:
        return "dense"
    from tokenbound.models.blocks import has_layers

    return "streamed" if has_layers(artifact.architecture) else "dense"


def _is_plainly_dense(artifact: ArtifactFile, placement: Placement) -> bool:
    """Whether a small model needs no prediction, which imports torch in the driver and so delays the start."""
    if artifact.base is not None:
        return True  # a delta is applied to the base's weights in memory
    if placement.device != "cpu":
        return False
    memory = executor().resources().memory_of_a_node
    return not memory or PLAINLY_DENSE * artifact.decoded_bytes * placement.replicas <= memory


def artifact_needs(
    artifact: ArtifactFile, what: WhatConfig, batch: int, *, device: str, shard_tokens: int
) -> Mapping[Form, FormNeeds]:
    """What a replica of an artifact takes in each form."""
    import torch

    from tokenbound.models.forms import layer_sizes, packed_bytes, packed_file_bytes
    from tokenbound.models.memory import replica_memory
    from tokenbound.models.quantized.schemes import scheme_of
    from tokenbound.models.smoothing_head import without_head

    architecture = without_head(artifact.architecture)
    dtype = getattr(torch, what.model.dtype)
    memory = replica_memory(architecture, dtype=dtype, batch=batch, length=what.windows.length, device=device)
    packed = packed_bytes(artifact.parsed.coded)
    if scheme_of(architecture) is not None and device != "cpu":
        packed = 0  # these codes stay on the host, where their weights are made
    return form_needs_here(
        memory,
        layer_sizes(architecture),
        dtype=dtype,
        device=device,
        batch_tokens=batch * what.windows.length,
        shard_tokens=shard_tokens,
        artifact_bytes=artifact.num_bytes,
        packed=packed,
        file_bytes=packed_file_bytes(artifact.parsed.coded),
    )


def form_needs_here(memory: ReplicaMemory, sizes: LayerSizes | None, **options: Any) -> Mapping[Form, FormNeeds]:
    """As `models.forms.form_needs`, with the processors of a node."""
    from tokenbound.models.forms import form_needs

    return form_needs(memory, sizes, cores=executor().resources().cpus_of_a_node, **options)


def choose(needs: Mapping[Form, FormNeeds], dense: Placement) -> Choice:
    """The first form that fits the memory of a node, and of its GPUs.

    Args:
        needs: of one replica in each form.
        dense: how dense replicas of one device each would be placed.
    """
    from tokenbound.models.forms import choose_form

    resources = executor().resources()
    nodes = max(1, round(resources.cpus / resources.cpus_of_a_node))
    return choose_form(needs, room_of(dense.device), replicas=math.ceil(dense.replicas / nodes), device=dense.device)


def room_of(device: str) -> Room:
    """Memory of a node, or of one of its GPUs and their host."""
    from tokenbound.models.forms import Room
    from tokenbound.models.spread import GPU_SHARE

    resources = executor().resources()
    memory = resources.memory_of_a_node
    if device == "cpu":
        return Room(memory, 0, 1)
    # GPUs that an autoscaler has yet to bring cannot be asked for their memory.
    gpu = int(GPU_SHARE * executor().smallest_gpu_bytes()) if resources.gpus else 0
    return Room(gpu, memory, max(1, resources.gpus_of_a_node))


def placed(choice: Choice, how: HowConfig, shards: int, gpus: int) -> Placement:
    """Replicas for a form. Where layers come and go one has a node's processors to itself, unless told otherwise."""
    placement = place_replicas(how, shards, gpus)
    if not choice.is_alone or placement.device != "cpu" or how.replicas != "auto":
        return placement
    resources = executor().resources()
    nodes = max(1, round(resources.cpus / resources.cpus_of_a_node))
    return replace(
        placement,
        replicas=min(placement.replicas, nodes),
        most=max(1, min(placement.most, shards)),
        threads=resources.cpus_of_a_node,
    )
