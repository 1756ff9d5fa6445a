"""Artifacts that hold only what a fine-tune changed: a quantized difference or a LoRA adapter on a named base.

The code length of a delta artifact counts the delta alone; that is honest only if the base was fixed independently of
the scored tokens, which the run's config must declare. The base is named by the digest of its tensors, and nothing is
applied to another one. Applying is element by element in float32, in a fixed order, so its result is the same bits
everywhere.

    difference   tuned = base + decoded
    adapter      tuned = base + scaling * (B_1 A_1' + B_2 A_2' + ...)      (LoRA: Hu et al. 2021, arXiv 2106.09685)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenbound.compression.artifact import Artifact, assemble_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.methods import CompressionMethod
from tokenbound.compression.tensor import encode_tensor
from tokenbound.errors import InputError, MismatchError

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration

Tensors = Mapping[str, "torch.Tensor"]

_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "megatron_config")


@dataclass(frozen=True)
class Delta:
    """What a delta artifact holds besides an architecture.

    Attributes:
        tensors: What is coded: float32 differences, or an adapter's factors and whole modules.
        reference: Names the base and how the tensors change it.
    """

    tensors: dict[str, torch.Tensor]
    reference: dict[str, Any]


def tensors_sha256(tensors: Tensors) -> str:
    """Digest of a model's tensors: names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{len(name)}:{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor).data)
    return digest.hexdigest()


def encode_difference(
    architecture: Mapping[str, Any],
    base: Tensors,
    tuned: Tensors,
    settings: CompressionMethod,
    *,
    calibration: Calibration | None = None,
) -> bytes:
    """Encode a fine-tune as its difference from the base; unchanged tensors cost nothing.

    Args:
        architecture: Config of the fine-tuned model.
        base: The declared base's tensors.
        tuned: The fine-tuned tensors: the same names, shapes and dtypes.
        settings: How to quantize the differences. `lossless` keeps each float32 difference, which is not always enough
            to restore the last bit of the tuned tensor.
        calibration: Of the fine-tuned model, for the methods that need one.

    Raises:
        InputError: names or shapes differ, or a changed tensor is not floating point; by name.
    """
    return _encode(architecture, difference(base, tuned), settings, calibration)


def difference(base: Tensors, tuned: Tensors) -> Delta:
    """The tensors that a fine-tune changed, as float32 differences.

    Raises:
        InputError: names or shapes differ, or a changed tensor is not floating point; by name.
    """
    if set(base) != set(tuned):
        raise InputError(f"base and fine-tune differ in tensors: {sorted(set(base) ^ set(tuned))[:5]}")
    changes = {name: _difference(name, base[name], tuned[name]) for name in sorted(tuned)}
    kept = {name: change for name, change in changes.items() if change is not None}
    return Delta(kept, {"kind": "difference", "sha256": tensors_sha256(base)})


def _encode(
    architecture: Mapping[str, Any], delta: Delta, settings: CompressionMethod, calibration: Calibration | None
) -> bytes:
    coded = (encode_tensor(name, delta.tensors[name], settings, calibration) for name in sorted(delta.tensors))
    return assemble_artifact(architecture, coded, settings, base=delta.reference)


