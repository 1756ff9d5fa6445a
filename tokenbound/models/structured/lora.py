"""Low-rank updates of frozen matrices (LoRA: Hu et al. 2021, arXiv 2106.09685), trained through `peft`.

    W = W0 + (alpha / r) B A,   A [r, inputs], B [outputs, r]

Parameters: r (inputs + outputs) for each layer. W0 is random and free, because the artifact holds the seed that it
comes from (Lotfi et al. 2023, arXiv 2312.17173): uniform with variance 1/inputs, of an embedding 1/width. The decoder
regenerates W0 bit for bit and adds the update in a fixed order, so a decoded model is a plain one with the same bits
everywhere, and needs no `peft`. A pretrained W0 is not free but declared: see `structured.adapter`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenbound.compression.weight_delta import low_rank_product
from tokenbound.config.family import LoraFamily, SubloraFamily
from tokenbound.errors import InputError
from tokenbound.models.structured.counter import uniform_weights
from tokenbound.models.structured.layers import is_transposed, layer_shape, linear_layers

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

FACTOR = ".lora_{}.default.weight"
"""How `peft` calls the factors of its default adapter."""
BASE_LAYER = ".base_layer"

Tensors = Mapping[str, torch.Tensor]


def random_matrix(seed: int, name: str, layer_or_shape: nn.Module | torch.Size) -> torch.Tensor:
    """The frozen random matrix that a seed and a parameter's name stand for, as the model stores it."""
    if isinstance(layer_or_shape, torch.Size):
        shape, inputs = tuple(layer_or_shape), layer_or_shape[-1]
    else:
        outputs, inputs = layer_shape(layer_or_shape)
        shape = (inputs, outputs) if is_transposed(layer_or_shape) else (outputs, inputs)
    return torch.from_numpy(uniform_weights(seed, name, shape, float(inputs) ** -0.5))


def check_rank(layers: Mapping[str, nn.Module], rank: int) -> None:
    """Refuse a rank above a layer's dimension.

    Raises:
        InputError: with the name of the layer.
    """
    for name, layer in layers.items():
        if rank > (most := min(layer_shape(layer))):
            raise InputError(f"family.rank {rank} is above the dimension {most} of {name}; lower it")


def frozen_matrices(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], *, others: str
) -> dict[str, nn.Module | torch.Size]:
    """Parameters that are not trained, by name: each with the layer or the shape that `random_matrix` takes."""
    found: dict[str, nn.Module | torch.Size] = {f"{name}.weight": layer for name, layer in layers.items()}
    if others == "frozen":
        rest = {name: p.shape for name, p in model.named_parameters() if p.ndim > 1}
        found |= {name: shape for name, shape in rest.items() if name not in found and not _is_tied(model, name)}
    return found


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return name in (getattr(model, "all_tied_weights_keys", None) or {})


@torch.no_grad()
def freeze(model: PreTrainedModel, frozen: Mapping[str, nn.Module | torch.Size], seed: int) -> None:
    """Stop the training of some parameters and set them to what the seed stands for."""
    for name, source in frozen.items():
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        if not parameter.is_meta:
            parameter.copy_(random_matrix(seed, name, source))


def attach_lora(model: PreTrainedModel, family: LoraFamily) -> None:
    """Freeze a model's matrices and put `peft`'s LoRA layers around the chosen ones, in place.

    Raises:
        InputError: a rank above a layer's dimension, an unknown layer, or `peft` is not installed.
    """
    peft = peft_module()
    layers = linear_layers(model, family.layers)
    check_rank(layers, family.rank)
    freeze(model, frozen_matrices(model, layers, others=family.others), family.seed)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, which it then sets right
        peft.inject_adapter_in_model(lora_config(family, layers), model)
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.requires_grad_(True)


TakeFactors = Callable[[str, "nn.Module", "dict[str, torch.Tensor]"], "tuple[torch.Tensor, torch.Tensor]"]
"""Takes both factors of a layer out of the tensors that are left, by the layer's name."""


def peft_module() -> ModuleType:
    """The package `peft`, without its warnings.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("family lora is trained through peft; `pip install peft`") from None
    logging.getLogger("peft").setLevel(logging.ERROR)
    return peft


def lora_config(family: LoraFamily, layers: Mapping[str, nn.Module]) -> peft.LoraConfig:
    """The family as `peft` says it, for these layers; stored as [inputs, outputs], they are updated transposed."""
    transposed = any(is_transposed(layer) for layer in layers.values())
    targets = {"target_modules": list(layers), "bias": "none", "fan_in_fan_out": transposed}
    config: peft.LoraConfig = peft_module().LoraConfig(r=family.rank, lora_alpha=family.alpha, **targets)
    return config


def merge_lora(blank: PreTrainedModel, family: LoraFamily, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The plain model's tensors from the trained ones; `blank` gives names and shapes.

    Raises:
        InputError: a factor is missing or has another shape than the layer asks for.
    """

    def factors(name: str, layer: nn.Module, rest: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return rest.pop(name + FACTOR.format("A")), rest.pop(name + FACTOR.format("B"))
        except KeyError as error:
            raise InputError(f"the artifact has no tensor {error.args[0]!r}, which its family needs") from None

    return merge_updates(blank, family, tensors, factors)


def merge_updates(
    blank: PreTrainedModel, family: LoraFamily | SubloraFamily, tensors: Tensors, factors: TakeFactors
) -> dict[str, torch.Tensor]:
    """Frozen matrices from the seed, with the updates that `factors` takes out of the tensors added."""
    layers = linear_layers(blank, family.layers)
    check_rank(layers, family.rank)
    rest = {name.replace(f"{BASE_LAYER}.", "."): value for name, value in tensors.items()}
    out: dict[str, torch.Tensor] = {}
    for name, source in frozen_matrices(blank, layers, others=family.others).items():
        if name in rest:
            raise InputError(f"the artifact holds {name!r}, which its family freezes")
        out[name] = random_matrix(family.seed, name, source)
    for name, layer in layers.items():
        first, second = factors(name, layer, rest)
        outputs, inputs = layer_shape(layer)
        if tuple(first.shape) != (family.rank, inputs) or tuple(second.shape) != (outputs, family.rank):
            raise InputError(f"the artifact's factors of {name!r} do not fit its shape [{outputs}, {inputs}]")
        update = low_rank_product(second, first, family.alpha / family.rank)
        out[f"{name}.weight"] += update.T if is_transposed(layer) else update
    return {**rest, **out}
