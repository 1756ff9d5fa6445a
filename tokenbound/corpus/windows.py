"""From documents to windows to shards: pure functions of document offsets and the window settings.

Each scored token is predicted exactly once. With ``length`` 4, ``stride`` 4, and a document of 8 ids (0 is BOS):

    ids        0 1 2 3 4 5 6 7
    window 0   i i i i              inputs 0-3 predict 1-4
    window 1           i i i        inputs 4-6 predict 5-7; the last window may be short, it is never shifted back

and with ``stride`` 2 each window after the first scores only what is not scored yet, with a longer context:

    window 0   i i i i              scores 1-4
    window 1       i i i i          inputs 2-5, scores 5-6
    window 2           i i i        inputs 4-6, scores 7

Window k starts at ``k * stride``, counted from its document (context `document`) or from its segment (`packed`):
a function of positions alone, never of where the document ends. A token without a context (the first id of a
document, or of a segment when packed) is predicted by no window and is not part of m. So BOS, where it is added, is
never a target in context `document`; EOS always is. When packed, both are ids of the stream like any other.

A *stream* is the concatenated ids of a segment. The window grid and the shards begin anew at each segment, so the
plan of a corpus that has grown starts with the plan it had before.

Where only some ids are targets (`corpus.targets: answers`), the windows stay where they are and score those targets
alone; windows without one are left out, and the others are numbered anew. The inputs are the same, so each prediction
has the context that it has in a run which scores everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tokenbound.errors import InputError

Int64 = npt.NDArray[np.int64]

ORDER_DOMAIN = b"tokenbound/window-order/1\0"
"""Starts every hash of `hashed_order`, so that no other use of SHA-256 collides with it."""

HASH_BATCH = 1 << 16
"""Windows hashed at a time; bounds the memory of their digests."""

AUTO_SHARDS = 64
"""How many shards `auto_shard_tokens` aims at."""
MIN_SHARD_TOKENS, MAX_SHARD_TOKENS = 1 << 14, 1 << 19
"""A shard is worth its overhead, and losing one costs little."""


class IdReader(Protocol):
    """The part of a prepared corpus that `gather` reads."""

    def read_ids(self, segment: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Ids of a range of a segment's stream."""

    def documents_between(self, segment: int, start: int, stop: int) -> tuple[int, Int64]:
        """First document, and offsets, of the documents around a range of a segment's stream."""

    def first_document(self, segment: int) -> int:
        """Number in the whole corpus of a segment's first document."""

    def targets_between(self, segment: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which ids of a range of a segment's stream are targets; None where all are."""


@dataclass(frozen=True)
class WindowTable:
    """One row per window; all columns are int64 arrays of the same length.

    A row's inputs are ``stream[start : start + num_inputs]``, its targets the same range one further,
    ``stream[start + 1 : start + num_inputs + 1]``, and its scored predictions those at the offsets
    ``first_target .. num_inputs - 1``, as far as their ids are targets.
    """

    window_id: Int64
    segment: Int64
    start: Int64
    """Stream index of the first input."""
    num_inputs: Int64
    first_target: Int64
    """Offset inside the window of the first scored prediction."""
    num_targets: Int64
    """Scored predictions."""

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.window_id)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> WindowTable:
        """The chosen rows."""
        return WindowTable(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True)
class WindowBatch:
    """Windows as padded arrays, all [W, L]. Padding holds id 0, document -1, position -1 and is masked."""

    inputs: Int64
    targets: Int64
    mask: npt.NDArray[np.bool_]
    """Which predictions are scored."""
    document: Int64
    """Number in the whole corpus of the document of each target."""
    position: npt.NDArray[np.int32]
    """Index of each target among the ids of its document, BOS included."""


