"""Small quantized checkpoints, made on the spot: by the tools themselves, or in their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_with_layout(
    source: Path, folder: Path, settings: dict[str, Any], lay_out: Callable[[np.ndarray], Any]
) -> dict[str, torch.Tensor]:
    """Write a checkpoint whose linear layers are in another tool's layout.

    Args:
        source: a plain checkpoint.
        folder: where to write.
        settings: its `quantization_config`; empty for none.
        lay_out: weights [outputs, inputs] to tensors by ending, and the weights they stand for.

    Returns:
        The tensors of the plain checkpoint that it stands for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain, stored, dense = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEAR):
            tensors, weights = lay_out(tensor.double().numpy())
            stored |= {layer + part: part_tensor for part, part_tensor in tensors.items()}
            dense[name] = torch.from_numpy(np.ascontiguousarray(weights))
        else:
            stored[name] = dense[name] = tensor
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return dense


def save_torchao(source: Path, folder: Path, config: Any) -> None:
    """Quantize a plain checkpoint with torchao and save it, as transformers does."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
    )
    model.save_pretrained(folder)


def save_compressed(source: Path, folder: Path, preset: str, **activations: Any) -> None:
    """Quantize a plain checkpoint by range with compressed-tensors and save it, as llm-compressor does.

    Args:
        source: a plain checkpoint.
        folder: where to write.
        preset: a scheme of compressed-tensors, such as W4A16.
        activations: what to change in how the inputs of layers are quantized.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = 16
    for name, value in activations.items():
        setattr(scheme.input_activations, name, value)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if (found := getattr(module, "quantization_scheme", None)) is None:
            continue
        grouped = module.weight.data.reshape(len(module.weight), -1, found.weights.group_size or module.in_features)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), found.weights)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
