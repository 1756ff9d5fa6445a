"""Other tools' layouts, written here from their documented formats, beside the weights that they stand for."""

from __future__ import annotations

import json

import numpy as np
import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]
Stored = tuple[Tensors, np.ndarray]
"""Tensors by the ending of their names, and the weights that they stand for, float32 [outputs, inputs]."""


def random_weights(rows: int = 128, columns: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(6, (rows, columns)) * 0.03


def quantize(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [outputs, inputs], zero points and float16 scales [outputs, groups]; asymmetric, by range."""
    grouped = weights.reshape(len(weights), -1, group)
    low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
    scales = np.maximum((high - low) / ((1 << bits) - 1), 1e-6).astype(np.float16)
    wide = scales.astype(np.float64)
    zeros = np.clip(np.rint(-low / wide), 0, (1 << bits) - 1)
    codes = np.clip(np.rint(grouped / wide[..., None]) + zeros[..., None], 0, (1 << bits) - 1)
    return codes.reshape(weights.shape).astype(np.int64), zeros.astype(np.int64), scales


def dequantize(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> np.ndarray:
    """In float64, whose rounding to float32 is the last."""
    return ((codes - zeros[:, group]) * scales.astype(np.float64)[:, group]).astype(np.float32)


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, lanes] as int32 words [n * bits / 32, lanes], least significant bits first, across words."""
    flags = (codes[:, None, :] >> np.arange(bits)[None, :, None] & 1).astype(np.uint8)
    packed = np.packbits(flags.reshape(-1, codes.shape[1]), axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<i4").T.copy()


def _tensors(**arrays: np.ndarray) -> Tensors:
    return {f".{name}": torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def gptq(weights: np.ndarray, bits: int, group: int = 128, *, older: bool = True, act_order: bool = False) -> Stored:
    """As AutoGPTQ ("gptq", `older`) or GPTQModel ("gptq_v2") saves a layer."""
    codes, zeros, scales = quantize(weights, bits, group)
    by_input = np.arange(codes.shape[1]) // group
    if act_order:  # an input's group is then any
        order = np.random.default_rng(1).permutation(codes.shape[1])
        codes, by_input = codes[:, order], by_input[order]
    stored = (zeros - 1) & ((1 << bits) - 1) if older else zeros
    tensors = _tensors(
        qweight=pack_stream(codes.T, bits),
        qzeros=pack_stream(stored, bits).T,
        scales=scales.T,
        g_idx=by_input.astype(np.int32),
    )
    return tensors, dequantize(codes, zeros, scales, by_input)


def awq(weights: np.ndarray, group: int = 128) -> Stored:
    """As AutoAWQ's "gemm" saves a layer."""
    codes, zeros, scales = quantize(weights, 4, group)

    def pack(values: np.ndarray) -> np.ndarray:
        words = values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
        return (words << (4 * np.arange(8, dtype=np.uint32))).sum(2).astype(np.uint32).view(np.int32)

    tensors = _tensors(qweight=pack(codes.T), qzeros=pack(zeros.T), scales=scales.T)
    return tensors, dequantize(codes, zeros, scales, np.arange(codes.shape[1]) // group)


def bitsandbytes_4bit(weights: np.ndarray, *, nested: bool = False, block: int = 64) -> Stored:
    """As bitsandbytes saves a layer in NF4, its scales plain or themselves in 8 bits."""
    draw = np.random.default_rng(1)
    table = np.sort(draw.normal(size=16)).astype(np.float32)
    table /= np.abs(table).max()
    blocks = weights.reshape(-1, block)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weights.shape)}
    parts = {"absmax": absmax, "quant_map": table}
    if nested:
        inner = np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
        offset = float(absmax.mean())
        top = np.abs(absmax - offset).max(keepdims=True).astype(np.float32)
        index = np.abs((absmax - offset)[:, None] / top - inner).argmin(1).astype(np.uint8)
        state |= {"nested_blocksize": 1 << 16, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"absmax": index, "nested_absmax": top, "nested_quant_map": inner}
        absmax = inner[index] * top + np.float32(offset)
    codes = np.abs(blocks[:, :, None] / absmax[:, None, None] - table).argmin(2)
    pairs = codes.reshape(-1, 2)
    parts = {f"weight.{name}": array for name, array in parts.items()}
    parts["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).astype(np.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return _tensors(**parts), (table[codes] * absmax[:, None]).reshape(weights.shape)


def bitsandbytes_8bit(weights: np.ndarray) -> Stored:
    """As bitsandbytes saves a layer of LLM.int8()."""
    scales = np.abs(weights).max(1).astype(np.float32)
    codes = np.rint(weights / scales[:, None] * 127).astype(np.int8)
    dense = codes.astype(np.float32) * scales[:, None] * np.float32(1 / 127)
    return _tensors(weight=codes, SCB=scales, weight_format=np.array(0, np.uint8)), dense


HQQ_PACKING = {8: ("8bit_u8", 8), 4: ("4bit_u8", 4), 3: ("3bit_32", 3), 2: ("2bit_u8", 2), 1: ("1bit_u8", 1)}


def hqq(weights: np.ndarray, bits: int, group: int = 128) -> Stored:
    """As hqq saves a layer along axis 1, to compute in float16: groups are rows, codes of a word are far apart."""
    rows = weights.reshape(-1, group)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    scale = ((high - low) / ((1 << bits) - 1)).astype(np.float16)
    zero = (-low / scale).astype(np.float16)
    codes = np.clip(np.rint(rows / scale + zero), 0, (1 << bits) - 1).astype(np.int64)
    packing, width = HQQ_PACKING[bits]
    per_word = 10 if bits == 3 else 8 // bits
    padded = np.concatenate([codes, np.zeros((-len(codes) % per_word, group), np.int64)])
    words = padded.reshape(per_word, -1, group) << (width * np.arange(per_word)[::-1])[:, None, None]
    meta = {"nbits": bits, "group_size": group, "axis": 1}
    tensors = _tensors(
        W_q=words.sum(0).astype(np.int32 if bits == 3 else np.uint8),
        scale=scale,
        zero=zero,
        shape=np.array(weights.shape),
        packing=np.frombuffer(packing.encode(), np.uint8),
        compute_dtype=np.frombuffer(b"torch.float16", np.uint8),
        unpack_view_dtype=np.frombuffer(b"torch.int32" if bits == 3 else b"torch.uint8", np.uint8),
        **{name: np.array(value, np.int32) for name, value in meta.items()},
        **{name: np.array(0, np.uint8) for name in ("view_as_float", "quant_scale", "quant_zero", "offload_meta")},
        **{name: np.array(1, np.uint8) for name in ("encoded_state_dict", "stores_quant_config", "channel_wise")},
    )
    return tensors, ((codes.astype(np.float16) - zero) * scale).astype(np.float32).reshape(weights.shape)


def compressed_tensors(weights: np.ndarray, group: int = 128) -> Tensors:
    """As compressed-tensors saves a layer in "pack-quantized"."""
    codes, _, scales = quantize(weights, 4, group)
    return {
        ".weight_packed": torch.from_numpy(pack_stream(codes.T, 4).T.copy()),
        ".weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        ".weight_shape": torch.tensor(codes.shape),
    }


def torchao(weights: np.ndarray, group: int = 128) -> Tensors:
    """As torchao saves weights: 4-bit codes two in a byte, and 8-bit floats."""
    codes, zeros, scales = quantize(weights, 4, group)
    return {
        "._weight_qdata": torch.from_numpy((codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8)),
        "._weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        "._weight_zero_point": torch.from_numpy(zeros.astype(np.int8)),
        ".fp8._weight_qdata": torch.from_numpy(codes.astype(np.float32) - 7).to(torch.float8_e4m3fn),
    }
