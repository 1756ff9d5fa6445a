"""From recorded losses to certificate lines: the one reduction that runs, re-claims and verification share.

Two passes. The first merges the shards' evidence and chooses one grid point per line; the second evaluates the
chosen points exactly over every loss. Both map over shards with a function the caller gives: ``map`` in a process,
tasks on a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.columns import Piece, window_sums
from tokenbound.bounds.constants import NLL_TOLERANCE_NATS
from tokenbound.bounds.controls import unexplained_share
from tokenbound.bounds.decisions import DecisionTable
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.bounds.exact import LineSums
from tokenbound.bounds.reduction import Sums, Tunings, certified_lines, loss_paths
from tokenbound.bounds.sampling import SamplingPath
from tokenbound.certificate.decisions import check_tables
from tokenbound.errors import MismatchError
from tokenbound.store.external_losses import iter_foreign
from tokenbound.store.losses import LIST_COLUMNS, PIECE_TOKENS, Losses
from tokenbound.store.run import CommitRecord, RunDirectory

A = TypeVar("A")
B = TypeVar("B")

REDUCED_COLUMNS = ("nll", "entropy", "rank", "alpha", "base_nll", "base_entropy")
"""What the reduction of most claims reads."""


def reduced_columns(claim: Claim) -> tuple[str, ...]:
    """What the reduction of a claim reads."""
    needed = dict.fromkeys(name for bound in claim.bounds if bound.rows(claim) for name in bound.columns)
    return (*REDUCED_COLUMNS, *(name for name in needed if name not in REDUCED_COLUMNS))


FLOAT32_MAX = float(np.finfo(np.float32).max)

RECORDS_PER_TASK = 64
"""Commit records that one task of the first pass merges."""

SHARDS_PER_TASK = 8
"""Shards that one task of the exact pass sums: at 2^19 tokens each, a tenth of a second of work or more."""


class Run(Protocol):
    """Something that maps a function over items, in order."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """The results, in the order of the items."""


class Ledger(Protocol):
    """Recorded losses in shards; picklable."""

    @property
    def num_shards(self) -> int:
        """How many shards, all of them there."""

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence:
        """Mergeable evidence of a shard, as committed with it where that is possible."""

    def pieces(self, shard: int) -> Iterator[Losses]:
        """The checked losses of a shard in consecutive pieces, which depend on the shard alone."""


@dataclass(frozen=True)
class RunLedger:
    """The committed shards 0 .. num_shards - 1 of a run directory."""

    uri: str
    num_shards: int
    scoring_fingerprint: str
    vocab_size: int
    columns: tuple[str, ...] = REDUCED_COLUMNS
    """List columns to read; the reduction needs no others."""
    last_windows: int | None = None
    """Where a sample stops inside its last shard: how many windows of that shard count. None: all of them."""
    earlier_fingerprints: tuple[str, ...] = ()
    """What the run was called while its corpus was shorter; shards committed under these names stand."""
    records: tuple[CommitRecord, ...] | None = None
    """The commit records, where they were read already: what they vouch for cannot change any more."""
    piece_tokens: int = PIECE_TOKENS
    """About how many tokens are held at once."""

    def first_windows(self, count: int) -> RunLedger:
        """The same ledger, cut after this many windows, which lie in its last shard.

        Raises:
            MismatchError: they do not.
        """
        records = [self.record(shard) for shard in range(self.num_shards)]
        last = count - sum(record.windows for record in records[:-1])
        if not 1 <= last <= records[-1].windows:
            raise MismatchError(f"{self.uri}: the first {count} windows do not end in shard {self.num_shards - 1}")
        return replace(self, last_windows=last)

    def record(self, shard: int) -> CommitRecord:
        """A shard's commit record.

        Raises:
            IncompleteError: the shard is not committed.
            MismatchError: it was committed by another run.
        """
        record = RunDirectory(self.uri).record(shard) if self.records is None else self.records[shard]
        if record.scoring_fingerprint not in (self.scoring_fingerprint, *self.earlier_fingerprints):
            raise MismatchError(
                f"{self.uri}: shard {shard} was scored for another model, corpus or protocol; use another run directory"
            )
        return record

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence:
        """Evidence committed with a shard; made again from its losses where it lacks a k."""
        committed = Evidence.from_json(json.dumps(self.record(shard).evidence))
        known = committed.errors is not None and set(top_k) <= set(committed.errors)
        return committed if known else shard_evidence(self.losses(shard), self.vocab_size, top_k)

    def losses(self, shard: int) -> Losses:
        """The losses of a shard, digest and values checked."""
        losses = RunDirectory(self.uri).losses(self.record(shard), self.columns)
        if self.last_windows is not None and shard == self.num_shards - 1:
            losses = losses.head(self.last_windows)
        check_losses(losses, self.vocab_size, f"{self.uri}: shard {shard}")
        return losses

    def pieces(self, shard: int) -> Iterator[Losses]:
        """The same losses in consecutive pieces."""
        pieces = RunDirectory(self.uri).pieces(self.record(shard), self.columns, piece_tokens=self.piece_tokens)
        if self.last_windows is not None and shard == self.num_shards - 1:
            pieces = leading(pieces, self.last_windows)
        for piece in pieces:
            check_losses(piece, self.vocab_size, f"{self.uri}: shard {shard}")
            yield piece


@dataclass(frozen=True)
class ForeignLedger:
    """Losses that another tool recorded: Parquet files with an `nll` column, one shard per row group."""

    groups: tuple[tuple[str, int], ...]
    """(file, row group) of each shard."""
    vocab_size: int
    piece_tokens: int = PIECE_TOKENS
    """About how many tokens are held at once."""

    @property
    def num_shards(self) -> int:
        """Row groups in all."""
        return len(self.groups)

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence:
        """Evidence made from the losses: nothing was committed."""
        return merge_evidence([shard_evidence(piece, self.vocab_size, top_k) for piece in self.pieces(shard)])

    def pieces(self, shard: int) -> Iterator[Losses]:
        """The checked losses of a row group in consecutive pieces."""
        path, group = self.groups[shard]
        for piece in iter_foreign(path, group, piece_tokens=self.piece_tokens):
            check_losses(piece, self.vocab_size, path)
            yield piece


def check_losses(losses: Losses, vocab_size: int, origin: str) -> None:
    """Refuse losses that no scorer of this package records.

    Raises:
        MismatchError: NaN, infinite or negative values in a scored window, a rank or token id outside the vocabulary.
    """
    failed = losses.token_unscored
    keep = slice(None) if failed is None else ~failed
    for name in ("nll", "entropy", "base_nll", "base_entropy"):
        values = getattr(losses, name)
        if values is None or not values[keep].size:
            continue
        lowest, highest = float(values[keep].min()), float(values[keep].max())  # NaN propagates through both
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise MismatchError(f"{origin}: NaN or infinite {name} in a scored window; score it again")
        if highest > FLOAT32_MAX:
            raise MismatchError(f"{origin}: {name} {highest} is no float32; no model gives so many nats")
        if lowest < -NLL_TOLERANCE_NATS:
            raise MismatchError(f"{origin}: negative {name} {lowest}; nats are -ln p, score it again")
    if losses.alpha is not None and losses.alpha[keep].size:
        lowest, highest = float(losses.alpha[keep].min()), float(losses.alpha[keep].max())
        if not 0 < lowest <= highest < 1:
            raise MismatchError(f"{origin}: alpha from {lowest} to {highest} lies outside (0, 1); score it again")
    rank = losses.rank[keep] if losses.rank is not None else np.zeros(0, np.int32)
    if rank.size and not 0 <= rank.min() <= rank.max() < vocab_size:
        raise MismatchError(
            f"{origin}: rank {rank.max()} outside the vocabulary of {vocab_size}; score the shard again"
        )
    if (
        losses.token is not None
        and losses.token.size
        and not 0 <= losses.token.min() <= losses.token.max() < vocab_size
    ):
        raise MismatchError(
            f"{origin}: token id {losses.token.max()} outside the vocabulary of {vocab_size}; use the right "
            "--vocab-size"
        )
    if losses.tables is not None:
        check_tables(losses, origin)


def shard_evidence(losses: Losses, vocab_size: int, top_k: tuple[int, ...]) -> Evidence:
    """Mergeable evidence of a shard; tokens of unscored windows are counted apart."""
    piece = _piece(losses, by_window=True)
    nll, entropy, alpha = piece.finite("nll"), piece.find("entropy"), piece.find("alpha")
    has_base = {"base_nll", "base_entropy"} <= set(piece.columns)
    from_losses = partial(
        Evidence.from_losses,
        nll,
        entropy,
        vocab_size=vocab_size,
        window_lengths=piece.window_lengths,
        worst_case=piece.worst_case,
    )
    tables = piece.decisions
    found = from_losses(
        decisions=None if tables is None else DecisionTable.of_cells(tables.cell, losses.num_tokens, tables.count),
        rank=piece.find("rank"),
        top_k=top_k,
        base_nll=piece.find("base_nll") if has_base else None,
        base_entropy=piece.find("base_entropy") if has_base else None,
    )
    return found if alpha is None else replace(found, head=from_losses(alpha=alpha))


def _piece(losses: Losses, *, by_window: bool) -> Piece:
    """Losses as the bounds read them."""
    failed = losses.token_unscored
    columns = {name: getattr(losses, name) for name in LIST_COLUMNS}
    recorded = {name: column for name, column in columns.items() if column is not None}
    if by_window:
        return Piece(recorded, failed, losses.window_lengths, losses.unscored, losses.tables)
    return Piece(recorded, failed, None, 0 if failed is None else int(failed.sum()), losses.tables)


@dataclass(frozen=True)
class Reduction:
    """What the reducer returns."""

    evidence: Evidence
    """Of the scored tokens; of a sampled run: of the pilot."""
    tunings: tuple[Tuning, ...]
    sums: LineSums
    """Of the lines of the claim's methods."""
    lines: tuple[Line, ...]
    loss_paths: tuple[SamplingPath, ...] = ()
    """Of a sampled run: what each line that bounds the loss could say after every window drawn."""


