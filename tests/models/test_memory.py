"""Memory predicted without storage is what a real forward pass allocates."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from tokenbound.config.family import FAMILY
from tokenbound.errors import InputError
from tokenbound.models.forward import last_hidden_state
from tokenbound.models.fusion import fuse_activations
from tokenbound.models.hf_model import blank_model
from tokenbound.models.memory import LiveBytes, random_model, replica_memory

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500, "n_positions": 64}
LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(dtype: torch.dtype) -> None:
    predicted = replica_memory(GPT2, dtype=dtype, batch=4, length=64, device="cpu")
    model = random_model(GPT2, dtype)
    fuse_activations(model)
    assert predicted.parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode(), LiveBytes() as live:
        last_hidden_state(model.base_model, torch.zeros(4, 64, dtype=torch.int64))
    # Without storage transformers makes the causal mask, which it skips where it can look at the ids.
    assert 0 < live.peak <= predicted.activations_bytes <= live.peak + 4 * 64 * 64
    larger = replica_memory(GPT2, dtype=dtype, batch=8, length=64, device="cpu")
    assert larger.activations_bytes == pytest.approx(2 * live.peak, rel=0.05)
    assert larger.weights_bytes == predicted.weights_bytes


def test_the_counter_forgets_what_is_gone() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[:10]
        del first
        assert live.now == 4000
        del view
        assert live.now == 0
        torch.zeros(10)
    assert live.peak == 4000


def test_a_model_of_70_billion_weights_is_planned_without_allocating_it() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = replica_memory(LLAMA_70B, dtype=torch.bfloat16, batch=4, length=2048, device="cuda")
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert found.weights_bytes == pytest.approx(2 * found.parameters, rel=1e-3)
    # Three products of the widest layer and the residual stream, 8,192 tokens of two bytes each.
    assert found.activations_bytes == pytest.approx(8192 * 2 * (3 * 28672 + 4 * 8192), rel=0.1)
    assert grown_bytes < 2**30


def test_a_model_that_makes_its_own_logits_pays_for_them() -> None:
    def with_unknown_head(architecture: Any, dtype: torch.dtype) -> Any:
        model = random_model(architecture, dtype)
        model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
        return model

    usual = replica_memory(GPT2, dtype=torch.float32, batch=4, length=64, device="cpu")
    own = replica_memory(GPT2, dtype=torch.float32, batch=4, length=64, device="cpu", make=with_unknown_head)
    assert own.total_bytes > usual.total_bytes


def test_an_architecture_that_is_none_is_refused() -> None:
    tree: dict[str, Any] = {**GPT2, "model_type": "no-such-type"}
    with pytest.raises(InputError, match="no-such-type"):
        replica_memory(tree, dtype=torch.float32, batch=1, length=8, device="cpu")
    assert blank_model(GPT2).device.type == "meta"


def test_a_family_has_the_memory_of_its_decoded_form() -> None:
    shape = {"dtype": torch.float32, "batch": 2, "length": 32, "device": "cpu"}
    dense = replica_memory(GPT2, **shape)
    lora = replica_memory({**GPT2, FAMILY: {"kind": "lora"}}, **shape)
    monarch = replica_memory({**GPT2, FAMILY: {"kind": "monarch", "blocks": 4}}, **shape)
    assert lora == dense
    saved = sum(rows * columns - min(rows, columns) * (rows + columns) // 4 for rows, columns in 2 * SIDES)
    assert dense.parameters - monarch.parameters == saved
    assert dense.weights_bytes - monarch.weights_bytes == 4 * saved


SIDES = [(192, 64), (64, 64), (256, 64), (64, 256)]
"""Linear layers of a block of `GPT2`."""
