"""Keys of a `quantization_config`: each is read, checked against the tensors, known to change no weight, or refused.

The packages that quantize write how they calibrated beside what the codes mean. Where codes become dense weights here,
a key that was skipped could mean other weights; where transformers runs the layers, a key that it skips could mean
another forward pass. So a key that is set and stands on no list stops the run. Light: this does not pull in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenbound.errors import InputError

_COMMON = frozenset({"quant_method", "modules_to_not_convert"})
"""Which layers are quantized is seen from the tensors themselves."""

_CALIBRATION = frozenset(
    {
        *("tokenizer", "dataset", "model_seqlen", "seqlen", "batch_size", "pad_token_id", "nsamples", "iters", "lr"),
        *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse"),
        *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
        *("cache_block_outputs", "minmax_lr", "enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage"),
        *("meta", "model_name_or_path", "model_file_base_name", "autoround_version", "lm_head"),
    }
)
"""How codes were found, and by what; the codes are there."""

_KERNELS = frozenset(
    {"backend", "use_exllama", "exllama_config", "disable_exllama", "use_cuda_fp16", "max_input_length"}
)
"""Which kernel multiplies; the weights are the same."""

KNOWN: dict[str, frozenset[str]] = {
    "gptq": _COMMON
    | _CALIBRATION
    | _KERNELS
    | {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "dynamic", "data_type"},
    "awq": _COMMON
    | _CALIBRATION
    | _KERNELS
    | {"bits", "group_size", "zero_point", "version", "format", "checkpoint_format", "desc_act", "sym"}
    | {"do_fuse", "modules_to_fuse", "fuse_max_seq_len"},  # fused layers have the same weights
    "bitsandbytes": _COMMON
    | {"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"}
    | {"bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"}
    | {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}  # each layer's own state says so again
    | {"llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"},
    "hqq": _COMMON | {"quant_config", "skip_modules", "dynamic_config", "nbits", "group_size", "axis", "view_as_float"},
    "quip#": _COMMON,
    "gguf": _COMMON,
    "compressed-tensors": _COMMON
    | {"config_groups", "format", "quantization_status", "global_compression_ratio", "ignore", "version"}
    | {"run_compressed", "dequantize", "use_optimized_inference", "sparsity_config"},
    "torchao": _COMMON | {"quant_type", "include_input_output_embeddings", "untie_embedding_weights"},
}
"""By method: every key that may be set."""

_WANTED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("gptq", "pack_dtype"): ("int32",),
    ("gptq", "data_type"): ("int",),
    ("awq", "backend"): ("auto", "legacy_awq", "autoawq", "gemm", "exllama_v1", "exllama_v2", "marlin", "torch"),
    ("awq", "checkpoint_format"): ("gemm",),
    ("bitsandbytes", "bnb_4bit_quant_type"): ("nf4", "fp4"),
}
"""The only values of some keys that mean what is decoded here."""

CURE = "if it changes no weight, remove it from config.json; else give a dequantized copy of the model"


def require_known_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Refuse a quantization config with a key, or a value, that is not understood.

    Raises:
        InputError: the message names the key, its value and the cure.

    >>> require_known_settings("gptq", {"quant_method": "gptq", "bits": 4, "rotation": ""})
    >>> require_known_settings("gptq", {"bits": 4, "rotation": "hadamard"})
    Traceback (most recent call last):
    tokenbound.errors.InputError: quantization_config: rotation = 'hadamard' is not understood for gptq; if it ...
    """
    for key in sorted(settings):
        value = settings[key]
        if is_empty(value):
            continue
        wanted = _WANTED.get((method, key))
        if key not in KNOWN[method] or (wanted is not None and str(value).lower() not in wanted):
            raise refusal(method, key, value)
    sparsity = settings.get("sparsity_config")
    if not is_empty(sparsity) and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise refusal(method, "sparsity_config", sparsity)
    if method == "gptq":
        _require_one_layout(settings)


def is_empty(value: object) -> bool:
    """Whether a key is as good as absent."""
    return value is None or value is False or (isinstance(value, str | Mapping | Sequence) and not value)


def refusal(method: str, key: str, value: object) -> InputError:
    """The error for a key that is not understood."""
    text = " ".join(repr(value).split())[:120]
    return InputError(f"quantization_config: {key} = {text} is not understood for {method}; {CURE}")


def _require_one_layout(settings: Mapping[str, Any]) -> None:
    """Per-layer settings of GPTQModel may give other bits and groups, which the tensors show, but no other meaning."""
    dynamic = settings.get("dynamic")
    for pattern, changes in dict(dynamic or {}).items():
        more = set(changes or ()) - {"bits", "group_size", "desc_act", "sym", *_CALIBRATION}
        if more or (changes and "sym" in changes and changes["sym"] != settings.get("sym", True)):
            raise refusal("gptq", "dynamic", {pattern: changes})
