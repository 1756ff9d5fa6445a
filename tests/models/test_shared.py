"""Weights decoded once per machine: one decodes, all map the same pages."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.config.compress import LosslessSettings
from tokenbound.models import shared
from tokenbound.models.memory import random_model
from tokenbound.models.replica import Replica
from tokenbound.models.weights import decode_weights
from tokenbound.store.local_folder import release_files

SHAPE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 6_000, "n_positions": 16}
IDS = np.arange(32).reshape(2, 16)


shared_weights = partial(shared.shared_weights, least_bytes=0)
"""Small weights are shared too."""


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release_files()


def make_artifact(seed: int = 0, vocab_size: int = 6_000) -> bytes:
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": vocab_size}
    tensors = {name: p.detach() for name, p in random_model(shape, torch.float32).named_parameters()}
    return encode_artifact(shape, tensors, LosslessSettings())


def losses(replica: Replica) -> bytes:
    return replica.score(IDS, IDS, np.ones_like(IDS, bool)).nll.tobytes()


def file_pages(path: Path) -> dict[str, int]:
    """Bytes of the mapping of a file in this process: resident, and its share where several processes map a page."""
    text = Path("/proc/self/smaps").read_text()
    lines = text[text.index(str(path)) :].splitlines()[1:]
    fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[:12] if line.endswith("kB")}
    return {name: fields[name] for name in ("Rss", "Pss", "Private_Dirty")}


def one_replica(data: bytes, folder: Path, barrier: Any, queue: Any, decoded: Callable[[], None]) -> None:
    def counted(artifact: ArtifactFile, workers: int) -> Any:
        decoded()
        return artifact.decoded(workers)

    weights = shared_weights(data, folder, decode=counted)
    replica = Replica.from_weights(weights, dtype=torch.float32, batch=2, length=16)
    found = losses(replica)
    barrier.wait(timeout=60)
    queue.put((found, file_pages(next(folder.glob("*.safetensors")))))
    barrier.wait(timeout=60)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="looks at Linux's list of mapped pages")
def test_two_replicas_decode_once_and_share_the_pages(tmp_path: Path) -> None:
    data = make_artifact()
    context = multiprocessing.get_context("fork")
    barrier, queue, decodings = context.Barrier(2), context.Queue(), context.Value("i", 0)

    def decoded() -> None:
        with decodings.get_lock():
            decodings.value += 1

    arguments = (data, tmp_path / "weights", barrier, queue, decoded)
    replicas = [context.Process(target=one_replica, args=arguments) for _ in range(2)]
    for replica in replicas:
        replica.start()
    (first, pages), (second, other_pages) = queue.get(timeout=60), queue.get(timeout=60)
    for replica in replicas:
        replica.join()
    assert decodings.value == 1
    alone = Replica.from_artifact(data, dtype=torch.float32, batch=2, length=16)
    assert first == second == losses(alone)
    weights_bytes = sum(p.numel() * p.element_size() for p in alone.model.parameters())
    for found in (pages, other_pages):
        assert found["Rss"] > 0.95 * weights_bytes
        assert found["Pss"] < 0.55 * weights_bytes
        assert found["Private_Dirty"] == 0


def test_tensors_and_architecture_are_those_of_the_artifact(tmp_path: Path) -> None:
    data = make_artifact(vocab_size=50)
    expected = decode_weights(data)
    for _ in range(2):
        found = shared_weights(data, tmp_path)
        assert found.architecture == expected.architecture
        assert found.identity == expected.identity


def test_weights_in_use_stay_and_others_make_room(tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.glob("*.safetensors*")))

    shared_weights(make_artifact(0, 50), tmp_path)
    shared_weights(make_artifact(1, 50), tmp_path)
    assert files() == 2
    release_files()
    (tmp_path / f"{'0' * 64}-1.safetensors.partial").write_bytes(b"half")
    shared_weights(make_artifact(2, 50), tmp_path)
    assert files() == 1


@pytest.mark.parametrize("obstacle", ["no room", "not ours"])
def test_without_a_place_each_decodes_its_own(
    tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "no room":
        monkeypatch.setattr(os, "statvfs", lambda path: type("Full", (), {"f_bavail": 0, "f_frsize": 4096})())
    else:
        tmp_path.chmod(0o777)
    data = make_artifact(vocab_size=50)
    with caplog.at_level(logging.WARNING):
        found = shared_weights(data, tmp_path)
    assert found.identity == decode_weights(data).identity
    assert "every replica decodes its own" in caplog.text
    assert not list(tmp_path.glob("*.safetensors*"))


def test_small_weights_need_no_file(tmp_path: Path) -> None:
    shared.shared_weights(make_artifact(vocab_size=50), tmp_path / "none")
    assert not (tmp_path / "none").exists()
