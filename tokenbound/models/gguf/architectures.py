"""What a GGUF file says of its model, as a config of transformers.

Each architecture of llama.cpp that transformers' own loader maps to a causal model has an entry here, which says what
every metadata key and every tensor means. A key or tensor that no entry explains may change losses, so it is refused,
never skipped. transformers' loader skips them: a Llama 3.1 read by it has lost its scaled rotary frequencies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenbound.errors import InputError
from tokenbound.gguf_file import GgufFile, Value

Config = dict[str, Any]

MAX_SIZE = 1 << 32
"""Of anything in a model."""
LAYER = re.compile(r"blk\.(\d+)\.(.+)")
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Factors that llama.cpp divides rotary frequencies by: Llama 3.1's scaling, of which only the result is stored."""

_DECODER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GPT2_ENDS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_LAYERS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BLOOM_ENDS = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_MAMBA_LAYERS = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out": "mixer.out_proj",
}
_LFM2_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "shortconv.conv": "conv.conv",
}

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_COUNTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_ROPE = (
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
)
_HEADS = ("attention.key_length", "attention.value_length")
_ALWAYS = ("vocab_size", "attention.causal", "tensor_data_layout")
"""Keys that any architecture may have, and that are checked."""


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture of llama.cpp lies in a GGUF file.

    Attributes:
        model_type: What transformers calls it.
        keys: Metadata keys, without the architecture's name before them, and the config keys that they become.
        read: Further metadata keys, which `finish` or the rotary embedding reads.
        layers: Tensors of a layer: ggml's name and the model's.
        ends: Tensors outside the layers.
        prefix: What the model has before a layer's number.
        has_rope: Whether it has rotary embeddings.
        is_partial: Whether part of a head may go without them.
        sizes_heads: Whether its config says how large a head is; otherwise it is the width over the heads.
        is_transposed: Whether the model keeps its weights as [inputs, outputs].
        permuted: Whether the rows of queries and keys were reordered for llama.cpp's rotary embedding.
        raised_norms: Whether the weights of norms are stored plus one.
        finish: What remains: (config, file) to further config keys.
    """

    model_type: str
    keys: Mapping[str, str]
    read: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=lambda: _DECODER)
    ends: Mapping[str, str] = field(default_factory=lambda: _ENDS)
    prefix: str = "model.layers."
    has_rope: bool = True
    is_partial: bool = False
    sizes_heads: bool = True
    is_transposed: bool = False
    permuted: bool = False
    raised_norms: bool = False
    finish: Callable[[Config, GgufFile], Config] = lambda config, file: {}

    @property
    def known(self) -> set[str]:
        """Metadata keys that it may have."""
        return {*self.keys, *self.read, *_ALWAYS, *_HEADS, *(_ROPE if self.has_rope else ())}


def read_config(file: GgufFile) -> Config:
    """The config of transformers for a GGUF file.

    Raises:
        InputError: an unknown architecture, a key that no entry explains, or one that is missing.
    """
    name, entry = file.architecture, architecture_of(file)
    found = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    if unknown := sorted(key for key, value in found.items() if key not in entry.known and value not in (0, False)):
        raise InputError(
            f"{file.path}: the metadata key {name}.{unknown[0]} = {str(found[unknown[0]])[:60]} may change the model, "
            "and is not understood; convert the model from its safetensors weights instead"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no tensor token_embd.weight; give the first part of a split file")
    config: Config = {"model_type": entry.model_type}
    for key, target in entry.keys.items():
        if key in found:
            config[target] = _numeric(file, f"{name}.{key}", found[key])
    layers, _ = (_size(file, f"{name}.{key}", found.get(key)) for key in ("block_count", "embedding_length"))
    if layers > len(file.tensors):
        raise InputError(f"{file.path} has {layers} layers but only {len(file.tensors)} tensors; fetch it again")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    _check(file, name, found, config["vocab_size"])
    if entry.has_rope:
        config |= _rope(file, entry, config, found)
    config |= entry.finish(config, file)
    config |= _special_ids(file, config["vocab_size"])
    return config


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """The entry of a file's architecture.

    Raises:
        InputError: there is none.
    """
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path} holds a model of the architecture {file.architecture[:40]!r}, which cannot be read from GGUF "
            f"({', '.join(ARCHITECTURES)} can); give its safetensors weights"
        )
    return ARCHITECTURES[file.architecture]


def _size(file: GgufFile, key: str, value: Value | None) -> int:
    """A positive whole number.

    Raises:
        InputError: it is something else, or is missing.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise InputError(f"{file.path}: the metadata key {key} is {str(value)[:40]}, not a size; convert it again")
    return value


