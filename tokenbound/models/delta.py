"""Models on a declared base: reading the base, a fine-tune as a delta on it, and an artifact decoded beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenbound.compression.artifact import decode_artifact, parse_artifact
from tokenbound.compression.delta import Delta, adapter_delta, apply_delta, difference, tensors_sha256
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import blank_model, check_checkpoint, read_checkpoint, read_json, read_safetensors
from tokenbound.models.quantized.methods import method_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft saves of an adapter."""


@dataclass(frozen=True)
class Weights:
    """A causal language model before it is built."""

    architecture: dict[str, Any]
    """Hugging Face config as JSON data."""
    tensors: dict[str, torch.Tensor]
    """By the names of the whole model; old checkpoints leave out the prefix of its body."""

    @property
    def identity(self) -> dict[str, str]:
        """Digests of tensors and architecture, which together name a base."""
        text = json.dumps(self.architecture, sort_keys=True, separators=(",", ":"))
        return {
            "sha256": tensors_sha256(self.tensors),
            "architecture_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


def read_base(name: str) -> Weights:
    """The weights of a base.

    Args:
        name: directory or hub id of a Hugging Face checkpoint, or path of a whole model's artifact.

    Raises:
        InputError: nothing there, or it is a delta itself.
    """
    if Path(name).is_file():
        return decode_weights(Path(name).read_bytes())
    checkpoint = read_checkpoint(name)
    return _named_in_full(checkpoint.architecture, checkpoint.tensors)


def check_base(name: str) -> dict[str, Any]:
    """The architecture of a base; reads no tensor.

    Raises:
        InputError: nothing there, or it is a delta itself.
    """
    if not Path(name).is_file():
        return check_checkpoint(name)
    parsed = parse_artifact(Path(name).read_bytes())
    if parsed.base is not None:
        raise InputError(f"base {name} is a delta itself; give the whole model that it was made on")
    return parsed.architecture


def is_adapter(path: str) -> bool:
    """Whether a directory holds a LoRA adapter, as peft saves it."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def read_delta(path: str, base: Weights) -> tuple[dict[str, Any], Delta]:
    """What a fine-tune changed: a peft LoRA adapter as it was saved, or the difference of a whole checkpoint.

    Args:
        path: directory of the adapter, or directory or hub id of the fine-tuned checkpoint.
        base: what it was made on.

    Returns:
        Architecture of the fine-tune, and the delta.

    Raises:
        InputError: neither an adapter nor a checkpoint, or it does not fit the base; by name.
    """
    if is_adapter(path):
        folder = Path(path)
        adapter = read_safetensors(folder / ADAPTER_WEIGHTS)
        return base.architecture, adapter_delta(base.tensors, adapter, read_json(folder / ADAPTER_CONFIG))
    checkpoint = read_checkpoint(path)
    tuned = _named_in_full(checkpoint.architecture, checkpoint.tensors)
    return tuned.architecture, difference(base.tensors, tuned.tensors)


def decode_weights(data: bytes, base: Weights | None = None, *, workers: int = 1) -> Weights:
    """The model inside an artifact.

    Args:
        data: the artifact's bytes.
        base: the base that a delta changes.
        workers: processes that decode large weights.

    Raises:
        InputError: the artifact is a delta and there is no base, or the other way round.
        MismatchError: the delta was made on another base.
        ArtifactError: the bytes are no artifact.
    """
    artifact = decode_artifact(data, workers=workers)
    if artifact.base is None:
        if base is not None:
            raise InputError("the artifact is a whole model, not a delta; leave the base out")
        return Weights(artifact.architecture, artifact.tensors)
    if base is None:
        raise InputError(f"the artifact is a delta on base {artifact.base.get('sha256')}; give that base as well")
    return Weights(artifact.architecture, apply_delta(artifact, base.tensors))


def _named_in_full(architecture: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Weights:
    method = method_of(architecture)
    if method is not None:
        raise InputError(
            f"a delta cannot be taken of {method.name} codes; give base and fine-tune as they were before they were "
            "quantized"
        )
    blank = blank_model(architecture, len(tensors))
    known, prefix = set(blank.state_dict()), blank.base_model_prefix

    def full(name: str) -> str:
        return f"{prefix}.{name}" if name not in known and f"{prefix}.{name}" in known else name

    return Weights(architecture, {full(name): tensor for name, tensor in tensors.items()})
