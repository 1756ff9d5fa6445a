"""Forged tables of decisions in runs whose digests, records and numbers are all consistent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from forgery_support import Forger

from tokenbound.bounds.columns import WindowDecisions
from tokenbound.bounds.decisions import LEVELS, MAX_LEVEL, DecisionTable
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, load_config
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.errors import MismatchError

pytestmark = pytest.mark.slow

Runs = Callable[[str], Forger]
Edit = Callable[[Forger], None]


def retabled(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Edit:
    """Other counts, from the dense table [W, 2, LEVELS] of a shard and its windows' numbers."""

    def edit(forged: Forger) -> None:
        for place, losses in enumerate(forged.losses):
            tables = losses.tables
            assert tables is not None
            window = np.repeat(np.arange(len(losses.window_id)), np.diff(tables.offsets))
            dense = np.zeros((len(losses.window_id), 2 * LEVELS), np.int64)
            dense[window, tables.cell] = tables.count
            dense = change(dense.reshape(-1, 2, LEVELS), losses.window_id).reshape(len(dense), -1)
            rows, cells = np.nonzero(dense)
            offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=1))])
            counts = dense[rows, cells].astype(np.int32)
            forged.losses[place] = replace(losses, tables=WindowDecisions(cells.astype(np.int16), counts, offsets))

    return edit