def reduce_ledger(
    ledger: Ledger,
    claim: Claim,
    sampling: SamplingPlan | None = None,
    *,
    run: Run = map,
    evidence: Evidence | None = None,
) -> Reduction:
    """Choose the grid points, evaluate them exactly, and bound.

    Args:
        ledger: the losses; for a sampled run its shards are consecutive pieces of the drawn order.
        claim: what is claimed.
        sampling: how the windows were drawn; None where every token was scored.
        run: how functions are mapped over shards.
        evidence: that of all shards, where the caller has merged it already; a sampled run takes its pilot's.

    Raises:
        IncompleteError: a shard is not committed.
        MismatchError: losses that are not what was committed.
    """
    if sampling is not None:
        evidence = pilot_evidence(ledger, claim, sampling)
        sampling = _with_share(ledger, sampling)
    elif evidence is None:
        evidence = full_evidence(ledger, claim.top_k, run=run)
    tunings = Tunings.chosen(evidence, claim, sampling)
    sums = _all_sums(ledger, tunings, by_window=sampling is not None, run=run)
    own = sums.lines.select(slice(len(tunings.lines)))
    lines = tuple(certified_lines(tunings, sums, claim, sampling))
    paths = () if sampling is None else tuple(loss_paths(tunings, sums, claim, sampling))
    return Reduction(evidence, tunings.lines, own, lines, paths)


