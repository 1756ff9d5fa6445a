"""A sweep: ordinals, resuming, failures, and tables; trials of every kind on tiny models."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tokenbound.config.run import load_tree, validate
from tokenbound.config.sweep import SweepConfig, expand_entries, remember
from tokenbound.engine.sweep_run import sweep
from tokenbound.errors import IncompleteError, InputError, MismatchError

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TRAINING = {"tokens": 1024, "window": 32, "batch": 4}
Tree = dict[str, Any]


@pytest.fixture
def tree(tmp_path: Path, text_folder: Path, tiny_checkpoint: Path) -> Tree:
    """Two compressions of one checkpoint."""
    return {
        "corpus": {
            "source": "text",
            "paths": [str(text_folder)],
            "tokenizer": "bytes",
            "tokenizer_is": "given",
            "add_bos": False,
            "add_eos": True,
        },
        "evaluate": {
            "model": {"checkpoint": str(tiny_checkpoint), "compress": {"method": "rtn"}},
            "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 4096},
        },
        "trials": {"fine": {"evaluate.model.compress.step": 0.1}, "coarse": {"evaluate.model.compress.step": 1.0}},
        "how": {
            "output": str(tmp_path / "sweep"),
            "cache": str(tmp_path / "prepared"),
            "evaluate": {"replicas": 1},
        },
    }


def config(tree: Tree, **changes: Any) -> SweepConfig:
    return validate(SweepConfig, {**tree, **changes}, origin="test")


def test_one_number_cannot_be_that_of_several_draws(tree: Tree) -> None:
    """The register counts; a number given to all is refused before anything runs, except where all share one claim."""
    numbered = {**tree["evaluate"], "bound": {"trial": 5}}
    assert len(expand_entries(config({**tree, "evaluate": numbered}), {})) == 2
    for shared in (
        {"sample": {"windows": 300}},
        {"bound": {"trial": 5, "prior": "holdout", "holdout_declaration": "no"}},
    ):
        with pytest.raises(
            InputError, match=r"'fine' and 'coarse': evaluate\.bound\.trial 5 cannot number both; set it to"
        ):
            expand_entries(config({**tree, "evaluate": {**numbered, **shared}}), {})


def test_what_is_trained_on_the_tokens_is_no_holdout(tree: Tree) -> None:
    holdout = {"windows": tree["evaluate"]["windows"], "bound": {"prior": "holdout", "holdout_declaration": "nothing"}}
    with pytest.raises(InputError, match="trained on these tokens"):
        expand_entries(config({**tree, "train": {"model": {}}, "trials": {"a": {}}, "evaluate": holdout}), {})


def test_a_trial_keeps_its_configuration(tree: Tree) -> None:
    known = remember(expand_entries(config(tree), {}), {})
    tree["trials"] = {"new": {"evaluate.model.compress.step": 0.5}, **tree["trials"]}
    assert len(expand_entries(config(tree), known)) == 3
    tree["trials"]["fine"] = {"evaluate.model.compress.step": 0.2}
    with pytest.raises(MismatchError, match="'fine'"):
        expand_entries(config(tree), known)


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ({"a/b": {}}, "becomes a folder"),
        ({"a": {"corpus.add_eos": False}}, "must begin with"),
        ({"a": {"train.model": {}}}, "must begin with"),
        ({"a": {"evaluate.model.compress.step": -1}}, "'a'"),
        ({"a": {"evaluate.windows.length.more": 1}}, "not a section"),
    ],
)
def test_a_bad_trial_is_named_before_anything_runs(tree: Tree, trials: Tree, words: str) -> None:
    with pytest.raises(InputError, match=words):
        expand_entries(config(tree, trials=trials), {})


def test_a_trained_model_leaves_no_room_for_another(tree: Tree) -> None:
    train = {"model": MODEL, "training": TRAINING}
    with pytest.raises(InputError, match="what was trained"):
        expand_entries(config(tree, train=train, trials={"a": {}}), {})


def test_adapters_are_compared_on_a_declared_base(tree: Tree, tiny_checkpoint: Path) -> None:
    train = {"base": str(tiny_checkpoint), "family": {"kind": "lora"}, "training": TRAINING}
    tree["evaluate"]["model"] = {"base_is_independent": "random weights"}
    (trial,) = expand_entries(config(tree, train=train, trials={"a": {"train.family.rank": 2}}), {})
    assert trial.run.what.model.base == str(tiny_checkpoint)
    assert trial.run.what.model.artifact == f"{trial.folder}/training/model.tokenbound"
    del tree["evaluate"]["model"]
    with pytest.raises(InputError, match="say how it was fixed"):
        expand_entries(config(tree, train=train, trials={"a": {}}), {})


@pytest.mark.usefixtures("ray_session")
def test_trials_are_certified_compared_and_resumed(tree: Tree, tmp_path: Path) -> None:
    tree["trials"]["broken"] = {"evaluate.sample": {"windows": 10**9, "pilot_windows": 10**8}}
    with pytest.raises(IncompleteError, match=r"1 of 3 trials failed \(broken: .*nothing of \d+ windows to draw"):
        sweep(config(tree))
    output = tmp_path / "sweep"
    rows = json.loads((output / "sweep.json").read_text())
    assert [row["trial"] for row in rows] == ["fine", "coarse"]
    assert rows[0]["artifact_bytes"] > rows[1]["artifact_bytes"]
    numbers = list(csv.DictReader((output / "sweep.csv").open()))
    assert float(numbers[0]["freedman"]) == rows[0]["lines"]["freedman"]
    table, said = (output / "sweep.md").read_text().split("\n\n", 1)
    assert len(table.splitlines()) == 4
    assert "This is the 1st configuration tried on this corpus (counted on this machine; declared)" in said
    assert [row["ordinal"] for row in rows] == [1, 1], "each artifact pays its own code"
    assert "fine" in "".join(ElementTree.parse(output / "sweep.svg").getroot().itertext())
    assert all(f"{name}/run/certificate.json" in (output / "sweep.html").read_text() for name in ("fine", "coarse"))
    before = (output / "fine/run/certificate.json").read_bytes()
    del tree["trials"]["broken"]
    assert [row.to_dict() for row in sweep(config(tree))] == rows
    assert (output / "fine/run/certificate.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_families_are_trained_and_certified_side_by_side(tree: Tree) -> None:
    train = {"model": MODEL, "training": TRAINING, "compress": {"method": "rtn"}}
    del tree["evaluate"]["model"]
    trials = {"dense": {}, "monarch": {"train.family": {"kind": "monarch", "blocks": 2}}}
    how = {**tree["how"], "parallel": 2, "train": {"threads": 1}}
    rows = sweep(config(tree, train=train, trials=trials, how=how))
    assert [row.family for row in rows] == ["dense", "monarch"]
    assert (rows[0].trained_parameters or 0) > (rows[1].trained_parameters or 0) > 0


FAMILIES = Path(__file__).parents[2] / "workflows/configs/families.yaml"


def tiny_families(tmp_path: Path, corpus: Tree) -> Tree:
    """The launch behind the README's table, so small that it teaches nothing."""
    tree = load_tree(FAMILIES)
    train, evaluate = tree["train"], tree["evaluate"]
    train["model"] |= {key: value for key, value in MODEL.items() if key in train["model"]}
    train["training"] |= TRAINING
    train["compress"] |= {"low": 0.01, "high": 1.0, "tries": 2}
    evaluate["windows"] |= {"length": 32, "batch": 4, "shard_tokens": 640}
    evaluate["sample"] = {"windows": 120, "pilot_windows": 40}
    families = [trial["train.family"] for trial in tree["trials"].values() if "train.family" in trial]
    for family in families:
        family |= {key: 2 for key in ("rank", "blocks", "terms") if key in family}
        family |= {"dimension": 100} if "dimension" in family else {}
    how = {"output": str(tmp_path / "families"), "parallel": 2, "train": {"threads": 1}}
    return {**tree, "corpus": corpus, "how": how}


