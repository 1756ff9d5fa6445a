"""Runs that record the decisions of every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here_support import scoring_here

from tokenbound.api import Certificate
from tokenbound.bounds.decisions import DecisionTable, TreeChoice, code_lengths
from tokenbound.certificate.decisions import check_decisions
from tokenbound.certificate.external import bound_losses
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.evaluate.stages import ScoreShard
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.run import RunDirectory

pytestmark = pytest.mark.usefixtures("ray_session", "scored_here")

Tree = Callable[..., dict[str, Any]]
METHODS = ["freedman", "kl", "bits"]


def run(tree: dict[str, Any], bound: dict[str, Any] | None = None, **what: Any) -> tuple[Certificate, Path]:
    """A run with the line `bits`, unless the bound is another."""
    tree = {**tree, "what": {**tree["what"], "bound": bound or {"methods": METHODS}, **what}}
    certificate = evaluate(validate(RunConfig, tree, origin="test"))
    return certificate, Path(tree["how"]["output"])


def test_decisions_are_recorded_beside_the_same_losses(run_tree: Tree, tmp_path: Path) -> None:
    tree = run_tree()
    certificate, place = run(tree)
    (line,) = (line for line in certificate.bounds if line["method"] == "bits")
    assert line["value"] > line["empirical"] > 0
    assert certificate.scoring_identity["tree"] == {"name": "zipf"}
    verify_beside(place / "certificate.json")

    other = {**tree, "how": {**tree["how"], "output": str(tmp_path / "plain")}}
    plain, plain_place = run(other, {"methods": METHODS[:2]})
    assert "tree" not in plain.scoring_identity
    ours, theirs = RunDirectory(str(place)), RunDirectory(str(plain_place))
    along = TreeChoice("zipf").over(257)
    total = 0
    for shard in ours.numbered("shards"):
        losses, without = (each.losses(each.record(shard)) for each in (ours, theirs))
        assert without.tables is None
        assert "decisions" not in theirs.record(shard).evidence
        for name in ("nll", "entropy", "rank", "token"):
            np.testing.assert_array_equal(getattr(losses, name), getattr(without, name))
        tables = losses.tables
        assert tables is not None
        table = DecisionTable.of_cells(tables.cell, losses.num_tokens, tables.count)
        assert DecisionTable.from_dict(ours.record(shard).evidence["decisions"]) == table
        assert table.num_decisions == along.num_decisions(losses.token).sum()
        check_decisions(losses, along, "test")
        total += table.num_decisions
    assert line["parameters"]["decisions_per_token"] == pytest.approx(total / certificate.num_tokens)

    size = {"vocab_size": 257, "tokenizer_vocab_size": 257, "code_length_bits": certificate.code_length_bits}
    found = {each["method"]: each for each in bound_losses(str(place), **size)}
    assert [*found] == ["freedman", "azuma", "kl", "bits"]
    assert found["bits"]["empirical"] == pytest.approx(line["empirical"], rel=1e-2)  # one more line is paid for

    for bound in ({"methods": METHODS, "tree": "balanced"}, {"methods": METHODS[:2]}):
        with pytest.raises(MismatchError, match=r"holds another run: tree \({'name': 'zipf'}, now"):
            run(tree, bound)


def test_a_sample_counts_the_decisions_of_its_largest_window(run_tree: Tree) -> None:
    tree = run_tree(sample={"windows": 120, "pilot_windows": 40})
    certificate, place = run(tree)
    verify_beside(place / "certificate.json")
    depth = TreeChoice("zipf").over(257).depth
    whole, _ = run({**tree, "how": {**tree["how"], "output": str(place.parent / "whole")}}, sample={})
    everything = RunDirectory(str(place.parent / "whole"))
    most = total = 0
    for shard in everything.numbered("shards"):
        losses = everything.losses(everything.record(shard))
        most = max(most, int(np.add.reduceat(depth[losses.token], losses.offsets[:-1]).max()))
        total += int(depth[losses.token].sum())
    assert certificate.corpus["max_window_decisions"] == most
    assert certificate.corpus["num_decisions"] == total
    assert not {"max_window_decisions", "num_decisions"} & whole.corpus.keys()
    lines = [{line["method"]: line for line in each.bounds}["bits"] for each in (certificate, whole)]
    assert lines[0]["value"] > lines[1]["value"]
    again = rescore(
        certificate,
        validate(RunConfig, {**tree, "what": {**tree["what"], "bound": {"methods": METHODS}}}, origin="test"),
        losses=str(place),
        artifact=str(place / "artifact.tokenbound"),
        windows=20,
    )
    assert again.windows == 20


def test_a_tree_from_counts_is_named_by_its_code_lengths(run_tree: Tree) -> None:
    tree = run_tree()
    certificate, place = run(tree, {"methods": METHODS, "tree": "counts"})
    verify_beside(place / "certificate.json")
    ids = [RunDirectory(str(place)).losses(RunDirectory(str(place)).record(0)).token]
    chosen = TreeChoice.from_dict(certificate.scoring_identity["tree"])
    assert chosen.name == "counts"
    assert chosen.lengths is not None
    corpus = [*Path(tree["what"]["corpus"]["paths"][0]).glob("*.txt")]
    counts = np.bincount([i for path in corpus for i in [*path.read_bytes(), 256]], minlength=257)
    assert chosen.lengths == code_lengths(counts)
    assert ids[0].size
    (line,) = (line for line in certificate.bounds if line["method"] == "bits")
    entropy = -(counts[counts > 0] / counts.sum() * np.log2(counts[counts > 0] / counts.sum())).sum()
    assert line["parameters"]["decisions_per_token"] < entropy + 1


def test_a_tree_without_the_line_is_refused(run_tree: Tree) -> None:
    with pytest.raises(InputError, match="`tree: balanced` is that of the method bits; add it to `methods`"):
        run(run_tree(), {"tree": "balanced", "methods": ["freedman"]})


class LosesAWindow(ScoreShard):
    """A scorer whose first window of each shard has no finite loss."""

    def __call__(self, row: Any) -> Any:
        scored = super().__call__(row)
        first = np.arange(len(scored["nll"])) < scored["lengths"][0]
        unscored = np.arange(len(scored["lengths"])) == 0
        return {**scored, "unscored": unscored, "nll": np.where(first, np.nan, scored["nll"])}


def test_a_window_without_a_loss_keeps_its_decisions(run_tree: Tree) -> None:
    tree = run_tree()
    bound = {"methods": METHODS, "unscorable": "worst_case"}
    with scoring_here(LosesAWindow):
        certificate, place = run(tree, bound)
    assert certificate.num_worst_case_tokens > 0
    verify_beside(place / "certificate.json")
    config = validate(RunConfig, {**tree, "what": {**tree["what"], "bound": bound}}, origin="test")
    artifact = str(place / "artifact.tokenbound")
    rescore(certificate, config, losses=str(place), artifact=artifact, windows=10_000)
    ledger = RunDirectory(str(place))
    losses = ledger.losses(ledger.record(0))
    assert losses.unscored[0]
    assert losses.tables.offsets[1] > 0


def test_a_tree_from_counts_stays_when_the_corpus_grows(run_tree: Tree, tmp_path: Path) -> None:
    tree, folder = run_tree(), tmp_path / "growing"
    folder.mkdir()
    (folder / "a.txt").write_text("one and two and three " * 300)
    tree["what"]["corpus"]["paths"] = [str(folder)]
    bound = {"methods": METHODS, "tree": "counts"}
    first, _ = run(tree, bound)
    (folder / "b.txt").write_text("four AND FIVE " * 300)
    second, place = run(tree, bound)
    assert second.earlier_fingerprints == [first.scoring_fingerprint]
    assert second.scoring_identity["tree"] == first.scoring_identity["tree"]
    verify_beside(place / "certificate.json")
    line, grown = (next(line for line in each.bounds if line["method"] == "bits") for each in (first, second))
    assert grown["parameters"]["decisions_per_token"] > line["parameters"]["decisions_per_token"]


@pytest.mark.slow
def test_of_a_delta_the_model_has_decisions_and_its_base_none(run_tree: Tree, tiny_checkpoint: Path) -> None:
    base = {"base": str(tiny_checkpoint), "base_is_independent": "made before", "checkpoint": str(tiny_checkpoint)}
    certificate, place = run(run_tree(), model=base)
    assert [line["method"] for line in certificate.bounds if line["top_k"] is None] == ["freedman", "relative", "bits"]
    verify_beside(place / "certificate.json")