def _difference(name: str, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor | None:
    import torch

    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise InputError(f"tensor {name!r} has another shape or dtype than in the base")
    if torch.equal(base, tuned):
        return None
    if not base.is_floating_point():
        raise InputError(f"tensor {name!r} changed but is not floating point; a difference cannot hold it")
    return tuned.detach().float().cpu() - base.detach().float().cpu()


def encode_adapter(
    architecture: Mapping[str, Any],
    base: Tensors,
    adapter: Tensors,
    adapter_config: Mapping[str, Any],
    settings: CompressionMethod,
    *,
    calibration: Calibration | None = None,
) -> bytes:
    """Encode a peft LoRA adapter: its A and B factors and any fully trained modules.

    Args:
        architecture: Config of the model.
        base: The declared base's tensors.
        adapter: As in `adapter_model.safetensors`.
        adapter_config: As in `adapter_config.json`: `r`, `lora_alpha`, `use_rslora`, `fan_in_fan_out` are read.
        settings: How to code the adapter's tensors.
        calibration: For the methods that need one, by adapter tensor names.

    Raises:
        InputError: an adapter that is not plain LoRA, or does not fit the base; by name.
    """
    return _encode(architecture, adapter_delta(base, adapter, adapter_config), settings, calibration)


def adapter_delta(base: Tensors, adapter: Tensors, adapter_config: Mapping[str, Any]) -> Delta:
    """The factors of a peft LoRA adapter, named as in the base.

    Raises:
        InputError: an adapter that is not plain LoRA, or does not fit the base; by name.
    """
    scaling = _scaling(adapter_config)
    tensors = {name.removeprefix(_PEFT_PREFIX): value for name, value in adapter.items()}
    reference = {
        "kind": "adapter",
        "sha256": tensors_sha256(base),
        "scaling": scaling,
        "transposed": bool(adapter_config.get("fan_in_fan_out", False)),
    }
    _check_adapter(tensors, base, transposed=bool(reference["transposed"]))
    return Delta(tensors, reference)


def _scaling(config: Mapping[str, Any]) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rank stabilization; rounded to float32 where it is applied."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type", "LORA")))
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if kind.upper() != "LORA" or used:
        raise InputError(
            f"only plain LoRA adapters can be encoded, not {kind} with {', '.join(used) or 'its settings'}"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _target(name: str) -> tuple[str, str]:
    """Base tensor and part ("A", "B" or "") that an adapter's tensor belongs to."""
    for part in ("A", "B"):
        if (marker := f".lora_{part}.") in name:
            return name.replace(marker, "."), part
    return name.replace(".modules_to_save.", ".").replace(".default.", "."), ""


def _check_adapter(tensors: Tensors, base: Tensors, *, transposed: bool) -> None:
    for name, tensor in tensors.items():
        target, part = _target(name)
        if target not in base:
            raise InputError(f"adapter tensor {name!r} belongs to {target!r}, which the base does not have")
        shape = base[target].shape[::-1] if transposed else base[target].shape
        wanted = {"A": lambda t, s: t.shape[1:] == s[1:], "B": lambda t, s: t.shape[:1] == s[:1]}
        is_pair = part and tensor.ndim == len(shape) == 2
        fits = is_pair and wanted[part](tensor, shape) if part else tensor.shape == base[target].shape
        if not fits or (part and _other(name, part) not in tensors):
            raise InputError(f"adapter tensor {name!r} does not fit the base's {target!r}")


def _other(name: str, part: str) -> str:
    return name.replace(f".lora_{part}.", f".lora_{'B' if part == 'A' else 'A'}.")


def apply_delta(artifact: Artifact, base: Tensors) -> dict[str, torch.Tensor]:
    """The fine-tuned model's tensors.

    Raises:
        MismatchError: the base is not the one that the artifact names.
        ArtifactError: the artifact is not a delta, or its tensors do not fit the base.
    """
    reference = artifact.base
    if reference is None or reference.get("kind") not in ("difference", "adapter"):
        raise ArtifactError("artifact: this is not a delta artifact, or of a kind unknown to this version")
    if (found := tensors_sha256(base)) != reference.get("sha256"):
        raise MismatchError(f"this delta was made on base {reference.get('sha256')}; the given base is {found}")
    if reference["kind"] == "difference":
        return {name: _add(name, base, artifact.tensors) for name in base}
    return _apply_adapter(artifact.tensors, base, reference)


def _add(name: str, base: Tensors, changes: Tensors) -> torch.Tensor:
    if name not in changes:
        return base[name]
    if changes[name].shape != base[name].shape:
        raise ArtifactError(f"artifact: the difference of {name!r} has another shape than the base")
    return (base[name].float() + changes[name].float()).to(base[name].dtype)


def _apply_adapter(changes: Tensors, base: Tensors, reference: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    try:
        _check_adapter(changes, base, transposed=bool(reference.get("transposed")))
        scaling = float(reference["scaling"])
    except (InputError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"artifact: the adapter does not fit its base: {error}") from error
    out = dict(base)
    for name, tensor in changes.items():
        target, part = _target(name)
        if not part:
            out[target] = tensor.to(base[target].dtype)
        elif part == "A":
            product = low_rank_product(changes[_other(name, "A")], tensor, scaling)
            product = product.T if reference.get("transposed") else product
            out[target] = (base[target].float() + product).to(base[target].dtype)
    return out


def low_rank_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaling * left @ right, one rank after the other, so that no library chooses the order of the sum."""
    import torch

    if left.shape[1] != right.shape[0]:
        raise ArtifactError("artifact: the factors of an adapter differ in rank")
    total = torch.zeros(left.shape[0], right.shape[1])
    for column, row in zip(left.float().T, right.float(), strict=True):
        total = total + column[:, None] * row[None, :]
    return total * torch.tensor(scaling, dtype=torch.float32)
