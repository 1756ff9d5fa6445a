"""The tensors of a GGUF file under the names and in the order that the model has them, their blocks untouched.

A row of a weight is a whole number of blocks, so what llama.cpp's converter did to rows (queries and keys reordered for
its rotary embedding, fused projections regrouped) is undone on the blocks themselves. What it did to values concerns
norms and vectors only, which are plain floats. A tensor of blocks keeps its bytes as uint8 [rows, bytes of a row],
under its name with `.ggml_` and its type behind it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenbound.compression.codecs.ggml import MARK
from tokenbound.compression.tensor_map import Header
from tokenbound.errors import InputError
from tokenbound.gguf_file import PLAIN, GgufFile, read_gguf
from tokenbound.models.gguf.architectures import (
    LAYER,
    ROPE_FREQUENCIES,
    Config,
    GgufArchitecture,
    architecture_of,
    read_config,
)
from tokenbound.models.quantized.schemes import QUANTIZATION

Array = NDArray[Any]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART = ".part"
"""In a name: what stands before the number of a part, where blocks of two types make one tensor of the model."""


def read_gguf_architecture(path: str | Path) -> Config:
    """The config of the model in a GGUF file; reads its header only.

    Raises:
        InputError: the file is not sound, or holds what is not understood.
    """
    return _architecture(read_gguf(path))


def stored_tensor(file: GgufFile, config: Config, name: str) -> torch.Tensor:
    """One tensor of a file, by ggml's name, as the model has it: blocks as bytes, plain values in their dtype."""
    entry, stored = architecture_of(file), file.tensors[name]
    rows = _reordered(file, entry, config, name, stored.read())
    if stored.type.name not in PLAIN:
        return torch.from_numpy(rows)
    return _changed(entry, name, torch.from_numpy(np.ascontiguousarray(rows)).view(_DTYPES[stored.type.name]))


def stored_header(file: GgufFile, name: str) -> Header:
    """Dtype and shape of `stored_tensor`; reads nothing."""
    stored = file.tensors[name]
    if stored.type.name not in PLAIN:
        return torch.uint8, stored.stored_shape
    empty = torch.empty(stored.shape, dtype=_DTYPES[stored.type.name], device="meta")
    return empty.dtype, tuple(_changed(architecture_of(file), name, empty).shape)


def stored_names(file: GgufFile) -> dict[str, str]:
    """Of each tensor by its name here (with its type behind it where it is of blocks): ggml's name."""
    entry, found = architecture_of(file), {}
    for name, stored in file.tensors.items():
        if name == ROPE_FREQUENCIES:
            continue  # they are in the config
        part = PART + ("1" if "ffn_up_exps" in name else "0") if _is_half(name) else ""
        kind = f"{MARK}{stored.type.name.lower()}" if stored.type.name not in PLAIN else ""
        found[f"{_target(file, entry, name)}{part}{kind}"] = name
    return found


def _architecture(file: GgufFile) -> Config:
    config = read_config(file)
    entry = architecture_of(file)
    for name in file.tensors:
        if name != ROPE_FREQUENCIES:
            _target(file, entry, name)
    if any(stored.type.name not in PLAIN or _is_half(name) for name, stored in file.tensors.items()):
        config[QUANTIZATION] = {"quant_method": "gguf"}
    return config


def _target(file: GgufFile, entry: GgufArchitecture, name: str) -> str:
    """The model's name of a tensor.

    Raises:
        InputError: the architecture has no such tensor.
    """
    match = LAYER.fullmatch(name)
    rest = name if match is None else match[2]
    leaf, dot, kind = rest.rpartition(".")
    if kind not in ("weight", "bias"):
        leaf, dot, kind = rest, "", ""
    known = (entry.ends if match is None else entry.layers).get(leaf)
    if known is None:
        raise InputError(
            f"{file.path}: tensor {name!r} is not one that a model of the architecture {file.architecture} has here; "
            "give its safetensors weights"
        )
    place = known if match is None else f"{entry.prefix}{match[1]}.{known}"
    return place if leaf.endswith("_exps") else f"{place}{dot}{kind}"  # experts are one parameter of their module


def _is_half(name: str) -> bool:
    """Whether a tensor is one of two that the model has as one."""
    return "ffn_gate_exps" in name or "ffn_up_exps" in name


def _reordered(file: GgufFile, entry: GgufArchitecture, config: Config, name: str, rows: Array) -> Array:
    """Rows [outputs, bytes], or a vector of bytes, in the model's order."""
    heads, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if entry.permuted and re.search(r"\.attn_[qk]\.(weight|bias)$", name):
        count = heads if ".attn_q." in name else keys if keys is not None else heads
        return _pairs_apart(file, name, rows, count)
    if file.architecture == "bloom" and ".attn_qkv." in name:
        return _by_head(file, name, rows, config["n_head"])
    return rows


def _in_rows(file: GgufFile, name: str, rows: Array, divisor: object) -> tuple[Array, int]:
    """As rows, of a bias one of each number, which divide into so many."""
    entry = file.tensors[name]
    cut = rows.reshape(entry.shape[0], -1)
    if not isinstance(divisor, int) or divisor < 1 or len(cut) % divisor:
        raise InputError(f"{file.path}: tensor {name!r} has {len(cut)} rows, which do not divide into {divisor} heads")
    return cut, len(cut) // divisor


def _pairs_apart(file: GgufFile, name: str, rows: Array, heads: object) -> Array:
    """Undo what puts two numbers that are rotated together beside each other; the model has them half a head apart."""
    cut, size = _in_rows(file, name, rows, heads)
    if size % 2:
        raise InputError(f"{file.path}: tensor {name!r} has heads of an odd size ({size})")
    halves = cut.reshape(-1, size // 2, 2, cut.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _by_head(file: GgufFile, name: str, rows: Array, heads: object) -> Array:
    """Queries, keys and values of each head together, which llama.cpp has apart."""
    cut, _ = _in_rows(file, name, rows, heads)
    if not isinstance(heads, int) or len(cut) % (3 * heads):
        raise InputError(f"{file.path}: tensor {name!r} has {len(cut)} rows, which are not queries, keys and values")
    parts = cut.reshape(3, heads, -1, cut.shape[1])
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(rows.shape)


def _changed(entry: GgufArchitecture, name: str, values: torch.Tensor) -> torch.Tensor:
    """Plain values as the model has them."""
    if entry.raised_norms and name.endswith("norm.weight"):
        return values - 1
    if entry.is_transposed and values.ndim == 2 and LAYER.fullmatch(name):
        return values.T.contiguous()
    if name.endswith(".ssm_a"):
        return torch.log(-values)
    if name.endswith((".ssm_conv1d.weight", ".shortconv.conv.weight")):
        return values.unsqueeze(1)
    if name.endswith(".ffn_gate_inp_shexp.weight") and values.ndim == 1:
        return values.unsqueeze(0)
    return values
