"""Columns of tables: which one holds the text, whether its type can, and the texts in it, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenbound.corpus.contents import HEAD_BYTES, binary_kind, compressor_of, refuse_pointer
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowText, Step, first_step
from tokenbound.corpus.streams import open_source
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


def column_texts(
    values: Iterable[object], text: RowText, rest: str, origin: str, first: int = 0
) -> Iterator[str | None]:
    """The texts of a column, row by row; None for a row that is left out.

    Args:
        values: of the column.
        text: what is looked for.
        rest: path inside each value; empty where the column is the text.
        origin: of which table, for messages.
        first: number of the first row.

    Raises:
        InputError: a value is not text; the message names the row.
    """
    for row, value in enumerate(values, start=first):
        try:
            yield text.inside(value, rest)
        except InputError as error:
            raise InputError(f"{origin}, row {row}: {error}") from None


def require_column(field: str, names: list[str], origin: str) -> Step:
    """The column of a table in which a field is, and the path inside it.

    Args:
        field: `corpus.text_field`.
        names: of the columns.
        origin: of which table, for messages.

    Raises:
        InputError: there is none, or more than one of its name.

    >>> require_column("meta.text", ["meta", "id"], "a.parquet")
    Step(key='meta', rest='text')
    """
    step = first_step(names, field)
    if step is None:
        columns = ", ".join(sorted(names))
        raise InputError(f"{origin}: no column {field!r} (there are: {columns}); set `corpus.text_field`")
    if names.count(step.key) > 1:
        raise InputError(f"{origin}: {names.count(step.key)} columns are named {step.key!r}; rename all but one")
    return step


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


def require_text_type(field: str, step: Step, kind: pa.DataType, origin: str) -> None:
    """Refuse a column whose type says that it holds no text.

    Args:
        field: `corpus.text_field`.
        step: the column, and the path inside it.
        kind: type of the column.
        origin: of which table, for messages.

    Raises:
        InputError: it holds something else, or has no such field inside.
    """
    from pyarrow import types  # configs are validated without it

    rest, inner = step.rest, kind
    while rest and types.is_struct(inner):
        names = [inner.field(index).name for index in range(inner.num_fields)]
        found = first_step(names, rest)
        if found is None:
            raise InputError(
                f"{origin}: column {step.key!r} has no field {rest!r} (there are: {', '.join(sorted(names))}); set "
                "`corpus.text_field`"
            )
        inner, rest = inner.field(names.index(found.key)).type, found.rest
    if types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
        inner = inner.value_type
    stored = inner.value_type if types.is_dictionary(inner) else inner
    if not any(getattr(types, f"is_{name}")(stored) for name in TEXT_TYPES) or (rest and not types.is_null(stored)):
        raise InputError(f"{origin}: column {field!r} is {kind}, not text; set `corpus.text_field`")
