"""Packed weights in a file: written once per machine, mapped by all, and given back behind what is made of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.calibration import Calibration, MatrixSums
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.methods import CompressionMethod
from tokenbound.config.compress import E8Settings, GptqSettings, LosslessSettings, RoundToNearestSettings
from tokenbound.models import packed_file, shared
from tokenbound.models.packed_file import PackedFile, write_packed
from tokenbound.models.safetensors_file import PAGE_BYTES
from tokenbound.models.sources import PackedFileSource
from tokenbound.store.local_folder import is_in_memory, release_files

CPU = torch.device("cpu")
MATRIX, VECTOR = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"

shared_packed_file = partial(shared.shared_packed_file, least_bytes=0, on_disk=False)
"""Small weights are shared too."""


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release_files()


def make_artifact(method: CompressionMethod | None = None, rows: int = 64, columns: int = 128) -> ArtifactFile:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        MATRIX: torch.randn(rows, columns, generator=generator).to(torch.bfloat16),
        VECTOR: torch.randn(columns, generator=generator).to(torch.bfloat16),
        "model.embed_tokens.weight": torch.randn(100, columns, generator=generator).to(torch.bfloat16),
    }
    sums = {
        name: MatrixSums(torch.ones(len(tensor)).double(), torch.eye(columns).double() / 2, 1000)
        for name, tensor in tensors.items()
        if tensor.ndim == 2
    }
    settings = method or RoundToNearestSettings(step=0.25)
    return ArtifactFile(encode_artifact({"model_type": "x"}, tensors, settings, calibration=Calibration(1000, sums)))


METHODS = (
    RoundToNearestSettings(step=0.25),
    GptqSettings(bits=4, group=64),
    E8Settings(bits=2),
    E8Settings(bits=3),
    LosslessSettings(),
)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_weights_of_a_file_are_those_of_the_artifact(method: CompressionMethod, resident: bool, tmp_path: Path) -> None:
    artifact = make_artifact(method)
    file = shared_packed_file(artifact, tmp_path)
    assert file is not None
    source = PackedFileSource(artifact, file, CPU, resident=resident)
    source.keep([MATRIX])
    for name in 2 * artifact.names:
        expected, found = artifact.tensor(name), source.tensor(name, CPU)
        assert (
            (found.dtype, found.shape) == (expected.dtype, expected.shape) == (source.dtype(name), source.shape(name))
        )
        assert tensor_bytes(found).tobytes() == tensor_bytes(expected).tobytes(), name


def test_other_readers_of_the_format_can_read_it(tmp_path: Path) -> None:
    artifact = make_artifact()
    write_packed(tmp_path / "a.packed", artifact)
    with safe_open(tmp_path / "a.packed", "pt") as file:
        names = set(file.keys())
        words = sum(file.get_tensor(name).numel() for name in names if name.startswith(f"{MATRIX}/plane"))
    assert 64 * 128 * 3 / 8 <= words <= 64 * 128 * 6 / 8
    assert {f"{MATRIX}/places", f"{MATRIX}/steps", f"{VECTOR}/values"} <= names
    assert (tmp_path / "a.packed").stat().st_size < words + 100 * 128 + 8 * PAGE_BYTES


def test_first_process_packs_and_the_others_map_the_same_file(tmp_path: Path) -> None:
    packed, asked = make_artifact(), make_artifact()
    shared_packed_file(packed, tmp_path)
    (path,) = tmp_path.glob("*.packed")
    before = path.stat()

    class Unreadable(ArtifactFile):
        def each(self, work: object, workers: int = 1) -> Iterator[object]:  # type: ignore[override]
            raise AssertionError("the codes were read again")

    assert shared_packed_file(Unreadable(asked.read()), tmp_path) is not None
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.name.startswith(f"{packed.sha256}-")


def resident_bytes(text: str, path: Path) -> int:
    """Of the mapping of a file in this process."""
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="looks at Linux's list of mapped pages")
@pytest.mark.parametrize(
    "method", [RoundToNearestSettings(step=0.25), LosslessSettings()], ids=lambda method: method.name
)
@pytest.mark.parametrize("resident", [True, False])
def test_pages_stay_behind_a_weight_only_where_they_are_to_stay(
    method: CompressionMethod, resident: bool, tmp_path: Path
) -> None:
    artifact = make_artifact(method, rows=2048, columns=1024)
    file = shared_packed_file(artifact, tmp_path)
    assert file is not None
    source = PackedFileSource(artifact, file, CPU, resident=resident)
    source.keep([MATRIX])
    (path,) = tmp_path.glob("*.packed")
    made = source.tensor(MATRIX, CPU)
    assert made.sum().isfinite()
    pages = resident_bytes(Path("/proc/self/smaps").read_text(), path)
    if resident:
        assert pages >= 0.9 * path.stat().st_size * 2048 / 2148
    else:
        assert pages <= 1 << 17, "the system maps a few neighbours of each page"
        assert not file.holds(made), "else it would bring its pages back"


def test_mapping_may_be_larger_than_memory(tmp_path: Path) -> None:
    """A read-only mapping takes no memory that the system would have to promise."""
    artifact = make_artifact()
    path = tmp_path / "a.packed"
    write_packed(path, artifact)
    os.truncate(path, 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # a hole behind the tensors
    with PackedFile(path).reading(MATRIX) as weight:
        assert torch.equal(weight.dense(CPU), artifact.tensor(MATRIX))


@pytest.mark.parametrize("obstacle", ["no room", "not ours"])
def test_without_a_place_there_is_no_file_and_the_log_says_so(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "no room":
        monkeypatch.setattr(os, "statvfs", lambda path: type("Full", (), {"f_bavail": 0, "f_frsize": 4096})())
    else:
        tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert shared_packed_file(make_artifact(), tmp_path) is None
    assert "every replica decodes its own" in caplog.text
    assert not list(tmp_path.glob("*.packed*"))


@pytest.mark.skipif(not is_in_memory("/dev/shm"), reason="there is no folder in memory")
def test_file_that_must_not_take_memory_is_not_put_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert shared_packed_file(make_artifact(), "/dev/shm/packed", on_disk=True) is None
    assert "in memory; name another folder in how.local_folder" in caplog.text
    assert not Path("/dev/shm/packed").exists()


def test_small_weights_need_no_file(tmp_path: Path) -> None:
    assert shared.shared_packed_file(make_artifact(), tmp_path / "none", on_disk=False) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.slow  # for a process needs seconds to start
def test_processes_share_the_packing(tmp_path: Path) -> None:
    from tokenbound.compression.decode_pool import run_in_processes

    artifact = make_artifact()
    found = {
        item.name: facts for item, (facts, _) in run_in_processes(packed_file._packed_parts, artifact.parsed.coded, 2)
    }
    assert found == {item.name: packed_file._packed_parts(item)[0] for item in artifact.parsed.coded}
