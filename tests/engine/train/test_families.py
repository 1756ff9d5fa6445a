"""Every family through the whole engine: scored, certified, verified, and asked for text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from tokenbound.certificate.verify import verify_beside
from tokenbound.cli import app
from tokenbound.compression.artifact import encode_artifact, parse_artifact
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.config.family import (
    FAMILY,
    KroneckerFamily,
    LoraFamily,
    MonarchFamily,
    SubloraFamily,
)
from tokenbound.config.run import PretrainConfig, RunConfig, validate
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.train.run import pretrain
from tokenbound.errors import InputError
from tokenbound.models.generate import generate_ids
from tokenbound.models.structured.registry import attach_family, trained_tensors

pytestmark = pytest.mark.usefixtures("ray_session")

ARCHITECTURE = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def artifact_of(family: Any) -> bytes:
    """An untrained model of a family; lossy, so that decoding matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ARCHITECTURE))
    attach_family(model, family)
    architecture = {"model_type": "llama", **ARCHITECTURE, FAMILY: family.model_dump(mode="json")}
    return encode_artifact(architecture, trained_tensors(model), RoundToNearestSettings())


def certify(tree: dict[str, Any], tmp_path: Path, artifact: bytes) -> tuple[Any, Path]:
    path = tmp_path / "model.tokenbound"
    path.write_bytes(artifact)
    tree["what"]["model"] = {"artifact": str(path)}
    certificate, run = certified(tree)
    config = validate(RunConfig, tree, origin="test")
    found = rescore(certificate, config, losses=run, artifact=str(path), windows=2)
    assert found.largest_difference_nats < 1e-4
    return certificate, Path(run)


def certified(tree: dict[str, Any]) -> tuple[Any, str]:
    """A run's verified certificate, and its directory."""
    tree["what"]["windows"]["shard_tokens"] = 1 << 14
    paths: list[str] = []
    evaluate(validate(RunConfig, tree, origin="test"), on_certificate=lambda _, name: paths.append(name))
    certificate, run, artifact = verify_beside(paths[0])
    assert Path(artifact).read_bytes() == Path(tree["what"]["model"]["artifact"]).read_bytes()
    return certificate, run


