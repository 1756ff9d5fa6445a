"""From recorded losses to certificate lines: the one reduction that runs, re-claims and verification share.

Two passes. The first merges the shards' evidence and chooses one grid point per line; the second evaluates the
chosen points exactly over every loss. Both map over shards with a function the caller gives: ``map`` in a process,
tasks on a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.certify import certify
from tokenbound.bounds.choice import choose_tunings
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.constants import NLL_TOLERANCE_NATS
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.bounds.exact import LineSums, line_sums, merge_sums
from tokenbound.errors import MismatchError
from tokenbound.store.foreign import read_foreign
from tokenbound.store.losses import Losses
from tokenbound.store.run import CommitRecord, RunDirectory

A = TypeVar("A")
B = TypeVar("B")

REDUCED_COLUMNS = ("nll", "entropy", "rank", "alpha")
"""What the reduction reads."""

RECORDS_PER_TASK = 64
"""Commit records that one task of the first pass merges."""


class Run(Protocol):
    """Something that maps a function over items, in order."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """The results, in the order of the items."""


class Ledger(Protocol):
    """Recorded losses in shards; picklable."""

    @property
    def num_shards(self) -> int:
        """How many shards, all of them there."""

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence | None:
        """Evidence committed with a shard; None where there is none for these ks."""

    def losses(self, shard: int) -> Losses:
        """The checked losses of a shard."""


@dataclass(frozen=True)
class RunLedger:
    """The committed shards 0 .. num_shards - 1 of a run directory."""

    uri: str
    num_shards: int
    scoring_fingerprint: str
    vocab_size: int
    columns: tuple[str, ...] = REDUCED_COLUMNS
    """List columns to read; the reduction needs no others."""
    num_windows: int | None = None
    """Where a sample stops inside its last shard: how many windows count in all."""

    def record(self, shard: int) -> CommitRecord:
        """A shard's commit record.

        Raises:
            IncompleteError: the shard is not committed.
            MismatchError: it was committed by another run.
        """
        record = RunDirectory(self.uri).record(shard)
        if record.scoring_fingerprint != self.scoring_fingerprint:
            raise MismatchError(
                f"{self.uri}: shard {shard} was scored for another model, corpus or protocol; use another run directory"
            )
        return record

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence | None:
        """Evidence committed with a shard."""
        evidence = Evidence.from_json(json.dumps(self.record(shard).evidence))
        known = evidence.errors is not None and set(top_k) <= set(evidence.errors)
        return evidence if known else None

    def losses(self, shard: int) -> Losses:
        """The losses of a shard, digest and values checked."""
        losses = RunDirectory(self.uri).losses(self.record(shard), self.columns)
        if self.num_windows is not None and shard == self.num_shards - 1:
            before = sum(self.record(earlier).windows for earlier in range(shard))
            losses = losses.head(min(len(losses.window_id), self.num_windows - before))
        check_losses(losses, self.vocab_size, f"{self.uri}: shard {shard}")
        return losses


@dataclass(frozen=True)
class ForeignLedger:
    """Losses that another tool recorded: Parquet files with an `nll` column, one shard per row group."""

    pieces: tuple[tuple[str, int], ...]
    """(file, row group) of each shard."""
    vocab_size: int

    @property
    def num_shards(self) -> int:
        """Row groups in all."""
        return len(self.pieces)

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence | None:
        """Nothing was committed."""
        return None

    def losses(self, shard: int) -> Losses:
        """The checked losses of a row group."""
        path, group = self.pieces[shard]
        losses = read_foreign(path, group)
        check_losses(losses, self.vocab_size, path)
        return losses


def check_losses(losses: Losses, vocab_size: int, origin: str) -> None:
    """Refuse losses that no scorer of this package records.

    Raises:
        MismatchError: NaN, infinite or negative values in a scored window, a rank or token id outside the vocabulary.
    """
    failed = losses.token_unscored
    keep = slice(None) if failed is None else ~failed
    for name, values in (("nll", losses.nll), ("entropy", losses.entropy)):
        if values is None or not values[keep].size:
            continue
        lowest, highest = float(values[keep].min()), float(values[keep].max())  # NaN propagates through both
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise MismatchError(f"{origin}: NaN or infinite {name} in a scored window; score it again")
        if lowest < -NLL_TOLERANCE_NATS:
            raise MismatchError(f"{origin}: negative {name} {lowest}; nats are -ln p, score it again")
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


def shard_evidence(losses: Losses, vocab_size: int, top_k: tuple[int, ...]) -> Evidence:
    """Mergeable evidence of a shard; tokens of unscored windows are counted apart."""
    return Evidence.from_losses(
        *_finite(losses),
        vocab_size=vocab_size,
        top_k=top_k,
        window_lengths=losses.window_lengths,
        worst_case=losses.unscored,
    )


class _Columns(NamedTuple):
    nll: NDArray[Any]
    entropy: NDArray[Any] | None
    rank: NDArray[Any] | None
    alpha: NDArray[Any] | None


def _finite(losses: Losses) -> _Columns:
    """The columns that the bounds read, without the tokens of unscored windows."""
    failed = losses.token_unscored
    kept = slice(None) if failed is None else ~failed
    columns = (losses.entropy, losses.rank, losses.alpha)
    return _Columns(losses.nll[kept], *(None if column is None else column[kept] for column in columns))


@dataclass(frozen=True)
class Reduction:
    """What the reducer returns."""

    evidence: Evidence
    """Of the scored tokens; of a sampled run: of the pilot."""
    tunings: tuple[Tuning, ...]
    sums: LineSums
    lines: tuple[Line, ...]


def reduce_ledger(
    ledger: Ledger,
    claim: Claim,
    sampling: SamplingPlan | None = None,
    *,
    run: Run = map,
    trust_evidence: bool = True,
    evidence: Evidence | None = None,
) -> Reduction:
    """Choose the grid points, evaluate them exactly, and bound.

    Args:
        ledger: the losses; for a sampled run its shards are consecutive pieces of the drawn order.
        claim: what is claimed.
        sampling: how the windows were drawn; None where every token was scored.
        run: how functions are mapped over shards.
        trust_evidence: take the evidence of the commit records; otherwise build it again from the losses.
        evidence: that of all shards, where the caller has merged it already; not for a sampled run.

    Raises:
        IncompleteError: a shard is not committed.
        MismatchError: losses that are not what was committed.
    """
    if sampling is not None:
        evidence = pilot_evidence(ledger, claim, sampling)
    elif evidence is None:
        evidence = full_evidence(ledger, claim.vocab_size, claim.top_k, run=run, trust=trust_evidence)
    tunings = choose_tunings(evidence, claim, sampling)
    sums = merge_sums(list(run(partial(shard_sums, ledger, tunings, sampling is not None), range(ledger.num_shards))))
    return Reduction(evidence, tunings, sums, certify(tunings, sums, claim, sampling))


def full_evidence(
    ledger: Ledger, vocab_size: int, top_k: tuple[int, ...], *, run: Run = map, trust: bool = True
) -> Evidence:
    """Evidence of every shard, merged."""
    shards = range(ledger.num_shards)
    chunks = (
        [shards[i : i + RECORDS_PER_TASK] for i in range(0, len(shards), RECORDS_PER_TASK)]
        if trust
        else [[s] for s in shards]
    )
    return merge_evidence(list(run(partial(_chunk_evidence, ledger, vocab_size, top_k, trust), chunks)))


def _chunk_evidence(
    ledger: Ledger, vocab_size: int, top_k: tuple[int, ...], trust: bool, shards: Sequence[int]
) -> Evidence:
    def one(shard: int) -> Evidence:
        committed = ledger.evidence(shard, top_k) if trust else None
        return committed or shard_evidence(ledger.losses(shard), vocab_size, top_k)

    return merge_evidence([one(shard) for shard in shards])


def pilot_evidence(ledger: Ledger, claim: Claim, sampling: SamplingPlan) -> Evidence:
    """Evidence of the first windows of the draw, which alone may choose the grid point."""
    parts = [shard_evidence(losses, claim.vocab_size, claim.top_k) for losses in _leading(ledger, sampling.pilot_units)]
    return merge_evidence(parts)


def _leading(ledger: Ledger, windows: int) -> Iterator[Losses]:
    for shard in range(ledger.num_shards):
        if windows <= 0:
            return
        losses = ledger.losses(shard)
        yield losses.head(min(windows, len(losses.window_id)))
        windows -= len(losses.window_id)


def shard_sums(ledger: Ledger, tunings: Sequence[Tuning], by_window: bool, shard: int) -> LineSums:
    """The exact pass over one shard."""
    losses = ledger.losses(shard)
    if by_window:
        return line_sums(tunings, *_finite(losses), window_lengths=losses.window_lengths, worst_case=losses.unscored)
    failed = losses.token_unscored
    return line_sums(tunings, *_finite(losses), worst_case=0 if failed is None else int(failed.sum()))
