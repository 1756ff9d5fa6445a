"""Artifacts by the names of configs: opened once while they stay as they are, and errors that name the key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tokenbound.compression.artifact import encode_artifact
from tokenbound.config.compress import LosslessSettings
from tokenbound.engine.artifacts import everywhere, named_artifact
from tokenbound.errors import InputError, MismatchError


def make(value: float) -> bytes:
    return encode_artifact({}, {"w": torch.full((3,), value)}, LosslessSettings())


def test_it_is_opened_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.tokenbound"
    path.write_bytes(make(1.0))
    first = named_artifact(str(path))
    assert named_artifact(str(path)) is first
    path.unlink()
    path.write_bytes(make(2.0))
    os.utime(path, ns=(1, 1))
    second = named_artifact(str(path))
    assert second.sha256 != first.sha256
    assert float(second.tensor("w")[0]) == 2.0


def test_errors_name_the_key_and_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^what\.model\.artifact: \S+ does not exist; make it with `tokenbound"):
        named_artifact(str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"^artifact: \S+ does not exist"):
        named_artifact(str(tmp_path), field="artifact")
    path = tmp_path / "a.tokenbound"
    path.write_bytes(make(1.0))
    with pytest.raises(MismatchError, match="has the digest"):
        named_artifact(str(path), sha256="0" * 64)
    with pytest.raises(MismatchError, match="the demo's artifact has the digest"):
        named_artifact("demo", sha256="0" * 64)


def test_the_demo_is_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_bytes(b"another")
    assert everywhere("demo") == "demo"
    assert named_artifact("demo").architecture["model_type"] == "llama"
