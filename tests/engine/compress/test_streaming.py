"""A checkpoint becomes an artifact tensor by tensor: the same bytes as in memory, and none of it is held."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from here_support import Killed, compressing_here

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.tensor_map import Header, TensorMap
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.compress import run as compress
from tokenbound.engine.compress.checkpointed_parts import Parts
from tokenbound.engine.compress.run import encode_checkpoint, parts_of
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import read_checkpoint


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    with compressing_here():
        yield


@pytest.mark.parametrize("settings", [LosslessSettings(), RoundToNearestSettings(step=0.3)])
def test_the_file_is_what_is_made_in_memory(tiny_checkpoint: Path, tmp_path: Path, settings: Any) -> None:
    out = tmp_path / "a.tokenbound"
    artifact = encode_checkpoint(str(tiny_checkpoint), settings, out=str(out))
    loaded = read_checkpoint(tiny_checkpoint)
    assert out.read_bytes() == encode_artifact(loaded.architecture, dict(loaded.tensors), settings)
    assert artifact.path == out
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokenbound"]


def test_a_full_disk_is_named_and_what_was_coded_is_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.tokenbound"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            InputError, match=r"a\.tokenbound: No space left on device: .* choose another disk"
        ) as found:
            encode_checkpoint(str(tiny_checkpoint), LosslessSettings(), out=str(out))
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokenbound.parts"]
    with use_executor(Killed(after=0)):  # nothing is left to be coded
        assert encode_checkpoint(str(tiny_checkpoint), LosslessSettings(), out=str(out)).num_bytes


def test_a_task_gets_a_name_and_a_place(tiny_checkpoint: Path) -> None:
    from ray import cloudpickle

    content = compress._content(str(tiny_checkpoint), None, LosslessSettings())
    held = sum(tensor.nbytes for tensor in content.tensors.values())
    assert len(cloudpickle.dumps(content.tensors)) < held / 20


SIDE = 1024
FINE = RoundToNearestSettings(step=0.002)


class Drawn(TensorMap):
    """A model that exists only tensor by tensor."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(int(name)))

    def __iter__(self) -> Iterator[str]:
        return map(str, range(100, 140))

    def __len__(self) -> int:
        return 40

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def header(self, name: str) -> Header:
        return torch.float32, (SIDE, SIDE)


def peak_bytes() -> int:
    """The kernel's highest resident size since it was last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def measure(folder: Path) -> dict[str, int]:
    """Encode a large model here, and open and decode what came out."""
    content = compress._Content({}, Drawn())
    task = compress.partial(compress._encode_one, content.tensors, None, FINE)
    task("100")  # libraries are loaded now
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = peak_bytes()
    with compressing_here():
        coded = compress._encode(content.tensors, task, FINE, Parts(str(folder / "parts"), 0))
        artifact = compress._write(content, coded, {}, str(folder / "a.tokenbound"), None)
    for _ in artifact.decoded():
        pass
    return {"over": peak_bytes() - base, "artifact": artifact.num_bytes}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")
@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    quiet = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, **quiet, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(shown)
    assert found["over"] < 8 << 22 < 12 << 22 < found["artifact"], "eight of forty tensors, and libraries"
    assert ArtifactFile(tmp_path / "a.tokenbound").sha256


def test_parts_lie_beside_the_artifact() -> None:
    assert parts_of("s3://bucket/a.tokenbound?region=x") == "s3://bucket/a.tokenbound.parts?region=x"
    assert parts_of("folder/a.tokenbound") == "folder/a.tokenbound.parts"


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
