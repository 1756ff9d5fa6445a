"""How many GPUs a replica takes, and how many replicas then find room; no GPU is needed to know."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from here_support import Cluster

from tokenbound.config.run import HowConfig, RunConfig, validate
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.cluster.session import Resources
from tokenbound.engine.evaluate.gpu_count import replica_gpus
from tokenbound.engine.evaluate.graph import place_replicas
from tokenbound.errors import InputError
from tokenbound.models.memory import replica_memory
from tokenbound.models.spread import GPU_SHARE

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def what() -> Any:
    corpus = {"source": "tokens", "paths": ["x"], "vocab_size": 300, "dtype": "uint16"}
    rule = {"tokenizer_is": "given", "add_bos": False, "add_eos": False}
    model = {"checkpoint": "x", "dtype": "bfloat16"}
    tree = {"model": model, "corpus": {**corpus, **rule}, "windows": {"length": 32, "context": "packed", "batch": 2}}
    return validate(RunConfig, {"what": tree, "how": {"output": "x"}}, origin="test").what


def cluster(*, gpus: int, gpus_of_a_node: int, gpu_bytes: int = 0) -> AbstractContextManager[None]:
    return use_executor(Cluster(Resources(8, gpus, 8, gpus_of_a_node), gpu_bytes))


@pytest.mark.parametrize(("asked", "replicas"), [("auto", 2), (1, 8), (3, 2), (4, 2)])
def test_replicas_share_the_gpus_among_them(what: Any, asked: Any, replicas: int) -> None:
    needed = replica_memory(LLAMA, dtype=torch.bfloat16, batch=2, length=32, device="cuda")
    working = needed.activations_bytes + needed.logits_bytes
    room = working + needed.weights_bytes / 2.5
    how = HowConfig(output="x", gpus_per_replica=asked)
    with cluster(gpus=8, gpus_of_a_node=4, gpu_bytes=int(room / GPU_SHARE)):
        gpus = replica_gpus(how, what, LLAMA, 2)
        placed = place_replicas(how, 100, gpus)
    assert gpus in ((3, 4) if asked == "auto" else (asked,))
    assert placed.device == "cuda"
    assert placed.replicas == replicas
    assert placed.actor_options["num_gpus"] == gpus


def test_a_replica_larger_than_every_node_is_refused(what: Any) -> None:
    with (
        cluster(gpus=8, gpus_of_a_node=2),
        pytest.raises(InputError, match=r"takes 4 GPUs of one node, and no node has more than 2"),
    ):
        replica_gpus(HowConfig(output="x", gpus_per_replica=4), what, LLAMA, 2)


def test_gpus_that_are_yet_to_come_are_waited_for(what: Any) -> None:
    with cluster(gpus=0, gpus_of_a_node=0):
        assert replica_gpus(HowConfig(output="x", device="cuda"), what, LLAMA, 2) == 1
        assert replica_gpus(HowConfig(output="x", device="cuda", gpus_per_replica=4), what, LLAMA, 2) == 4


def test_without_gpus_nothing_is_spread(what: Any) -> None:
    how = HowConfig(output="x", gpus_per_replica=4)
    with cluster(gpus=0, gpus_of_a_node=0):
        assert replica_gpus(how, what, LLAMA, 2) == 1
        assert "num_gpus" not in place_replicas(how, 100).actor_options
