"""The registry of families: how a model gets its trained form, and how an artifact's tensors become a model again.

A family stands in the artifact's architecture under one key, so it is part of the code length. Adding a family is one
file with an `attach` function, its settings, and a line in `_ATTACH` (and in `_MERGE`, if a plain model
comes out of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from tokenbound.config.family import FAMILY, Family, FamilyChoice
from tokenbound.errors import InputError
from tokenbound.models.structured.kronecker import attach_kronecker
from tokenbound.models.structured.lora import attach_lora, merge_lora
from tokenbound.models.structured.monarch import attach_monarch
from tokenbound.models.structured.sublora import attach_sublora, merge_sublora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTACH: dict[str, Callable[[Any, Any], None]] = {
    "dense": lambda model, family: None,
    "kronecker": attach_kronecker,
    "monarch": attach_monarch,
    "lora": attach_lora,
    "sublora": attach_sublora,
}
"""By `family.kind`: put the trained form into a model, in place."""

_MERGE: dict[str, Callable[[Any, Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "lora": merge_lora,
    "sublora": merge_sublora,
}
"""Families whose decoded model is a plain one: (blank plain model, family, tensors) to the plain model's tensors."""


def attach_family(model: PreTrainedModel, family: Family) -> None:
    """Put a family's trained form into a model, in place; what is to be trained keeps `requires_grad`.

    Raises:
        InputError: the family does not fit the model.
    """
    _ATTACH[family.kind](model, family)


def attach_decoded(model: PreTrainedModel, family: Family | None) -> None:
    """Put the form that a decoded artifact of a family has into a model, in place; None: a dense one.

    Raises:
        InputError: the family does not fit the model.
    """
    if family is not None and family.kind not in _MERGE:
        attach_family(model, family)


def trained_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What an artifact must hold of a model in its trained form, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {**trained, **buffers}


def family_of(architecture: Mapping[str, Any]) -> Family | None:
    """The family that an architecture names; None for a dense model.

    Raises:
        InputError: a family unknown to this version, or with settings out of range.
    """
    if FAMILY not in architecture:
        return None
    try:
        return FamilyChoice.model_validate({"family": architecture[FAMILY]}).family
    except ValueError as error:
        raise InputError(f"{FAMILY} of the architecture is not valid: {' '.join(str(error).split())[:200]}") from None


def merge_family(
    blank: PreTrainedModel, family: Family, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The plain model's tensors, or None for a family whose model keeps its form."""
    merge = _MERGE.get(family.kind)
    return None if merge is None else merge(blank, family, tensors)
