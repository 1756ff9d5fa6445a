"""How a replica may hold its weights, and what each form takes: predicted from an architecture and a code length.

    dense      all weights in memory
    packed     the codes of an artifact in memory, and the weights of one layer while it runs
    streamed   the weights of the layer that runs and of the next one, made for every shard

Both make weights from packed words in a file of the machine, for which room on the disk is taken for granted here: a
replica that finds none reads the artifact, and is as much slower as decoding is slower than unpacking.

Shape legend: B windows of a batch, L tokens of a window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from tokenbound.compression.packed_weights import PACKING_BITS, predicted_bytes
from tokenbound.models.blocks import HELD_BYTES, find_layers, has_layers
from tokenbound.models.hf_model import blank_model
from tokenbound.models.smoothing_head import without_head

if TYPE_CHECKING:
    from tokenbound.compression.tensor import CodedTensor
    from tokenbound.models.memory import ReplicaMemory

Form = Literal["dense", "packed", "streamed"]
FORMS: tuple[Form, ...] = ("dense", "packed", "streamed")

HOST_COPIES = 3
"""Copies of the weights that a host holds while a dense replica starts: the decoded tensors, the model, and slack."""
PROCESS_BYTES = 450_000_000
"""Memory of a process that has imported torch and transformers."""
SCRATCH_LAYERS = 0.5
"""Part of a layer that its largest tensor and what is made on the way to it take."""
DECODED_PER_SECOND = 25e6
"""Weights that a core decodes or packs from an artifact in a second."""
UNPACKED_PER_SECOND = 200e6
"""Weights that a core makes in a second from packed codes in a file that is in the page cache."""
DEVICE_UNPACKED_PER_SECOND = 20e9
"""The same of a GPU that holds the codes."""
DEVICE_STREAMED_PER_SECOND = 4e9
"""The same of a GPU to which the codes are copied first. Assumed, not measured: a byte each, from pageable memory."""
START_SWEEPS = 1
"""Times that all layers are made before the first shard: for the canary and the probe together."""


@dataclass(frozen=True)
class LayerSizes:
    """Weights of a model, by where they are."""

    layers: int
    in_layers: int
    """In the decoder layers together."""
    largest: int
    """In the largest of them."""
    outside: int
    """In embeddings, norms and head, tied ones counted once."""
    width: int
    """Numbers of a token's hidden state."""


def layer_sizes(architecture: Mapping[str, Any]) -> LayerSizes | None:
    """Count the weights of a model's layers; None where they cannot come and go one by one. Nothing is allocated.

    Example:
        >>> shape = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...              num_attention_heads=4, vocab_size=1000, tie_word_embeddings=True)
        >>> layer_sizes(shape)
        LayerSizes(layers=2, in_layers=82176, largest=41088, outside=64064, width=64)
    """
    if not has_layers(architecture):
        return None
    model = blank_model(without_head(architecture))
    layers = find_layers(model)
    assert layers is not None, "it has layers"
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers.modules]
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = cast(torch.Tensor, model.get_input_embeddings().weight)
    return LayerSizes(len(sizes), sum(sizes), max(sizes), total - sum(sizes), int(embeddings.shape[1]))


_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys under which configs say how many layers there are."""


def shallow(architecture: Mapping[str, Any], layers: int) -> dict[str, Any] | None:
    """The architecture with its first few layers alone; None where its config does not say how many it has.

    Example:
        >>> shallow({"model_type": "x", "num_hidden_layers": 3, "layer_types": ["a", "b", "a"]}, 2)
        {'model_type': 'x', 'num_hidden_layers': 2, 'layer_types': ['a', 'b']}
    """
    depth = next((architecture[key] for key in _DEPTH if isinstance(architecture.get(key), int)), None)
    if depth is None or depth < layers:
        return None
    by_layer = {k: v[:layers] for k, v in architecture.items() if isinstance(v, list) and len(v) == depth}
    return {**architecture, **by_layer, **{key: layers for key in _DEPTH if architecture.get(key) == depth}}


def packed_bytes(coded: Sequence[CodedTensor]) -> int:
    """Memory of an artifact's layers once they are packed; estimated from the lengths of their codes."""
    return sum(predicted_bytes(item) for item in coded if re.search(r"(^|\.)\d+\.", item.name))


