"""A tiny random model of every architecture that transformers registers as a causal language model, and its outcome.

As a program, it tries all of them, or those named, and writes what became of each into `models/architectures.md`:

    PYTHONPATH=. python tests/architectures_support.py [MODEL_TYPE...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenbound.compression.artifact import encode_artifact
from tokenbound.config.compress import LosslessSettings
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import clean_architecture, read_checkpoint
from tokenbound.models.hf_model import blank_model
from tokenbound.models.probe import probe_causality
from tokenbound.models.replica import Replica
from tokenbound.store.strict_json import shortened

BATCH, LENGTH, VOCABULARY = 3, 24, 97
TOLERANCE = 2e-5
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "embedding_dim", "embedding_size", "attention_hidden_size")
_INNER = (
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "feed_forward_size", "decoder_ffn_dim",
    "encoder_ffn_dim", "dim_ff", "dff", "d_inner", "intermediate_size_mlp", "dense_intermediate_size", "mlp_dim",
    "shared_intermediate_size", "linear_d_ff",
)  # fmt: skip
_EXPERT = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
    "index_n_heads", "mamba_n_heads", "mamba_num_heads",
)  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length")
_ROOMS = (
    "head_dim", "dim_head", "d_head", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim",
    "index_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "q_lora_rank",
    "o_lora_rank", "kv_lora_rank", "hc_lowrank", "ple_embed_dim", "hidden_size_per_layer_input", "laurel_rank",
    "mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "router_hidden_size", "adapter_rank",
)  # fmt: skip
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_EXPERT, 24),
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_POSITIONS, 64),
    **dict.fromkeys(_ROOMS, 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "qk_rope_head_dim": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "rotary_dim": 4,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "zero_expert_num": 2,
    "is_decoder": True,
    "moe_num_experts": 4,
    "depth": 2,
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        (
            "shape_embed_dim",
            "pronunciation_embed_dim",
            "ext_pw_out_channel",
            "depthwise_separable_out_channel",
            "nemo_conv_channels",
            "output_channels",
            "hidden_size_global",
            "mamba_d_ssm",
            "adapter_out_dim",
            "adapter_input_size",
        ),
        32,
    ),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""What is set of a config that knows the key."""
LATENT = {"num_key_value_heads": 4, "head_dim": 4}
"""Beside `kv_lora_rank`: keys and values are made for every query head, and only a part of a head is rotated."""
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 2, "topk_group": 1},
    "bamba": MAMBA2,
    "blt": {"encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "num_hidden_layers": 4,
        "per_layer_config": {},
        "mlp_layer_types": ["dense"] * 4,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        }
    },
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ple_embed_dim": None,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 1,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": None,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beside."""


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A small config that still has every part of the architecture."""
    config_class = CONFIG_MAPPING[model_type]
    overrides = OVERRIDES.get(model_type, {}) | changes
    try:
        known = config_class().to_dict()
    except ValueError:  # of one whose defaults do not fit each other
        known = config_class(**overrides).to_dict()
    return config_class(**(_small(known) | overrides))


def _small(known: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: {"model_type": value["model_type"]} | _small(value) | OVERRIDES.get(value["model_type"], {})
        for key, value in known.items()
        if isinstance(value, dict) and value.get("model_type")
    }
    sizes = SIZES | (LATENT if "kv_lora_rank" in known else {})
    return nested | {key: value for key, value in sizes.items() if key in known}


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    model_type: str
    result: str
    """`right`, or the line with which it is refused."""
    is_refused: bool
    has_head: bool
    error_nats: float = 0.0

    @property
    def row(self) -> str:
        """Its row of the table."""
        head = "" if self.is_refused else "recognised" if self.has_head else "the model's own logits"
        return f"| {self.model_type} | {shortened(self.result, 140).replace('|', '/')} | {head} |"


def outcome(model_type: str) -> Outcome:
    """Save a tiny random model, encode it, score windows with the artifact, and compare with the unpadded model."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    try:
        blank_model(clean_architecture(config.to_dict()))
        with tempfile.TemporaryDirectory() as folder:
            model = _saved(config, Path(folder))
            checkpoint = read_checkpoint(folder)
            data = encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings())
        replica = Replica.from_artifact(data, dtype=torch.float32, batch=BATCH, length=LENGTH)
        probe_causality(replica)
        error = _largest_error(replica, model)
    except InputError as refusal:
        return Outcome(model_type, str(refusal), is_refused=True, has_head=False)
    return Outcome(model_type, "right", is_refused=False, has_head=replica.head is not None, error_nats=error)


def _saved(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """A random model on disk; where a text model is registered for a config of text and images, beside that config."""
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    if type(model.config) is not type(config):
        config.save_pretrained(folder)
    return model


def _largest_error(replica: Replica, model: PreTrainedModel) -> float:
    """Nats between a loss of the replica and that of the model on the window alone, by a float64 softmax."""
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(3, VOCABULARY, (2, BATCH, LENGTH))
    lengths = np.array([LENGTH, LENGTH // 2, 3])[:BATCH]
    mask = np.arange(LENGTH) < lengths[:, None]
    found = replica.score(inputs, targets, mask).nll
    errors = []
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(inputs[row : row + 1, :length]), use_cache=False).logits[0]
        wanted = torch.from_numpy(targets[row, :length])
        losses = torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="none")
        errors.append(np.abs(found[row, :length] - losses.numpy()).max())
    return float(np.max(errors))


# --- The table -----------------------------------------------------------------------------------------------------

TABLE = Path(__file__).parent / "models" / "architectures.md"
_HEADING = f"""# Architectures

Written by `PYTHONPATH=. python tests/architectures_support.py` with transformers {transformers.__version__}, on a CPU.
Each is a tiny random model, saved, encoded and scored. `right`: every loss is within {TOLERANCE:g} nats of a float64
softmax of the model that sees its window alone. What else stands there is the line with which it is refused.

| architecture | outcome | head |
|:--|:--|:--|
"""


def table_rows() -> dict[str, str]:
    """The rows of the table as it is, by architecture."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| architecture ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def write_table(rows: Mapping[str, str]) -> None:
    """Write the rows in the order of their names."""
    TABLE.write_text(_HEADING + "".join(f"{rows[name]}\n" for name in sorted(rows)), encoding="utf-8")


def main() -> None:
    """Try architectures and write their rows."""
    rows = table_rows()
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = outcome(name)
        assert found.is_refused or found.error_nats < TOLERANCE, f"{name}: wrong by {found.error_nats:.1e} nats"
        rows[name] = found.row
    write_table({name: row for name, row in rows.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


if __name__ == "__main__":
    main()
