"""Calibration with one layer in memory collects what that of a whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenbound.compression.calibration import Batch, Calibration, MatrixSums, collect_calibration
from tokenbound.models.blocks import build_chain
from tokenbound.models.build import trained_form
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.layer_calibration import calibrate_by_layers
from tokenbound.models.memory import random_model
from tokenbound.models.sources import MapSource

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def some_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(97, (count, 3, 24), generator=generator)
    masks = torch.rand(count, 3, 24, generator=generator) < 0.9
    return list(zip(ids, masks, strict=True))


@pytest.mark.parametrize("held_bytes", [1 << 30, 1], ids=["all at once", "one by one"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_whole_model(kind: str, held_bytes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    random_model({"model_type": kind, **SHAPE, **KINDS[kind]}, torch.float32).save_pretrained(tmp_path / "model")
    found = read_checkpoint(str(tmp_path / "model"))
    model = trained_form(found.architecture, found.tensors)
    expected = collect_calibration(model, some_batches(5), seed=3)
    chain = build_chain(found.architecture, MapSource(found.tensors), dtype=torch.float32, device="cpu")
    chain.held_bytes = held_bytes
    total, most = Calibration(), 0

    def keep(sums: dict[str, MatrixSums]) -> None:
        nonlocal most
        most = max(most, len(sums))
        total.add(Calibration(0, sums))

    states = tmp_path / "states"
    states.mkdir()
    rest = calibrate_by_layers(chain, some_batches(5), keep, folder=states, seed=3)
    assert not rest.matrices
    assert not [*states.iterdir()]
    assert (rest.tokens, rest.squares) == (expected.tokens, pytest.approx(expected.squares, rel=1e-6))
    assert total.matrices.keys() == expected.matrices.keys()
    assert most < len(expected.matrices) / 2
    for name, sums in expected.matrices.items():
        ours = total.matrices[name]
        assert (ours.seen, ours.transposed, ours.is_embedding) == (sums.seen, sums.transposed, sums.is_embedding), name
        torch.testing.assert_close(ours.rows, sums.rows, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(ours.moment, sums.moment, rtol=1e-5, atol=1e-9)
    assert all(p.is_meta for block in chain.blocks for p in block.module.parameters() if p.ndim > 1)
