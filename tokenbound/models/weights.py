"""Models on a declared base: reading the base, a fine-tune as a delta on it, and an artifact decoded beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenbound.compression.artifact_file import ArtifactFile, as_artifact
from tokenbound.compression.tensor_map import RenamedTensors
from tokenbound.compression.weight_delta import NAMED_BASE, WeightDelta, apply_delta, difference, tensors_sha256
from tokenbound.errors import InputError
from tokenbound.gguf_file import locate_gguf
from tokenbound.models.adapters import ADAPTER_CONFIG, read_adapter, read_adapter_config, require_adapter_files
from tokenbound.models.checkpoint import check_checkpoint, is_hub_id, locate, locate_config, read_checkpoint
from tokenbound.models.hf_model import blank_model
from tokenbound.models.quantized.schemes import scheme_of
from tokenbound.store.copies import local_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A causal language model before it is built."""

    architecture: dict[str, Any]
    """Hugging Face config as JSON data."""
    tensors: Mapping[str, torch.Tensor]
    """By the names of the whole model; old checkpoints leave out the prefix of its body. Those of a base are read one
    by one, whenever they are asked for."""

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
        name: directory, URI or hub id of a Hugging Face checkpoint, a GGUF file, or path or URI of a whole model's
            artifact.

    Raises:
        InputError: nothing there, or it is a delta itself.
    """
    if Path(local_copy(name)).is_file() and locate_gguf(local_copy(name)) is None:
        artifact = _whole(local_copy(name))
        return Weights(artifact.architecture, artifact.tensors)
    checkpoint = read_checkpoint(name)
    return _named_in_full(checkpoint.architecture, checkpoint.tensors)


def check_base(name: str) -> dict[str, Any]:
    """The architecture of a base; reads no tensor.

    Raises:
        InputError: nothing there, or it is a delta itself.
    """
    if not Path(name).is_file() or locate_gguf(name) is not None:
        return check_checkpoint(name)
    return _whole(name).architecture


def _whole(name: str) -> ArtifactFile:
    """The artifact of a base.

    Raises:
        InputError: it is a delta itself.
    """
    artifact = ArtifactFile(name)
    if artifact.base is not None:
        raise InputError(f"base {name} is a delta itself; give the whole model that it was made on")
    return artifact


def is_adapter(path: str) -> bool:
    """Whether a directory or hub id holds a LoRA adapter, as peft saves it.

    Raises:
        InputError: there is no such directory, and the hub has none of this name.
    """
    return (locate_config(path) / ADAPTER_CONFIG).is_file()


def check_adapter(path: str) -> None:
    """Refuse an adapter by its config and its files; reads no tensor, and of a hub id only the config.

    Raises:
        InputError: a key that is not understood, or weights that are not there.
    """
    folder = locate_config(path)
    read_adapter_config(folder)
    if Path(path).expanduser().is_dir():
        require_adapter_files(folder)


def read_delta(path: str, base: Weights, *, base_name: str | None = None) -> tuple[dict[str, Any], WeightDelta]:
    """What a fine-tune changed: a peft LoRA adapter as it was saved, or the difference of a whole checkpoint.

    Args:
        path: directory or hub id of the adapter, or of the fine-tuned checkpoint.
        base: what it was made on.
        base_name: what the config calls the base. An adapter that names another one says so in its delta, and so does
            the log.

    Returns:
        Architecture of the fine-tune, and the delta.

    Raises:
        InputError: neither an adapter nor a checkpoint, or it does not fit the base; by name.
    """
    if is_adapter(path):
        architecture, delta, config = read_adapter(locate(path), base.architecture, base.tensors)
        if base_name is None or config.named_base is None or is_same_base(config.named_base, base_name):
            return architecture, delta
        logger.warning(
            "the adapter %s says that it was trained on %s, but the base is %s; the certificate names both",
            path,
            config.named_base,
            base_name,
        )
        return architecture, WeightDelta(delta.tensors, {**delta.reference, NAMED_BASE: config.named_base})
    checkpoint = read_checkpoint(path)
    tuned = _named_in_full(checkpoint.architecture, checkpoint.tensors)
    return tuned.architecture, difference(base.tensors, tuned.tensors)


def is_same_base(named: str, given: str) -> bool:
    """Whether the base that an adapter names is the one that is given.

    Names are compared, not weights: the same path once links are resolved, or the same hub id and revision, of which a
    side may leave the revision out. A local copy of a hub model, or a folder that only shares the last part of its
    name, could hold anything, so it counts as another base and is reported as one.

    >>> is_same_base("org/name", "org/name@main"), is_same_base("org/name@v2", "org/name@v1")
    (True, False)
    >>> is_same_base("/models/name", "name")
    False
    """
    if named.rstrip("/") == given.rstrip("/"):
        return True
    left, right = Path(named).expanduser(), Path(given).expanduser()
    if left.exists() or right.exists():
        return left.exists() and right.exists() and left.resolve() == right.resolve()
    if not is_hub_id(named) or not is_hub_id(given):
        return False
    (left_id, _, left_revision), (right_id, _, right_revision) = named.partition("@"), given.partition("@")
    return left_id == right_id and (left_revision or "main") == (right_revision or left_revision or "main")


def decode_weights(artifact: ArtifactFile | bytes, base: Weights | None = None, *, workers: int = 1) -> Weights:
    """The model inside an artifact, decoded into memory.

    Args:
        artifact: open, or its bytes.
        base: the base that a delta changes.
        workers: processes that decode large weights.

    Raises:
        InputError: the artifact is a delta and there is no base, or the other way round.
        MismatchError: the delta was made on another base.
        ArtifactError: the bytes are no artifact.
    """
    opened = as_artifact(artifact)
    if opened.base is None:
        if base is not None:
            raise InputError("the artifact is a whole model, not a delta; leave the base out")
        found = dict(opened.decoded(workers))
        return Weights(opened.architecture, {name: found[name] for name in opened.names})
    if base is None:
        raise InputError(f"the artifact is a delta on base {opened.base.get('sha256')}; give that base as well")
    return Weights(opened.architecture, apply_delta(opened, base.tensors))


def _named_in_full(architecture: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Weights:
    method = scheme_of(architecture)
    if method is not None:
        raise InputError(
            f"a delta cannot be taken of {method.name} codes; give base and fine-tune as they were before they were "
            "quantized"
        )
    blank = blank_model(architecture, len(tensors))
    known, prefix = set(blank.state_dict()), blank.base_model_prefix

    def full(name: str) -> str:
        return f"{prefix}.{name}" if name not in known and f"{prefix}.{name}" in known else name

    return Weights(architecture, RenamedTensors(tensors, {full(name): name for name in tensors}))
