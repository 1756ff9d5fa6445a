"""What each way of holding weights takes, and which is chosen; nothing of these sizes is allocated."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.models.forms import (
    Choice,
    FormNeeds,
    LayerSizes,
    Room,
    choose_form,
    form_needs,
    held_bytes,
    layer_sizes,
    packed_bytes,
    packed_file_bytes,
    tokens_per_second,
)
from tokenbound.models.memory import replica_memory
from tokenbound.models.packed_file import write_packed
from tokenbound.models.safetensors_file import PAGE_BYTES
from tokenbound.models.sources import PackedSource

GB = 10**9
SEVENTY = LayerSizes(layers=80, in_layers=68_452_000_000, largest=855_650_000, outside=524_000_000, width=8192)


@cache
def seven_billion(device: str) -> dict[Any, FormNeeds]:
    architecture = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    dtype = torch.bfloat16
    memory = replica_memory(architecture, dtype=dtype, batch=4, length=512, device=device)
    sizes = layer_sizes(architecture)
    assert sizes is not None
    assert (sizes.layers, sizes.in_layers + sizes.outside) == (32, memory.parameters)
    return form_needs(
        memory,
        sizes,
        dtype=dtype,
        device=device,
        cores=2,
        batch_tokens=2048,
        shard_tokens=1 << 16,
        artifact_bytes=3_500_000_000,
        packed=4_000_000_000,
        file_bytes=4_200_000_000,
    )


def test_needs_of_seven_billion_weights() -> None:
    needs = seven_billion("cpu")
    assert 40 * GB < needs["dense"].device_bytes < 43 * GB
    assert 6 * GB < needs["packed"].device_bytes < 8 * GB
    assert 3 * GB < needs["streamed"].device_bytes < 5 * GB
    assert (needs["packed"].disk_bytes, needs["streamed"].disk_bytes) == (7_700_000_000, 7_700_000_000)
    on_gpu = seven_billion("cuda")
    assert 13 * GB < on_gpu["dense"].device_bytes < 16 * GB
    assert on_gpu["streamed"].host_bytes == 2 * 202_383_360 * 2


@pytest.mark.parametrize(
    ("room", "form", "alone"),
    [(100, "dense", False), (50, "dense", True), (12, "packed", True), (6, "streamed", True), (1, "streamed", True)],
)
def test_first_form_that_fits_two_processors(room: int, form: str, alone: bool) -> None:
    choice = choose_form(seven_billion("cpu"), Room(room * GB, 0, 1), replicas=2, device="cpu")
    assert (choice.form, choice.is_alone) == (form, alone)
    assert "\n" not in choice.why


@pytest.mark.parametrize(("gpu", "form"), [(80, "dense"), (10, "packed"), (5, "streamed")])
def test_first_form_that_fits_a_gpu(gpu: int, form: str) -> None:
    assert choose_form(seven_billion("cuda"), Room(gpu * GB, 64 * GB, 1), replicas=1, device="cuda").form == form


def test_dense_replicas_are_spread_over_the_gpus_of_a_node_and_need_a_host() -> None:
    needs = seven_billion("cuda")
    assert choose_form(needs, Room(10 * GB, 64 * GB, 2), replicas=1, device="cuda").form == "dense"
    choice = choose_form(needs, Room(80 * GB, 16 * GB, 1), replicas=1, device="cuda")
    assert choice.form == "packed"
    assert "1 dense replica would need 40.4 GB of 16.0 GB" in choice.why


def test_unknown_memory_changes_nothing() -> None:
    expected = Choice("dense", False, "the memory of the nodes is not known")
    assert choose_form(seven_billion("cpu"), Room(0, 0, 1), replicas=2, device="cpu") == expected


def test_architecture_without_layers_is_dense_however_large() -> None:
    needs = {"dense": seven_billion("cpu")["dense"]}
    assert choose_form(needs, Room(GB, 0, 1), replicas=1, device="cpu").form == "dense"
    assert layer_sizes({"model_type": "markov"}) is None


def test_hidden_states_that_wait_are_bounded() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "batch_tokens": 2048}
    assert held_bytes(SEVENTY, shard_tokens=1, **options) == 2 * 2 * 8192 * 2048
    assert held_bytes(SEVENTY, shard_tokens=1 << 16, **options) == 2 * 2 * 8192 << 16
    assert held_bytes(SEVENTY, shard_tokens=1 << 30, **options) == 1 << 31


def test_speed_is_that_of_dense_and_of_the_weights_that_are_made_for_each_shard() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu", "cores": 2, "batch_tokens": 2048}
    many, few = 1 << 16, 1 << 11
    assert tokens_per_second("dense", 7.0, SEVENTY, shard_tokens=few, **options) == 7.0
    for form in ("packed", "streamed"):
        slow = tokens_per_second(form, 7.0, SEVENTY, shard_tokens=few, **options)
        assert slow == pytest.approx(few / (few / 7 + SEVENTY.in_layers / 400e6))
        assert slow < 0.8 * tokens_per_second(form, 7.0, SEVENTY, shard_tokens=many, **options) < 0.8 * 7


@pytest.mark.parametrize("step", [1.0, 0.25, 0.05])
def test_packed_size_is_estimated_from_the_code(step: float, tmp_path: Path) -> None:
    weights = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {"model.layers.0.mlp.up_proj.weight": weights, "model.embed_tokens.weight": weights[:64]}
    artifact = ArtifactFile(encode_artifact({"model_type": "x"}, tensors, RoundToNearestSettings(step=step)))
    source = PackedSource(artifact, torch.device("cpu"))
    source.keep(["model.layers.0.mlp.up_proj.weight"])
    assert packed_bytes(artifact.parsed.coded) == pytest.approx(source.num_bytes, rel=0.1)
    write_packed(tmp_path / "a.packed", artifact)
    stored = (tmp_path / "a.packed").stat().st_size
    assert packed_file_bytes(artifact.parsed.coded) == pytest.approx(stored, rel=0.1, abs=4 * PAGE_BYTES)