def packed_file_bytes(coded: Sequence[CodedTensor]) -> int:
    """Size of the file of an artifact's packed weights, estimated likewise: it holds all tensors."""
    return sum(predicted_bytes(item) for item in coded)


def packed_bytes_at(bits: float, sizes: LayerSizes, dtype: torch.dtype) -> int:
    """The same from a number of bits for each weight; codes as long as the weights are kept as weights."""
    return int(min(bits + PACKING_BITS, 8 * dtype.itemsize) * sizes.in_layers / 8)


@dataclass(frozen=True)
class FormNeeds:
    """What one replica takes in one form."""

    form: Form
    device_bytes: int
    """On the device: with a CPU all its memory."""
    host_bytes: int
    """Beside it on the host of a GPU."""
    disk_bytes: int
    """In the local folder: decoded weights that dense replicas share; or packed ones, and a copy of an artifact."""
    load_seconds: float
    """Until the first shard begins, start-up of the process not counted."""


def form_needs(
    memory: ReplicaMemory,
    sizes: LayerSizes | None,
    *,
    dtype: torch.dtype,
    device: str,
    cores: int,
    batch_tokens: int,
    shard_tokens: int,
    artifact_bytes: int | None,
    packed: int | None,
    file_bytes: int | None,
) -> dict[Form, FormNeeds]:
    """Predict what a replica takes in each form that its architecture allows.

    Args:
        memory: of a dense replica, as `replica_memory` predicts it.
        sizes: of its layers; None if they cannot come and go.
        dtype: arithmetic of the body.
        device: `cpu` or `cuda`.
        cores: that decode.
        batch_tokens: B times L.
        shard_tokens: tokens that are scored between two commits.
        artifact_bytes: of the artifact; None if it is not known.
        packed: bytes of the packed layers; None if they are not known, and packed replicas are then left out.
        file_bytes: of all packed weights in a file; None if they are not known.
    """
    on_host = device != "cpu"
    working = memory.activations_bytes + memory.logits_bytes
    decoding = memory.parameters / (DECODED_PER_SECOND * cores)
    host = HOST_COPIES * memory.weights_bytes
    dense = FormNeeds(
        "dense",
        memory.total_bytes if on_host else host + working + PROCESS_BYTES,
        host if on_host else 0,
        memory.weights_bytes,
        decoding,
    )
    found: dict[Form, FormNeeds] = {"dense": dense}
    if sizes is None:
        return found
    itemsize = dtype.itemsize
    layer = itemsize * sizes.largest
    outside = memory.weights_bytes - itemsize * sizes.in_layers  # with the head's float32 copy on a CPU
    held = held_bytes(sizes, dtype=dtype, batch_tokens=batch_tokens, shard_tokens=shard_tokens)
    process = 0 if on_host else PROCESS_BYTES
    scratch = int(SCRATCH_LAYERS * layer)
    decoded = (0, 2 * layer) if on_host else (2 * layer, 0)
    disk = (artifact_bytes or 0) + (file_bytes or 0)
    seconds: dict[Form, float] = {
        form: decoding + START_SWEEPS * sizes.in_layers / _made_per_second(form, device, cores)
        for form in ("packed", "streamed")
    }
    if packed is not None:
        bytes_ = packed + layer + scratch + outside + working + held + process
        found["packed"] = FormNeeds("packed", bytes_, decoded[1], disk, seconds["packed"])
    bytes_ = 2 * layer + scratch + outside + working + held + process
    found["streamed"] = FormNeeds("streamed", bytes_, decoded[1], disk, seconds["streamed"])
    return found


def _made_per_second(form: Form, device: str, cores: int) -> float:
    """Weights of layers that come and go."""
    if device == "cpu":
        return UNPACKED_PER_SECOND * cores
    return DEVICE_UNPACKED_PER_SECOND if form == "packed" else DEVICE_STREAMED_PER_SECOND