@dataclass(frozen=True)
class SegmentPlan:
    """The windows of one segment: of each document in turn, or of the one stream. Memory O(documents)."""

    length: int
    stride: int
    begins: Int64
    """Stream index of each sequence (document, or the stream itself)."""
    first_windows: Int64
    """int64 [sequences + 1]: windows before each sequence."""
    first_targets: Int64
    """int64 [sequences + 1]: scored predictions before each sequence."""

    @property
    def num_windows(self) -> int:
        """Windows of the segment."""
        return int(self.first_windows[-1])

    @property
    def num_tokens(self) -> int:
        """Scored predictions of the segment."""
        return int(self.first_targets[-1])

    @property
    def max_window_tokens(self) -> int:
        """Scored predictions of the largest window: always some sequence's first one."""
        return min(self.length, int(np.diff(self.first_targets).max(initial=0)))

    @property
    def num_sequences(self) -> int:
        """Documents (streams, when packed) with a scored prediction."""
        return int(np.count_nonzero(np.diff(self.first_targets)))

    def sequence_of(self, windows: Int64) -> Int64:
        """Number of the sequence that each window lies in."""
        return np.searchsorted(self.first_windows, windows, side="right") - 1

    def locate(self, windows: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """Columns start, num_inputs, first_target and num_targets of windows numbered within the segment."""
        sequence = self.sequence_of(windows)
        ordinal = windows - self.first_windows[sequence]
        predictions = self.first_targets[sequence + 1] - self.first_targets[sequence]
        begin = ordinal * self.stride
        num_inputs = np.minimum(self.length, predictions - begin)
        first_target = np.where(ordinal == 0, 0, self.length - self.stride)
        return self.begins[sequence] + begin, num_inputs, first_target, num_inputs - first_target

    def targets_before(self, window: int) -> int:
        """Scored predictions of the windows before one."""
        sequence = int(np.searchsorted(self.first_windows, window, side="right")) - 1
        ordinal = window - int(self.first_windows[sequence])
        inside = 0 if ordinal == 0 else self.length + (ordinal - 1) * self.stride
        return int(self.first_targets[sequence]) + inside

    def windows_within(self, tokens: int) -> int:
        """How many leading windows have at most ``tokens`` scored predictions together."""
        sequence = int(np.searchsorted(self.first_targets, tokens, side="right")) - 1
        left = tokens - int(self.first_targets[sequence])
        whole = 0 if left < self.length else 1 + (left - self.length) // self.stride
        return int(self.first_windows[sequence]) + whole


@dataclass(frozen=True)
class TargetPlan:
    """Those windows of a segment that hold a target, numbered among themselves. Memory O(windows)."""

    grid: SegmentPlan
    """All windows of the segment."""
    kept: Int64
    """Windows of the grid with a target, ascending."""
    first_targets: Int64
    """int64 [windows + 1]: targets before each of them."""

    @classmethod
    def of(cls, grid: SegmentPlan, targets: Int64) -> TargetPlan:
        """Count the targets of every window.

        Args:
            grid: the windows.
            targets: int64 [runs, 2], first id and end of each run of targets in the stream, ascending.
        """
        start, num_inputs, first_target, _ = grid.locate(np.arange(grid.num_windows))
        first, stop = start + first_target + 1, start + num_inputs + 1
        counts = targets_before(targets, stop) - targets_before(targets, first)
        kept = np.flatnonzero(counts).astype(np.int64)
        return cls(grid, kept, _starts(counts[kept]))

    @property
    def num_windows(self) -> int:
        """Windows of the segment with a target."""
        return len(self.kept)

    @property
    def num_tokens(self) -> int:
        """Scored predictions of the segment."""
        return int(self.first_targets[-1])

    @property
    def max_window_tokens(self) -> int:
        """Scored predictions of the largest window."""
        return int(np.diff(self.first_targets).max(initial=0))

    @property
    def num_sequences(self) -> int:
        """Documents (streams, when packed) with a scored prediction."""
        return len(np.unique(self.grid.sequence_of(self.kept)))

    def locate(self, windows: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """Columns start, num_inputs, first_target and num_targets of windows numbered among those with a target."""
        start, num_inputs, first_target, _ = self.grid.locate(self.kept[windows])
        return start, num_inputs, first_target, self.first_targets[windows + 1] - self.first_targets[windows]

    def targets_before(self, window: int) -> int:
        """Scored predictions of the windows before one."""
        return int(self.first_targets[window])

    def windows_within(self, tokens: int) -> int:
        """How many leading windows have at most ``tokens`` scored predictions together."""
        return int(np.searchsorted(self.first_targets, tokens, side="right")) - 1


def targets_before(targets: Int64, positions: Int64) -> Int64:
    """How many targets come before each position of a stream.

    >>> targets_before(np.array([[2, 4], [7, 9]]), np.array([0, 3, 4, 8, 9])).tolist()
    [0, 1, 2, 3, 4]

    Args:
        targets: int64 [runs, 2], first id and end of each run of targets, ascending.
        positions: in the stream.
    """
    begins, ends = targets[:, 0], targets[:, 1]
    whole = _starts(ends - begins)
    run = np.searchsorted(begins, positions, side="right")
    beyond = np.maximum(np.concatenate([[0], ends])[run] - positions, 0)
    return whole[run] - beyond


@dataclass(frozen=True)
class CorpusPlan:
    """All windows of a corpus, numbered segment after segment; tables are made for the rows asked for."""

    segments: tuple[SegmentPlan | TargetPlan, ...]
    first_windows: Int64
    """int64 [segments + 1]: windows before each segment."""

    @property
    def num_windows(self) -> int:
        """N: windows of the corpus."""
        return int(self.first_windows[-1])

    @property
    def num_tokens(self) -> int:
        """m: scored predictions of the corpus."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def max_window_tokens(self) -> int:
        """s_max: scored predictions of the largest window."""
        return max((segment.max_window_tokens for segment in self.segments), default=0)

    @property
    def num_sequences(self) -> int:
        """Documents (streams, when packed) with a scored prediction."""
        return sum(segment.num_sequences for segment in self.segments)

    def windows(self, ids: npt.ArrayLike) -> WindowTable:
        """The rows of the given windows, in the given order.

        Raises:
            IndexError: an id is not in the plan.
        """
        window_id = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(window_id) and not (window_id.min() >= 0 and window_id.max() < self.num_windows):
            raise IndexError(f"window ids must lie in [0, {self.num_windows})")
        segment = np.searchsorted(self.first_windows, window_id, side="right") - 1
        columns = np.empty((4, len(window_id)), dtype=np.int64)
        for index in np.unique(segment):
            rows = segment == index
            columns[:, rows] = self.segments[index].locate(window_id[rows] - self.first_windows[index])
        return WindowTable(window_id, segment, *columns)


def plan_segment(
    offsets: npt.ArrayLike, *, length: int, context: Literal["packed", "document"], stride: int | None = None
) -> SegmentPlan:
    """Plan one segment from its document offsets (int64 [documents + 1], starting with 0).

    >>> plan = plan_segment([0, 8], length=4, context="document", stride=2)
    >>> [column.tolist() for column in plan.locate(np.arange(plan.num_windows))]
    [[0, 2, 4], [4, 4, 3], [0, 2, 2], [4, 2, 1]]

    Args:
        offsets: where each document begins in the stream, and where the last one ends.
        length: inputs of one window.
        context: `document`: no window crosses a document. `packed`: windows over the whole stream.
        stride: distance between window starts, at most ``length``; null means ``length``.

    Raises:
        InputError: length or stride is out of range.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(f"windows: stride {stride} must lie in [1, length = {length}]")
    bounds = np.asarray(offsets, dtype=np.int64)
    if context == "packed":
        bounds = bounds[[0, -1]]
    predictions = np.maximum(np.diff(bounds) - 1, 0)
    # ceil((predictions - length) / stride) windows after the first, none where the first one suffices.
    later = np.maximum(-((length - predictions) // stride), 0)
    windows = np.where(predictions > 0, 1 + later, 0)
    return SegmentPlan(length, stride, bounds[:-1], _starts(windows), _starts(predictions))


def plan_corpus(
    offsets: Sequence[npt.ArrayLike],
    *,
    length: int,
    context: Literal["packed", "document"],
    stride: int | None = None,
    targets: Sequence[Int64 | None] | None = None,
) -> CorpusPlan:
    """Plan a corpus from the document offsets of each of its segments, in order.

    Time and memory are O(documents), with targets O(windows). Whether BOS and EOS were added does not matter here: they
    are ids of their document like any other, and the first id of a context is never a target.

    Args:
        offsets: of each segment, as `plan_segment` takes them.
        length: inputs of one window.
        context: as in `plan_segment`.
        stride: as in `plan_segment`.
        targets: of each segment the runs of ids that are scored, int64 [runs, 2]; null where all are.

    Raises:
        InputError: length or stride is out of range.
    """
    grids = [plan_segment(each, length=length, context=context, stride=stride) for each in offsets]
    runs = targets if targets is not None else [None] * len(grids)
    segments = tuple(grid if own is None else TargetPlan.of(grid, own) for grid, own in zip(grids, runs, strict=True))
    return CorpusPlan(segments, _starts(np.array([segment.num_windows for segment in segments], dtype=np.int64)))


def auto_shard_tokens(num_tokens: int) -> int:
    """Scored tokens per shard where the config says `auto`.

    >>> auto_shard_tokens(426_680), auto_shard_tokens(10**9)
    (16384, 524288)
    """
    return min(max(num_tokens // AUTO_SHARDS, MIN_SHARD_TOKENS), MAX_SHARD_TOKENS)


def shard_slices(plan: CorpusPlan, shard_tokens: int, batch: int = 1) -> list[tuple[int, int]]:
    """Cut the windows into shards: consecutive ``(start_window, stop_window)``, in order, without gaps.

    A shard takes whole windows while they fit into ``shard_tokens`` scored tokens (at least one), whole batches of them
    where one fits, so that no batch is filled up in vain; and it ends with its segment, so a further segment changes no
    shard before it.

    Raises:
        InputError: ``shard_tokens`` is not positive.
    """
    if shard_tokens < 1:
        raise InputError(f"windows.shard_tokens must be positive, not {shard_tokens}")
    return [
        (int(first) + start, int(first) + stop)
        for segment, first in zip(plan.segments, plan.first_windows, strict=False)
        for start, stop in _segment_shards(segment, shard_tokens, batch)
    ]


def whole_batches(windows: int, batch: int) -> int:
    """So many windows or a few less: a multiple of the batch where one fits, else what there is, at least one.

    Example:
        >>> whole_batches(41, 16), whole_batches(5, 16), whole_batches(0, 16)
        (32, 5, 1)
    """
    return windows - windows % batch if windows >= batch else max(1, windows)


def gather(corpus: IdReader, table: WindowTable, length: int) -> WindowBatch:
    """Read the windows of a table, padded to ``length``.

    Memory is about 33 bytes per cell of [W, L]. Neighbouring windows are read together.

    Raises:
        InputError: a window is longer than ``length``.
    """
    if len(table) and table.num_inputs.max() > length:
        raise InputError(f"windows of {table.num_inputs.max()} inputs do not fit into length {length}")
    shape = (len(table), length)
    batch = WindowBatch(
        inputs=np.zeros(shape, np.int64),
        targets=np.zeros(shape, np.int64),
        mask=_between(table.first_target, table.num_inputs, length),
        document=np.full(shape, -1, np.int64),
        position=np.full(shape, -1, np.int32),
    )
    for rows in _neighbours(table):
        _fill(batch, rows, corpus, table[rows])
    return batch


def hashed_order(
    num_windows: int,
    *,
    artifact_sha256: str,
    corpus_sha256: str,
    fingerprint: str,
    seed: int,
    first: int | None = None,
) -> Int64:
    """Windows in the order of their SHA-256, from which every sample is a prefix.

    The hash of window u is SHA-256 over `ORDER_DOMAIN`; then the UTF-8 bytes of ``artifact_sha256``,
    ``corpus_sha256`` and ``fingerprint``, each behind its length as 8 bytes; then ``seed`` and u as 8 bytes each; all
    integers unsigned and big-endian. Hashes compare as byte strings, equal ones by u. About one
    microsecond per window, and 8 bytes of memory.

    Args:
        num_windows: N; the units are 0 .. N - 1.
        artifact_sha256: digest of the frozen hypothesis.
        corpus_sha256: digest of the corpus.
        fingerprint: the scoring fingerprint.
        seed: the config's seed.
        first: how many to return; null means all. The result is the same prefix whatever it is.

    Returns:
        int64 [first] window ids.

    Raises:
        InputError: ``seed`` is no unsigned 64-bit integer.
    """
    if not 0 <= seed < 1 << 64:
        raise InputError(f"sample.seed {seed} must lie in [0, 2^64)")
    texts = [text.encode() for text in (artifact_sha256, corpus_sha256, fingerprint)]
    framed = b"".join(_u64(len(text)) + text for text in texts)
    start = hashlib.sha256(ORDER_DOMAIN + framed + _u64(seed))

    def digests(units: Int64) -> list[bytes]:
        packed = units.astype(">u8").tobytes()
        found = []
        for offset in range(0, len(packed), 8):
            state = start.copy()
            state.update(packed[offset : offset + 8])
            found.append(state.digest())
        return found

    return _smallest(num_windows, digests, num_windows if first is None else min(first, num_windows))


# --- parts -----------------------------------------------------------------------------------------------------


def _starts(sizes: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _segment_shards(segment: SegmentPlan | TargetPlan, shard_tokens: int, batch: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < segment.num_windows:
        fitting = segment.windows_within(segment.targets_before(start) + shard_tokens)
        stop = segment.num_windows
        if fitting < stop:
            stop = min(start + whole_batches(fitting - start, batch), stop)
        yield start, stop
        start = stop


def _between(low: Int64, high: Int64, length: int) -> npt.NDArray[np.bool_]:
    """Bool [W, L]: whether each offset lies in its row's [low, high)."""
    offset = np.arange(length)
    return (offset >= low[:, None]) & (offset < high[:, None])


def _neighbours(table: WindowTable) -> Iterator[Int64]:
    """Rows grouped so that the ranges of a group touch and lie in one segment."""
    if not len(table):
        return
    order = np.lexsort((table.start, table.segment))
    start, segment = table.start[order], table.segment[order]
    reach = np.maximum.accumulate(start + table.num_inputs[order] + 1 + segment * _SEGMENT_SPAN)
    apart = start[1:] + segment[1:] * _SEGMENT_SPAN > reach[:-1]
    yield from np.split(order, np.flatnonzero(apart) + 1)


_SEGMENT_SPAN = 1 << 44
"""Longer than any segment's stream, shorter than 2^63 over any number of segments."""


def _fill(batch: WindowBatch, rows: Int64, corpus: IdReader, table: WindowTable) -> None:
    """Put the ids, documents and positions of neighbouring windows of one segment into a batch."""
    segment = int(table.segment[0])
    low, high = int(table.start.min()), int((table.start + table.num_inputs).max()) + 1
    ids = corpus.read_ids(segment, low, high).astype(np.int64)
    document, offsets = corpus.documents_between(segment, low, high)
    wanted = corpus.targets_between(segment, low, high)
    valid = _between(np.zeros_like(table.start), table.num_inputs, batch.inputs.shape[1])
    index = np.minimum(table.start[:, None] + 1 + np.arange(valid.shape[1]), high - 1)
    # side="right" passes over empty documents: they begin where the next one does and contain nothing.
    owner = np.searchsorted(offsets, index, side="right") - 1
    batch.inputs[rows] = np.where(valid, ids[index - 1 - low], 0)
    batch.targets[rows] = np.where(valid, ids[index - low], 0)
    batch.document[rows] = np.where(valid, owner + document + corpus.first_document(segment), -1)
    batch.position[rows] = np.where(valid, index - offsets[owner], -1)
    if wanted is not None:
        batch.mask[rows] &= wanted[index - low]


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _smallest(num_units: int, digests: Callable[[Int64], list[bytes]], first: int, *, batch: int = HASH_BATCH) -> Int64:
    """The ``first`` units by digest, equal digests by unit; sorts on 8 bytes and resolves their ties exactly."""
    if first == 0:
        return np.empty(0, dtype=np.int64)
    heads = np.empty(num_units, dtype=np.uint64)
    for start in range(0, num_units, batch):
        units = np.arange(start, min(start + batch, num_units))
        heads[units] = np.frombuffer(b"".join(digest[:8] for digest in digests(units)), dtype=">u8")
    candidates = np.flatnonzero(heads <= np.partition(heads, first - 1)[first - 1])
    order = candidates[np.argsort(heads[candidates], kind="stable")]
    for start, stop in _runs(heads[order]):
        tied = np.sort(order[start:stop])
        order[start:stop] = [unit for _, unit in sorted(zip(digests(tied), tied.tolist(), strict=True))]
    return order[:first].astype(np.int64)


def _runs(keys: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Ranges of two or more equal neighbours."""
    edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    long = np.diff(edges) > 1
    return list(zip(edges[:-1][long].tolist(), edges[1:][long].tolist(), strict=True))
