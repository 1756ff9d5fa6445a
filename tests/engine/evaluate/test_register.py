"""What is tried on a corpus is counted and paid for, by whatever command; repeating it is free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from here_support import scoring_here

from tokenbound.api import Certificate
from tokenbound.bounds.codes import elias_delta_bits
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.reevaluate import expand_models, reevaluate
from tokenbound.errors import InputError
from tokenbound.report.words import remarks, selection_sentence

Tree = Callable[..., dict[str, Any]]
SAMPLE = {"windows": 24, "pilot_windows": 8}
LINES = {"methods": ["azuma"]}

pytestmark = pytest.mark.usefixtures("ray_session")


def run(tree: dict[str, Any]) -> Certificate:
    paths: list[str] = []
    with scoring_here():
        certificate = evaluate(
            validate(RunConfig, tree, origin="test"), on_certificate=lambda _, path: paths.append(path)
        )
    verify_beside(paths[0])
    return certificate


def test_every_redraw_is_the_next_trial(run_tree: Tree, other_checkpoint: Path, text_folder: Path) -> None:
    """Another seed, artifact, pilot, protocol, claim, or another name of the same corpus; none of them is free."""
    other = {"checkpoint": str(other_checkpoint)}
    corpus = {**run_tree()["what"]["corpus"], "paths": [f"{text_folder}/*.txt"]}
    windows = {**run_tree()["what"]["windows"], "length": 16}
    tries = [
        run_tree("first", sample=SAMPLE, bound=LINES),
        run_tree("seed", sample={**SAMPLE, "seed": 1}, bound=LINES),
        run_tree("artifact", sample=SAMPLE, bound=LINES, model=other),
        run_tree("pilot", sample={**SAMPLE, "pilot_windows": 9}, bound=LINES),
        run_tree("protocol", sample=SAMPLE, bound=LINES, windows=windows),
        run_tree("named", sample={**SAMPLE, "seed": 2}, bound=LINES, corpus=corpus),
        run_tree("first", sample=SAMPLE, bound={"methods": ["azuma"], "delta": 0.04}),
    ]
    found = [run(tree) for tree in tries]
    assert [certificate.trial for certificate in found] == [1, 2, 3, 4, 5, 6, 7]
    first, second = found[:2]
    assert second.tune_bits is not None
    assert first.tune_bits is not None
    assert second.tune_bits - first.tune_bits >= elias_delta_bits(2) - elias_delta_bits(1) - 3, "and azuma's j"
    assert selection_sentence(second) == (
        "This is the 2nd configuration tried on a sample of this corpus (counted on this machine; declared), drawn "
        "with seed 1; its lines were named before scoring."
    )
    longer = run(run_tree("first", sample={**SAMPLE, "windows": 40}, bound=LINES))
    assert longer.trial == 1, "where scoring stops is no part of a configuration"
    elsewhere = run(run_tree("elsewhere", sample={**SAMPLE, "seed": 1}, bound=LINES))
    assert (elsewhere.trial, elsewhere.bound_bits) == (2, second.bound_bits), "the same configuration again"
    (below,) = [run_tree("below", sample={**SAMPLE, "seed": 9}, bound={**LINES, "trial": 7})]
    with pytest.raises(InputError, match=r"what\.bound\.trial: 7 is below 8, .*/prepared/draws/.* set it to auto"):
        run(below)
    assert not Path(below["how"]["output"], "plan.json").exists(), "it was refused before anything was written"
    below["what"]["bound"]["trial"] = 12
    asked = run(below)
    assert (asked.trial, asked.selection and asked.selection.counted_by) == (12, "config")
    assert "(numbered by its config; declared)" in selection_sentence(asked)


def test_of_a_whole_corpus_only_claims_are_counted(run_tree: Tree, other_checkpoint: Path, tmp_path: Path) -> None:
    first = run(run_tree("first", bound=LINES))
    other = run(run_tree("other", bound=LINES, model={"checkpoint": str(other_checkpoint)}))
    assert (first.trial, other.trial) == (1, 1), "every artifact pays its own code"
    assert "where other models and protocols do not count" in selection_sentence(first)
    second = run(run_tree("first", bound={"methods": ["azuma"], "delta": 0.01}))
    assert second.trial == 2, "a second claim on the same losses"
    assert (tmp_path / "first" / f"certificate-{second.claim_fingerprint[:8]}.json").exists()
    assert run(run_tree("first", bound={"methods": ["azuma"], "delta": 0.01})).trial == 2
    assert json.loads((tmp_path / "first" / "certificate.json").read_text())["trial"] == 1
    holdout = {**LINES, "prior": "holdout", "holdout_declaration": "nothing"}
    models: list[dict[str, Any]] = [{}, {"model": {"checkpoint": str(other_checkpoint)}}]
    held = [run(run_tree(f"holdout-{place}", bound=holdout, **model)) for place, model in enumerate(models)]
    assert [certificate.trial for certificate in held] == [3, 4], "one holdout for several models"
    assert "tried on this holdout (counted on this machine; declared)" in selection_sentence(held[0])


def test_a_schedule_and_runs_by_hand_share_one_count(run_tree: Tree) -> None:
    run(run_tree("by-hand", sample=SAMPLE, bound=LINES))
    tree = run_tree("nightly", sample=SAMPLE, bound=LINES)
    with scoring_here():
        (entry,) = reevaluate(expand_models(tree, origin="test"))
        assert (entry.trial, entry.evaluation) == (2, 1)
        assert "the 2nd configuration tried on a sample of this corpus" in entry.selection
        assert reevaluate(expand_models(tree, origin="test")) == [], "nothing new"
    assert run(run_tree("by-hand", sample={**SAMPLE, "seed": 5}, bound=LINES) | {"how": _beside(tree)}).trial == 3


def _beside(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree["how"], "output": tree["how"]["output"] + "-beside"}


def test_a_grown_corpus_by_hand_is_counted_on(run_tree: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "growing"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("some words that are repeated " * 150 + name)
        corpus = {**run_tree()["what"]["corpus"], "paths": [str(folder)]}
        drawn = run(run_tree(f"run-{name}", sample=SAMPLE, bound=LINES, corpus=corpus))
    assert (drawn.corpus["segments"], drawn.trial) == (2, 2)


def _say_what_scored(path: Path, environment: dict[str, str]) -> None:
    """As a machine with other libraries would have committed this shard."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": environment}))


def test_shards_say_what_scored_them(run_tree: Tree, tmp_path: Path) -> None:
    tree = run_tree(bound=LINES)
    first = run(tree)
    (found,) = first.environment["scored_by"]
    assert found["shards"] == first.num_shards
    assert {"tokenbound", "torch", "transformers", "numpy", "python", "device", "compile"} < set(found)
    record = json.loads((tmp_path / "run" / "shards" / "00001.json").read_text())["environment"]
    assert {"shards": found["shards"], **record} == {**found, "threads": record["threads"]}
    _say_what_scored(tmp_path / "run" / "shards" / "00001.json", {**record, "torch": "9.9"})
    mixed = run(tree)
    assert mixed.bound_bits == first.bound_bits
    assert [entry["shards"] for entry in mixed.environment["scored_by"]] == [first.num_shards - 1, 1]
    page = (tmp_path / "run" / "report.html").read_text()
    others = first.num_shards - 1
    said = f"Not all shards were scored in the same environment: {others} by torch {record['torch']}; 1 by torch 9.9."
    assert said in page
    assert remarks(mixed)[1:] == [said]
    assert remarks(first)[1:] == []
