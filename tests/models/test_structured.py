"""Families: layers against the matrix they stand for, artifacts against the trained form, refusals by name."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.config.family import (
    FAMILY,
    KroneckerFamily,
    LoraFamily,
    MonarchFamily,
    SubloraFamily,
)
from tokenbound.errors import InputError
from tokenbound.models.build import count_trained, trained_form
from tokenbound.models.generate import generate_ids
from tokenbound.models.memory import LiveBytes
from tokenbound.models.probe import canary, probe_causality
from tokenbound.models.replica import Replica
from tokenbound.models.structured.counter import random_groups, random_signs, uniform_weights
from tokenbound.models.structured.kronecker import KroneckerLinear
from tokenbound.models.structured.monarch import MonarchLinear
from tokenbound.models.structured.registry import attach_family, trained_tensors

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 83,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 83,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}
FAMILIES = [
    KroneckerFamily(terms=2),
    MonarchFamily(blocks=2),
    LoraFamily(rank=2),
    SubloraFamily(rank=2, dimension=90, others="frozen"),
]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(2, 5), st.integers(2, 5), st.integers(1, 3), st.booleans())
def test_kronecker_equals_its_matrix(a: int, b: int, c: int, d: int, terms: int, bias: bool) -> None:
    layer = KroneckerLinear(nn.Linear(a * b, c * d, bias=bias, dtype=torch.float64), terms)
    assert_equals_its_matrix(layer, torch.randn(2, 3, a * b, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_monarch_equals_its_matrix(blocks: int, more_in: int, more_out: int, bias: bool) -> None:
    inputs, outputs = blocks * (blocks + more_in), blocks * (blocks + more_out)
    layer = MonarchLinear(nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64), blocks)
    assert_equals_its_matrix(layer, torch.randn(2, 3, inputs, dtype=torch.float64))
    assert bool((layer.dense_matrix() != 0).all())


def assert_equals_its_matrix(layer: Any, x: torch.Tensor) -> None:
    """Values, and gradients of everything, through the layer and through the dense matrix that it stands for."""
    x.requires_grad_(True)
    free = [x, *layer.parameters()]
    dense = nn.functional.linear(x, layer.dense_matrix(), layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, dense)
    weight = torch.randn_like(dense)
    through_layer, through_matrix = (torch.autograd.grad((out * weight).sum(), free) for out in (found, dense))
    torch.testing.assert_close(through_layer, through_matrix)


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    "family",
    [
        KroneckerFamily(terms=4),
        MonarchFamily(blocks=16),
        LoraFamily(rank=4),
        SubloraFamily(rank=4, dimension=100),
    ],
    ids=lambda family: family.kind,
)
def test_forward_and_backward_never_make_the_matrix(family: Any) -> None:
    """All that both passes hold at once is less than the matrix would be."""
    model, x = OneLayer(512, 512), torch.randn(4, 512, requires_grad=True)
    attach_family(model, family)
    matrix_bytes = 4 * 512 * 512
    with LiveBytes() as live:
        model(x).square().sum().backward()
    assert 0 < live.peak < matrix_bytes / 4
    dense = OneLayer(512, 512)
    with LiveBytes() as live:
        dense(x).square().sum().backward()
    assert live.peak > matrix_bytes  # its gradient: what the others are spared is seen


def test_seeded_numbers_are_fixed_for_ever() -> None:
    """An artifact holds the seed alone: were one bit to change, what was certified would be another model."""
    weights = uniform_weights(7, "w", (3,), 0.5)
    assert [value.hex() for value in weights.tolist()] == [
        "0x1.22e4320000000p-2",
        "-0x1.a4944c0000000p-1",
        "-0x1.4a28de0000000p-1",
    ]
    layer = uniform_weights(0, "model.layers.0.self_attn.q_proj.weight", (64, 32), 32**-0.5)
    found = hashlib.sha256(layer.astype("<f4").tobytes()).hexdigest()
    assert found == "8a9997b2234bca6da88f702c92bf3473362def8feae245c7fb9e7d2a9d7684eb"
    projection = (
        random_signs(3, "s", 1000).astype("<f4").tobytes() + random_groups(3, "g", 1000, 37).astype("<i8").tobytes()
    )
    found = hashlib.sha256(projection).hexdigest()
    assert found == "f795c42fe351aaf95e26729939559d606cdd7ed93284172522d8d14e40387fb6"
    assert abs(float(uniform_weights(7, "w", (100_000,), 0.5).std()) - 0.5) < 0.005
    assert np.array_equal(weights, uniform_weights(7, "w", (100,), 0.5)[:3])
    assert sorted(np.bincount(random_groups(1, "g", 10, 4))) == [2, 2, 3, 3]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_artifacts_of_a_family_decode_score_and_speak(name: str, family: Any) -> None:
    shape = dict(ARCHITECTURES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    attach_family(model, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = trained_tensors(model)
    assert count_trained(ARCHITECTURES[name], family) == sum(tensor.numel() for tensor in tensors.values())
    architecture = {**ARCHITECTURES[name], FAMILY: family.model_dump(mode="json")}
    data = encode_artifact(architecture, tensors, RoundToNearestSettings(step=0.1))
    replica = Replica.from_artifact(data, dtype=torch.float32, batch=2, length=16)
    canary(replica)
    probe_causality(replica)
    found = decode_artifact(data)
    form, ids = trained_form(found.architecture, found.tensors), torch.arange(16)[None]
    torch.testing.assert_close(replica.model(input_ids=ids).logits, form(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert len(list(generate_ids(data, [5], max_new_tokens=4))) == 4


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        (KroneckerFamily(terms=3), 3 * (4 * 6 + 6 * 8)),  # outputs 4 * 6, inputs 6 * 8
        (MonarchFamily(blocks=2), 24 * (24 + 48) // 2),
        (LoraFamily(rank=5), 5 * (24 + 48)),
        (SubloraFamily(rank=5, dimension=77), 77),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_the_parameters_are_as_many_as_the_docstrings_say(family: Any, parameters: int) -> None:
    model = OneLayer(48, 24)
    attach_family(model, family)
    assert sum(tensor.numel() for tensor in trained_tensors(model).values()) == parameters + 24  # and the bias


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (LoraFamily(rank=9), "above the dimension 8"),
        (LoraFamily(layers=("nowhere",)), "'nowhere'"),
        (SubloraFamily(rank=2, dimension=10**6), "must lie between"),
        (KroneckerFamily(terms=1000), "rank"),
        (MonarchFamily(blocks=3), "does not divide"),
        (MonarchFamily(blocks=8), "root of the smaller side"),
    ],
)
def test_families_that_do_not_fit_are_refused(family: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        count_trained(ARCHITECTURES["llama"], family)
