"""Parts of a model that are exchanged for torch's one-pass forms, and those that are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tokenbound.models.fusion import fuse_activations, fuse_norms

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def filled(model):
    """The same model with weights that no symmetry hides."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "exchanged"), [("llama", 5), ("qwen3", 9), ("olmo2", 9), ("gemma2", 0)])
def test_norms_that_are_the_same_are_exchanged(name, exchanged, dtype):
    model = filled(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES))).to(dtype)
    fused, ids = copy.deepcopy(model), torch.arange(20)[None]
    assert fuse_norms(fused) == exchanged
    assert fused.state_dict().keys() == model.state_dict().keys()
    with torch.inference_mode():
        expected, found = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, fused))
    assert (found - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_the_tanh_form_of_gelu_is_exchanged(name):
    model = nn.Sequential(nn.Linear(4, 4), ACT2FN[name])
    fused = copy.deepcopy(model)
    assert fuse_activations(fused) == 1
    rows = torch.linspace(-6, 6, 400).view(-1, 4)
    torch.testing.assert_close(fused(rows), model(rows), atol=2e-6, rtol=0)


class GatedRMSNorm(LlamaRMSNorm):
    """Called with a second argument."""

    def forward(self, states, gate=None):
        return super().forward(states) if gate is None else super().forward(states * gate)


def hooked():
    norm = LlamaRMSNorm(8)
    norm._hf_hook = object()
    return norm


@pytest.mark.parametrize(
    "norm",
    [
        Gemma2RMSNorm(8),
        GatedRMSNorm(8),
        nn.RMSNorm(8),
        hooked(),
        nn.LayerNorm(8),
        ACT2FN["gelu"],
        ACT2FN["silu"],
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_other_parts_stay(norm):
    model = nn.Sequential(norm)
    assert fuse_activations(model) == fuse_norms(model) == 0
    assert model[0] is norm


def test_norms_of_a_model_of_two_dtypes_stay():
    model = nn.Sequential(LlamaRMSNorm(8), nn.Linear(8, 8).bfloat16())
    assert fuse_norms(model) == 0


def test_a_norm_with_broken_weights_is_exchanged_all_the_same():
    norm = LlamaRMSNorm(8)
    with torch.no_grad():
        norm.weight[3] = torch.nan
    assert fuse_norms(nn.Sequential(norm)) == 1
