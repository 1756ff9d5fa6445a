"""The exact pass: every printed line evaluated over every loss, shard by shard.

float64 throughout; sums are pairwise within a block, and the sums of blocks, of a shard's pieces and of shards are
added by ``math.fsum``, which rounds once. Blocks and pieces depend on the shard alone, so that neither the tree of the
reduction nor the number of workers changes a digit of a certificate.

What a token contributes to a line is the line's own affair (its evaluator, in :mod:`~tokenbound.bounds.lines`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.blocks import Block, Columns, Evaluator, TokenSums, Unavailable
from tokenbound.bounds.claim import Tuning
from tokenbound.bounds.columns import Floats, Ints, window_sums, worst_case_windows
from tokenbound.bounds.constants import BLOCK_TOKENS
from tokenbound.bounds.lines.base import token_bound
from tokenbound.errors import InputError, MismatchError

FIELDS: Final = TokenSums._fields


@dataclass(frozen=True)
class LineSums:
    """Exact sums of every line over some shards. Merging concatenates; totals are taken once, by ``math.fsum``."""

    num_tokens: int
    """Tokens, worst-case ones included."""
    worst_case_tokens: int
    """Tokens counted at the worst case."""
    shards: Floats
    """[S, lines, 3] sums of the fields of :class:`~tokenbound.bounds.blocks.TokenSums`."""
    nll: Floats
    """[S] sums of the unsmoothed nll in nats over the tokens with a finite loss."""
    windows: Floats | None = None
    """[lines, W] sum of z_i over each window in draw order; null unless windows were given."""
    window_lengths: Ints | None = None
    """[W] tokens of each window."""

    def total(self, line: int, name: str) -> float:
        """Exactly rounded total of one field of one line."""
        return math.fsum(self.shards[:, line, FIELDS.index(name)].tolist())

    def mean(self, line: int, name: str) -> float:
        """Mean per token of one field of one line."""
        return self.total(line, name) / self.num_tokens

    @property
    def mean_nll_nats(self) -> float:
        """Unsmoothed mean nll of the tokens with a finite loss, nats."""
        return math.fsum(self.nll.tolist()) / max(self.num_tokens - self.worst_case_tokens, 1)

    def collapsed(self) -> LineSums:
        """The same sums as of one shard, each total rounded once."""
        lines = range(self.shards.shape[1])
        totals = np.array([[[self.total(line, name) for name in FIELDS] for line in lines]])
        nll = np.array([math.fsum(self.nll.tolist())])
        return replace(self, shards=totals.reshape(1, len(lines), len(FIELDS)), nll=nll)

    def select(self, lines: slice) -> LineSums:
        """The sums of some of the lines, e.g. when one pass evaluated two claims."""
        windows = None if self.windows is None else self.windows[lines]
        return replace(self, shards=self.shards[:, lines], windows=windows)


def line_sums(
    tunings: Sequence[Tuning],
    nll: ArrayLike,
    entropy: ArrayLike | None = None,
    rank: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    *,
    window_lengths: ArrayLike | None = None,
    worst_case: ArrayLike | int | None = None,
) -> LineSums:
    """Evaluate every line over one shard.

    Args:
        tunings: the lines.
        nll: [T] unsmoothed losses in nats, as stored.
        entropy: [T] entropies in nats; needed by forecasts of degree 1 and more and by alpha(H).
        rank: [T] ranks; needed by `kl` lines.
        alpha: [T] weights of a smoothing head; needed where a tuning says so.
        window_lengths: [W] tokens of each window in draw order, for sampled runs; with the worst-case windows' own.
        worst_case: [W] True where a window has no finite loss (it is then absent from the arrays above); or, without
            `window_lengths`, the number of such tokens.

    Raises:
        InputError: losses that are not finite, arrays of different lengths, a column that a line needs and is absent.

    >>> sums = line_sums([Tuning("kl", vocab_size=256, top_k=1)], nll=[0.1, 2.0, 0.3, 0.2], rank=[0, 3, 0, 0])
    >>> sums.num_tokens, sums.mean(0, "loss")
    (4, 0.25)
    """
    columns = Columns.checked(nll, entropy, rank, alpha)
    lengths = None if window_lengths is None else np.asarray(window_lengths, dtype=np.int64)
    failed, worst_tokens = worst_case_windows(worst_case, lengths)
    evaluators = [evaluator_of(tuning) for tuning in tunings]
    per_token = None if lengths is None else np.empty((len(tunings), columns.size))
    blocks, nll_sum = _block_sums(evaluators, columns, per_token)
    totals = np.array(
        [[math.fsum(blocks[:, line, f].tolist()) for f in range(len(FIELDS))] for line in range(len(tunings))]
    )
    totals = totals.reshape(len(tunings), len(FIELDS))
    for line, evaluator in enumerate(evaluators):
        totals[line] += np.array(evaluator.worst()) * worst_tokens
    windows = None
    if per_token is not None and lengths is not None:
        windows = _window_values(evaluators, per_token, lengths, failed)
    return LineSums(columns.size + worst_tokens, worst_tokens, totals[None], np.array([nll_sum]), windows, lengths)


def merge_sums(parts: Sequence[LineSums]) -> LineSums:
    """The sums of all shards together. For sampled runs the parts must be in draw order.

    Raises:
        InputError: nothing to merge.
        MismatchError: the parts are of different lines, or only some have windows.

    >>> top_1 = [Tuning("kl", vocab_size=256, top_k=1)]
    >>> parts = [line_sums(top_1, nll=[0.1, 0.1], rank=[0, 0]), line_sums(top_1, nll=[2.0, 2.0], rank=[3, 1])]
    >>> merge_sums(parts).mean(0, "loss")
    0.5
    """
    if not parts:
        raise InputError("there are no sums to merge")
    if len({part.shards.shape[1:] for part in parts}) > 1 or len({part.windows is None for part in parts}) > 1:
        raise MismatchError("shards were evaluated for different lines")
    windows = [part.windows for part in parts if part.windows is not None]
    lengths = [part.window_lengths for part in parts if part.window_lengths is not None]
    return LineSums(
        num_tokens=sum(part.num_tokens for part in parts),
        worst_case_tokens=sum(part.worst_case_tokens for part in parts),
        shards=np.concatenate([part.shards for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        windows=np.concatenate(windows, axis=1) if windows else None,
        window_lengths=np.concatenate(lengths) if lengths else None,
    )


def highest_value(tuning: Tuning) -> float:
    """Largest possible z_i of a line."""
    return evaluator_of(tuning).worst().value


def evaluator_of(tuning: Tuning) -> Evaluator:
    """Evaluates the line that was tuned."""
    return Unavailable() if tuning.unavailable is not None else token_bound(tuning.method).evaluator(tuning)


def _block_sums(evaluators: Sequence[Evaluator], columns: Columns, per_token: Floats | None) -> tuple[Floats, float]:
    starts = range(0, columns.size, BLOCK_TOKENS)
    result = np.zeros((len(starts), len(evaluators), len(FIELDS)))
    nll_sums = []
    block = Block()
    for row, start in enumerate(starts):
        block.load(columns, start)
        nll_sums.append(block.nll_sum)
        for line, evaluator in enumerate(evaluators):
            out = None if per_token is None else per_token[line, start : start + block.size]
            result[row, line] = evaluator.evaluate(block, out)
    return result, math.fsum(nll_sums)


def _window_values(
    evaluators: Sequence[Evaluator], per_token: Floats, lengths: Ints, failed: NDArray[np.bool_] | None
) -> Floats:
    scored = lengths if failed is None else np.where(failed, 0, lengths)
    rows = [window_sums(values, scored) for values in per_token]
    if failed is not None:
        for row, evaluator in zip(rows, evaluators, strict=True):
            row[failed] = evaluator.worst().value * lengths[failed]
    return np.array(rows).reshape(len(evaluators), lengths.size)