def _numeric(file: GgufFile, key: str, value: Value) -> Value:
    """A number, a switch, or a number for each layer.

    Raises:
        InputError: it is something else, or far beyond what any model has.
    """
    found = _plain(value)
    for item in found if isinstance(found, list) else [found]:
        if isinstance(item, str) or not abs(item) <= MAX_SIZE:
            raise InputError(
                f"{file.path}: the metadata key {key} is {str(item)[:40]!r}, not such a number; convert it again"
            )
    return found


def _plain(value: Value) -> Value:
    """Numbers as configs have them: what was a decimal number before it became a float32 is one again."""
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]  # one number for each layer
    return value


def _check(file: GgufFile, name: str, found: Mapping[str, Value], vocabulary: int) -> None:
    """What must be as it always is."""
    size = found.get("vocab_size", vocabulary)
    if size != vocabulary:
        raise InputError(f"{file.path}: {name}.vocab_size is {size}, but token_embd.weight has {vocabulary} rows")
    if found.get("attention.causal", True) is not True:
        raise InputError(f"{file.path} is not a causal model ({name}.attention.causal is false); give a decoder")
    if found.get("attention.key_length") != found.get("attention.value_length"):
        raise InputError(f"{file.path}: keys and values of different lengths are not supported; give its safetensors")


def _special_ids(file: GgufFile, vocabulary: int) -> Config:
    """Ids that configs have beside the model; none of them changes a loss."""
    named = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
    found = {key: file.metadata.get(f"tokenizer.ggml.{source}") for key, source in named.items()}
    ids = {key: value if isinstance(value, int) and 0 <= value < vocabulary else None for key, value in found.items()}
    return {**ids, "pad_token_id": None}


# --- Rotary embeddings ------------------------------------------------------------------------------------------------


def _head_size(config: Config, found: Mapping[str, Value]) -> int:
    """Numbers of a head."""
    length = found.get("attention.key_length")
    return int(length) if isinstance(length, int) else config["hidden_size"] // config["num_attention_heads"]


def _rope(file: GgufFile, entry: GgufArchitecture, config: Config, found: Mapping[str, Value]) -> Config:
    name = file.architecture
    if not isinstance(config.get("num_attention_heads"), int) or config["num_attention_heads"] < 1:
        raise InputError(f"{file.path}: {name}.attention.head_count is not one number; give its safetensors weights")
    size = _head_size(config, found)
    rotated = found.get("rope.dimension_count", size)
    base = _numeric(file, f"{name}.rope.freq_base", found.get("rope.freq_base", 10000.0))
    rope: Config = {"rope_type": "default", "rope_theta": base}
    if rotated != size:
        if not entry.is_partial or not isinstance(rotated, int) or not size:
            raise InputError(f"{file.path}: {name}.rope.dimension_count is {rotated} of heads of {size}, not all of it")
        rope["partial_rotary_factor"] = rotated / size
    rope |= _scaling(file, name, found)
    if ROPE_FREQUENCIES in file.tensors:
        rope |= _llama3(file, size)
    if entry.sizes_heads:
        return {"head_dim": size, "rope_parameters": rope}
    if size * config["num_attention_heads"] != config["hidden_size"]:
        raise InputError(f"{file.path}: {name}.attention.key_length is {size}, which {entry.model_type} cannot have")
    return {"rope_parameters": rope}


