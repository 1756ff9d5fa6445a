"""Quantized layers that run here as they are deployed: transformers loads the decoded tensors by its own quantizer.

The tensors are written to a safetensors file in a temporary folder, with the header that they had, and read from there
as the checkpoint itself would be. torchao's config names classes of its package by text, so every such name is first
held against what the package defines as a record or an enumeration: nothing else is ever called. (The types of weights
in its records are looked up in a table of its own.) Patterns for the names of layers are first held to be quick.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tokenbound.errors import InputError
from tokenbound.models.quantized.regexes import require_quick_patterns
from tokenbound.models.quantized.schemes import QUANTIZATION, RECORDS, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = Mapping[str, torch.Tensor]


def load_deployed(
    blank: PreTrainedModel, method: Scheme, architecture: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Load a model as its checkpoint would be.

    Args:
        blank: the model without storage and without its quantization.
        method: how it is quantized.
        architecture: with the keys of `methods`.
        tensors: as stored, by name.
        dtype: arithmetic of everything that is not quantized.

    Returns:
        The model and transformers' loading report.

    Raises:
        InputError: a config that names what it must not or has patterns that might hang, or weights for another dtype.
        Exception: of many kinds, where transformers or the package cannot make sense of config and tensors.
    """
    records = architecture.get(RECORDS) or {}
    require_quick_patterns(architecture[QUANTIZATION])
    if method.name == "torchao":
        _require_plain_records(architecture[QUANTIZATION])
    settings = _settings(method, architecture[QUANTIZATION])
    config = type(blank.config).from_dict({**blank.config.to_dict(), QUANTIZATION: settings})
    with TemporaryDirectory(prefix="tokenbound-") as folder:
        _write(Path(folder), tensors, records)
        # With `output_loading_info` it returns a pair, which its annotation does not say.
        loaded: Any = type(blank).from_pretrained(
            folder,
            config=config,
            generation_config=blank.generation_config,  # or it is looked for beside the tensors
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in the report, and are refused by name
            use_safetensors=True,
            local_files_only=True,
        )
    model, report = loaded
    if method.name == "compressed-tensors":
        _decompress(model)
    _require_dtype(model, dtype)
    return model, report


def _settings(method: Scheme, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it is, but for what transformers cannot load so: packed zero points of compressed-tensors.

    Those it restores only while loading, to the same weights, and with one scheme for all layers.
    """
    groups = settings.get("config_groups")
    if method.name != "compressed-tensors" or not isinstance(groups, Mapping) or len(groups) != 1:
        return dict(settings)
    (group,) = groups.values()
    is_weight_only = not group.get("input_activations") and not group.get("output_activations")
    has_zeros = (group.get("weights") or {}).get("symmetric") is False
    return {**settings, **({"dequantize": True} if is_weight_only and has_zeros else {})}


def _write(folder: Path, tensors: Tensors, records: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    header = {"format": "pt"}
    if records:
        header |= {name: json.dumps(record) for name, record in records.items()}
        header["tensor_names"] = json.dumps(sorted(records))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", header)


def read_records(path: Path) -> dict[str, Any]:
    """What torchao says of the quantized weights in the header of a safetensors file, by name; empty without it.

    Raises:
        InputError: the header is not torchao's.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    try:
        records = {name: json.loads(header[name]) for name in json.loads(header.get("tensor_names", "[]"))}
        return {name: record for name, record in records.items() if record["_type"] != "Tensor"}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} has no sound torchao header ({error!r}); fetch the checkpoint again") from None


def _decompress(model: PreTrainedModel) -> None:
    """What compressed-tensors does before the first forward pass of the whole model; here its body runs alone."""
    if hasattr(model, "ct_decompress_hook"):
        cast(Any, model.hf_quantizer).compressor.decompress_model(model)


_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)
"""Weights that are what they seem; the last stand for a model whose memory is planned."""


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's product is not that of its weight as a plain tensor."""
    weight = getattr(module, "weight", None)
    if hasattr(module, "quantization_scheme"):
        return True
    return isinstance(weight, torch.Tensor) and type(weight) not in _PLAIN


def _require_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Quantized weights come back in the dtype that they were made from, whatever is asked for."""
    for name, module in model.named_modules():
        found = module.weight.dtype if is_quantized(module) and isinstance(module, nn.Linear) else dtype
        if found != dtype:
            raise InputError(
                f"what.model.dtype {_short(dtype)}: the quantized weight of {name} computes in {_short(found)}; set "
                f"what.model.dtype: {_short(found)}"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- What a config of torchao may name ----------------------------------------------------------------------------


def _require_plain_records(tree: object) -> None:
    for kind, data in _named_types(tree):
        if kind == "torch.dtype":
            known = isinstance(data, str) and isinstance(getattr(torch, data, None), torch.dtype)
        else:
            known = _is_record(kind)
        if not known:
            raise InputError(f"the model's quantization config names {kind} {str(data)[:60]!r}, which is not known")


def _named_types(tree: object) -> Iterator[tuple[str, Any]]:
    """Every type that a config names, with its data."""
    if isinstance(tree, Mapping):
        if "_type" in tree:
            yield str(tree["_type"]), tree.get("_data")
        for value in tree.values():
            yield from _named_types(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _named_types(value)


def _is_record(name: str) -> bool:
    """Whether each place where torchao looks for a class defines only a dataclass, named tuple or enum by this name."""
    from torchao.core.config import ALLOWED_AO_MODULES

    places = [import_module(place) for place in sorted(ALLOWED_AO_MODULES)]
    found = [getattr(place, name) for place in places if hasattr(place, name)]
    return bool(found) and all(
        isinstance(kind, type)
        and kind.__module__.startswith("torchao.")
        and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum | tuple))
        for kind in found
    )
