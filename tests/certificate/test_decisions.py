"""Tables of decisions: how they are made, and which are those of their tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_support import make_losses

from tokenbound.bounds.columns import WindowDecisions
from tokenbound.bounds.decisions import CELLS, LEVEL_STEP, LEVELS, MAX_LEVEL, DecisionTable, decision_tree, level_of
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.certificate.decisions import check_decisions, check_tables, window_decisions
from tokenbound.certificate.reduce import check_losses, shard_evidence
from tokenbound.errors import MismatchError
from tokenbound.store.losses import Losses

TREE = decision_tree("zipf", 257)


def scored(lengths: list[int], seed: int = 0, unscored: tuple[int, ...] = ()) -> Losses:
    """Losses of random predictions, and the tables of their decisions, as a head would give them."""
    losses = make_losses(lengths, seed=seed, unscored=unscored)
    generator = np.random.default_rng(seed)
    outcomes = TREE.outcomes(losses.token).astype(np.int64)
    odds = generator.normal(0, 3, outcomes.shape)
    lost = np.where(outcomes < 0, 0, np.logaddexp(0, np.where(outcomes == 1, -odds, odds)))
    cells = np.where(outcomes < 0, -1, outcomes * LEVELS + level_of(odds) + MAX_LEVEL).astype(np.int16)
    padded = np.full((len(lengths), max(lengths), cells.shape[1]), -1, np.int16)
    padded[np.arange(max(lengths)) < np.array(lengths)[:, None]] = cells
    nll = np.where(np.isnan(losses.nll), np.nan, lost.sum(-1)).astype(np.float32)
    return replace(losses, nll=nll, tables=window_decisions(padded))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 130), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_tables_count_every_cell(windows: int, length: int, seed: int) -> None:
    cells = np.random.default_rng(seed).integers(-1, CELLS, (windows, length, 3)).astype(np.int16)
    tables = window_decisions(cells)
    assert len(tables.offsets) == windows + 1
    for window, (start, stop) in enumerate(zip(tables.offsets, tables.offsets[1:], strict=False)):
        found, counts = np.unique(cells[window][cells[window] >= 0], return_counts=True)
        np.testing.assert_array_equal(tables.cell[start:stop], found)
        np.testing.assert_array_equal(tables.count[start:stop], counts)


@pytest.mark.parametrize("seed", range(5))
def test_honest_tables_pass(seed: int) -> None:
    for unscored in ((), (1,), (0, 1, 2)):
        losses = scored([7, 30, 1], seed, unscored)
        check_decisions(losses, TREE, "here")
        check_decisions(replace(losses, token=None), TREE, "here")
        check_losses(losses, 257, "here")


def test_log_odds_on_the_edge_of_a_level_pass() -> None:
    """Where every decision is rounded the same way, as of a model that counts, the chain rule holds to the last."""
    losses = scored([40])
    outcomes = TREE.outcomes(losses.token).astype(np.int64)
    for side in (-1, 1):
        odds = (np.full(outcomes.shape, -12.0) + side * (0.5 - 1e-9)) * LEVEL_STEP
        lost = np.where(outcomes < 0, 0, np.logaddexp(0, np.where(outcomes == 1, -odds, odds))).sum(-1)
        cells = np.where(outcomes < 0, -1, outcomes * LEVELS + level_of(odds) + MAX_LEVEL).astype(np.int16)
        check_decisions(replace(losses, nll=lost.astype(np.float32), tables=window_decisions(cells[None])), TREE, "x")


def test_a_deep_token_frees_its_window_from_the_chain_rule_alone() -> None:
    losses = scored([10, 10])
    nll = losses.nll.copy()
    nll[3] = 75.0
    check_decisions(replace(losses, nll=nll), TREE, "here")
    nll[3] = 55.0
    with pytest.raises(MismatchError, match="the decisions of window 0 lose"):
        check_decisions(replace(losses, nll=nll), TREE, "here")


def changed(losses: Losses, **fields: Any) -> Losses:
    assert losses.tables is not None
    return replace(losses, tables=WindowDecisions(**{**losses.tables.__dict__, **fields}))


def test_tables_that_no_scorer_writes_are_refused() -> None:
    losses = scored([5, 6])
    tables = losses.tables
    assert tables is not None
    twice = tables.cell.copy()
    twice[1] = twice[0]
    other = tables.count.copy()
    other[0] = 0
    beyond = tables.cell.copy()
    beyond[-1] = CELLS
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cell": twice}, "do not ascend"),
        ({"count": other}, "counts below 1"),
        ({"cell": beyond}, r"cells outside \[0, 510\)"),
        ({"cell": tables.cell - 300}, "cells outside"),
        ({"offsets": tables.offsets[[0, 2]]}, "not every window"),
        ({"offsets": tables.offsets[[0, 0, 2]]}, "window with tokens has no decisions|do not ascend"),
    ]
    for fields, reason in cases:
        with pytest.raises(MismatchError, match=f"here: .*({reason})"):
            check_tables(changed(losses, **fields), "here")
        with pytest.raises(MismatchError):
            check_losses(changed(losses, **fields), 257, "here")


def test_tables_of_other_tokens_are_refused() -> None:
    losses = scored([30, 30])
    tables = losses.tables
    assert tables is not None
    with pytest.raises(MismatchError, match="window 0 does not have the decisions"):
        check_decisions(changed(losses, count=tables.count + 1), TREE, "here")
    with pytest.raises(MismatchError, match=r"does not have the (decisions|outcomes)"):
        check_decisions(losses, decision_tree("balanced", 257), "here")
    with pytest.raises(MismatchError, match="the decisions of window 0 lose"):
        check_decisions(replace(losses, nll=losses.nll * np.float32(0.9)), TREE, "here")


def test_the_evidence_of_shards_is_the_sum_of_their_windows() -> None:
    parts = [scored([20, 3, 9], seed, unscored=(1,)) for seed in range(4)]
    found = [shard_evidence(part, 257, (1,)) for part in parts]
    merged = merge_evidence(found)
    assert merged.decisions == merge_evidence([merge_evidence(found[2:]), merge_evidence(found[:2])]).decisions
    tables = [part.tables for part in parts]
    cells = np.concatenate([table.cell for table in tables if table is not None])
    counts = np.concatenate([table.count for table in tables if table is not None])
    assert merged.decisions == DecisionTable.of_cells(cells, 4 * 32, counts)
    assert Evidence.from_json(merged.to_json()).decisions == merged.decisions
    assert len(found[0].to_json()) < 10_000
    with pytest.raises(MismatchError, match="only some shards have tables of decisions"):
        merge_evidence([found[0], shard_evidence(replace(parts[1], tables=None), 257, (1,))])
