"""Columns of tables: which ones make a document, whether their types can, and the documents in them, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenbound.corpus.answers import Document
from tokenbound.corpus.contents import HEAD_BYTES, binary_kind, compressor_of, refuse_pointer
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowField, RowMessages, Step, first_step, row_document
from tokenbound.corpus.streams import one_line, open_source
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def require_kind(file: SourceFile, kind: str, magics: tuple[bytes, ...]) -> bytes:
    """Say what a file is that is not of a kind, by its first bytes.

    Args:
        file: to look at.
        kind: such as `Parquet`.
        magics: how files of the kind begin.

    Returns:
        The beginning that it has.

    Raises:
        InputError: it begins otherwise.
    """
    with open_source(file) as stream:
        head = stream.read(HEAD_BYTES)
    refuse_pointer(file, head)
    if found := next((magic for magic in magics if head.startswith(magic)), None):
        return found
    if compressor := compressor_of(head):
        raise InputError(f"corpus file {file.path!r} is compressed by {compressor}; decompress the {kind} file")
    what = binary_kind(head) or ("empty" if not head else "JSON or text" if head[:1] in b"{[" else None)
    raise InputError(
        f"corpus file {file.path!r} is not a readable {kind} file{f' (it is {what})' if what else ''}; restore it, or "
        "set `corpus.source` to what it is"
    )


def find_columns(fields: Sequence[RowField], names: list[str], origin: str) -> list[Step]:
    """The columns of a table in which fields of its rows are, and the path to each inside its column.

    Args:
        fields: of which a document is made.
        names: of the columns.
        origin: of which table, for messages.

    Raises:
        InputError: there is none for a field, or more than one of its name.

    >>> from tokenbound.corpus.row_text import RowText
    >>> find_columns([RowText("meta.text")], ["meta", "id"], "a.parquet")
    [Step(key='meta', rest='text')]
    """
    return [_find_column(field, names, origin) for field in fields]


def _find_column(field: RowField, names: list[str], origin: str) -> Step:
    step = first_step(names, field.name)
    if step is None:
        columns = ", ".join(sorted(names))
        raise InputError(f"{origin}: no column {field.name!r} (there are: {columns}); set `corpus.{field.key}`")
    if names.count(step.key) > 1:
        raise InputError(f"{origin}: {names.count(step.key)} columns are named {step.key!r}; rename all but one")
    return step


def column_documents(
    rows: Iterable[Sequence[object]], fields: Sequence[RowField], steps: Sequence[Step], origin: str, first: int = 0
) -> Iterator[Document | None]:
    """The documents of a table, row by row; None for a row that is left out.

    Args:
        rows: the values of the columns in each, in the order of the steps.
        fields: of which a document is made.
        steps: where each of them is, as `find_columns` says.
        origin: of which table, for messages.
        first: number of the first row.

    Raises:
        InputError: a value is something else than its field holds; the message names the row.

    >>> from tokenbound.corpus.row_text import RowText
    >>> list(column_documents([({"b": "x"},), ({"b": "y"},)], [RowText("a.b")], [Step("a", "b")], "a.parquet"))
    ['x', 'y']
    """
    for number, values in enumerate(rows, start=first):
        try:
            yield document_inside(values, fields, steps)
        except InputError as error:
            raise InputError(f"{origin}, row {number}: {error}") from None


def batch_documents(
    batches: Iterable[pa.RecordBatch], fields: Sequence[RowField], steps: Sequence[Step], origin: str
) -> Iterator[Document | None]:
    """As :func:`column_documents`, of the rows of record batches.

    Args:
        batches: with at least the columns that the steps begin with.
        fields: of which a document is made.
        steps: where each is, as `find_typed_columns` found it.
        origin: of which table, for messages.
    """
    rows = (row for batch in batches for row in zip(*(batch.column(s.key).to_pylist() for s in steps), strict=True))
    return column_documents(rows, fields, steps, origin)


@contextmanager
def damage_named(file: SourceFile, kind: str) -> Iterator[None]:
    """Say of which file of a kind, such as `Parquet`, it is that Arrow cannot read it.

    Raises:
        InputError: it cannot.
    """
    import pyarrow as pa  # configs are validated without it

    try:
        yield
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(
            f"corpus file {file.path!r} is not a readable {kind} file: {one_line(error)}; restore or remove it"
        ) from None


def document_inside(values: Sequence[object], fields: Sequence[RowField], steps: Sequence[Step]) -> Document | None:
    """The document of one row of a table; None for a row that is left out.

    Args:
        values: of the columns, in the order of the steps.
        fields: of which a document is made.
        steps: where each of them is, as `find_columns` says.

    Raises:
        InputError: a value is something else than its field holds.
    """
    found = [field.inside(value, step.rest) for value, field, step in zip(values, fields, steps, strict=True)]
    return row_document(found)


def find_typed_columns(fields: Sequence[RowField], schema: pa.Schema, origin: str) -> list[Step]:
    """The same as `find_columns`, of a table whose columns have types, which must fit the fields.

    Args:
        fields: of which a document is made.
        schema: of the table.
        origin: of which table, for messages.

    Raises:
        InputError: a column is missing, or its type says that it holds something else or has no such field inside.
    """
    steps = find_columns(fields, schema.names, origin)
    for field, step in zip(fields, steps, strict=True):
        _require_type(field, step, schema.field(step.key).type, origin)
    return steps


TEXT_TYPES = (
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "fixed_size_binary",
    "null",
)
"""Types of columns that may hold text; in binary ones it is UTF-8."""


def _require_type(field: RowField, step: Step, kind: pa.DataType, origin: str) -> None:
    """Refuse a column whose type says that it does not hold a field."""
    from pyarrow import types  # configs are validated without it

    rest, inner = step.rest, kind
    while rest and types.is_struct(inner):
        names = [inner.field(index).name for index in range(inner.num_fields)]
        found = first_step(names, rest)
        if found is None:
            raise InputError(
                f"{origin}: column {step.key!r} has no field {rest!r} (there are: {', '.join(sorted(names))}); set "
                f"`corpus.{field.key}`"
            )
        inner, rest = inner.field(names.index(found.key)).type, found.rest
    fits = _may_hold_messages(inner) if isinstance(field, RowMessages) else _may_hold_text(inner)
    if not fits or (rest and not types.is_null(inner)):
        raise InputError(f"{origin}: column {field.name!r} is {kind}, not {field.holds}; set `corpus.{field.key}`")


def _may_hold_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    item = kind.value_type if _is_list(kind) else kind
    stored = item.value_type if types.is_dictionary(item) else item
    return any(getattr(types, f"is_{name}")(stored) for name in TEXT_TYPES)


def _may_hold_messages(kind: pa.DataType) -> bool:
    from pyarrow import types

    item = kind.value_type if _is_list(kind) else kind
    return bool(types.is_null(item) or (item is not kind and types.is_struct(item)))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