def _scaling(file: GgufFile, name: str, found: Mapping[str, Value]) -> Config:
    kind = found.get("rope.scaling.type", "linear" if "rope.scale_linear" in found else "none")
    factor = _plain(found.get("rope.scaling.factor", found.get("rope.scale_linear", 1.0)))
    original = found.get("rope.scaling.original_context_length")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original is not None:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise InputError(f"{file.path}: {name}.rope.scaling.type {kind!r} is not understood; give its safetensors weights")


def _llama3(file: GgufFile, size: int) -> Config:
    """Find the parameters that make the stored factors; those of Llama 3.1 and 3.2 but for the factor, which is seen.

    Raises:
        InputError: no such parameters make them.
    """
    stored = file.tensors[ROPE_FREQUENCIES].read().reshape(-1).view("<f4")
    base, factor = float(_number(file, "rope.freq_base", 10000.0)), float(stored.max())
    low, high, original = 1.0, 4.0, 8192
    lengths = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
    made = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != made.shape or not np.allclose(made, stored, rtol=1e-4, atol=0):
        raise InputError(f"{file.path}: {ROPE_FREQUENCIES} holds factors that are not Llama 3's; give its safetensors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _number(file: GgufFile, key: str, default: float) -> float:
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if isinstance(value, bool | str | list):
        raise InputError(f"{file.path}: {file.architecture}.{key} is not a number; convert it again")
    return value


# --- What single architectures need -----------------------------------------------------------------------------------


def _has(file: GgufFile, leaf: str) -> bool:
    return any(name.endswith(leaf) for name in file.tensors)


def _llama(config: Config, file: GgufFile) -> Config:
    return {"attention_bias": _has(file, ".attn_q.bias"), "mlp_bias": _has(file, ".ffn_up.bias")}


def _gemma(config: Config, file: GgufFile) -> Config:
    """Attention is scaled by the size of a head, but in the largest models by the width over the heads."""
    is_largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[file.architecture]
    scaled = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    return {"query_pre_attn_scalar": scaled}


def _gemma3(config: Config, file: GgufFile) -> Config:
    """Local layers have a base of their own, which only newer files say, and are not scaled."""
    local = {"rope_type": "default", "rope_theta": _plain(_number(file, "rope.freq_base_swa", 10000.0))}
    ropes = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return {**_gemma(config, file), "rope_parameters": ropes}


def _stablelm(config: Config, file: GgufFile) -> Config:
    return {"use_qkv_bias": _has(file, ".attn_q.bias")}


def _falcon(config: Config, file: GgufFile) -> Config:
    if config["num_kv_heads"] != 1:
        raise InputError(f"{file.path} is a falcon with several key-value heads, which cannot be read from GGUF here")
    return {
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "new_decoder_architecture": False,
    }


def _experts(config: Config, file: GgufFile) -> Config:
    """Every layer has experts, whose weights are normalised in Qwen 3 alone."""
    return {"norm_topk_prob": file.architecture == "qwen3moe", "decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2_moe(config: Config, file: GgufFile) -> Config:
    """The width of the shared expert is that of its tensor: older files do not say it."""
    shared = next((entry.shape[0] for name, entry in file.tensors.items() if name.endswith("ffn_up_shexp.weight")), 0)
    routed = next((entry.shape[1] for name, entry in file.tensors.items() if name.endswith("ffn_up_exps.weight")), 0)
    widths = {"shared_expert_intermediate_size": shared, "moe_intermediate_size": routed}
    return {**_experts(config, file), **widths}


def _lfm2(config: Config, file: GgufFile) -> Config:
    """Layers with no key-value heads are convolutions."""
    heads = file.metadata.get("lfm2.attention.head_count_kv")
    if not isinstance(heads, list) or not heads:
        raise InputError(f"{file.path}: lfm2.attention.head_count_kv is not a list; convert it again")
    kinds = ["full_attention" if count else "conv" for count in heads]
    return {"num_key_value_heads": max(heads), "layer_types": kinds, "block_auto_adjust_ff_dim": False}


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", {**_SIZES, **_RMS}, permuted=True, finish=_llama),
    "qwen2": GgufArchitecture("qwen2", {**_SIZES, **_RMS}),
    "qwen3": GgufArchitecture("qwen3", {**_SIZES, **_RMS}, layers={**_DECODER, **_QK_NORMS}),
    "qwen2moe": GgufArchitecture(
        "qwen2_moe",
        {**_SIZES, **_RMS, **_COUNTS},
        read=("expert_feed_forward_length", "expert_shared_feed_forward_length"),
        layers={**_DECODER, **_EXPERTS, **_SHARED_EXPERT},
        finish=_qwen2_moe,
    ),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe",
        {**_SIZES, **_RMS, **_COUNTS, "expert_feed_forward_length": "moe_intermediate_size"},
        layers={**_DECODER, **_QK_NORMS, **_EXPERTS},
        finish=_experts,
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        {
            **_SIZES,
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        layers={**_DECODER, **_GEMMA_NORMS},
        raised_norms=True,
        finish=_gemma,
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        {**_SIZES, **_RMS, "attention.sliding_window": "sliding_window"},
        read=("rope.freq_base_swa",),
        layers={**_DECODER, **_GEMMA_NORMS, **_QK_NORMS},
        raised_norms=True,
        finish=_gemma3,
    ),
    "phi3": GgufArchitecture(
        "phi3",
        {**_SIZES, **_RMS, "attention.sliding_window": "sliding_window"},
        layers={**_DECODER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        is_partial=True,
        sizes_heads=False,
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2",
        {**_SIZES, "attention.layer_norm_epsilon": "norm_epsilon"},
        layers={**_DECODER, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        sizes_heads=False,
    ),
    "stablelm": GgufArchitecture(
        "stablelm",
        {
            **_SIZES,
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        is_partial=True,
        sizes_heads=False,
        finish=_stablelm,
    ),
    "nemotron": GgufArchitecture(
        "nemotron",
        {**_SIZES, "attention.layer_norm_epsilon": "norm_eps"},
        is_partial=True,
        sizes_heads=False,
        raised_norms=True,
    ),
    "falcon": GgufArchitecture(
        "falcon",
        {
            **{key: target for key, target in _SIZES.items() if key != "attention.head_count_kv"},
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        layers=_BLOOM_LAYERS,
        ends=_BLOOM_ENDS,
        prefix="transformer.h.",
        is_partial=True,
        sizes_heads=False,
        finish=_falcon,
    ),
    "bloom": GgufArchitecture(
        "bloom",
        {
            "block_count": "n_layer",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        read=("context_length", "feed_forward_length", "attention.head_count_kv"),
        layers=_BLOOM_LAYERS,
        ends=_BLOOM_ENDS,
        prefix="transformer.h.",
        has_rope=False,
    ),
    "gpt2": GgufArchitecture(
        "gpt2",
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        layers=_GPT2_LAYERS,
        is_transposed=True,
        ends=_GPT2_ENDS,
        prefix="transformer.h.",
        has_rope=False,
    ),
    "mamba": GgufArchitecture(
        "mamba",
        {
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
            "ssm.inner_size": "intermediate_size",
        },
        read=("context_length", "feed_forward_length", "attention.head_count"),
        layers=_MAMBA_LAYERS,
        ends={"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
        prefix="backbone.layers.",
        has_rope=False,
    ),
    "lfm2": GgufArchitecture(
        "lfm2",
        {**_SIZES, "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        layers=_LFM2_LAYERS,
        ends={**_ENDS, "token_embd_norm": "model.embedding_norm"},
        finish=_lfm2,
    ),
}
"""By `general.architecture`."""
