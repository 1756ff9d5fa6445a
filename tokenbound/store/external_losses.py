"""Losses from other tools: any Parquet file with an `nll` column in nats, flat or one list per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokenbound.errors import InputError
from tokenbound.store import filesystem as files
from tokenbound.store.losses import PIECE_TOKENS, Losses, rows_per_piece
from tokenbound.store.uri import reroot

COLUMNS = ("nll", "entropy", "rank", "token")
"""What is read; only `nll` must be there. `token`, where it holds ids, is checked against the vocabulary."""


def find_row_groups(path: str) -> tuple[tuple[str, int], ...]:
    """(file, row group) pairs of a Parquet file, or of all Parquet files below a directory, sorted; none empty.

    Raises:
        InputError: nothing is there, or a file is not Parquet.
    """
    filesystem, root = files.resolve(path)
    if not files.exists(filesystem, root):
        raise InputError(f"losses {path!r} do not exist; give a Parquet file or a directory of them")
    found = (
        [root]
        if root.endswith(".parquet")
        else [p for p in files.list_paths(filesystem, root, recursive=True) if p.endswith(".parquet")]
    )
    if not found:
        raise InputError(f"no *.parquet below {path!r}")
    places = [reroot(path, name) for name in found]
    groups = tuple((place, group) for place in places for group in _filled_groups(place))
    if not groups:
        raise InputError(f"the Parquet files at {path!r} have no rows")
    return groups


def _filled_groups(path: str) -> list[int]:
    metadata = _open(path).metadata
    return [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]


def available_columns(path: str) -> tuple[str, ...]:
    """Which of `COLUMNS` a file has.

    Raises:
        InputError: it has no `nll`.
    """
    schema = _open(path).schema_arrow
    names = [name for name in schema.names if name != "token" or pa.types.is_integer(_element(schema.field(name).type))]
    if "nll" not in names:
        raise InputError(f"{path} has no column `nll` (nats per token); its columns are {', '.join(schema.names)}")
    return tuple(name for name in COLUMNS if name in names)


def common_columns(groups: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Which of `COLUMNS` all files have.

    Raises:
        InputError: a file has no `nll`, or has other columns than the first.
    """
    paths = list(dict.fromkeys(path for path, _ in groups))
    found = available_columns(paths[0])
    for path in paths[1:]:
        if available_columns(path) != found:
            raise InputError(
                f"{path} has the columns {', '.join(available_columns(path))}, but {paths[0]} has {', '.join(found)}; "
                "give files with the same columns"
            )
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _element(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if _is_list(kind) else kind


def named_windows(groups: Sequence[tuple[str, int]]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(file, ids of its rows) of the row groups that name their windows by an integer column `window_id`."""
    for path, group in groups:
        file = _open(path)
        if "window_id" in file.schema_arrow.names and pa.types.is_integer(file.schema_arrow.field("window_id").type):
            yield path, file.read_row_group(group, columns=["window_id"]).column(0).to_numpy().astype(np.int64)


def _open(path: str) -> pq.ParquetFile:
    filesystem, name = files.resolve(path)
    try:
        return pq.ParquetFile(files.open_random(filesystem, name))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not readable as Parquet: {error}".replace("\n", " ")) from None


def iter_foreign(path: str, group: int, *, piece_tokens: int = PIECE_TOKENS) -> Iterator[Losses]:
    """One row group as consecutive pieces of losses; each row of a list column is a window.

    Raises:
        InputError: `nll` is missing, null or no number, ranks are no integers, or list lengths disagree.
    """
    names = available_columns(path)
    file = _open(path)
    rows = rows_per_piece(file, group, piece_tokens=piece_tokens)
    for batch in file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
        yield _losses([batch.column(name) for name in names], names, path)


def _losses(arrays: Sequence[pa.Array], names: Sequence[str], path: str) -> Losses:
    lengths, flat = zip(*(_flatten(array, name, path) for array, name in zip(arrays, names, strict=True)), strict=True)
    if any(not np.array_equal(own, lengths[0]) for own in lengths):
        raise InputError(f"{path}: the lists of {', '.join(names)} have different lengths")
    columns: dict[str, NDArray[Any]] = dict(zip(names, flat, strict=True))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[0])])
    empty = np.zeros(0, np.int64)
    return Losses(
        window_id=np.arange(len(lengths[0])),
        offsets=offsets,
        unscored=np.zeros(len(lengths[0]), bool),
        document=empty,
        position=empty.astype(np.int32),
        nll=columns["nll"],
        entropy=columns.get("entropy"),
        rank=columns.get("rank"),
        token=columns.get("token"),
    )


def _flatten(array: pa.Array, name: str, path: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Lengths of the rows (one window of everything where the column is flat) and the values."""
    if array.null_count:
        raise InputError(f"{path}: column `{name}` has {array.null_count} nulls; every token needs a value")
    nested = _is_list(array.type)
    values = array.flatten() if nested else array
    kinds = ("integers", False) if name == "rank" else ("numbers", pa.types.is_floating(values.type))
    if values.null_count or not (kinds[1] or pa.types.is_integer(values.type)):
        raise InputError(
            f"{path}: column `{name}` must hold {kinds[0]} without nulls, flat or as lists; it is {array.type}"
        )
    if not nested:
        lengths = np.array([len(array)], np.int64)
    elif pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size, np.int64)
    else:
        lengths = array.value_lengths().to_numpy().astype(np.int64)
    return lengths, values.to_numpy(zero_copy_only=False)