@pytest.mark.slow
def test_the_launch_behind_the_table_survives_a_kill(tree: Tree, tmp_path: Path) -> None:
    tiny = tiny_families(tmp_path, tree["corpus"])
    path, output = tmp_path / "tiny.yaml", tmp_path / "families"
    path.write_text(yaml.safe_dump(tiny, sort_keys=False))
    command = [sys.executable, "-m", "workflows.sweep", str(path)]
    root, environment = FAMILIES.parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
    deadline = time.monotonic() + 600
    while len(done := sorted(output.glob("*/result.json"))) < 3 and time.monotonic() < deadline:
        assert killed.poll() is None, "the launch ended by itself"
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {result: result.stat().st_mtime_ns for result in done}
    assert 3 <= len(before) < len(tiny["trials"])
    assert not (output / "sweep.md").exists()
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert again.returncode == 0, again.stderr
    assert {result: result.stat().st_mtime_ns for result in before} == before
    check_tables(output, again.stdout, list(tiny["trials"]))
    spans = sorted((begun(output / name), (output / name / "result.json").stat().st_mtime) for name in tiny["trials"])
    assert any(second[0] < first[1] - 0.5 for first, second in pairwise(spans)), "no two trials ran side by side"


def begun(trial: Path) -> float:
    """When a trial's training directory was claimed."""
    return (trial / "training/training.json").stat().st_mtime


def check_tables(output: Path, shown: str, trials: list[str]) -> None:
    """Every trial with every column, in the terminal, in Markdown and CSV, and as a point of the plot."""
    rows = {row["trial"]: row for row in json.loads((output / "sweep.json").read_text())}
    assert list(rows) == trials
    head, _, *body = (output / "sweep.md").read_text().splitlines()
    table = list(csv.DictReader((output / "sweep.csv").open()))
    bounds = ("freedman", "azuma", "top-1 error", "top-10 error")
    columns = ("trained parameters", "artifact bytes", "measured", *bounds)
    assert all(column in head and column in shown for column in columns)
    assert [row["trial"] for row in table] == trials == [line.split(" | ")[0].strip("| ") for line in body]
    assert all(float(row[name]) > 0 for row in table for name in bounds)
    assert [row["trial"] for row in table if row["freedman, head"]] == ["dense-head"]
    assert set(trials) <= set(ElementTree.parse(output / "sweep.svg").getroot().itertext())
    assert all(rows[name]["trained_parameters"] > 0 for name in trials)
    assert all(name in shown for name in trials)


def test_a_users_error_in_a_training_worker_comes_out_as_itself() -> None:
    from ray.train import WorkerGroupError

    from tokenbound.engine.cluster.session import plain_errors

    with pytest.raises(InputError, match=r"^lower the rate$"), plain_errors():
        raise WorkerGroupError("long text", {0: RuntimeError("other"), 1: InputError("lower the rate")})
    with pytest.raises(WorkerGroupError), plain_errors():
        raise WorkerGroupError("long text", {0: RuntimeError("other")})
