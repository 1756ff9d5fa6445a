"""A GGUF file is certified from a few lines of config, with the tokenizer inside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from gguf_support import LLAMA, byte_level_keys, llama, llama_tensors, write_gguf

from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, load_config
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.report.terminal import certificate_text


@pytest.mark.usefixtures("ray_session", "scored_here", "compressed_here")
@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_a_gguf_file_gets_a_certificate(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", LLAMA, llama_tensors(llama(), kind), byte_level_keys())
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index}: " + "some words to score " * 40)
    config = {
        "what": {
            "model": {"checkpoint": str(tmp_path), "file": "model.gguf"},
            "corpus": {
                "source": "text",
                "paths": [str(tmp_path / "text")],
                "tokenizer": str(tmp_path / "model.gguf"),
                "tokenizer_is": "given",
                "add_bos": False,
                "add_eos": True,
            },
            "windows": {"length": 32},
        },
        "how": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    paths: list[str] = []
    certificate = evaluate(
        load_config(RunConfig, tmp_path / "run.yaml"), on_certificate=lambda _, path: paths.append(path)
    )
    assert certificate.num_scored_tokens == certificate.num_tokens > 2000
    assert certificate.model["source"] == f"{tmp_path}/model.gguf"
    arithmetic = certificate.model.get("arithmetic")
    assert arithmetic is None if kind == "F16" else "llama.cpp also rounds activations" in arithmetic
    assert ("other kernels may give other losses" in " ".join(certificate_text(certificate).split())) == (kind != "F16")
    stored = sum(tensor.nbytes for tensor in read_checkpoint(tmp_path / "model.gguf").tensors.values())
    assert certificate.artifact_bytes < stored + 2048
    assert torch.isfinite(torch.tensor(certificate.mean_nll_nats))
    verify_beside(paths[0])
