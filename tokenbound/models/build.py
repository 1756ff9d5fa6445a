"""Models of every family: blank for checking, in their trained form, and decoded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tokenbound.config.family import FAMILY, Family
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import clean_architecture
from tokenbound.models.hf_model import _load, _refuse_incomplete, _refuse_uncovered, _transposed, blank_model
from tokenbound.models.quantized.layouts import dense_tensors
from tokenbound.models.quantized.schemes import (
    scheme_of,
)
from tokenbound.models.smoothing_head import take_head
from tokenbound.models.structured.ngram_lm import decode_markov
from tokenbound.models.structured.registry import attach_family, family_of, merge_family, trained_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


def plain_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture of the dense model that a family changes."""
    return {key: value for key, value in architecture.items() if key != FAMILY}


def count_trained(architecture: Mapping[str, Any], family: Family) -> int:
    """Trained parameters of a family on an architecture; found without storage.

    Raises:
        InputError: the family does not fit the architecture.
    """
    model = blank_model(plain_architecture(architecture))
    attach_family(model, family)
    return sum(tensor.numel() for tensor in trained_tensors(model).values())


def decode_family(
    architecture: Mapping[str, Any], tensors: Tensors, *, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """The model that an artifact of a family holds, in eval mode and without gradients.

    Raises:
        InputError: an unknown family, tensors that do not fit it, or more memory than this machine has.
    """
    family, plain = family_of(architecture), plain_architecture(architecture)
    assert family is not None, "its architecture names one"
    if family.kind == "markov":
        # Of a transformers model it has all that is used: logits, config and embeddings.
        return cast("PreTrainedModel", decode_markov(architecture, tensors).eval().to(device))
    blank = blank_model(plain)
    _require_memory(blank)
    merged = merge_family(blank, family, tensors)
    if merged is not None:
        return build_model(plain, merged, dtype=dtype, device=device)
    attach_family(blank, family)
    _require_same(blank, tensors)
    model = _materialise(blank, dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return _in_place(model, device)


def trained_form(architecture: Mapping[str, Any], tensors: Tensors) -> PreTrainedModel:
    """The model in the form in which it is trained, in float32 on the CPU, with these trained tensors; dense ones too.

    Raises:
        InputError: as `decode_family`.
    """
    family = family_of(architecture)
    if family is None:
        return build_model(architecture, tensors, dtype=torch.float32, device="cpu")
    model = _materialise(blank_model(plain_architecture(architecture)), torch.float32)
    attach_family(model, family)
    _require_same(model, tensors)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    model.eval()
    return model


def save_trained(model: PreTrainedModel, family: Family, folder: Path) -> None:
    """Write a model in its trained form as a checkpoint for `read_checkpoint`: what is trained, and the family."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    path = folder / "config.json"
    tree = {**json.loads(path.read_text(encoding="utf-8")), FAMILY: family.model_dump(mode="json")}
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in trained_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _require_memory(blank: PreTrainedModel) -> None:
    """A few bytes can name a model of any size: what is regenerated must fit this machine."""
    needed = sum(4 * parameter.numel() for parameter in blank.parameters())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise InputError(f"the artifact's model needs {needed:,} bytes in float32; this machine has {present:,}")


def _require_same(model: PreTrainedModel, tensors: Tensors) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in trained_tensors(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        raise InputError(
            f"tensor {wrong[0]!r}: the artifact has {given.get(wrong[0])}, the model {wanted.get(wrong[0])}"
        )


def _materialise(blank: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Storage for a blank model: parameters to be loaded, derived buffers as transformers computes them."""
    for parameter in blank.parameters():
        parameter.data = parameter.data.to(dtype)
    model: PreTrainedModel = blank.to_empty(device="cpu")
    model.tie_weights()
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in model.modules():  # transformers computes the buffers of these alone
        setattr(module, "_is_hf_initialized", not module._non_persistent_buffers_set)  # noqa: B010
    model.initialize_weights()
    return model


def build_model(
    architecture: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    """Make the causal LM that an architecture and its tensors define.

    Nothing is left to chance: a parameter or persistent buffer that neither a tensor nor a declared tie covers is
    refused, since it would be initialised at random, and so is a tensor that the model has no place for.

    Args:
        architecture: Hugging Face config as a dict, `model_type` included.
        tensors: weights by name; names of older checkpoints are mapped as transformers does.
        dtype: arithmetic of the model body.
        device: where the model is to live.

    Returns:
        The `transformers.PreTrainedModel`, in eval mode and without gradients.

    Raises:
        InputError: unknown or non-causal architecture, or one quantized in an unknown way; missing, unknown or
            misshapen tensors, by name.
    """
    architecture, tensors, smoothing = take_head(clean_architecture(architecture), tensors)
    model = _build_plain(architecture, tensors, dtype, device)
    if smoothing is not None:
        model.smoothing_head = smoothing.requires_grad_(False).to(device)
    return model


def _build_plain(
    architecture: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    if FAMILY in architecture:
        from tokenbound.models.build import decode_family

        return decode_family(architecture, tensors, dtype=dtype, device=device)
    method = scheme_of(architecture)
    blank = blank_model(architecture, len(tensors))
    if method is not None and method.package is None:
        tensors = dense_tensors(method, architecture, tensors, dtype=dtype, transposed=_transposed(blank))
    _refuse_uncovered(blank, tensors)
    model, report = _load(blank, architecture, tensors, dtype)
    _refuse_incomplete(report)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return _in_place(model, device)


def _in_place(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The model in eval mode on its device."""
    cast(torch.nn.Module, model.eval()).to(device)
    return model
