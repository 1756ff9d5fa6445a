"""The reduction reads losses in pieces; what it gives does not depend on how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from losses_support import make_losses, with_base

from tokenbound.bounds import (
    Claim,
    RelativeTuning,
    SamplingPlan,
    certify_relative,
    choose_tunings,
    first_prefix,
    line_sums,
    relative_sums,
)
from tokenbound.certificate.reduce import (
    ForeignLedger,
    RunLedger,
    exact_sums,
    full_evidence,
    reduce_ledger,
    reduced_columns,
    shard_evidence,
)
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

V, TOP_K = 257, (1, 10)
LENGTHS = [[40, 0, 7, 33, 64, 64, 1, 64] * 3, [64] * 20, [5, 9]]
TOKENS = sum(map(sum, LENGTHS))
CLAIM = Claim(V, V, 500.0, 0.05, TOKENS, top_k=TOP_K)


def commit(folder: Path, unscored: tuple[int, ...] = (), *, base: bool = False, head: bool = False) -> RunLedger:
    run = RunDirectory(str(folder))
    for number, lengths in enumerate(LENGTHS):
        losses = make_losses(lengths, seed=number, unscored=unscored if number == 1 else ())
        losses = with_base(losses, seed=number) if base else losses
        alpha = np.where(losses.nll > 1, np.float32(0.25), np.float32(2.0**-6))
        losses = replace(losses, alpha=alpha) if head else losses
        run.commit(number, losses, json.loads(shard_evidence(losses, V, TOP_K).to_json()), "f")
    return RunLedger(run.uri, len(LENGTHS), "f", V)


def joined(pieces: Iterable[Losses], name: str) -> Any:
    return np.concatenate([getattr(piece, name) for piece in pieces])


@pytest.mark.parametrize("unscored", [(), (0, 7, 8)])
def test_pieces_are_the_shard(tmp_path: Path, unscored: tuple[int, ...]) -> None:
    ledger = replace(commit(tmp_path, unscored), piece_tokens=100)
    for shard in (0, 1):
        pieces, whole = list(ledger.pieces(shard)), ledger.losses(shard)
        assert len(pieces) > 5
        assert max(piece.num_tokens for piece in pieces) <= 200
        for name in ("window_id", "window_lengths", "unscored", "nll", "entropy", "rank"):
            np.testing.assert_array_equal(joined(pieces, name), getattr(whole, name), err_msg=name)


@pytest.mark.parametrize("by_window", [False, True])
def test_sums_do_not_depend_on_pieces_chunks_or_order(tmp_path: Path, by_window: bool) -> None:
    ledger = commit(tmp_path, unscored=(3,))
    tunings = choose_tunings(full_evidence(ledger, TOP_K), CLAIM)
    whole = exact_sums(ledger, tunings, by_window=by_window)
    backwards = exact_sums(ledger, tunings, by_window=by_window, run=last_first, shards_per_task=1)
    in_pieces = replace(ledger, piece_tokens=100)
    pieces = exact_sums(in_pieces, tunings, by_window=by_window, shards_per_task=1)
    assert whole.shards.tolist() == backwards.shards.tolist()
    np.testing.assert_allclose(pieces.shards, whole.shards, rtol=1e-14)
    assert (pieces.num_tokens, pieces.worst_case_tokens) == (whole.num_tokens, 64)
    assert pieces.mean_nll_nats == pytest.approx(whole.mean_nll_nats, rel=1e-14)
    if by_window:
        np.testing.assert_allclose(pieces.windows, whole.windows, rtol=1e-13)


def last_first(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    return [function(item) for item in reversed(list(items))][::-1]


def test_a_line_is_the_mean_over_every_token(tmp_path: Path) -> None:
    ledger = commit(tmp_path)
    reduction = reduce_ledger(ledger, CLAIM)
    shards = [ledger.losses(shard) for shard in range(3)]
    columns = [joined(shards, name) for name in ("nll", "entropy", "rank")]
    at_once = line_sums(reduction.tunings, *columns)
    for line, printed in enumerate(reduction.lines):
        assert printed.empirical == pytest.approx(at_once.mean(line, "loss"), rel=1e-13)


def test_a_prefix_cuts_the_last_shard(tmp_path: Path) -> None:
    ledger = replace(commit(tmp_path), num_shards=2)
    prefix = ledger.first_windows(24 + 11)
    assert prefix.last_windows == 11
    assert joined(prefix.pieces(1), "nll").tolist() == prefix.losses(1).nll.tolist()
    assert prefix.losses(1).num_tokens == 11 * 64
    assert len(prefix.losses(0).window_id) == 24
    with pytest.raises(MismatchError, match="do not end in shard 1"):
        ledger.first_windows(24)
    with pytest.raises(MismatchError, match="do not end in shard 1"):
        ledger.first_windows(45)


def test_the_pilot_is_the_first_windows_alone(tmp_path: Path) -> None:
    ledger = commit(tmp_path)
    plan = SamplingPlan(num_units=1000, max_unit_tokens=64, pilot_units=30)
    claim = replace(CLAIM, num_tokens=30_000)
    evidence = reduce_ledger(ledger, claim, plan).evidence
    assert evidence.num_tokens == sum(LENGTHS[0]) + 6 * 64
    assert evidence.sums["windows"] == 30


def test_evidence_that_lacks_a_k_is_made_again(tmp_path: Path) -> None:
    ledger = commit(tmp_path)
    evidence = full_evidence(ledger, (1, 100))
    assert evidence.errors is not None
    assert evidence.errors[100] == sum(int((ledger.losses(shard).rank >= 100).sum()) for shard in range(3))


@pytest.mark.parametrize("nested", [False, True])
def test_row_groups_of_other_tools_are_read_in_pieces(tmp_path: Path, nested: bool) -> None:
    nll = np.random.default_rng(0).gamma(1.0, 1.2, 1000).astype(np.float32)
    column = pa.ListArray.from_arrays(pa.array(range(0, 1001, 20)), pa.array(nll)) if nested else pa.array(nll)
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"nll": column}), path)
    ledger = ForeignLedger(((path, 0),), V, piece_tokens=100)
    pieces = list(ledger.pieces(0))
    assert max(piece.num_tokens for piece in pieces) == 100
    assert joined(pieces, "nll").tolist() == nll.tolist()
    evidence = ledger.evidence(0, TOP_K)
    assert evidence.num_tokens == 1000
    assert evidence.mean_nll_nats == pytest.approx(math.fsum(nll.tolist()) / 1000, abs=1e-8)


@pytest.mark.parametrize("unscored", [(), (3,)])
def test_a_delta_has_a_relative_line_evaluated_over_every_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unscored: tuple[int, ...]
) -> None:
    ledger = commit(tmp_path, unscored, base=True)
    claim = replace(CLAIM, num_bases=1)
    line = reduce_ledger(ledger, claim).lines[-1]
    assert line.method == "relative"
    whole = [ledger.losses(shard) for shard in range(ledger.num_shards)]
    kept = [~np.repeat(losses.unscored, losses.window_lengths) for losses in whole]
    columns = [
        np.concatenate([getattr(losses, name)[keep] for losses, keep in zip(whole, kept, strict=True)])
        for name in ("nll", "base_nll", "entropy", "base_entropy")
    ]
    tuning = RelativeTuning.from_dict(line.parameters)
    sums = relative_sums(tuning, *columns, worst_case=64 * len(unscored))
    assert certify_relative(tuning, sums, claim).value == pytest.approx(line.value, rel=1e-12)
    assert reduce_ledger(replace(ledger, piece_tokens=100), claim, run=last_first).lines[-1].value == pytest.approx(
        line.value, rel=1e-12
    )


def test_a_sampled_delta_has_a_relative_line_with_its_own_slack(tmp_path: Path) -> None:
    ledger = commit(tmp_path, base=True).first_windows(46)
    windows = [lengths for shard in LENGTHS for lengths in shard]
    plan = SamplingPlan(num_units=len(windows) + 200, max_unit_tokens=64, pilot_units=20)
    claim = replace(CLAIM, num_tokens=TOKENS + 200 * 64, num_bases=1)
    line = reduce_ledger(ledger, claim, plan).lines[-1]
    assert line.method == "relative"
    assert line.terms["sampling_slack"] > 0
    assert not {"excess", "base_bound"} & set(line.terms), "a sample bounds their sum alone"


@pytest.mark.parametrize(
    ("columns", "claimed", "names"),
    [
        ({}, {}, ["freedman", "azuma"]),
        ({"base": True}, {"num_bases": 1}, ["freedman", "azuma", "relative"]),
        ({"head": True}, {"head_alpha_min": 2.0**-6}, ["freedman", "azuma", *["freedman"] * 3, "azuma"]),
    ],
)
def test_every_line_that_bounds_the_loss_is_watched(
    tmp_path: Path, columns: dict[str, bool], claimed: dict[str, Any], names: list[str]
) -> None:
    """`until_slack_bits` speaks of all of them, each with the slack that it prints."""
    ledger = commit(tmp_path, **columns).first_windows(46)
    plan = SamplingPlan(num_units=sum(map(len, LENGTHS)) + 200, max_unit_tokens=64, pilot_units=20)
    claim = replace(CLAIM, num_tokens=TOKENS + 200 * 64, **claimed)
    reduction = reduce_ledger(ledger, claim, plan)
    lines = [line for line in reduction.lines if line.bounds_risk]
    assert [line.method for line in lines] == names
    printed = [line.terms["sampling_slack"] for line in lines]
    assert [path.slack[-1] for path in reduction.loss_paths] == pytest.approx(printed, rel=1e-12)
    assert (first_prefix(reduction.loss_paths, max(printed) * (1 + 1e-9)) or 0) > 20
    assert first_prefix(reduction.loss_paths, min(path.slack.min() for path in reduction.loss_paths) / 2) is None
    assert reduce_ledger(commit(tmp_path, **columns), replace(claim, num_tokens=TOKENS)).loss_paths == ()


def test_a_delta_without_recorded_base_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="base_nll"):
        reduce_ledger(commit(tmp_path), replace(CLAIM, num_bases=1))


def test_a_document_line_needs_whole_documents_and_their_column(tmp_path: Path) -> None:
    ledger = commit(tmp_path)
    documents = len(np.unique(np.concatenate([ledger_documents(ledger, shard) for shard in range(3)])))
    claim = replace(CLAIM, methods=("azuma", "document"), num_documents=documents)
    line = reduce_ledger(replace(ledger, columns=reduced_columns(claim)), claim).lines[-1]
    assert (line.method, line.parameters["documents"]) == ("document", documents)
    with pytest.raises(InputError, match="`document`"):
        reduce_ledger(ledger, claim)
    plan = SamplingPlan(num_units=300, max_unit_tokens=64, pilot_units=20)
    with pytest.raises(InputError, match="every window scored"):
        reduce_ledger(replace(ledger, columns=reduced_columns(claim)), claim, plan)


def ledger_documents(ledger: RunLedger, shard: int) -> Any:
    return replace(ledger, columns=("document", "nll")).losses(shard).document
