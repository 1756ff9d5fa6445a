"""GGUF files made on the spot, as llama.cpp's converter makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from tokenbound.compression.codecs.ggml import FORMATS
from tokenbound.gguf_file import TYPES

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
"""What the `gguf` package can make of weights."""
ALL = tuple(TYPES[number].name for number in FORMATS)


def number_of(kind: str) -> int:
    return next(number for number, entry in TYPES.items() if entry.name == kind)


def random_weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights in rows and columns of different sizes, with a few outliers."""
    draw = np.random.default_rng(seed)
    spread = np.exp(0.3 * draw.standard_normal((rows, 1)) + 0.2 * draw.standard_normal((1, columns)))
    weights = 0.02 * spread * draw.standard_normal((rows, columns))
    weights *= np.where(draw.random((rows, columns)) < 0.001, 4, 1)
    return weights.astype(np.float32)


def k_blocks(kind: str, weights: np.ndarray) -> np.ndarray:
    """Blocks of a K-quant that stand for about these weights: uint8 [rows, bytes]."""
    layout, entry = FORMATS[number_of(kind)], TYPES[number_of(kind)]
    groups = weights.reshape(-1, layout.groups, 256 // layout.groups)
    top = layout.symbols - 1
    if kind in ("Q2_K", "Q4_K", "Q5_K"):
        limit = 15 if kind == "Q2_K" else 63
        low = np.maximum(0, -groups.min(2))
        scale = (groups.max(2) + low) / top
        d, dmin = (np.maximum(part.max(1, keepdims=True) / limit, 1e-6).astype(np.float16) for part in (scale, low))
        steps, minima = (np.rint(part / unit).clip(0, limit) for part, unit in ((scale, d), (low, dmin)))
        unit = np.maximum((steps * d)[:, :, None], 1e-9)
        codes = np.rint((groups + (minima * dmin)[:, :, None]) / unit).clip(0, top)
        heads = [d.view(np.uint16), dmin.view(np.uint16), steps.astype(np.uint8), minima.astype(np.uint8)]
    else:
        limit, offset = (127, 0) if kind == "Q6_K" else (31, 32)
        scale = np.abs(groups).max(2) / (layout.symbols // 2)
        d = np.maximum(scale.max(1, keepdims=True) / limit, 1e-6).astype(np.float16)
        steps = np.rint(scale / d).clip(1, limit)
        codes = np.rint(groups / (steps * d)[:, :, None]).clip(-layout.symbols // 2, layout.symbols // 2 - 1)
        codes, heads = codes + layout.symbols // 2, [d.view(np.uint16), (steps + offset).astype(np.uint8)]
    blocks = layout.join(heads, codes.astype(np.uint8), np.zeros((len(groups), 0), np.uint8))
    return blocks.reshape(len(weights), -1, entry.size).reshape(len(weights), -1)


def blocks_of(kind: str, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Blocks of any type; of types that only llama.cpp's own code can make, random ones with sound scales."""
    if kind in QUANTIZED:
        return quants.quantize(weights, GGMLQuantizationType[kind])
    if kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        return k_blocks(kind, weights)
    entry, layout = TYPES[number_of(kind)], FORMATS[number_of(kind)]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (weights.size // entry.elements, entry.size), dtype=np.uint8)
    heads, codes, rest = layout.split(blocks)
    if heads:
        heads[0] = (0.01 * (1 + draw.random((len(blocks), 1)))).astype(np.float16).view(np.uint16)
        blocks = layout.join(heads, codes, rest)
    else:  # IQ1_M has its scale in the top four bits of four 16-bit words
        bits = int(np.float16(0.01).view(np.uint16))
        for place in range(4):
            blocks[:, 49 + 2 * place] = blocks[:, 49 + 2 * place] & 15 | (bits >> 4 * place & 15) << 4
    return blocks.reshape(len(weights), -1)


Tensors = Mapping[str, tuple[np.ndarray, str]]
"""By name: weights, or blocks where the type has them, and the type."""


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Tensors, tokenizer: Mapping[str, Any] = {}
) -> Path:
    """Write a file: metadata without the architecture's name before its keys."""
    writer = GGUFWriter(path, architecture)
    for key, value in {**{f"{architecture}.{key}": value for key, value in metadata.items()}, **tokenizer}.items():
        add_value(writer, key, value)
    for name, (data, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, np.ascontiguousarray(data.astype({"F32": "<f4", "F16": "<f2"}[kind])))
        else:
            blocks = data if data.dtype == np.uint8 else quants.quantize(data, number)
            writer.add_tensor(name, np.ascontiguousarray(blocks), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them: the two numbers that are rotated together beside each other."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


LLAMA = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
    "vocab_size": 257,
}


def llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random Llama of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = LlamaConfig(**{**shape, **heads, "initializer_range": 0.2, "tie_word_embeddings": True, **changes})
    return LlamaForCausalLM(config).eval()


_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_tensors(model: torch.nn.Module, kind: str = "F32") -> dict[str, tuple[np.ndarray, str]]:
    """The tensors of a Llama as its GGUF file has them; vectors stay float32."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            heads = model.config.num_attention_heads if ".q_proj" in name else model.config.num_key_value_heads
            array = paired(array, heads)
        place = name.replace("model.layers.", "blk.")
        for ours, theirs in _LLAMA_NAMES.items():
            place = place.replace(ours, theirs)
        found[place] = (array, kind if array.ndim > 1 else "F32")
    return found


def write_llama(path: Path, model: torch.nn.Module | None = None, kind: str = "F32", **changes: Any) -> Path:
    """A tiny Llama in a GGUF file."""
    metadata = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    return write_gguf(path, "llama", metadata, llama_tensors(model or llama(), kind))


def byte_level_keys() -> dict[str, Any]:
    """A tokenizer of bytes with one merge, as llama.cpp's converter writes it; 257 ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    letters = [letter for letter in alphabet if letter != "\u0143"]  # one for a byte that is in no text
    tokens = [*letters, "so", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": ["s o"],
        "tokenizer.ggml.eos_token_id": 256,
    }
