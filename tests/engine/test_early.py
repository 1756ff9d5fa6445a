"""What can be refused without Ray is refused before it starts: ten seconds are long for a misspelt path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tokenbound.config.compress import KfacSettings
from tokenbound.config.run import PretrainConfig, RunConfig, validate
from tokenbound.config.sweep import SweepConfig
from tokenbound.engine import sweep_run as sweep
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.engine.compress import run as compress
from tokenbound.engine.evaluate import run as evaluate
from tokenbound.engine.plan import run as planning
from tokenbound.engine.reevaluate import expand_models, reevaluate
from tokenbound.engine.train import run as train
from tokenbound.errors import InputError, MismatchError, TokenboundError

Tree = dict[str, Any]
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 64}


class NoRay(Executor):
    def session(self, *_: Any) -> AbstractContextManager[None]:
        pytest.fail("Ray was started first")


@pytest.fixture(autouse=True)
def _no_ray() -> Iterator[None]:
    with use_executor(NoRay()):
        yield


@pytest.fixture
def bad(tmp_path: Path, tiny_checkpoint: Path, run_tree: Callable[..., Tree]) -> dict[str, tuple[Tree, str]]:
    """By what is wrong: sections of `what`, and words of the error."""
    corpus = run_tree()["what"]["corpus"]
    copies = {name: tmp_path / name for name in ("cut", "pickled", "encoder")}
    for folder in copies.values():
        shutil.copytree(tiny_checkpoint, folder)
    weights = copies["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copies["pickled"] / "model.safetensors").rename(copies["pickled"] / "pytorch_model.bin")
    (copies["encoder"] / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "junk").write_bytes(b"junk")
    return {
        "no corpus": ({"corpus": {**corpus, "paths": ["absent"]}}, "'absent' does not exist"),
        "no tokenizer": ({"corpus": {**corpus, "tokenizer": "./absent"}}, "absent"),
        "no checkpoint": ({"model": {"checkpoint": "./absent"}}, "absent does not exist"),
        "no artifact": ({"model": {"artifact": "absent"}}, "absent does not exist"),
        "no base": (
            {"model": {"checkpoint": str(tiny_checkpoint), "base": "./absent", "base_is_independent": "x"}},
            "absent",
        ),
        "artifact": ({"model": {"artifact": str(tmp_path / "junk")}}, "junk|magic|artifact"),
        "cut weights": ({"model": {"checkpoint": str(copies["cut"])}}, "not a sound safetensors file"),
        "pickles": ({"model": {"checkpoint": str(copies["pickled"])}}, "pickle weights only"),
        "no causal model": ({"model": {"checkpoint": str(copies["encoder"])}}, "encoder-only"),
        "long windows": ({"windows": {"length": 65}}, "64 positions"),
    }


KINDS = ("no corpus", "no tokenizer", "no checkpoint", "no artifact", "no base", "artifact", "cut weights", "pickles")
KINDS += ("no causal model", "long windows")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind: str, bad: dict[str, tuple[Tree, str]], run_tree: Callable[..., Tree]) -> None:
    sections, words = bad[kind]
    tree = run_tree(**sections)
    with pytest.raises(InputError, match=words):
        evaluate.evaluate(validate(RunConfig, tree, origin="test"))
    with pytest.raises(InputError, match=words):
        reevaluate(expand_models(tree, origin="test"))
    whole = {"corpus": tree["what"].pop("corpus"), "evaluate": tree["what"], "trials": {"one": {}}, "how": tree["how"]}
    with pytest.raises(InputError, match=f"trial 'one': .*({words})"):
        sweep.sweep(validate(SweepConfig, whole, origin="test"))
    assert not (Path(tree["how"]["output"]) / "trials.json").exists(), "a trial that was refused keeps its name"


def test_a_plan_finds_damaged_weights(bad: dict[str, tuple[Tree, str]], run_tree: Callable[..., Tree]) -> None:
    sections, words = bad["cut weights"]
    with pytest.raises(InputError, match=words):
        planning.plan_run(validate(RunConfig, run_tree(**sections), origin="test"), bits_per_weight=4.0)


def test_what_a_plan_needs(bad: dict[str, tuple[Tree, str]], run_tree: Callable[..., Tree]) -> None:
    for kind in ("no corpus", "no checkpoint", "no artifact", "no causal model", "long windows"):
        sections, words = bad[kind]
        with pytest.raises(InputError, match=words):
            planning.plan_run(validate(RunConfig, run_tree(**sections), origin="test"))


def test_a_place_of_another_run(run_tree: Callable[..., Tree], tmp_path: Path) -> None:
    tree = run_tree()
    (tmp_path / "run").mkdir()
    identity = {"protocol": {"length": 8}, "sampled": False, "seed": 0, "pilot_windows": None}
    (tmp_path / "run/plan.json").write_text(json.dumps({"scoring_identity": identity}))
    with pytest.raises(MismatchError, match="holds another run: protocol"):
        evaluate.evaluate(validate(RunConfig, tree, origin="test"))


def test_a_compression(bad: dict[str, tuple[Tree, str]], run_tree: Callable[..., Tree], tiny_checkpoint: Path) -> None:
    settings = compress.LosslessSettings()
    for kind in ("no checkpoint", "cut weights", "pickles", "no causal model"):
        sections, words = bad[kind]
        with pytest.raises(InputError, match=words):
            compress.compress_checkpoint(sections["model"]["checkpoint"], settings, None, out="a")
    for kind in ("no corpus", "no tokenizer", "long windows"):
        sections, words = bad[kind]
        run = validate(RunConfig, run_tree(**sections), origin="test")
        with pytest.raises(InputError, match=words):
            compress.compress_checkpoint(str(tiny_checkpoint), settings, run, out="a")
    with pytest.raises(InputError, match="absent does not exist"):
        compress.compress_checkpoint(str(tiny_checkpoint), settings, None, "./absent", out="a")
    with pytest.raises(InputError, match="needs tokens to calibrate on"):
        compress.compress_checkpoint(str(tiny_checkpoint), KfacSettings(), None, out="a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"hidden_size": 16}}, "model_type"),
        ({"model": {"model_type": "lama"}}, "model_type 'lama' is not known"),
        ({"model": {**SHAPE, "vocab_size": 100}}, "vocab_size 100 is too small"),
        ({"training": {"tokens": 64, "window": 65}}, "64 positions"),
        ({"family": {"kind": "lora", "rank": 99}}, "rank"),
        ({"model": {}, "start": "./absent"}, "absent does not exist"),
        ({"model": {}, "base": "./absent", "family": {"kind": "lora"}}, "absent does not exist"),
    ],
)
def test_a_training(changes: Tree, words: str, run_tree: Callable[..., Tree], tmp_path: Path) -> None:
    tree = run_tree()
    what = {"model": SHAPE, "corpus": tree["what"]["corpus"], "training": {"tokens": 64, "window": 32}, **changes}
    how = {"output": str(tmp_path / "out")}
    with pytest.raises(InputError, match=words):
        train.pretrain(validate(PretrainConfig, {"what": what, "how": how}, origin="test"))
    assert not (tmp_path / "out").exists(), "what was refused leaves the place to the corrected config"
    declared = {"base_is_independent": "older"} if "base" in what else {}
    whole = {"corpus": what.pop("corpus"), "train": what, "evaluate": {"model": declared}, "trials": {"one": {}}}
    whole["how"] = how
    with pytest.raises(TokenboundError, match=f"trial 'one': .*{words}"):
        sweep.sweep(validate(SweepConfig, whole, origin="test"))