def held_bytes(sizes: LayerSizes, *, dtype: torch.dtype, batch_tokens: int, shard_tokens: int) -> int:
    """Hidden states of the batches that wait between two layers, with those that the model began with."""
    a_batch = 2 * sizes.width * dtype.itemsize * batch_tokens
    batches = max(1, min(-(-shard_tokens // batch_tokens), HELD_BYTES // max(1, a_batch)))
    return a_batch * batches


def tokens_per_second(
    form: Form,
    dense: float,
    sizes: LayerSizes,
    *,
    dtype: torch.dtype,
    device: str,
    cores: int,
    batch_tokens: int,
    shard_tokens: int,
) -> float:
    """Speed of a form from that of a dense replica: weights are made once for the batches that wait together.

    What is made on the way takes the same cores, or the same GPU, as what computes meanwhile.

    Args:
        form: of the replica.
        dense: tokens per second of a dense one.
        sizes: of its layers.
        dtype: arithmetic of the body.
        device: `cpu` or `cuda`.
        cores: that make weights.
        batch_tokens: B times L.
        shard_tokens: tokens that are scored between two commits.
    """
    if form == "dense":
        return dense
    batch = held_bytes(sizes, dtype=dtype, batch_tokens=batch_tokens, shard_tokens=batch_tokens)
    held = held_bytes(sizes, dtype=dtype, batch_tokens=batch_tokens, shard_tokens=shard_tokens)
    tokens = min(shard_tokens, held // batch * batch_tokens)
    return tokens / (tokens / dense + sizes.in_layers / _made_per_second(form, device, cores))


@dataclass(frozen=True)
class Room:
    """Memory that replicas may use."""

    device_bytes: int
    """Of a device; with a CPU that of a whole node, and 0 where it is not known."""
    host_bytes: int
    """Of the host of a GPU; 0 where it is not known."""
    devices: int
    """Over which a dense replica may be spread: the GPUs of a node."""


@dataclass(frozen=True)
class Choice:
    """A form, how many replicas of it share a node's memory, and why."""

    form: Form
    is_alone: bool
    """One replica has a node's processors to itself: there is no room for more, or they make its weights."""
    why: str


def choose_form(needs: Mapping[Form, FormNeeds], room: Room, *, replicas: int, device: str) -> Choice:
    """The first form that fits: dense if it can be, then packed, then streamed.

    Args:
        needs: of one replica in each form that is possible.
        room: what there is.
        replicas: dense ones that would share a node, with a CPU.
        device: `cpu` or `cuda`.
    """
    if not room.device_bytes:
        return Choice("dense", False, "the memory of the nodes is not known")
    said = []
    order: list[tuple[Form, bool]] = [("dense", False), ("dense", True), ("packed", True), ("streamed", True)]
    for form, alone in order:
        need = needs.get(form)
        if need is None or (alone and form == "dense" and (device != "cpu" or replicas == 1)):
            continue
        count = replicas if device == "cpu" and not alone else 1
        there = room.device_bytes * (room.devices if form == "dense" and device != "cpu" else 1)
        what = f"{count} {form} replica{'s' if count > 1 else ''}"
        is_tight_on_host = 0 < room.host_bytes < need.host_bytes
        if count * need.device_bytes <= there and not is_tight_on_host:
            said.append(f"{what} need{'' if count > 1 else 's'} {_gigabytes(count * need.device_bytes)}")
            return Choice(form, alone, f"{'; '.join(said)}, of {_gigabytes(there)}")
        short = need.host_bytes if is_tight_on_host else count * need.device_bytes
        limit = room.host_bytes if is_tight_on_host else there
        said.append(f"{what} would need {_gigabytes(short)} of {_gigabytes(limit)}")
    last: Form = next(form for form in reversed(FORMS) if form in needs)
    return Choice(last, last != "dense" or replicas > 1, "; ".join(said))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