def full_evidence(ledger: Ledger, top_k: tuple[int, ...], *, run: Run = map) -> Evidence:
    """Evidence of every shard, merged."""
    chunks = _chunks(ledger.num_shards, RECORDS_PER_TASK)
    return merge_evidence(list(run(partial(_merged_evidence, ledger, top_k), chunks)))


def _merged_evidence(ledger: Ledger, top_k: tuple[int, ...], shards: range) -> Evidence:
    return merge_evidence([ledger.evidence(shard, top_k) for shard in shards])


def _chunks(items: int, size: int) -> list[range]:
    return [range(start, min(start + size, items)) for start in range(0, items, size)]


def pilot_evidence(ledger: Ledger, claim: Claim, sampling: SamplingPlan) -> Evidence:
    """Evidence of the first windows of the draw, which alone may choose the grid point."""
    draw = chain.from_iterable(map(ledger.pieces, range(ledger.num_shards)))
    pilot = leading(draw, sampling.pilot_units)
    return merge_evidence([shard_evidence(piece, claim.vocab_size, claim.top_k) for piece in pilot])


def _with_share(ledger: Ledger, sampling: SamplingPlan) -> SamplingPlan:
    """The plan, knowing how much of the windows' losses its control variates leave in the pilot."""
    if sampling.controls is None:
        return sampling
    draw = chain.from_iterable(map(ledger.pieces, range(ledger.num_shards)))
    pilot = list(leading(draw, sampling.pilot_units))
    finite = ((np.nan_to_num(piece.nll.astype(np.float64)), piece.window_lengths) for piece in pilot)
    sums = np.concatenate([window_sums(nll, lengths) for nll, lengths in finite])
    lengths = np.concatenate([piece.window_lengths for piece in pilot])
    units = sums - sums.sum() / lengths.sum() * lengths
    return replace(sampling, unexplained=unexplained_share(sampling.controls, units))


def leading(pieces: Iterable[Losses], windows: int) -> Iterator[Losses]:
    """The first windows of consecutive pieces; no piece beyond them is read."""
    for piece in pieces:
        yield piece.head(min(windows, len(piece.window_id)))
        windows -= len(piece.window_id)
        if windows <= 0:
            return


def exact_sums(
    ledger: Ledger,
    tunings: Sequence[Tuning],
    *,
    by_window: bool = False,
    run: Run = map,
    shards_per_task: int = SHARDS_PER_TASK,
) -> LineSums:
    """The exact pass of some lines over every shard, in order.

    Args:
        ledger: the losses.
        tunings: the lines.
        by_window: keep each window's sums as well, for sampled runs.
        run: how functions are mapped over shards.
        shards_per_task: how many shards one call of a mapped function takes.
    """
    return _all_sums(
        ledger, Tunings(tuple(tunings)), by_window=by_window, run=run, shards_per_task=shards_per_task
    ).lines


def _all_sums(
    ledger: Ledger, tunings: Tunings, *, by_window: bool, run: Run, shards_per_task: int = SHARDS_PER_TASK
) -> Sums:
    chunks = _chunks(ledger.num_shards, shards_per_task)
    return Sums.merged(list(run(partial(_merged_sums, ledger, tunings, by_window), chunks)))


def _merged_sums(ledger: Ledger, tunings: Tunings, by_window: bool, shards: range) -> Sums:
    return Sums.merged([_shard_sums(ledger, tunings, by_window, shard) for shard in shards])


def _shard_sums(ledger: Ledger, tunings: Tunings, by_window: bool, shard: int) -> Sums:
    return Sums.merged(
        [Sums.of(tunings, _piece(losses, by_window=by_window)) for losses in ledger.pieces(shard)]
    ).collapsed()
