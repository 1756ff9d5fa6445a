"""LoRA through `peft` on a pretrained base that stays as it is: what a delta artifact of the kind `adapter` holds.

The factors are `peft`'s own, saved as `peft` saves them; see `tokenbound.compression.weight_delta` for how they are
coded and put onto the base again, without `peft`. Parameters: r (inputs + outputs) for each layer. The artifact pays
for the factors alone, and that is honest only where the base was fixed without regard to the scored tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenbound.config.family import LoraFamily
from tokenbound.models.build import build_model
from tokenbound.models.hf_model import blank_model
from tokenbound.models.structured.layers import linear_layers
from tokenbound.models.structured.lora import check_rank, lora_config, peft_module
from tokenbound.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, ADAPTER = "base_model.model.", "default"
"""What `peft` puts before the names of an adapted model, and what it calls the only adapter."""


def adapted_model(base: Weights, family: LoraFamily) -> PreTrainedModel:
    """The base with fresh LoRA factors from torch's present seed, float32 on the CPU; they alone are trained.

    Raises:
        InputError: a rank above a layer's dimension, an unknown layer, or `peft` is not installed.
    """
    return _adapt(build_model(base.architecture, base.tensors, dtype=torch.float32, device="cpu"), family)


def count_adapter(base: Weights, family: LoraFamily) -> int:
    """Trained parameters; found without storage.

    Raises:
        InputError: the family does not fit the base, or `peft` is not installed.
    """
    model = _adapt(blank_model(base.architecture), family)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adapt(model: PreTrainedModel, family: LoraFamily) -> PreTrainedModel:
    peft = peft_module()
    layers = linear_layers(model, family.layers)
    check_rank(layers, family.rank)
    adapted: PreTrainedModel = peft.get_peft_model(model, lora_config(family, layers), adapter_name=ADAPTER)
    return adapted


def factor_names(model: PreTrainedModel) -> dict[str, str]:
    """The trained parameters of an adapted model, each with what the artifact calls it."""
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: name.removeprefix(PREFIX).replace(f".{ADAPTER}.", ".") for name in trained}


def save_adapter(model: PreTrainedModel, base: str, folder: Path) -> None:
    """Write the factors as `peft` does, for it and for `tokenbound.models.weights.read_delta`."""
    model.peft_config[ADAPTER].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
