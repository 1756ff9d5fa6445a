"""Artifacts that hold only what a fine-tune changed: a quantized difference or a LoRA adapter on a named base.

The code length of a delta artifact counts the delta alone; that is honest only if the base was fixed independently of
the scored tokens, which the run's config must declare. The base is named by the digest of its tensors, and nothing is
applied to another one. Applying is element by element in float32, in a fixed order, so its result is the same bits
everywhere.

    difference   tuned = base + decoded
    adapter      tuned = base + scaling * (B_1 A_1' + B_2 A_2' + ...)      (LoRA: Hu et al. 2021, arXiv 2106.09685)

How the config of a LoRA adapter becomes such factors is in `tokenbound.models.adapters`. A fine-tune that changes one
side of a tied pair names the copy in `untied`: the base's tensor is first copied under the other name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenbound.compression.artifact import Artifact, assemble_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.methods import CompressionMethod
from tokenbound.compression.tensor import encode_tensor
from tokenbound.compression.tensor_map import Header, RenamedTensors, TensorMap, header_of
from tokenbound.errors import InputError, MismatchError

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration

Tensors = Mapping[str, "torch.Tensor"]

NAMED_BASE = "adapter_base"
"""Key of a delta's reference: the base that an adapter says it was trained on, where that is not the one given."""


@dataclass(frozen=True)
class WeightDelta:
    """What a delta artifact holds besides an architecture.

    Attributes:
        tensors: What is coded: float32 differences, or an adapter's factors and whole modules.
        reference: Names the base and how the tensors change it.
    """

    tensors: Tensors
    reference: dict[str, Any]


def named_base(reference: Mapping[str, Any] | None) -> str | None:
    """The base that an adapter says it was trained on, where that is not the one that its delta was put on."""
    found = (reference or {}).get(NAMED_BASE)
    return None if found is None else str(found)


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


def difference(base: Tensors, tuned: Tensors, *, untied: Mapping[str, str] | None = None) -> WeightDelta:
    """The tensors that a fine-tune changed, as float32 differences.

    Args:
        base: The declared base's tensors.
        tuned: The fine-tuned tensors.
        untied: Names that only the fine-tune has, each with the base's tensor that it starts as a copy of.

    Raises:
        InputError: names or shapes differ, or a changed tensor is not floating point; by name.
    """
    reference: dict[str, Any] = {"kind": "difference", "sha256": tensors_sha256(base)}
    reference |= {"untied": dict(untied)} if untied else {}
    full = _with_copies(base, reference)
    if set(full) != set(tuned):
        raise InputError(f"base and fine-tune differ in tensors: {sorted(set(full) ^ set(tuned))[:5]}")
    changed = [name for name in sorted(tuned) if _is_changed(name, full[name], tuned[name])]
    return WeightDelta(Differences(full, tuned, changed), reference)


class Differences(TensorMap):
    """What a fine-tune adds to its base, in float32: each difference is taken when it is asked for."""

    def __init__(self, base: Tensors, tuned: Tensors, names: Sequence[str]) -> None:
        """Take no difference yet.

        Args:
            base: The base's tensors.
            tuned: The fine-tune's.
            names: Of those that are not the same.
        """
        self.base, self.tuned, self.names = base, tuned, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One difference."""
        if name not in self:
            raise KeyError(name)
        return self.tuned[name].detach().float().cpu() - self.base[name].detach().float().cpu()

    def header(self, name: str) -> Header:
        """Dtype and shape of a difference."""
        import torch

        return torch.float32, header_of(self.base, name)[1]


def _with_copies(base: Tensors, reference: Mapping[str, Any]) -> Tensors:
    """The base's tensors, and those that a fine-tune untied from them."""
    untied = reference.get("untied") or {}
    if not isinstance(untied, Mapping) or any(
        name in base or not isinstance(source, str) or source not in base for name, source in untied.items()
    ):
        raise ArtifactError("artifact: the untied tensors of the delta do not fit its base")
    return RenamedTensors(base, {**{name: name for name in base}, **untied}) if untied else base


def _encode(
    architecture: Mapping[str, Any], delta: WeightDelta, settings: CompressionMethod, calibration: Calibration | None
) -> bytes:
    coded = (encode_tensor(name, delta.tensors[name], settings, calibration) for name in sorted(delta.tensors))
    return assemble_artifact(architecture, coded, settings, base=delta.reference)


def _is_changed(name: str, base: torch.Tensor, tuned: torch.Tensor) -> bool:
    import torch

    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise InputError(f"tensor {name!r} has another shape or dtype than in the base")
    if torch.equal(base, tuned):
        return False
    if not base.is_floating_point():
        raise InputError(f"tensor {name!r} changed but is not floating point; a difference cannot hold it")
    return True


def encode_delta(
    architecture: Mapping[str, Any],
    delta: WeightDelta,
    settings: CompressionMethod,
    *,
    calibration: Calibration | None = None,
) -> bytes:
    """Encode a delta that is already known.

    Args:
        architecture: Config of the fine-tuned model.
        delta: From `difference` or `adapter_delta`.
        settings: How to code its tensors.
        calibration: For the methods that need one, by the delta's tensor names.
    """
    return _encode(architecture, delta, settings, calibration)


def adapter_delta(
    base: Tensors,
    tensors: Tensors,
    *,
    scaling: float,
    transposed: bool = False,
    untied: Mapping[str, str] | None = None,
) -> WeightDelta:
    """The factors of a low-rank update, and tensors that are replaced as a whole.

    Args:
        base: The declared base's tensors.
        tensors: By the base's names: `X.lora_A.weight` [r, inputs] and `X.lora_B.weight` [outputs, r] for a tensor
            `X.weight`, and whole tensors under their own names.
        scaling: Of every product; rounded to float32 where it is applied.
        transposed: The base keeps the updated tensors as [inputs, outputs].
        untied: New tensor names, each with the base's tensor that it starts as a copy of.

    Raises:
        InputError: tensors that do not fit the base; by name.
    """
    reference = {"kind": "adapter", "sha256": tensors_sha256(base), "scaling": scaling, "transposed": transposed}
    reference |= {"untied": dict(untied)} if untied else {}
    _check_adapter(tensors, _with_copies(base, reference), transposed=transposed)
    return WeightDelta(dict(tensors), reference)


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
        stored = header_of(base, target)[1]
        shape = stored[::-1] if transposed else stored
        wanted = {"A": lambda t, s: t.shape[1:] == s[1:], "B": lambda t, s: t.shape[:1] == s[:1]}
        is_pair = part and tensor.ndim == len(shape) == 2
        fits = is_pair and wanted[part](tensor, shape) if part else tensor.shape == stored
        if not fits or (part and _other(name, part) not in tensors):
            raise InputError(f"adapter tensor {name!r} does not fit the base's {target!r}")


def _other(name: str, part: str) -> str:
    return name.replace(f".lora_{part}.", f".lora_{'B' if part == 'A' else 'A'}.")


def apply_delta(artifact: Artifact | ArtifactFile, base: Tensors) -> dict[str, torch.Tensor]:
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
    full = _with_copies(base, reference)
    if reference["kind"] == "difference":
        return {name: _add(name, full, artifact.tensors) for name in full}
    return _apply_adapter(dict(artifact.tensors), full, reference)


def _add(name: str, base: Tensors, changes: Tensors) -> torch.Tensor:
    start = base[name]
    if name not in changes:
        return start
    change = changes[name]
    if change.shape != start.shape:
        raise ArtifactError(f"artifact: the difference of {name!r} has another shape than the base")
    return (start.float() + change.float()).to(start.dtype)


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
