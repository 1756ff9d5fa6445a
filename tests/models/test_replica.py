"""Replicas: windows in, per-token statistics out, equal to a float64 softmax of the whole model."""

from __future__ import annotations

import copy
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Phi3Config

from tokenbound.errors import InputError, ReplicaOutOfMemory
from tokenbound.models.forward import is_out_of_memory
from tokenbound.models.head import Head
from tokenbound.models.probe import probe_causality
from tokenbound.models.replica import Replica, unscorable

SMALL = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=83, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1),
    "gemma2": Gemma2Config(
        **SMALL, **HEADS, head_dim=8, final_logit_softcapping=4.0, sliding_window=8, max_position_embeddings=64
    ),
}
BATCH, LENGTH = 4, 24


def make_model(name="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15.0)
    return model


def make_replica(name="llama", **options):
    return Replica(make_model(name), **({"batch": BATCH, "length": LENGTH} | options))


def windows(rows=BATCH, seed=0, vocab=83):
    """Random windows of different lengths; the first predictions of one are context only, as with a stride."""
    generator = np.random.default_rng(seed)
    inputs = generator.integers(0, vocab, (rows, LENGTH))
    targets = generator.integers(0, vocab, (rows, LENGTH))
    lengths = generator.integers(1, LENGTH + 1, rows)
    lengths[0] = LENGTH
    mask = np.arange(LENGTH) < lengths[:, None]
    mask[0, :5] = False
    return inputs, targets, mask


def oracle(model, inputs, targets):
    with torch.inference_mode():
        model = copy.deepcopy(model).double()
        log_p = model(input_ids=torch.from_numpy(inputs), use_cache=False).logits.double().log_softmax(-1)
    nll = -log_p.gather(2, torch.from_numpy(targets)[..., None])[..., 0]
    return nll.numpy(), -(log_p.exp() * log_p).sum(-1).numpy()


def same(left, right):
    return all(getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in ("nll", "entropy", "rank"))


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_a_float64_softmax(name):
    replica = make_replica(name)
    assert replica.head is not None
    assert replica.vocab_size == 83
    inputs, targets, mask = windows()
    statistics = replica.score(inputs, targets, mask)
    nll, entropy = oracle(replica.model, inputs, targets)
    np.testing.assert_allclose(statistics.nll[mask], nll[mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(statistics.entropy[mask], entropy[mask], atol=1e-5, rtol=0)
    assert statistics.nll.dtype == statistics.entropy.dtype == np.float32
    assert statistics.rank.dtype == np.int32
    assert (statistics.rank[mask] >= 0).all()
    assert (statistics.rank[mask] < 83).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fused_parts_change_no_loss(name):
    model, untouched = make_model(name), make_model(name)
    replica = Replica(model, batch=BATCH, length=LENGTH)
    kinds = [type(module) for module in replica.model.modules()]
    assert (nn.GELU if name == "gpt2" else nn.RMSNorm) in kinds
    inputs, targets, mask = windows()
    statistics = replica.score(inputs, targets, mask)
    nll, entropy = oracle(untouched, inputs, targets)
    np.testing.assert_allclose(statistics.nll[mask], nll[mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(statistics.entropy[mask], entropy[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_to_the_right_changes_nothing(name):
    replica = make_replica(name)
    inputs, targets, mask = windows()
    padded = np.where(np.arange(LENGTH) <= mask.shape[1] - 1 - mask[:, ::-1].argmax(1)[:, None], inputs, 7)
    assert not np.array_equal(padded, inputs), "some window must be short"
    assert same(replica.score(inputs, targets, mask), replica.score(padded, targets, mask))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_partial_batch_scores_as_in_a_full_one(name):
    replica = make_replica(name)
    inputs, targets, mask = windows()
    whole = replica.score(inputs, targets, mask)
    part = replica.score(inputs[:1], targets[:1], mask[:1])
    assert part.nll.shape == (1, LENGTH)
    assert part.nll.tobytes() == whole.nll[:1].tobytes()
    assert part.rank.tobytes() == whole.rank[:1].tobytes()


def test_unscored_positions_are_marked_and_their_targets_ignored():
    replica = make_replica(chunk_tokens=8)
    inputs, targets, mask = windows()
    expected = replica.score(inputs, targets, mask)
    statistics = replica.score(inputs, np.where(mask, targets, -100), mask)
    assert same(expected, statistics)
    assert np.isnan(statistics.nll[~mask]).all()
    assert np.isnan(statistics.entropy[~mask]).all()
    assert (statistics.rank[~mask] == -1).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_else_is_scored_moves_no_bit(name):
    replica = make_replica(name, chunk_tokens=16)
    inputs, targets, mask = windows()
    everything = replica.score(inputs, targets, np.ones_like(mask))
    some = replica.score(inputs, targets, mask)
    assert replica.gather
    for left, right in ((everything.nll, some.nll), (everything.entropy, some.entropy), (everything.rank, some.rank)):
        assert left[mask].tobytes() == right[mask].tobytes()


def test_a_head_whose_bits_depend_on_place_scores_the_padding_too(caplog):
    plain, heights = make_replica(), []
    expected = plain.score(*windows())

    class Leaning(Head):
        def place_matters(self, *_, **__):
            return True

        def logits(self, hidden, out=None):
            heights.append(len(hidden))
            return super().logits(hidden, out)

    replica = make_replica(head=Leaning(plain.head.weight, plain.head.bias))
    assert same(replica.score(*windows()), expected)
    assert sum(heights) == BATCH * LENGTH
    assert sum("depend on a token's place" in record.message for record in caplog.records) == 1


def test_scoring_twice_gives_the_same_bits():
    replica = make_replica("gpt2")
    batch = windows()
    assert same(replica.score(*batch), replica.score(*batch))


def test_unknown_heads_use_the_models_own_logits(caplog):
    model = make_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    fallback = Replica(model, batch=BATCH, length=LENGTH, own_logits_bytes=2 * 4 * LENGTH * 83)
    assert fallback.head is None
    assert fallback.vocab_size == 83
    assert fallback._rows_of_own_logits() == 2
    assert sum("head not recognised" in record.message for record in caplog.records) == 1
    inputs, targets, mask = windows()
    statistics = fallback.score(inputs, targets, mask)
    nll, entropy = oracle(make_model("llama"), inputs, targets)
    np.testing.assert_allclose(statistics.nll[mask], nll[mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(statistics.entropy[mask], entropy[mask], atol=1e-5, rtol=0)


def test_bfloat16_body_has_float32_losses():
    exact, half = make_replica("llama"), Replica(make_model("llama").bfloat16(), batch=BATCH, length=LENGTH)
    inputs, targets, mask = windows()
    left, right = exact.score(inputs, targets, mask), half.score(inputs, targets, mask)
    assert half.head is not None
    assert 0 < np.abs(left.nll[mask] - right.nll[mask]).max() < 0.5
    assert len(np.unique(right.nll[mask])) > 0.9 * len(np.unique(left.nll[mask])), "losses are not rounded to bfloat16"


def test_nan_weights_come_out_as_unscorable_windows():
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    replica = Replica(model, batch=BATCH, length=LENGTH)
    inputs, targets, mask = windows()
    inputs[inputs == 5] = 6
    inputs[2, 0] = 5
    mask[2, 0] = True
    statistics = replica.score(inputs, targets, mask)
    assert unscorable(statistics, mask).tolist() == [False, False, True, False]
    assert (statistics.rank[2][mask[2]] == 83).all()
    assert not unscorable(statistics, mask & (np.arange(4) != 2)[:, None]).any()


def test_ids_beyond_the_vocabulary():
    replica = make_replica()
    inputs, targets, mask = windows()
    inputs[1, 3] = 83
    with pytest.raises(InputError, match=r"token id 83.*V = 83 ids \(0\.\.82\); use the tokenizer"):
        replica.score(inputs, targets, mask)
    inputs[1, 3] = -1
    with pytest.raises(InputError, match="token id -1"):
        replica.score(inputs, targets, mask)
    inputs[1, 3] = 0
    targets[0, 10] = 1000
    with pytest.raises(InputError, match="token id 1000"):
        replica.score(inputs, targets, mask)
    with pytest.raises(InputError, match="tokenizer gpt2 has token id 50256"):
        replica.check_vocabulary(50_256, "tokenizer gpt2")
    replica.check_vocabulary(82)


@pytest.mark.parametrize("name", CONFIGS)
def test_windows_longer_than_the_models_positions(name):
    make_replica(name, length=64)
    with pytest.raises(InputError, match=r"windows\.length 65 is longer than the 64 positions"):
        make_replica(name, length=65)


def test_shapes_are_checked():
    replica = make_replica()
    inputs, targets, mask = windows()
    with pytest.raises(ValueError, match=r"must all be \[W, 24\]"):
        replica.score(inputs[:2, :5], targets[:2, :5], mask[:2, :5])
    assert replica.score(inputs[:0], targets[:0], mask[:0]).nll.shape == (0, 24)


@pytest.mark.parametrize("name", CONFIGS)
def test_many_windows_score_as_batch_by_batch(name):
    replica = make_replica(name)
    batch = windows(rows=3 * BATCH + 1)
    whole = replica.score(*batch)
    for first in range(0, 3 * BATCH + 1, BATCH):
        rows = slice(first, first + BATCH)
        part = replica.score(*(array[rows] for array in batch))
        assert part.nll.tobytes() == whole.nll[rows].tobytes()
        assert part.entropy.tobytes() == whole.entropy[rows].tobytes()
        assert part.rank.tobytes() == whole.rank[rows].tobytes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_has_a_name(error):
    replica = make_replica()

    def fail(*args, **kwargs):
        raise error

    replica.model.model.forward = fail
    with pytest.raises(ReplicaOutOfMemory, match=r"4 x 24 tokens on cpu; use a smaller windows\.batch"):
        replica.score(*windows())


def test_real_cpu_exhaustion_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_of_a_model_that_has_run_keep_their_name():
    replica = make_replica()
    replica.score(*windows())

    def fail(*args, **kwargs):
        raise RuntimeError("a device fault")

    replica.model.model.forward = fail
    with pytest.raises(RuntimeError, match="a device fault") as caught:
        replica.score(*windows())
    assert not isinstance(caught.value, ReplicaOutOfMemory)


def test_an_architecture_that_fails_is_named_in_one_line():
    model = make_model()

    def fail(*args, **kwargs):
        raise ValueError("no cache of\nthis kind")

    model.forward = model.model.forward = fail
    with pytest.raises(InputError, match=r"^the llama architecture .*: ValueError: no cache of this kind; correct"):
        Replica(model, batch=BATCH, length=LENGTH)


def test_an_architecture_that_fails_at_the_planned_shape_is_named_too():
    replica = make_replica()

    def fail(*args, **kwargs):
        raise RuntimeError("The size of tensor a (24) must match the size of tensor b (16)")

    replica.model.model.forward = fail
    with pytest.raises(InputError, match=r"the llama architecture cannot be run .*tensor a"):
        replica.score(*windows())


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access"), OSError("the disk"), MemoryError()])
def test_machines_are_not_taken_for_architectures(error):
    replica = make_replica()

    def fail(*args, **kwargs):
        raise error

    replica.model.model.forward = fail
    with pytest.raises(type(error) if not isinstance(error, MemoryError) else ReplicaOutOfMemory) as caught:
        replica.score(*windows())
    assert not isinstance(caught.value, InputError)


def test_from_artifact_scores_like_the_checkpoint(tmp_path):
    from tokenbound.compression.artifact import encode_artifact
    from tokenbound.config.compress import LosslessSettings
    from tokenbound.models.checkpoint import read_checkpoint

    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    data = encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings())
    replica = Replica.from_artifact(data, dtype=torch.float32, batch=BATCH, length=LENGTH)
    direct = Replica(model, batch=BATCH, length=LENGTH)
    assert same(replica.score(*windows()), direct.score(*windows()))


def test_a_compiler_that_fails_is_done_without(monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("no such pass\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setenv("CXX", sys.executable)
    replica = Replica(make_model("llama"), batch=BATCH, length=LENGTH, compile=True)
    assert [record.message for record in caplog.records if "compile" in record.message] == [
        "torch.compile failed (no such pass); scoring without it"
    ]
    assert same(replica.score(*windows()), make_replica("llama").score(*windows()))


@pytest.mark.slow
def test_a_compiled_replica_agrees(caplog):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    inputs, targets, mask = windows()
    expected = make_replica("llama").score(inputs, targets, mask)
    replica = Replica(make_model("llama"), batch=BATCH, length=LENGTH, compile=True)
    assert replica.compile, caplog.text
    statistics = replica.score(inputs, targets, mask)
    np.testing.assert_allclose(statistics.nll[mask], expected.nll[mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(statistics.entropy[mask], expected.entropy[mask], atol=1e-5, rtol=0)
    assert (statistics.rank[mask] == expected.rank[mask]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_agrees_with_the_cpu(dtype, compile):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, targets, mask = windows()
    expected = make_replica("llama").score(inputs, targets, mask)
    replica = Replica(make_model("llama").to(dtype), batch=BATCH, length=LENGTH, device="cuda", compile=compile)
    assert replica.head is not None
    statistics = replica.score(inputs, targets, mask)
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    np.testing.assert_allclose(statistics.nll[mask], expected.nll[mask], atol=tolerance, rtol=0)
    np.testing.assert_allclose(statistics.entropy[mask], expected.entropy[mask], atol=tolerance, rtol=0)
    assert same(statistics, replica.score(inputs, targets, mask))


# --- Rotary factors that depend on the length ----------------------------------------------------------------------

ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 8.0, 32.0],
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


def longrope_model():
    torch.manual_seed(0)
    config = Phi3Config(
        **SMALL,
        **HEADS,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=LONGROPE,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def alone(model, inputs, targets):
    """Nats of the last prediction of some ids, by the model that sees them alone."""
    logits = model(input_ids=torch.from_numpy(inputs)[None], use_cache=False).logits[0, -1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(int(targets[-1]))).item()


@pytest.mark.parametrize("has_head", [True, False])
def test_rotary_factors_are_those_of_what_precedes_a_token(has_head):
    model = longrope_model()
    if not has_head:
        model.lm_head = nn.Sequential(model.lm_head)
    replica = Replica(model, batch=BATCH, length=LENGTH)
    assert (replica.head is not None) == has_head
    inputs, targets, mask = windows()
    found = replica.score(inputs, targets, mask).nll
    for row, position in zip(*np.nonzero(mask), strict=True):
        seen = slice(0, position + 1)
        assert found[row, position] == pytest.approx(alone(model, inputs[row, seen], targets[row, seen]), abs=1e-5)


def test_rotary_factors_do_not_leak_where_a_window_ends():
    replica = Replica(longrope_model(), batch=BATCH, length=LENGTH)
    probe_causality(replica)
    inputs, targets, _ = windows()
    everything = np.ones(inputs.shape, bool)
    short = np.arange(LENGTH) < np.array([[3], [ORIGINAL], [ORIGINAL + 1], [LENGTH]])
    whole, cut = replica.score(inputs, targets, everything), replica.score(inputs, targets, short)
    assert whole.nll[short].tobytes() == cut.nll[short].tobytes()


def test_windows_within_the_original_context_are_one_pass():
    model = longrope_model()
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for length, passes in ((ORIGINAL, 1), (ORIGINAL + 1, 2)):
        replica = Replica(model, batch=1, length=length)
        calls.clear()
        ids = np.full((1, length), 5)
        replica.score(ids, ids, np.ones((1, length), bool))
        assert len(calls) == passes


def test_dynamic_factors_do_not_move_within_the_positions():
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, **HEADS, max_position_embeddings=LENGTH, rope_parameters=parameters)
    model = AutoModelForCausalLM.from_config(config).eval()
    replica = Replica(model, batch=BATCH, length=LENGTH)
    inputs, targets, mask = windows()
    found = replica.score(inputs, targets, mask).nll
    for row, position in zip(*np.nonzero(mask), strict=True):
        seen = slice(0, position + 1)
        assert found[row, position] == pytest.approx(alone(model, inputs[row, seen], targets[row, seen]), abs=1e-5)
