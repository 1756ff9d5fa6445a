"""Replicas whose layers have weights only while they run: the same bits, in less memory."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from blocks_support import packed_file
from torch import nn

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.demo import demo_artifact
from tokenbound.errors import InputError
from tokenbound.models.blocks import BlockChain, build_chain, find_layers, has_layers, require_layers
from tokenbound.models.checkpoint import Checkpoint, read_checkpoint
from tokenbound.models.hf_model import blank_model
from tokenbound.models.memory import random_model
from tokenbound.models.probe import canary, check_replica, probe_causality
from tokenbound.models.replica import Replica, WindowStatistics
from tokenbound.models.sources import MapSource, PackedFileSource, PackedSource, TensorSource
from tokenbound.models.weights import Weights, decode_weights

VOCAB, BATCH, LENGTH = 97, 2, 32

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, **_COMMON},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **_COMMON},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, **_COMMON},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **_COMMON},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, **_COMMON},
    "phi3": {  # two passes through the layers for each batch
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 8.0, 32.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "pad_token_id": 0,
        **_COMMON,
    },
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A random checkpoint of each architecture, as transformers saves it: experts one by one, tied weights once."""
    made: dict[str, Checkpoint] = {}

    def make(kind: str) -> Checkpoint:
        if kind not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(kind)
            random_model({"model_type": kind, **ARCHITECTURES[kind]}, torch.float32).save_pretrained(folder)
            made[kind] = read_checkpoint(str(folder))
        return made[kind]

    return make


def some_windows(count: int, length: int = LENGTH, vocab: int = VOCAB) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, vocab, (count, length))
    return inputs, np.roll(inputs, -1, axis=1), generator.random((count, length)) < 0.8


def require_same(left: WindowStatistics, right: WindowStatistics) -> None:
    for name in ("nll", "entropy", "rank"):
        assert getattr(left, name).tobytes() == getattr(right, name).tobytes(), name


def dense(found: Checkpoint, dtype: torch.dtype, **options: Any) -> Replica:
    shape = {"batch": BATCH, "length": LENGTH, **options}
    return Replica.from_weights(Weights(found.architecture, found.tensors), dtype=dtype, **shape)


