"""One replica over several GPUs: the plan is pure, and a spread model scores as a whole one does."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from tokenbound.errors import InputError
from tokenbound.models.hf_model import blank_model
from tokenbound.models.memory import random_model, replica_memory
from tokenbound.models.probe import canary, probe_causality
from tokenbound.models.replica import Replica
from tokenbound.models.spread import GPU_SHARE, gpus_for, plan_devices, spread_model, spread_over_gpus

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": 500,
    "n_positions": 64,
}
WORKING = 1 << 20


def weights_by_device(model: Any, devices: dict[str, int]) -> dict[int, int]:
    sizes: dict[int, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        place = next(devices[part] for part in devices if name == part or name.startswith(f"{part}."))
        sizes[place] += parameter.numel() * 2
    return sizes


def test_layers_are_laid_whole_and_in_order_into_the_memory_at_hand() -> None:
    model = blank_model(LLAMA)
    free = [9 << 20, 7 << 20, 20 << 20]
    devices = plan_devices(model, free, working_bytes=WORKING, dtype=torch.bfloat16)
    sizes = weights_by_device(model, devices)
    assert set(sizes) == {0, 1, 2}
    assert all(size <= GPU_SHARE * free[place] - WORKING for place, size in sizes.items())
    layers = [devices[f"model.layers.{index}"] for index in range(12)]
    assert layers == sorted(layers)
    assert sum(sizes.values()) == 2 * sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_lies_where_its_embedding_does() -> None:
    model = blank_model(GPT2)
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    devices = plan_devices(model, [total, total], working_bytes=0, dtype=torch.float32)
    assert set(devices.values()) == {0, 1}
    assert devices["lm_head"] == devices["transformer.wte"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"do not fit into 2 GPUs.*how\.gpus_per_replica"):
        plan_devices(blank_model(LLAMA), [6 << 20] * 2, working_bytes=WORKING, dtype=torch.bfloat16)


def test_the_number_of_gpus_counts_whole_layers() -> None:
    model, dtype = blank_model(LLAMA), torch.bfloat16
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    sizes: dict[str, Any] = {"weights_bytes": weights, "working_bytes": WORKING, "dtype": dtype}
    assert gpus_for(model, gpu_bytes=2 * weights, **sizes) == 1
    for gpu_bytes in (weights // 2, weights // 3):
        count = gpus_for(model, gpu_bytes=gpu_bytes, **sizes)
        assert count > 1
        plan_devices(model, [gpu_bytes] * count, working_bytes=WORKING, dtype=dtype)
        with pytest.raises(InputError):
            plan_devices(model, [gpu_bytes] * (count - 1), working_bytes=WORKING, dtype=dtype)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2])
def test_a_spread_model_scores_as_a_whole_one(architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"batch": 2, "length": 16}

    def model() -> Any:
        torch.manual_seed(0)
        return random_model(architecture, torch.float32)

    needed = replica_memory(architecture, dtype=torch.float32, device="cuda", **shape)
    free = [int((needed.weights_bytes * 0.8 + needed.activations_bytes + needed.logits_bytes) / GPU_SHARE)] * 2
    placed: list[Any] = []

    def on_the_host(model: Any, devices: dict[str, int]) -> Any:
        placed.append(devices)
        return spread_model(model, dict.fromkeys(devices, "cpu"))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], free[index]))
    spread = spread_over_gpus(model(), architecture, gpus=2, dtype=torch.float32, place=on_the_host, **shape)
    assert set(placed[0].values()) == {0, 1}
    monkeypatch.setattr(spread, "to", lambda *arguments: pytest.fail("a spread model must not be moved"))
    replica = Replica(spread, **shape)
    monkeypatch.undo()
    assert replica.head is not None
    canary(replica)
    probe_causality(replica)
    ids = np.random.default_rng(0).integers(0, 500, (2, 17))
    windows = (ids[:, :-1], ids[:, 1:], np.ones((2, 16), bool))
    expected, found = Replica(model(), **shape).score(*windows), replica.score(*windows)
    assert found.nll.tobytes() == expected.nll.tobytes()
    assert found.rank.tobytes() == expected.rank.tobytes()


@pytest.mark.gpu
def test_two_gpus_score_as_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    shape: dict[str, Any] = {"batch": 2, "length": 16, "device": "cuda:0"}
    torch.manual_seed(0)
    model = random_model(GPT2, torch.float32)
    ids = np.random.default_rng(0).integers(0, 500, (2, 17))
    windows = (ids[:, :-1], ids[:, 1:], np.ones((2, 16), bool))
    half = {"transformer.wte": 0, "transformer.wpe": 0, "lm_head": 0, "transformer.drop": 0, "transformer.ln_f": 1}
    devices = {**half, **{f"transformer.h.{index}": index // 2 for index in range(4)}}
    spread = Replica(spread_model(random_like(model), devices), **shape)
    expected = Replica(model, **shape).score(*windows)
    assert spread.score(*windows).nll.tobytes() == expected.nll.tobytes()


def random_like(model: Any) -> Any:
    copy = random_model(GPT2, torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy
