"""Token losses: flat arrays in memory, one Parquet row per window on disk.

Shapes: W windows, T scored tokens in all, `offsets` of shape [W + 1] cuts the flat arrays into windows. Where decisions
were recorded, each window also has a table of its D different cells and their counts, cut by `decision_offsets`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenbound.bounds.columns import WindowDecisions
from tokenbound.bounds.decisions import LEVELS
from tokenbound.errors import MismatchError

LIST_COLUMNS: dict[str, pa.DataType] = {
    "document": pa.int64(),
    "position": pa.int32(),
    "token": pa.int32(),
    "nll": pa.float32(),
    "entropy": pa.float32(),
    "rank": pa.int32(),
    "alpha": pa.float32(),
    "base_nll": pa.float32(),
    "base_entropy": pa.float32(),
}
"""Type of the elements of each list column, in file order."""

TABLE_COLUMNS: dict[str, pa.DataType] = {"decision_cell": pa.int16(), "decision_count": pa.int32()}
"""Type of the elements of the table of each window, in file order: cells, ascending, and how often each occurred. Both
are absent where decisions were not recorded, and never null: a decision whose probability is no number is a fair coin.
"""

TABLE_CELLS = 2 * LEVELS
"""Cells that the table of one window can have."""

ALL_COLUMNS = (*LIST_COLUMNS, *TABLE_COLUMNS)
"""Every column but `window_id`."""

OPTIONAL_COLUMNS = ("token", "alpha", "base_nll", "base_entropy")
"""Columns that a ledger may lack: `token` where the user keeps the corpus private, `alpha` without a smoothing head,
those of a base where the model is no delta."""

NULL_COLUMNS = ("nll", "entropy", "alpha", "base_nll", "base_entropy")
"""Columns that are null in a window that could not be scored."""

ROWS_PER_GROUP = 1024
"""Windows per row group."""

PIECE_TOKENS = 1 << 16
"""Tokens that a streaming reader decodes at a time, about: what it holds stays near the cache."""


@dataclass(frozen=True)
class Losses:
    """The losses of some windows. A window that could not be scored has null `nll`, `entropy`, and rank V."""

    window_id: NDArray[np.int64]
    """Global window ids, [W]."""
    offsets: NDArray[np.int64]
    """Where each window's tokens begin in the flat arrays, [W + 1]."""
    unscored: NDArray[np.bool_]
    """Windows without finite losses, [W]; their `nll` and `entropy` entries are NaN."""
    document: NDArray[np.int64]
    """Document of each target, [T]."""
    position: NDArray[np.int32]
    """Position of each target in its document, [T]."""
    nll: NDArray[np.float32]
    """-ln p of each target, nats, unsmoothed, [T]."""
    entropy: NDArray[np.float32] | None = None
    """Entropy of the predictive distribution, nats, [T]; another tool's losses may lack it."""
    rank: NDArray[np.int32] | None = None
    """How many other tokens were at least as probable as the target, [T]; another tool's losses may lack it."""
    token: NDArray[np.int32] | None = None
    """Target ids, [T]."""
    alpha: NDArray[np.float32] | None = None
    """Smoothing weights of the model's own head, [T]."""
    base_nll: NDArray[np.float32] | None = None
    """Of a delta: -ln p of each target under its base, nats, [T]."""
    base_entropy: NDArray[np.float32] | None = None
    """Of a delta: entropy of the base's predictive distribution, nats, [T]."""
    tables: WindowDecisions | None = None
    """The decisions of each window, where they were recorded."""

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return int(self.offsets[-1])

    @property
    def window_lengths(self) -> NDArray[np.int64]:
        """Tokens of each window, [W]."""
        return np.diff(self.offsets)

    @property
    def token_unscored(self) -> NDArray[np.bool_] | None:
        """Tokens of unscored windows, [T]; None where there are none."""
        return np.repeat(self.unscored, self.window_lengths) if self.unscored.any() else None

    def head(self, num_windows: int) -> Losses:
        """The first windows alone."""
        stop = int(self.offsets[num_windows])
        return Losses(
            self.window_id[:num_windows],
            self.offsets[: num_windows + 1],
            self.unscored[:num_windows],
            **{name: column[:stop] if column is not None else None for name, column in self._columns()},  # type: ignore[arg-type]
            tables=None if self.tables is None else self.tables.first(num_windows),
        )

    def _columns(self) -> list[tuple[str, NDArray[Any] | None]]:
        return [(name, getattr(self, name)) for name in LIST_COLUMNS]


def to_parquet(losses: Losses) -> bytes:
    """Encode as Parquet: zstd, byte-stream-split values. The same losses give the same bytes.

    About 8.4 bytes per token on real losses.
    """
    columns: dict[str, pa.Array] = {"window_id": pa.array(losses.window_id, pa.int64())}
    offsets = pa.array(losses.offsets, pa.int32())
    for name, kind in LIST_COLUMNS.items():
        values = getattr(losses, name)
        if values is not None:
            mask = pa.array(losses.unscored) if name in NULL_COLUMNS and losses.unscored.any() else None
            columns[name] = pa.ListArray.from_arrays(*_without_masked(offsets, values, kind, mask), mask=mask)
    if losses.tables is not None:
        cuts = pa.array(losses.tables.offsets, pa.int32())
        for name, values in zip(TABLE_COLUMNS, (losses.tables.cell, losses.tables.count), strict=True):
            columns[name] = pa.ListArray.from_arrays(cuts, pa.array(values, TABLE_COLUMNS[name]))
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={_leaf(name): _encoding(name) for name in columns},
        write_statistics=False,
    )
    return sink.getvalue()


def _encoding(name: str) -> str:
    """Ascending cells lie close together; of other numbers the bytes of one weight resemble each other."""
    return "DELTA_BINARY_PACKED" if name == "decision_cell" else "BYTE_STREAM_SPLIT"


def _leaf(name: str) -> str:
    return name if name == "window_id" else f"{name}.list.element"


def _without_masked(
    offsets: pa.Array, values: NDArray[Any], kind: pa.DataType, mask: pa.Array | None
) -> tuple[pa.Array, pa.Array]:
    """Parquet keeps no values under a null list, so they are cut out here."""
    if mask is None:
        return offsets, pa.array(values, kind)
    lengths = np.diff(offsets.to_numpy())
    masked = mask.to_numpy(zero_copy_only=False)
    kept = np.concatenate([[0], np.cumsum(np.where(masked, 0, lengths))])
    return pa.array(kept, pa.int32()), pa.array(values[~np.repeat(masked, lengths)], kind)


def from_parquet(data: bytes | pa.Buffer, columns: Sequence[str] | None = None, *, origin: str = "losses") -> Losses:
    """Decode what :func:`to_parquet` wrote.

    Args:
        data: the file's bytes.
        columns: list columns to read; the others come back empty (`document`, `position`) or None. Default all.
        origin: name for error messages.

    Raises:
        MismatchError: not Parquet, a column is missing, or list lengths disagree.
    """
    with _damage_named(origin):
        file, names = _open(data, columns, origin)
        table = file.read(names)
    return _from_arrays(names, [table[name].combine_chunks() for name in names], origin)


def iter_parquet(
    data: bytes | pa.Buffer, columns: Sequence[str] | None = None, *, origin: str, piece_tokens: int = PIECE_TOKENS
) -> Iterator[Losses]:
    """Decode what :func:`to_parquet` wrote in consecutive pieces of whole windows, about `piece_tokens` tokens each.

    Where a piece ends depends on the file alone. Memory: the file's bytes and a few megabytes.

    Args:
        data: the file's bytes.
        columns: as in :func:`from_parquet`.
        origin: name for error messages.
        piece_tokens: about how many tokens a piece has.

    Raises:
        MismatchError: as in :func:`from_parquet`.
    """
    with _damage_named(origin):
        file, names = _open(data, columns, origin)
        for batch in file.iter_batches(
            rows_per_piece(file, piece_tokens=piece_tokens), columns=names, use_threads=False
        ):
            yield _from_arrays(names, [batch.column(name) for name in names], origin)


def claimed_counts(data: bytes | pa.Buffer, *, origin: str) -> tuple[int, int]:
    """Windows of a losses file, and the values of its largest list column, by its metadata alone.

    A column has a value for each token, and one for each window without any.

    Args:
        data: the file's bytes.
        origin: name for error messages.

    Raises:
        MismatchError: not Parquet.
    """
    with _damage_named(origin):
        metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        windows, most = int(metadata.num_rows), 0
        for i in range(metadata.num_columns):
            values = sum(int(group.column(i).num_values) for group in groups)
            name = metadata.schema.column(i).path.partition(".")[0]
            if name not in TABLE_COLUMNS:
                most = max(most, values)
            elif values > windows * TABLE_CELLS:
                raise MismatchError(f"{origin}: {values:,} cells of decisions in {windows:,} windows; score it again")
        return windows, most


def rows_per_piece(file: pq.ParquetFile, group: int | None = None, *, piece_tokens: int = PIECE_TOKENS) -> int:
    """Rows of about `piece_tokens` values, by the metadata of one row group, or of all; at least one."""
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in (range(metadata.num_row_groups) if group is None else [group])]
    rows = sum(int(each.num_rows) for each in groups)
    values = max(sum(int(each.column(i).num_values) for each in groups) for i in range(metadata.num_columns))
    return max(1, piece_tokens * rows // max(values, 1))


@contextmanager
def _damage_named(origin: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise MismatchError(f"{origin}: not readable as Parquet ({error}); score the shard again") from None


def _open(data: bytes | pa.Buffer, columns: Sequence[str] | None, origin: str) -> tuple[pq.ParquetFile, list[str]]:
    """The file and the names of the columns to read, `window_id` first."""
    file = pq.ParquetFile(pa.BufferReader(data))
    present = set(file.schema_arrow.names)
    wanted = [name for name in ALL_COLUMNS if columns is None or name in columns]
    missing = [name for name in wanted if name not in present and name not in (*OPTIONAL_COLUMNS, *TABLE_COLUMNS)]
    if missing or "window_id" not in present:
        raise MismatchError(f"{origin}: column {(missing or ['window_id'])[0]!r} is missing; it is no losses file")
    return file, ["window_id", *(name for name in wanted if name in present)]


def _from_arrays(names: Sequence[str], arrays: Sequence[pa.Array], origin: str) -> Losses:
    window_id = arrays[0].to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    unscored = np.zeros(len(window_id), bool)
    offsets: NDArray[np.int64] | None = None
    flat: dict[str, NDArray[Any]] = {}
    nullable: dict[str, tuple[NDArray[np.int64], NDArray[Any]]] = {}
    tables = _tables_from(dict(zip(names, arrays, strict=True)), origin)
    for name, array in zip(names[1:], arrays[1:], strict=True):
        if name in TABLE_COLUMNS:
            continue
        values = array.flatten().to_numpy(zero_copy_only=False)
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        if array.null_count:
            unscored |= array.is_null().to_numpy(zero_copy_only=False)
            nullable[name] = (lengths, values)
            continue
        own = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        if offsets is not None and not np.array_equal(own, offsets):
            raise MismatchError(f"{origin}: list lengths of column {name!r} differ from the others; score it again")
        offsets, flat[name] = own, values
    if offsets is None:
        raise MismatchError(f"{origin}: no complete list column; score the shard again")
    for name, (lengths, values) in nullable.items():
        flat[name] = _restore_masked(lengths, values, offsets, unscored, name, origin)
    empty = np.zeros(0)
    return Losses(
        window_id,
        offsets,
        unscored,
        **{name: flat.get(name, None if name in OPTIONAL_COLUMNS else empty) for name in LIST_COLUMNS},  # type: ignore[arg-type]
        tables=tables,
    )


def _tables_from(arrays: dict[str, pa.Array], origin: str) -> WindowDecisions | None:
    """The tables of the windows; None where the file has none or they are not read."""
    found = {name: arrays[name] for name in TABLE_COLUMNS if name in arrays}
    if not found:
        return None
    for name, array in found.items():
        sound = pa.types.is_list(array.type) and array.type.value_type == TABLE_COLUMNS[name]
        if not sound or array.null_count or array.flatten().null_count:
            raise MismatchError(
                f"{origin}: column {name!r} must be lists of {TABLE_COLUMNS[name]} without nulls; score the shard again"
            )
    lengths = [array.value_lengths().to_numpy(zero_copy_only=False) for array in found.values()]
    if len(found) < len(TABLE_COLUMNS) or not np.array_equal(*lengths):
        raise MismatchError(f"{origin}: the tables of decisions do not pair cells with counts; score the shard again")
    cell, count = (array.flatten().to_numpy(zero_copy_only=False) for array in found.values())
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[0], dtype=np.int64)])
    return WindowDecisions(cell, count, offsets)


def _restore_masked(
    lengths: NDArray[np.int64],
    values: NDArray[Any],
    offsets: NDArray[np.int64],
    unscored: NDArray[np.bool_],
    name: str,
    origin: str,
) -> NDArray[Any]:
    full = np.diff(offsets)
    if not np.array_equal(lengths, np.where(unscored, 0, full)):
        raise MismatchError(f"{origin}: list lengths of column {name!r} differ from the others; score it again")
    restored = np.full(int(offsets[-1]), np.nan, np.float32)
    restored[~np.repeat(unscored, full)] = values
    return restored