def streamed(architecture: Any, source: TensorSource, dtype: torch.dtype, **options: Any) -> Replica:
    return Replica.from_source(architecture, source, dtype=dtype, **{"batch": BATCH, "length": LENGTH, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_streamed_losses_are_those_of_a_dense_replica(
    checkpoint: Callable[[str], Checkpoint], kind: str, dtype: torch.dtype
) -> None:
    found, windows = checkpoint(kind), some_windows(7)
    replica = streamed(found.architecture, MapSource(found.tensors), dtype)
    require_same(dense(found, dtype).score(*windows), replica.score(*windows))
    assert replica.head is not None


def test_no_matrix_of_a_layer_is_in_memory_between_scores(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("qwen3_moe")
    replica = streamed(found.architecture, MapSource(found.tensors), torch.float32)
    replica.score(*some_windows(7))
    layers = find_layers(replica.model)
    assert layers is not None
    for module in layers.modules:
        assert {parameter.is_meta for parameter in module.parameters() if parameter.ndim > 1} == {True}
        assert {parameter.is_meta for parameter in module.parameters() if parameter.ndim == 1} == {False}


class Watched(MapSource):
    """Notes what is asked for, and which of what it gave is still there."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        self.asked.append(name)
        return super().tensor(name, device).clone()


def test_weights_are_made_once_for_all_batches_of_a_shard(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("llama")
    source = Watched(found.tensors)
    replica = streamed(found.architecture, source, torch.float32)
    source.asked.clear()
    replica.score(*some_windows(9))
    matrices = [name for name, tensor in found.tensors.items() if ".layers." in name and tensor.ndim == 2]
    assert sorted(source.asked) == sorted(matrices)


def test_two_layers_at_most_are_in_memory(checkpoint: Callable[[str], Checkpoint]) -> None:
    found, most = checkpoint("llama"), 0

    class Counting(MapSource):
        def tensor(self, name: str, device: torch.device) -> torch.Tensor:
            nonlocal most
            layers = [block.module for block in chain.blocks] if chains else []
            present = [any(p.ndim > 1 and not p.is_meta for p in layer.parameters()) for layer in layers]
            most = max(most, sum(present))
            return super().tensor(name, device)

    chains: list[BlockChain] = []
    replica = streamed(found.architecture, Counting(found.tensors), torch.float32)
    chain = replica.chain
    assert chain is not None
    chains.append(chain)
    replica.score(*some_windows(9))
    assert 1 <= most <= 2


def test_batches_that_do_not_fit_the_memory_held_wait_for_the_others(checkpoint: Callable[[str], Checkpoint]) -> None:
    found, windows = checkpoint("llama"), some_windows(9)
    source = Watched(found.tensors)
    replica = streamed(found.architecture, source, torch.float32)
    assert replica.chain is not None
    hidden = BATCH * LENGTH * 32 * 4
    replica.chain.held_bytes = 5 * hidden  # arguments of a layer: hidden states, masks and rotary embeddings
    source.asked.clear()
    expected = dense(found, torch.float32).score(*windows)
    require_same(expected, replica.score(*windows))
    assert 1 < source.asked.count("model.layers.0.mlp.up_proj.weight") <= 5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_models_own_logits_are_streamed_too(checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    """Without a head that is recognised a batch runs forward several times."""
    found, windows = checkpoint(kind), some_windows(5)
    options = {"own_logits_bytes": 4 * LENGTH * VOCAB}
    pair = (
        dense(found, torch.float32, **options),
        streamed(found.architecture, MapSource(found.tensors), torch.float32, **options),
    )
    for replica in pair:
        replica.head = None
    require_same(pair[0].score(*windows), pair[1].score(*windows))


def test_probe_and_canary_pass_and_make_the_weights_once_for_both(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("llama")
    source = Watched(found.tensors)
    replica = streamed(found.architecture, source, torch.float32)
    assert canary(replica) == canary(dense(found, torch.float32))
    source.asked.clear()
    check_replica(replica)
    assert source.asked.count("model.layers.1.mlp.up_proj.weight") == 1


@pytest.mark.parametrize("check", [probe_causality, check_replica])
def test_probe_refuses_a_streamed_model_that_looks_ahead(
    checkpoint: Callable[[str], Checkpoint], check: Callable[[Replica], None]
) -> None:
    found = checkpoint("llama")
    replica = streamed(found.architecture, MapSource(found.tensors), torch.float32)
    replica.model.model.norm.register_forward_hook(lambda module, inputs, output: output + output[:, -1:])
    with pytest.raises(InputError, match="depends on later tokens"):
        check(replica)


def test_canary_refuses_a_streamed_model_with_a_broken_weight(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("llama")
    replica = streamed(found.architecture, MapSource(found.tensors), torch.float32)
    with torch.no_grad():
        replica.model.model.norm.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"canary: .* weight model\.norm\.weight holds NaN"):
        check_replica(replica)


def test_rank_limits_load_layers_too(checkpoint: Callable[[str], Checkpoint]) -> None:
    found, windows = checkpoint("gpt2"), some_windows(3)
    replica = streamed(found.architecture, MapSource(found.tensors), torch.float32)
    expected = dense(found, torch.float32).rank_limits(*windows, 1e-3)
    for left, right in zip(expected, replica.rank_limits(*windows, 1e-3), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_demo_artifact_streams_to_the_same_losses(dtype: torch.dtype) -> None:
    data = demo_artifact()
    weights, artifact = decode_weights(data), ArtifactFile(data)
    windows = some_windows(5, 64, 257)
    shape = {"batch": 2, "length": 64}
    expected = Replica.from_weights(weights, dtype=dtype, **shape).score(*windows)
    replica = Replica.from_source(artifact.architecture, MapSource(artifact.tensors), dtype=dtype, **shape)
    require_same(expected, replica.score(*windows))


def test_error_in_a_layer_ends_every_pass_and_leaves_no_weights(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("llama")

    class Failing(MapSource):
        def tensor(self, name: str, device: torch.device) -> torch.Tensor:
            if name.startswith("model.layers.2."):
                raise InputError("the artifact is damaged")
            return super().tensor(name, device)

    replica = streamed(found.architecture, MapSource(found.tensors), torch.float32)
    assert replica.chain is not None
    replica.chain._loader.source = Failing(found.tensors)
    with pytest.raises(InputError, match="damaged"):
        replica.score(*some_windows(9))
    gc.collect()
    assert all(p.is_meta for block in replica.chain.blocks[:2] for p in block.module.parameters() if p.ndim > 1)


class Changed(MapSource):
    """Without some tensors, and with others."""

    def __init__(self, tensors: dict[str, torch.Tensor], less: Collection[str], more: dict[str, torch.Tensor]) -> None:
        super().__init__({name: tensor for name, tensor in tensors.items() if name not in less} | more)


@pytest.mark.parametrize(
    ("less", "more", "message"),
    [
        (["model.layers.1.mlp.up_proj.weight"], {}, "no tensor for model.layers.1.mlp.up_proj.weight"),
        ([], {"model.layers.1.mlp.side.weight": torch.ones(2, 2)}, "no place for the tensors model.layers.1.mlp.side"),
        ([], {"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}, "another shape .* model.layers.1.mlp.up_proj"),
    ],
)
def test_incomplete_tensors_are_refused_before_any_is_made(
    checkpoint: Callable[[str], Checkpoint], less: list[str], more: dict[str, torch.Tensor], message: str
) -> None:
    found = checkpoint("llama")
    with pytest.raises(InputError, match=message):
        build_chain(found.architecture, Changed(found.tensors, less, more), dtype=torch.float32, device="cpu")


def test_architecture_without_a_list_of_layers_is_refused_in_one_line() -> None:
    architecture = {"model_type": "llama", "tokenbound_family": {"kind": "sublora"}, **_COMMON}
    with pytest.raises(InputError, match=r"how.weights: streamed .* set how.weights: dense") as caught:
        require_layers(architecture, "streamed")
    assert "\n" not in str(caught.value)
    assert not has_layers({"model_type": "markov"})


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_layers_are_found(kind: str) -> None:
    layers = find_layers(blank_model({"model_type": kind, **ARCHITECTURES[kind]}))
    assert layers is not None
    assert len(layers.modules) == 3


def test_model_without_such_a_list_has_no_layers() -> None:
    model = blank_model({"model_type": "llama", **_COMMON})
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    assert find_layers(model) is None


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Artifacts of 4 bits or so, with layers wide enough to be packed."""

    def make(kind: str) -> bytes:
        architecture = {"model_type": kind, **ARCHITECTURES[kind], **_WIDE.get(kind, {"intermediate_size": 256})}
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        random_model(architecture, torch.float32).save_pretrained(folder)
        found = read_checkpoint(str(folder))
        return encode_artifact(found.architecture, found.tensors, RoundToNearestSettings(step=0.25))

    return cache(make)


_WIDE: dict[str, dict[str, int]] = {
    "gpt2": {"n_inner": 256},
    "qwen3_moe": {"moe_intermediate_size": 256},
    "opt": {"ffn_dim": 256},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_and_streamed_losses_of_an_artifact_are_those_of_a_dense_replica(
    quantized: Callable[[str], bytes], kind: str, dtype: torch.dtype
) -> None:
    data, windows = quantized(kind), some_windows(5)
    artifact = ArtifactFile(data)
    expected = Replica.from_weights(decode_weights(data), dtype=dtype, batch=BATCH, length=LENGTH).score(*windows)
    packed = PackedSource(artifact, torch.device("cpu"), workers=2)
    require_same(expected, streamed(artifact.architecture, packed, dtype).score(*windows))
    require_same(expected, streamed(artifact.architecture, MapSource(artifact.tensors), dtype).score(*windows))
    file = packed_file(artifact)
    for resident in (True, False):
        source = PackedFileSource(artifact, file, torch.device("cpu"), resident=resident)
        require_same(expected, streamed(artifact.architecture, source, dtype).score(*windows))
    matrices = [item for item in artifact.parsed.coded if re.search(r"\.\d+\.", item.name) and len(item.shape) > 1]
    assert 0 < packed.num_bytes < sum(item.decoded_bytes for item in matrices) / 2
