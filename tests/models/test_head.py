"""The chunked head against a float64 full softmax."""

from __future__ import annotations

import math

import pytest
import torch
from architectures_support import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
)

from tokenbound.errors import InputError
from tokenbound.models.chunks import chunk_shape, chunked_statistics, logits_statistics, require_compiler
from tokenbound.models.forward import last_hidden_state, own_logits
from tokenbound.models.head import Head, body_and_projection, find_head, token_statistics

CPU = torch.device("cpu")


def full_softmax(logits, targets):
    """Float64 oracle: nll, entropy, rank of each row."""
    logits = logits.double()
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    rank = (logits >= logits.gather(1, targets[:, None])).sum(-1) - 1
    return nll, entropy, rank


def agree(statistics, logits, targets, tolerance=1e-5):
    nll, entropy, rank = full_softmax(logits, targets)
    torch.testing.assert_close(statistics.nll.double(), nll, atol=tolerance, rtol=0)
    torch.testing.assert_close(statistics.entropy.double(), entropy, atol=tolerance, rtol=0)
    assert torch.equal(statistics.rank, rank.int())


def problem(tokens=300, width=24, vocab=701, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 0.7
    bias = torch.randn(vocab, generator=generator)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 128, 10_000])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.125), (5.0, 3.0)])
def test_matches_a_full_softmax_for_every_chunk_size(chunk_tokens, softcap, scale):
    hidden, weight, bias, targets = problem()
    statistics = token_statistics(
        hidden, weight, bias, targets, softcap=softcap, scale=scale, chunk_tokens=chunk_tokens
    )
    logits = scale * (hidden.double() @ weight.double().t() + bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll, entropy, _ = full_softmax(logits, targets)
    torch.testing.assert_close(statistics.nll.double(), nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.entropy.double(), entropy, atol=1e-5, rtol=0)
    agree(statistics, Head(weight, bias, softcap, scale).logits(hidden), targets)


def test_large_vocabulary_stays_within_tolerance():
    hidden, weight, _, targets = problem(tokens=40, width=64, vocab=50_257)
    weight *= 0.5
    nll, entropy, _ = full_softmax(hidden.double() @ weight.double().t(), targets)
    statistics = token_statistics(hidden, weight, None, targets)
    torch.testing.assert_close(statistics.nll.double(), nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.entropy.double(), entropy, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 40),
    tokens=st.integers(1, 12),
    size=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_scale_of_logits(vocab, tokens, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator) * size
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    statistics = logits_statistics(logits, targets, chunk_tokens=5)
    agree(statistics, logits, targets, tolerance=1e-5 * max(1.0, size))
    assert (statistics.nll >= 0).all()
    assert (statistics.entropy >= 0).all()
    assert (statistics.entropy <= math.log(vocab) + 1e-5).all()


def test_ties_count_against_the_target():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]] * 3)
    assert logits_statistics(logits, torch.tensor([1, 0, 4])).rank.tolist() == [2, 3, 4]


def test_rank_uses_the_logits_before_any_rounding():
    # 1 and 1 + 1e-7 differ in float32, but not after 1e4 is subtracted from both.
    logits = torch.tensor([[1e4, 1.0, 1.0 + 2**-23]])
    assert logits_statistics(logits, torch.tensor([2])).rank.tolist() == [1]


def test_masked_vocabulary_rows_give_no_nan():
    hidden, weight, bias, targets = problem(tokens=50)
    bias[600:] = -torch.inf
    targets %= 600
    statistics = token_statistics(hidden, weight, bias, targets, chunk_tokens=16)
    agree(statistics, hidden @ weight.t() + bias, targets, tolerance=2e-5)


def test_masked_rows_change_no_other_value():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(1)) * 4
    targets = torch.arange(64)
    plain = logits_statistics(logits, targets)
    masked = logits.clone()
    masked[5, 99] = -torch.inf
    with_mask = logits_statistics(masked, targets)
    others = torch.arange(64) != 5
    for name in ("nll", "entropy", "rank"):
        assert torch.equal(getattr(plain, name)[others], getattr(with_mask, name)[others])
    assert with_mask.entropy[5].isfinite()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_broken_logits_are_shown_not_hidden(compile):
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = torch.nan  # not the target
    logits[1, 2] = torch.nan  # the target
    logits[2, 4] = torch.inf
    logits[3] = -torch.inf
    logits[4, 2] = -torch.inf  # the target: an infinite loss, all else sound
    statistics = logits_statistics(logits, torch.full((7,), 2), compile=compile)
    assert statistics.nll[:4].isnan().all()
    assert statistics.nll[4] == torch.inf
    assert statistics.entropy[4].isfinite()
    assert statistics.rank[:5].tolist() == [9] * 5
    agree(
        type(statistics)(statistics.nll[5:], statistics.entropy[5:], statistics.rank[5:]),
        logits[5:],
        torch.full((2,), 2),
    )


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_scored_tokens_are_computed_and_nothing_else_moves(compile):
    hidden, weight, bias, targets = problem(tokens=70)
    scored = torch.rand(70, generator=torch.Generator().manual_seed(1)) < 0.4
    options = {"chunk_tokens": 10, "compile": compile}
    every = token_statistics(hidden, weight, bias, targets, **options)
    some = token_statistics(hidden, weight, bias, targets, scored=scored, **options)
    for name in ("nll", "entropy", "rank"):
        assert torch.equal(getattr(every, name)[scored], getattr(some, name)[scored])
    assert some.nll[~scored].isnan().all()
    assert some.entropy[~scored].isnan().all()
    assert (some.rank[~scored] == -1).all()


