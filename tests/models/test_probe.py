"""The causality probe and the canary: what they refuse and what they let through."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tokenbound.errors import InputError
from tokenbound.models.probe import canary, probe_causality, probe_ids
from tokenbound.models.replica import Replica

SMALL = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "gpt2": GPT2Config(vocab_size=83, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, sliding_window=8),
}


class ToyConfig(PretrainedConfig):
    """One attention layer with a flaw of choice."""

    model_type = "toy-for-the-probe"

    def __init__(self, vocab_size=83, hidden_size=32, flaw="none", **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.flaw = vocab_size, hidden_size, flaw


class ToyBody(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        query, key, value = self.mix(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=self.config.flaw != "bidirectional")
        return BaseModelOutput(last_hidden_state=self._flawed(x, input_ids))

    def _flawed(self, x, input_ids):
        flaw = self.config.flaw
        if flaw == "activation scale of the tensor":
            scale = x.abs().max() / 127
            return (x / scale).round() * scale
        if flaw == "activation scale of the row":
            scale = x.abs().amax(-1, keepdim=True) / 127
            return (x / scale).round() * scale
        if flaw == "whisper of the last token":  # far below any loss tolerance
            return x + 1e-6 * x[:, -1:]
        if flaw == "whisper of the next row":
            return x + 1e-6 * x.roll(1, 0)
        if flaw == "padding":
            return x + (input_ids[:, -2:] == 0).all(1)[:, None, None]
        if flaw == "noise":
            return x + 1e-6 * torch.randn_like(x)
        return x


class Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def toy(flaw="none", batch=4, length=16):
    torch.manual_seed(0)
    model = Toy(ToyConfig(flaw=flaw)).eval()
    nn.init.normal_(model.lm_head.weight)
    nn.init.normal_(model.model.embed.weight)
    return Replica(model, batch=batch, length=length)


def real(name, batch=4, length=48, dtype=torch.float32):
    torch.manual_seed(0)
    return Replica(AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype), batch=batch, length=length)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(4, 48), (1, 16), (3, 1), (2, 2), (1, 1)])
def test_causal_models_pass(name, shape):
    batch, length = shape
    probe_causality(real(name, batch, length))


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_pass_in_bfloat16(name):
    probe_causality(real(name, dtype=torch.bfloat16))


@pytest.mark.parametrize("flaw", ["none", "activation scale of the row"])
def test_a_sound_toy_passes(flaw):
    replica = toy(flaw)
    assert replica.head is not None
    probe_causality(replica)
    probe_causality(toy(flaw, batch=1))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("bidirectional", "depends on later tokens"),
        ("whisper of the last token", "depends on later tokens"),
        ("activation scale of the tensor", "depends on the other windows of its batch"),
        ("whisper of the next row", "depends on the other windows of its batch"),
        ("padding", "depends on the padding behind its window"),
        ("noise", "changes when the same batch is scored again"),
    ],
)
def test_flawed_models_are_refused(flaw, message):
    replica = toy("none")
    replica.model.config.flaw = replica.model.model.config.flaw = flaw
    with pytest.raises(InputError, match=f"not causal.*{message}"):
        probe_causality(replica)


def test_one_window_per_batch_does_not_hide_a_flaw():
    for flaw in ("bidirectional", "activation scale of the tensor"):
        with pytest.raises(InputError, match="depends on later tokens"):
            probe_causality(toy(flaw, batch=1))


def test_flaws_show_without_a_known_head():
    replica = toy("bidirectional")
    replica.head = None
    with pytest.raises(InputError, match="later tokens"):
        probe_causality(replica)
    replica = toy("none")
    replica.head = None
    probe_causality(replica)


def test_real_windows_may_be_fewer_than_the_batch():
    replica = toy()
    probe_causality(replica, np.full((2, 16), 5))


def test_any_batch_shows_a_scale_across_the_tensor():
    """Whatever the windows hold, also the token that sets the scale, and where the vocabulary is small."""
    replica = toy("none")
    replica.model.model.config.flaw = "activation scale of the tensor"
    for seed in range(20):
        with pytest.raises(InputError, match="depends on"):
            probe_causality(replica, probe_ids(replica, seed=seed))


def test_bidirectional_llama_is_refused():
    replica = real("llama")
    own = replica.model.model.forward

    def both_directions(**kwargs):
        flags = [layer.self_attn for layer in replica.model.model.layers]
        for module in flags:
            module.is_causal = False
        batch, length = kwargs["input_ids"].shape
        return own(**kwargs, attention_mask=torch.zeros(batch, 1, length, length))

    replica.model.model.forward = both_directions
    with pytest.raises(InputError, match="depends on later tokens"):
        probe_causality(replica)


def test_canary_returns_the_mean_loss():
    replica = real("llama")
    assert canary(replica) == pytest.approx(math.log(83), abs=0.2)
    assert canary(replica) == canary(replica)
    inputs = np.full((1, 48), 3)
    mask = np.zeros((1, 48), dtype=bool)
    mask[0, :5] = True
    assert 0 < canary(replica, inputs, mask=mask) < 10


def test_canary_names_a_nan_weight():
    replica = real("gpt2")
    with torch.no_grad():
        replica.model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite: weight transformer\.h\.1\.mlp\.c_fc\.weight holds NaN"):
        canary(replica)


def test_a_model_loaded_with_nan_weights_reaches_the_canary():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match=r"lm_head\.weight holds NaN"):
        canary(Replica(model, batch=2, length=8))


def test_canary_reports_overflow_with_sound_weights():
    replica = toy()
    with torch.no_grad():
        replica.model.lm_head.weight.mul_(1e30)
        replica.model.model.embed.weight.mul_(1e30)
    with pytest.raises(InputError, match=r"arithmetic overflows; set model\.dtype"):
        canary(replica)


def test_canary_refuses_an_absurd_loss():
    replica = toy()
    with torch.no_grad():
        replica.model.lm_head.weight.mul_(1e4)
    with pytest.raises(InputError, match=r"nats per token, beyond 44\.2.*do not belong together"):
        canary(replica)
    assert canary(replica, max_nats=math.inf) > 44.2


def test_probe_ids_are_the_same_everywhere():
    replica = toy(batch=2, length=3)
    assert probe_ids(replica).tolist() == probe_ids(replica).tolist()
    assert probe_ids(replica).tolist() != probe_ids(replica, seed=1).tolist()
    assert probe_ids(replica).max() < 83
