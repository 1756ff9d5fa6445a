"""What `inspect` shows of artifacts of every kind."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.weight_delta import adapter_delta, encode_delta, encode_difference, tensors_sha256
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
from tokenbound.demo import demo_artifact
from tokenbound.report.artifact_view import artifact_view

GOLDEN = Path(__file__).parents[1] / "compression" / "golden"
BASE = {
    "layers.0.q.weight": torch.randn(24, 16, generator=torch.Generator().manual_seed(0)),
    "n.weight": torch.ones(16),
}


def shown(data: bytes, *, compare: bool) -> str:
    console = Console(file=StringIO(), record=True, width=200)

    console.print(artifact_view(inspect_artifact(data, compare=compare)))
    return console.export_text()


def delta(kind: str) -> bytes:
    if kind == "difference":
        return encode_difference({}, BASE, {**BASE, "n.weight": BASE["n.weight"] * 2}, RoundToNearestSettings())
    lora = {"layers.0.q.lora_A.weight": torch.ones(2, 16), "layers.0.q.lora_B.weight": torch.ones(24, 2)}
    return encode_delta({}, adapter_delta(BASE, lora, scaling=2.0), LosslessSettings())


@pytest.mark.parametrize("compare", [False, True])
def test_every_codec_has_its_row(compare: bool) -> None:
    data = (GOLDEN / "every_codec.tokenbound").read_bytes()
    text = shown(data, compare=compare)
    assert f"{len(data):,} bytes" in text
    assert "tokenizer" in text
    codecs = text[text.index("\n codec ") :]
    for name in ("exact", "uniform", "groups", "lattice", "float16", "packed"):
        assert len(re.findall(rf"^ ?{name} +[\d,]+ ", codecs, re.MULTILINE)) == 1, name
    assert ("zstd-19" in text) == compare


def test_usual_names_of_layers_stay_whole_in_eighty_columns() -> None:
    console = Console(file=StringIO(), record=True, width=80)
    console.print(artifact_view(inspect_artifact(demo_artifact())))
    assert " model.layers.0.post_attention_layernorm " in console.export_text()


def test_comparisons_fit_a_terminal_of_eighty_columns() -> None:
    console = Console(file=StringIO(), record=True, width=80)
    console.print(artifact_view(inspect_artifact((GOLDEN / "every_codec.tokenbound").read_bytes(), compare=True)))
    text = console.export_text()
    assert "transposed" in text
    assert "…" not in text


def test_a_markov_model_says_what_general_codecs_need() -> None:
    report = inspect_artifact((GOLDEN / "ngrams.tokenbound").read_bytes(), compare=True)
    share = report.codecs["n-grams"]
    assert share.elements > share.num_bytes
    assert share.num_bytes < min(share.gzip_bytes or 0, share.zstd_bytes or 0, share.xz_bytes or 0)


@pytest.mark.parametrize("kind", ["difference", "adapter"])
def test_a_delta_names_its_base(kind: str) -> None:
    text = shown(delta(kind), compare=True)
    assert f"a delta ({kind}) on the base with digest {tensors_sha256(BASE)}" in text


def test_the_smoothing_head_is_a_layer_of_its_own() -> None:
    head = {"tokenbound_smoothing.weight": torch.ones(1, 16), "tokenbound_smoothing.bias": torch.zeros(1)}
    report = inspect_artifact(encode_artifact({}, {**BASE, **head}, RoundToNearestSettings()))
    assert set(report.layers) == {"layers.0", "n", "tokenbound_smoothing"}
    assert report.layers["tokenbound_smoothing"].elements == 17
    assert json.loads(json.dumps(report.to_dict()))["layers"]["layers.0"]["tensors"] == 1