@pytest.mark.parametrize("count", [0, 1, 10, 11, 70])
def test_every_product_has_the_height_of_a_chunk(count):
    heights = []

    def fill(rows, out):
        heights.append(len(out))
        return out.normal_()

    scored = torch.arange(70) < count
    found = chunked_statistics(fill, torch.zeros(70, dtype=torch.int64), 30, chunk_tokens=10, scored=scored)
    assert heights == [10] * -(-count // 10)
    assert torch.equal(found.nll.isfinite(), scored)


def test_a_head_knows_whether_a_tokens_place_moves_its_bits():
    _, weight, bias, _ = problem(tokens=1)
    assert not Head(weight, bias).place_matters(16)

    class Leaning(Head):
        def logits(self, hidden, out=None):
            found = super().logits(hidden, out)
            found[3].mul_(1 + 1e-6)
            return found

    assert Leaning(weight, bias).place_matters(16)


def test_never_more_logits_than_one_chunk():
    largest = 0

    def fill(rows, out):
        nonlocal largest
        largest = max(largest, out.untyped_storage().nbytes())
        return out.zero_()

    chunked_statistics(fill, torch.zeros(20_000, dtype=torch.int64), 600)
    chunk, rows = chunk_shape(600, CPU)
    assert largest == 4 * 600 * chunk
    assert chunk % rows == 0


@pytest.mark.parametrize("vocab", [2, 257, 512, 32_000, 50_257, 128_256, 262_144])
def test_chunks_fit_cache_and_memory(vocab):
    chunk, rows = chunk_shape(vocab, CPU)
    assert 4 * vocab * rows <= max(2**21, 4 * vocab * 2)
    assert 256 <= chunk <= 1024
    device_chunk, _ = chunk_shape(vocab, torch.device("cuda"))
    assert 4 * vocab * device_chunk <= 2**28


def test_half_precision_weights_give_float32_logits():
    hidden, weight, _, targets = problem(tokens=20)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    agree(token_statistics(hidden, weight, None, targets), hidden.float() @ weight.float().t(), targets)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="compile: no C"):
        token_statistics(*problem(tokens=2), compile=True)


@pytest.mark.slow
def test_compiled_chunks_match_a_full_softmax():
    try:
        require_compiler(CPU)
    except InputError:
        pytest.skip("no C++ compiler")
    hidden, weight, bias, targets = problem(tokens=150, vocab=50_257)
    bias[50_000:] = -torch.inf
    targets %= 50_000
    statistics = token_statistics(hidden, weight, bias, targets, compile=True)
    agree(statistics, Head(weight, bias).logits(hidden), targets)


# --- Recognising heads ---------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, final_logit_softcapping=3.0),
    "gptj with a bias": GPTJConfig(
        vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=1
    ),
    "granite": GraniteConfig(**SMALL, **HEADS, logits_scaling=7.0),
    "cohere": CohereConfig(**SMALL, **HEADS, **IDS, logit_scale=0.0625),
    "falcon_h1": FalconH1Config(
        **SMALL, **HEADS, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, lm_head_multiplier=0.04
    ),
    "a body that the class misnames": tiny_config("llama4_text"),
    "a scale before the matrix": tiny_config("minicpm3", dim_model_base=8),
    "a layer before the matrix": tiny_config("modernbert-decoder"),
    "a soft-cap under another name": tiny_config("xlstm", output_logit_soft_cap=3.0),
    "rows that are cut off": tiny_config("inkling_text", vocab_size=110, unpadded_vocab_size=97),
}


def tiny(config, seed=0, gain=20.0):
    """A random model with logits of a trained model's size."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(gain)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_known_heads_reproduce_the_models_own_logits(name):
    model = tiny(CONFIGS[name])
    head = find_head(model)
    assert head is not None
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    body, _ = body_and_projection(model)
    hidden = last_hidden_state(body, ids).flatten(0, 1)
    targets = ids.roll(-1, 1).flatten()
    oracle = own_logits(model, ids).flatten(0, 1)
    assert head.vocab_size == 97
    statistics = head.statistics(hidden, targets)
    nll, entropy, _ = full_softmax(oracle, targets)
    torch.testing.assert_close(statistics.nll.double(), nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.entropy.double(), entropy, atol=1e-5, rtol=0)


def test_soft_cap_and_scale_are_found():
    assert find_head(tiny(CONFIGS["gemma2"])).softcap == 3.0
    assert find_head(tiny(CONFIGS["granite"])).scale == pytest.approx(1 / 7)
    assert find_head(tiny(CONFIGS["gptj with a bias"])).bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_that_the_config_hides_is_not_missed(dtype):
    # Logits of a fresh model are far below the cap: only amplified hidden states show it.
    model = tiny(CONFIGS["gemma2"], gain=1.0).to(dtype)
    own = model.forward
    model.config.final_logit_softcapping = None

    def capped(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output

    assert find_head(model) is not None
    model.forward = capped
    assert find_head(model) is None


def test_unknown_heads_are_not_guessed():
    model = tiny(CONFIGS["llama"])
    model.lm_head = nn.Sequential(model.lm_head, nn.ReLU())
    assert find_head(model) is None


def test_a_transform_before_the_projection_is_noticed():
    model = tiny(CONFIGS["llama"])
    body = model.model.forward

    own = model.forward

    def doubled(output):
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    def forward(*args, **kwargs):
        model.model.forward = lambda **inner: doubled(body(**inner))
        try:
            return own(*args, **kwargs)
        finally:
            model.model.forward = body

    model.forward = forward
    assert find_head(model) is None
