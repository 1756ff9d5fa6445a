"""Attention in blocks: torch's causal attention where a token is scored, nothing where none is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tokenbound.models.attention import BLOCK_QUERIES, LONGEST, AttentionInBlocks, blocks
from tokenbound.models.replica import Replica

WIDE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS = {
    "llama": LlamaConfig(**WIDE, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}


def heads(batch, length, count, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, count, width, generator=generator).to(dtype).transpose(1, 2)


def up_to(used, length):
    return torch.arange(length) < torch.tensor(used)[:, None]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(1, 200))
def test_blocks_cover_what_is_used_once(used, length):
    used = [min(each, length) for each in used]
    times = np.zeros((len(used), length), int)
    for rows, queries in blocks(used, length):
        times[rows, queries] += 1
    rounded = [min(length, -(-each // BLOCK_QUERIES) * BLOCK_QUERIES) for each in used]
    np.testing.assert_array_equal(times, np.arange(length) < np.array(rounded)[:, None])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(1, 150), st.sampled_from([1, 2, 4]))
def test_used_queries_are_torch_s_and_the_others_zero(used, length, groups):
    used = [min(each, length) for each in used]
    query, key, value = (heads(len(used), length, count, seed=count) for count in (4, 4 // groups, 4 // groups))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=groups > 1)
    with AttentionInBlocks(up_to(used, length)):
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=groups > 1)
    for row, tokens in enumerate(used):
        torch.testing.assert_close(found[row, :, :tokens], expected[row, :, :tokens], atol=2e-6, rtol=0)
        assert not found[row, :, -(-tokens // BLOCK_QUERIES) * BLOCK_QUERIES :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_company(dtype):
    used, length = [512, 3, 0, 300, 64, 65], 512
    query, key, value = (heads(6, length, 4, dtype=dtype, seed=seed) for seed in range(3))
    with AttentionInBlocks(torch.ones(6, length, dtype=torch.bool)):
        everything = scaled_dot_product_attention(query, key, value, is_causal=True)
    with AttentionInBlocks(up_to(used, length)):
        some = scaled_dot_product_attention(query, key, value, is_causal=True)
    for row, tokens in enumerate(used):
        assert torch.equal(some[row, :, :tokens], everything[row, :, :tokens])
        with AttentionInBlocks(up_to([tokens], length)):
            alone = [each[row : row + 1] for each in (query, key, value)]
            assert torch.equal(scaled_dot_product_attention(*alone, is_causal=True)[0], some[row])


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"is_causal": False}, (2, 70)),
        ({"is_causal": False, "attn_mask": torch.ones(70, 70, dtype=torch.bool).triu()}, (2, 70)),
        ({}, (1, 70)),
        ({}, (2, 69)),
    ],
)
def test_other_attention_is_torch_s_own(change, shape):
    options = {"is_causal": True} | change
    parts = [heads(*shape, 4, seed=seed) for seed in range(3)]
    expected = scaled_dot_product_attention(*parts, **options)
    with AttentionInBlocks(up_to([1, 1], 70)):
        assert torch.equal(scaled_dot_product_attention(*parts, **options), expected)


def test_outside_nothing_is_changed():
    parts = [heads(2, 70, 4, seed=seed) for seed in range(3)]
    expected = scaled_dot_product_attention(*parts, is_causal=True)
    with AttentionInBlocks(up_to([1, 1], 70)):
        assert not torch.equal(scaled_dot_product_attention(*parts, is_causal=True), expected)
    assert torch.equal(scaled_dot_product_attention(*parts, is_causal=True), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_replica_attends_in_blocks_and_loses_nothing(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    length, used = 130, [130, 1, 64, 0, 100]
    ids = np.random.default_rng(0).integers(0, 61, (5, length))
    mask = up_to(used, length).numpy()
    with torch.inference_mode():
        log_p = model.double()(input_ids=torch.from_numpy(ids), use_cache=False).logits.log_softmax(-1).numpy()
    nll = -np.take_along_axis(log_p, ids[..., None], axis=2)[..., 0]
    scorer = Replica(model.float(), batch=5, length=length)
    found, everything = scorer.score(ids, ids, mask), scorer.score(ids, ids, np.ones_like(mask))
    np.testing.assert_allclose(found.nll[mask], nll[mask], atol=1e-5, rtol=0)
    assert found.nll[mask].tobytes() == everything.nll[mask].tobytes()
    assert found.entropy[mask].tobytes() == everything.entropy[mask].tobytes()


@pytest.mark.parametrize("known", [True, False])
def test_short_windows_cost_a_replica_less(known):
    model = AutoModelForCausalLM.from_config(MODELS["llama"]).eval()
    if not known:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    scorer = Replica(model, batch=4, length=256)
    assert (scorer.head is not None) == known
    ids, mask = np.ones((4, 256), int), up_to([256, 1, 0, 70], 256).numpy()
    with Attended() as attended:
        scorer.score(ids, ids, mask)
    assert sum(rows * queries for rows, queries in attended.shapes) == 2 * (256 + 64 + 128), "in two layers"


class Attended(TorchFunctionMode):
    """Keeps how many windows and queries torch's attention is called with."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.shapes.append((args[0].shape[0], args[0].shape[2]))
        return func(*args, **(kwargs or {}))


def test_long_windows_stay_with_torch_s_kernel():
    length, longer = LONGEST + 1, {"num_attention_heads": 4, "max_position_embeddings": LONGEST + 1}
    ids = np.ones((1, length), int)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE, **longer)).eval()
    scorer = Replica(model, batch=1, length=length)
    with Attended() as attended:
        scorer.score(ids, ids, ids > 0)
    assert attended.shapes == [(1, length)] * 2, "blocks do not pay here"
    assert LONGEST == 512