def surer_by(levels: int, one_in: int = 1) -> Edit:
    """The decisions of one level in so many become so many levels surer of what happened."""

    def change(dense: np.ndarray, _: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(dense)
        for level in range(LEVELS):
            by = levels if level % one_in == 0 else 0
            moved[:, 0, max(level - by, 0)] += dense[:, 0, level]
            moved[:, 1, min(level + by, 2 * MAX_LEVEL)] += dense[:, 1, level]
        return moved

    return retabled(change)


def without_the_worst(dense: np.ndarray, _: np.ndarray) -> np.ndarray:
    """One decision of each window is left out."""
    for window in dense:
        window[1, np.flatnonzero(window[1])[0]] -= 1
    return dense


def other_outcomes(dense: np.ndarray, _: np.ndarray) -> np.ndarray:
    """What went right against the odds went left."""
    for window in dense:
        worst = int(np.flatnonzero(window[1])[0])
        window[0, worst] += window[1, worst]
        window[1, worst] = 0
    return dense


def along_another_tree(forged: Forger) -> None:
    forged.tree["scoring_identity"]["tree"] = {"name": "balanced"}
    forged.reorder()


def without_a_tree(forged: Forger) -> None:
    del forged.tree["scoring_identity"]["tree"]
    forged.reorder()


def without_tables(forged: Forger) -> None:
    forged.losses = [replace(losses, tables=None) for losses in forged.losses]


def with_most(most: int | None) -> Edit:
    """Another largest number of decisions of a window."""

    def edit(forged: Forger) -> None:
        if most is None:
            del forged.tree["corpus"]["max_window_decisions"]
        else:
            forged.tree["corpus"]["max_window_decisions"] = most

    return edit


def with_share_of_decisions(share: float) -> Edit:
    """Another number of decisions of the whole corpus."""

    def edit(forged: Forger) -> None:
        corpus = forged.tree["corpus"]
        corpus["num_decisions"] = round(corpus["num_decisions"] * share)

    return edit


REFUSED_BY_VERIFY: dict[str, tuple[Edit, str]] = {
    "fewer-decisions": (retabled(without_the_worst), "window .* does not have the decisions of its token ids"),
    "other-outcomes": (retabled(other_outcomes), "window .* does not have the outcomes of its token ids"),
    "one-level-surer": (surer_by(1), "the decisions of window .* lose .* nats, its tokens"),
    "another-tree": (along_another_tree, "does not have the decisions|lose"),
    "no-tree": (without_a_tree, "no tree is named, but the methods freedman, bits need one"),
    "no-tables": (without_tables, "holds no tables of decisions"),
    "unknown-tree": (lambda forged: forged.set("scoring_identity.tree", {"name": "huffman"}), "tree.name"),
    "tree-with-a-key": (lambda forged: forged.set("scoring_identity.tree.seed", 1), "unknown key"),
    "damaged-lengths": (
        lambda forged: forged.set("scoring_identity.tree", {"name": "counts", "lengths": "AzB"}),
        "its code lengths are damaged",
    ),
    "lengths-of-another-vocabulary": (
        lambda forged: forged.set("scoring_identity.tree", {"name": "counts", "lengths": "ACCB"}),
        "scoring_identity.tree: a tree needs 257 code lengths",
    ),
    "huge-vocabulary": (
        lambda forged: forged.set("vocab_size", 1 << 60),
        "scoring_identity.tree: a tree of decisions has at most 1,048,576 ids",
    ),
    "small-windows": (with_most(5), "max_window_decisions: the certificate says 5, but a window of shard"),
    "half-of-the-decisions": (with_share_of_decisions(0.5), "corpus.num_decisions: the certificate says .* per token"),
    "no-decisions": (
        lambda forged: forged.tree["corpus"].pop("num_decisions"),
        "corpus.num_decisions: the certificate says None",
    ),
    "no-largest-window": (with_most(None), "max_window_decisions: the certificate says None"),
}


@pytest.mark.parametrize("name", REFUSED_BY_VERIFY)
def test_verify_refuses_forged_decisions(name: str, forger: Runs) -> None:
    edit, reason = REFUSED_BY_VERIFY[name]
    forged = forger("bits")
    edit(forged)
    try:
        forged.seal()
    except Exception:  # even the forger's own arithmetic refuses it; the file is written as it is
        forged.write()
    with pytest.raises(MismatchError, match=reason):
        verify_beside(forged.path)


def test_tables_where_no_line_needs_them_are_refused(forger: Runs) -> None:
    forged, donor = forger("sampled"), forger("bits")
    forged.losses = [replace(ours, tables=each.tables) for ours, each in zip(forged.losses, donor.losses, strict=True)]
    forged.seal()
    with pytest.raises(MismatchError, match="holds tables of decisions, of which the certificate says nothing"):
        verify_beside(forged.path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.to_dict(), None),
        (lambda table: DecisionTable(table.counts * 2, table.num_tokens).to_dict(), "not the sum of its windows"),
        (lambda table: DecisionTable(table.counts, table.num_tokens - 1).to_dict(), "not the sum of its windows"),
        (lambda table: {**table.to_dict(), "counts": table.to_dict()["counts"][:-8]}, "no sound table of decisions"),
        (lambda table: None, "no sound table of decisions"),
    ],
)
def test_a_record_whose_table_is_not_that_of_its_windows_is_refused(
    change: Callable[[DecisionTable], Any], reason: str | None, forger: Runs
) -> None:
    forged = forger("bits")
    place = forged.folder / "shards/00000.json"
    record = json.loads(place.read_text())
    record["evidence"]["decisions"] = change(DecisionTable.from_dict(record["evidence"]["decisions"]))
    place.write_text(json.dumps(record))
    if reason is None:
        verify_beside(forged.path)
        return
    with pytest.raises(MismatchError, match=reason):
        verify_beside(forged.path)


REFUSED_BY_RESCORING: dict[str, tuple[Edit, str]] = {
    "one-level-surer": (surer_by(1, one_in=4), "the levels of .* recorded decisions of outcome . are not the model's"),
    "fewer-decisions": (with_share_of_decisions(0.97), "corpus.num_decisions: the certificate says"),
    "larger-windows": (with_most(10_000), "corpus.max_window_decisions: the certificate says 10000"),
}


@pytest.mark.parametrize("name", REFUSED_BY_RESCORING)
def test_rescoring_refuses_decisions_that_verify_cannot(name: str, forger: Runs) -> None:
    edit, reason = REFUSED_BY_RESCORING[name]
    forged = forger("bits")
    edit(forged)
    forged.seal()
    certificate, run, artifact = verify_beside(forged.path)
    config = load_config(RunConfig, forged.folder / "config.yaml")
    with pytest.raises(MismatchError, match=reason):
        rescore(certificate, config, losses=run, artifact=artifact, windows=40)
