"""The linear layers of a model: finding them by name, their shape, and putting others in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored as [inputs, outputs]: GPT-2's `Conv1D`."""
    return type(layer).__name__ == "Conv1D"


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    rows, columns = layer.weight.shape  # type: ignore[misc, union-attr]
    return (int(columns), int(rows)) if is_transposed(layer) else (int(rows), int(columns))  # type: ignore[has-type]


def linear_layers(model: PreTrainedModel, chosen: Sequence[str] | None) -> dict[str, nn.Module]:
    """Linear layers by full name: those chosen, or all but the output head.

    Raises:
        InputError: a name that no linear layer has, or no linear layer at all.
    """
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_transposed(module)) and (module is not head or chosen is not None)
    }
    if chosen is None:
        if not found:
            raise InputError("family: the model has no linear layers besides its output head")
        return found
    for name in chosen:
        if not any(_is_called(full, name) for full in found):
            some = ", ".join(sorted({full.rpartition(".")[2] for full in found}))
            raise InputError(f"family.layers: no linear layer is called {name!r}; this model has {some}")
    return {full: layer for full, layer in found.items() if any(_is_called(full, name) for name in chosen)}


def _is_called(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def new_parameter(layer: nn.Module, *shape: int, std: float) -> nn.Parameter:
    """A normal random parameter on the device and in the dtype of the layer that it replaces part of."""
    weight: Any = layer.weight
    value = torch.empty(shape, device=weight.device, dtype=weight.dtype)
    return nn.Parameter(value if value.is_meta else value.normal_(0.0, std))


def replace_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put layers in the place of those of the same names."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