@pytest.mark.parametrize(
    "family",
    [
        KroneckerFamily(terms=2),
        pytest.param(MonarchFamily(blocks=2), marks=pytest.mark.slow),
        pytest.param(LoraFamily(rank=2), marks=pytest.mark.slow),
        pytest.param(SubloraFamily(rank=2, dimension=90), marks=pytest.mark.slow),
    ],
    ids=lambda family: family.kind,
)
@pytest.mark.usefixtures("scored_here")
def test_a_family_is_certified_verified_and_speaks(
    family: Any, run_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    certificate, _ = certify(run_tree(), tmp_path, artifact := artifact_of(family))
    assert certificate.num_scored_tokens == certificate.num_tokens
    assert len(list(generate_ids(artifact, [65], max_new_tokens=4))) == 4


@pytest.mark.usefixtures("scored_here")
def test_a_markov_model_is_counted_certified_and_speaks(
    run_tree: Callable[..., dict[str, Any]], tmp_path: Path, text_folder: Path
) -> None:
    tree = run_tree()
    what = {"family": {"kind": "markov", "order": 2}, "corpus": tree["what"]["corpus"]}
    how = {"output": str(tmp_path / "counted"), "cache": tree["how"]["cache"]}
    config = validate(PretrainConfig, {"what": what, "how": how}, origin="test")
    trained = pretrain(config)
    assert pretrain(config) == trained
    artifact = Path(trained.artifact).read_bytes()
    assert trained.artifact_bytes == len(artifact)
    certificate, _ = certify(tree, tmp_path, artifact)
    # The window's first predictions have shorter contexts than the corpus gave when it was counted.
    assert trained.loss_bits - 0.01 < certificate.mean_nll_bits < trained.loss_bits + 0.5
    text = bytes(generate_ids(artifact, list(b"word"), max_new_tokens=20, temperature=0.5))
    corpus = b" ".join(path.read_bytes() for path in sorted(text_folder.glob("*.txt")))
    assert np.mean([text[i : i + 2] in corpus for i in range(len(text) - 1)]) > 0.8


@pytest.mark.slow
def test_an_adapter_on_a_pretrained_base_is_trained_finished_certified_and_speaks(
    run_tree: Callable[..., dict[str, Any]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    tree = run_tree()
    training = {"tokens": 8192, "window": 32, "batch": 4, "lr": 0.02}
    what = {
        "base": str(tiny_checkpoint),
        "family": {"kind": "lora", "rank": 2},
        "corpus": tree["what"]["corpus"],
        "training": training,
        "compress": {"method": "rtn", "step": 0.25},
        "finish": {**training, "tokens": 2048, "nats_per_bit": 1e-6},
    }
    how = {"output": str(tmp_path / "adapted"), "cache": tree["how"]["cache"]}
    trained = pretrain(validate(PretrainConfig, {"what": what, "how": how}, origin="test"))
    artifact = Path(trained.artifact).read_bytes()
    assert parse_artifact(artifact).base is not None
    assert trained.trained_parameters == 2 * (4 * 2 * 16 + 3 * (16 + 32))  # rank 2 at attention and feed-forward
    assert trained.artifact_bytes < 1500
    declared = {"base": str(tiny_checkpoint), "base_is_independent": "random weights"}
    tree["what"] |= {"model": {"artifact": trained.artifact, **declared}}
    certificate, run = certified(tree)
    relative = next(line for line in certificate.bounds if line["method"] == "relative")
    assert relative["terms"]["excess_empirical"] < -0.1
    config = validate(RunConfig, tree, origin="test")
    found = rescore(certificate, config, losses=run, artifact=trained.artifact, windows=2)
    assert found.largest_difference_nats < 1e-4
    command = ["generate", trained.artifact, "--prompt", "word", "--tokens", "5", "--json"]
    shown = CliRunner().invoke(app, [*command, "--base", str(tiny_checkpoint)], catch_exceptions=False).stdout
    assert len(json.loads(shown)["tokens"]) == 5
    with pytest.raises(InputError, match="give that base"):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": {"kind": "monarch"}}, "`family.kind: lora` trains on it"),
        ({"model": {"model_type": "llama"}}, "leave `model`, `start`, `artifact` out"),
        ({"compress": {"method": "auto"}}, "rtn or lossless"),
        ({"smoothing_head": "azuma"}, "leave `smoothing_head` out"),
        ({"finish": {"tokens": 64}}, "`nats_per_bit`"),
    ],
)
def test_what_an_adapter_cannot_have_is_refused(
    run_tree: Callable[..., dict[str, Any]], changes: dict[str, Any], words: str
) -> None:
    what = {
        "base": "somewhere",
        "family": {"kind": "lora"},
        "corpus": run_tree()["what"]["corpus"],
        "training": {"tokens": 64},
        "compress": {"method": "rtn"},
    }
    with pytest.raises(InputError, match=words):
        validate(PretrainConfig, {"what": {**what, **changes}, "how": {"output": "out"}}, origin="test")


def test_a_network_needs_training_and_a_markov_model_does_not(tmp_path: Path, text_folder: Path) -> None:
    corpus = {
        "source": "text",
        "paths": [str(text_folder)],
        "tokenizer": "bytes",
        "tokenizer_is": "given",
        "add_bos": False,
        "add_eos": True,
    }
    tree = {"what": {"model": {"model_type": "llama"}, "corpus": corpus}, "how": {"output": str(tmp_path)}}
    with pytest.raises(InputError, match="`training` is missing"):
        validate(PretrainConfig, tree, origin="test")
    tree["what"] = {"family": {"kind": "markov", "order": 8}, "corpus": corpus}
    with pytest.raises(InputError, match="with 257 ids it is 6 at most"):
        pretrain(validate(PretrainConfig, tree, origin="test"))


def training_tree(tmp_path: Path, text_folder: Path, family: dict[str, Any], **training: Any) -> dict[str, Any]:
    corpus = {"source": "text", "paths": [str(text_folder)], "tokenizer": "bytes", "tokenizer_is": "given"}
    what = {
        "model": {"model_type": "llama", **{k: v for k, v in ARCHITECTURE.items() if k != "vocab_size"}},
        "family": family,
        "corpus": {**corpus, "add_bos": False, "add_eos": True},
        "training": {"tokens": 512, "window": 32, "batch": 4, **training},
    }
    return {"what": what, "how": {"output": str(tmp_path / "trained"), "cache": str(tmp_path / "prepared")}}


@pytest.mark.parametrize(
    ("family", "training", "words"),
    [
        ({"kind": "lora", "rank": 17}, {}, "family.rank 17 is above the dimension 16"),
        ({"kind": "sublora", "rank": 2, "dimension": 10**6}, {}, "family.dimension"),
        ({"kind": "monarch", "blocks": 3}, {}, "family.blocks 3 does not divide"),
        ({"kind": "kronecker", "terms": 99}, {}, "family.terms 99"),
        ({"kind": "dense"}, {"window": 65}, "64 positions"),
        ({"kind": "dense"}, {"window": 10**6}, "64 positions"),
        ({"kind": "dense", "rank": 1}, {}, "what.family.dense.rank"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_worker_starts(
    tmp_path: Path, text_folder: Path, family: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    tree = training_tree(tmp_path, text_folder, family, **training)
    with pytest.raises(InputError, match=words):
        pretrain(validate(PretrainConfig, tree, origin="test"))
    assert not (tmp_path / "trained/progress.jsonl").exists()


def test_a_corpus_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("too short")
    with pytest.raises(InputError, match=r"has 10 tokens, fewer than what\.training\.window \+ 1 = 33"):
        pretrain(
            validate(PretrainConfig, training_tree(tmp_path, tmp_path / "short", {"kind": "dense"}), origin="test")
        )


@pytest.mark.slow
def test_diverged_training_says_so(tmp_path: Path, text_folder: Path) -> None:
    tree = training_tree(tmp_path, text_folder, {"kind": "dense"}, lr=1e30, embedding_lr=1e30)
    with pytest.raises(InputError, match=r"training diverged at step \d+: .* lower training.lr"):
        pretrain(validate(PretrainConfig, tree, origin="test"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_artifact(tmp_path: Path, text_folder: Path) -> None:
    family = {"kind": "monarch", "blocks": 2}
    trees = [training_tree(tmp_path / str(turn), text_folder, family, optimizer="muon") for turn in range(2)]
    first, second = (pretrain(validate(PretrainConfig, tree, origin="test")) for tree in trees)
    assert Path(first.artifact).read_bytes() == Path(second.artifact).read_bytes()
