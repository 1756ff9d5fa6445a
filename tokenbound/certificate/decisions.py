"""Tables of decisions beside the token columns: how they are made, and what must agree.

A table says how often each cell (level and outcome) occurred in a window. What a table claims is tied to what else is
recorded of the window: the ids say how many decisions there were and how many of them went right, and by the chain rule
the losses of a token's decisions add up to its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.columns import Floats, WindowDecisions
from tokenbound.bounds.decisions import CELLS, LEVEL_STEP, LEVELS, MAX_LEVEL, DecisionTree
from tokenbound.errors import MismatchError
from tokenbound.store.losses import Losses

CHAIN_SLACK_NATS = 1e-3
"""Most that float32 sums may move the loss of one token's decisions, beyond the rounding of their levels."""

DEEPEST_NLL_NATS = 60.0
"""Of a token that costs more, float32 masses keep too few digits, or none: its window is not held to the chain rule."""

_WINDOWS_AT_ONCE = 64


def window_decisions(cells: NDArray[np.int16]) -> WindowDecisions:
    """The table of each window.

    Args:
        cells: [W, L, J] or [W, any]; -1 is no decision.

    >>> found = window_decisions(np.array([[7, 7, -1], [300, 9, 9]], np.int16))
    >>> found.cell.tolist(), found.count.tolist(), found.offsets.tolist()
    ([7, 9, 300], [2, 2, 1], [0, 1, 3])
    """
    flat = cells.reshape(len(cells), -1)
    entries, counts_of, sizes = ([np.zeros(0, np.int64)] for _ in range(3))
    for first in range(0, len(flat), _WINDOWS_AT_ONCE):
        some = flat[first : first + _WINDOWS_AT_ONCE]
        keys = (some + np.arange(len(some), dtype=np.int64)[:, None] * CELLS)[some >= 0]
        counts = np.bincount(keys, minlength=len(some) * CELLS)
        found = np.flatnonzero(counts)
        entries.append(found % CELLS)
        counts_of.append(counts[found])
        sizes.append(np.bincount(found // CELLS, minlength=len(some)))
    cell, count, lengths = (np.concatenate(each) for each in (entries, counts_of, sizes))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return WindowDecisions(cell.astype(np.int16), count.astype(np.int32), offsets)


def check_tables(losses: Losses, origin: str) -> None:
    """Refuse tables that no scorer of this package writes.

    Raises:
        MismatchError: other windows than the losses, cells that are none or not ascending, counts below one, or a
            window with tokens and no decision.
    """
    tables = losses.tables
    assert tables is not None, "there are tables to check"
    if tables.offsets.size - 1 != len(losses.window_id):
        raise MismatchError(f"{origin}: not every window has a table of decisions; score the shard again")
    cell, count = tables.cell.astype(np.int64), tables.count
    if cell.size and not (cell.min() >= 0 and cell.max() < CELLS and count.min() >= 1):
        raise MismatchError(
            f"{origin}: a table of decisions holds cells outside [0, {CELLS}) or counts below 1; score the shard again"
        )
    window = np.repeat(np.arange(tables.offsets.size - 1), np.diff(tables.offsets))
    if not (np.diff(window * CELLS + cell) > 0).all():
        raise MismatchError(f"{origin}: the cells of a table of decisions do not ascend; score the shard again")
    if ((np.diff(tables.offsets) == 0) & (losses.window_lengths > 0)).any():
        raise MismatchError(f"{origin}: a window with tokens has no decisions; score the shard again")


def check_decisions(losses: Losses, tree: DecisionTree, origin: str) -> None:
    """Refuse tables that are not of these tokens along this tree.

    Raises:
        MismatchError: of a window the number of decisions, how many of them went right, or their summed loss is not
            what its ids and losses say.
    """
    check_tables(losses, origin)
    if losses.token is not None:
        _check_counts(losses, tree, origin)
    _check_chain(losses, origin)


def _check_counts(losses: Losses, tree: DecisionTree, origin: str) -> None:
    tables, ids = losses.tables, losses.token
    assert tables is not None, "there are tables to check"
    assert ids is not None, "the ids are known"
    recorded = np.stack([tables.window_sums(tables.count), tables.window_sums(tables.count * (tables.cell >= LEVELS))])
    rights = (tree.outcomes(np.arange(tree.vocab_size)) == 1).sum(-1)
    expected = np.stack([_sums(values[ids], losses) for values in (tree.depth, rights)])
    for window, (found, right) in zip(losses.window_id, (recorded != expected).T, strict=True):
        if found or right:
            raise MismatchError(
                f"{origin}: window {window} does not have the {'decisions' if found else 'outcomes'} of its token ids; "
                "score the shard again"
            )


def _check_chain(losses: Losses, origin: str) -> None:
    tables = losses.tables
    assert tables is not None, "there are tables to check"
    lowest, highest = (tables.window_sums(limit[tables.cell] * tables.count) for limit in cell_limits_nats())
    failed = losses.token_unscored
    nll = losses.nll.astype(np.float64)
    nll = nll if failed is None else np.where(failed, np.inf, nll)
    held = _sums((nll > DEEPEST_NLL_NATS).astype(np.float64), losses) == 0
    total = _sums(np.where(nll > DEEPEST_NLL_NATS, 0.0, nll), losses)
    slack = CHAIN_SLACK_NATS * losses.window_lengths
    outside = held & ~((lowest - slack <= total) & (total <= highest + slack))
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise MismatchError(
            f"{origin}: the decisions of window {losses.window_id[at]} lose {lowest[at]:.2f} to {highest[at]:.2f} "
            f"nats, its tokens {total[at]:.2f}; score the shard again"
        )


def cell_limits_nats() -> tuple[Floats, Floats]:
    """[CELLS] the least and the most that a decision of each cell can have lost before its level was rounded.

    >>> lowest, highest = cell_limits_nats()
    >>> left, surely_right = MAX_LEVEL, 2 * MAX_LEVEL  # left at level 0, and at the last level
    >>> [float(limit[cell].round(3)) for limit in (lowest, highest) for cell in (left, surely_right)]
    [0.662, 15.813, 0.725, inf]
    """
    middle = np.arange(-MAX_LEVEL, MAX_LEVEL + 1) * LEVEL_STEP
    low, high = middle - LEVEL_STEP / 2, middle + LEVEL_STEP / 2
    low[0], high[-1] = -np.inf, np.inf
    left, right = (np.logaddexp(0, low), np.logaddexp(0, high)), (np.logaddexp(0, -high), np.logaddexp(0, -low))
    return np.concatenate([left[0], right[0]]), np.concatenate([left[1], right[1]])


def _sums(values: NDArray[np.generic], losses: Losses) -> Floats:
    """[W] sums of a value per token."""
    ends = np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])
    return np.asarray(ends[losses.offsets[1:]] - ends[losses.offsets[:-1]])
