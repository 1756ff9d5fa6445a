"""Columns of losses: checks of their shape, sums over windows, and bytes as text. Shared by all that reads them."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.errors import InputError, MismatchError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WindowDecisions:
    """The decisions of consecutive windows: a sparse table of cells (:mod:`~tokenbound.bounds.decisions`) of each."""

    cell: NDArray[np.int16]
    """[D] cells, ascending within a window."""
    count: NDArray[np.int32]
    """[D] how often each occurred in its window."""
    offsets: Ints
    """[W + 1] where the cells of each window begin."""

    def window_sums(self, values: NDArray[Any]) -> Floats:
        """[W] sums over each window of a value per entry, [D]."""
        return window_sums(values, np.diff(self.offsets))

    def first(self, num_windows: int) -> WindowDecisions:
        """Those of the first windows."""
        stop = int(self.offsets[num_windows])
        return WindowDecisions(self.cell[:stop], self.count[:stop], self.offsets[: num_windows + 1])


@dataclass(frozen=True)
class Piece:
    """Consecutive windows of recorded losses, as a bound with a pass of its own reads them."""

    columns: Mapping[str, NDArray[Any]]
    """[T] each, by name: those recorded, of every token."""
    failed: NDArray[np.bool_] | None
    """[T] tokens of windows without a finite loss; None where there are none."""
    window_lengths: Ints | None
    """[W] tokens of each window, where a sample needs the sums of windows."""
    worst_case: NDArray[np.bool_] | int
    """Which windows failed ([W]), or without `window_lengths` how many tokens."""
    decisions: WindowDecisions | None = None
    """Of every window, failed ones included: a decision whose probability is no number is a fair coin."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column of every token.

        Raises:
            MismatchError: it was not recorded.
        """
        if name not in self.columns:
            raise MismatchError(f"the losses have no column `{name}`, which the claim needs; score them again")
        return self.columns[name]

    def require_decisions(self) -> WindowDecisions:
        """The decisions of the windows.

        Raises:
            MismatchError: they were not recorded.
        """
        if self.decisions is None:
            raise MismatchError("the losses have no table of decisions, which `bits` needs; score them again")
        return self.decisions

    def finite(self, name: str) -> NDArray[Any]:
        """A column of the tokens that have a finite loss.

        Raises:
            MismatchError: it was not recorded.
        """
        column = self[name]
        return column if self.failed is None else column[~self.failed]

    def find(self, name: str) -> NDArray[Any] | None:
        """As :meth:`finite`; None where the column was not recorded."""
        return self.finite(name) if name in self.columns else None


def check_length(column: NDArray[Any], size: int, name: str) -> NDArray[Any]:
    """Refuse a column that does not hold one value per token."""
    if column.shape != (size,):
        raise InputError(f"`{name}` has shape {column.shape}, the losses ({size},): one value per token is needed")
    return column


def check_entropy(entropy: ArrayLike, size: int, name: str = "entropy") -> NDArray[np.floating]:
    """Refuse entropies that are not finite or not one per token."""
    column: NDArray[np.floating] = check_length(np.asarray(entropy), size, name)
    if column.size and not np.isfinite(column.min() + column.max()):
        raise InputError(f"`{name}` must be finite for every token; leave the column out to use constant forecasts")
    return column


def window_sums(values: NDArray[Any], lengths: Ints) -> Floats:
    """[W] sums of consecutive runs of ``lengths`` values; an empty window sums to 0.

    Raises:
        InputError: the lengths do not add up to the number of values.
    """
    if (lengths.size and int(lengths.min()) < 0) or int(lengths.sum()) != values.size:
        raise InputError(f"window_lengths add up to {int(lengths.sum())}, but there are {values.size} losses")
    result = np.zeros(lengths.size, dtype=np.float64)
    filled = np.flatnonzero(lengths)
    if filled.size:
        ends = np.cumsum(lengths[filled])
        result[filled] = np.add.reduceat(values, np.concatenate([[0], ends[:-1]]))
    return result


def worst_case_windows(
    worst_case: ArrayLike | int | None, lengths: Ints | None
) -> tuple[NDArray[np.bool_] | None, int]:
    """Which windows failed ([W] or None) and how many tokens count at the worst case.

    Raises:
        InputError: marks that do not fit the windows, or a count that is not one.
    """
    if worst_case is None:
        return None, 0
    if lengths is None:
        count = np.asarray(worst_case)
        if count.ndim or count.dtype == np.bool_ or count < 0:
            raise InputError("without window_lengths, `worst_case` is the number of tokens counted at the worst case")
        return None, int(count)
    failed = np.asarray(worst_case, dtype=np.bool_)
    if failed.shape != lengths.shape:
        raise InputError(f"`worst_case` marks {failed.shape} windows, window_lengths has {lengths.shape}")
    return failed, int(lengths[failed].sum())


def pack(data: bytes) -> str:
    """Compressed bytes as ASCII text."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def unpack(text: str, limit: int) -> bytes:
    """The inverse of :func:`pack`, in bounded memory.

    Raises:
        ValueError: the text is cut short, damaged, or holds more than ``limit`` bytes.
    """
    stream = zlib.decompressobj()
    raw = stream.decompress(base64.b64decode(text, validate=True), limit + 1)
    if not stream.eof or len(raw) > limit:
        raise ValueError("compressed data is cut short or too long")
    return raw
