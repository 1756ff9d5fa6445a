"""`parquet`: each row is a document, the text of its column `text_field`, or bytes there that hold UTF-8.

With `prompt_field` or `messages_field` a row is a prompt with its answer, or a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tokenbound.corpus.answers import Answered, Conversation, Document
from tokenbound.corpus.contents import HEAD_BYTES, binary_kind, compressor_of, refuse_pointer
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import AnswerFields, PathFields
from tokenbound.corpus.streams import one_line, open_anywhere, open_source
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetFields(AnswerFields, PathFields):
    """Keys of `parquet`."""


class Parquet(FileSource[ParquetFields], TextSource[ParquetFields]):
    """Parquet files with a text column."""

    name = "parquet"
    takes = ParquetFields
    suffixes = (".parquet", ".pq")

    def documents(self, file: SourceFile) -> Iterator[Document]:
        """What each row holds."""
        import pyarrow as pa  # configs are validated without it
        import pyarrow.parquet as pq

        _require_parquet(file)
        names = list(self.fields.columns)
        try:
            with open_anywhere(file) as stream:
                table = pq.ParquetFile(stream)
                schema = table.schema_arrow
                for name in names:
                    require_column(name, schema.names, file.path)
                for name in self.fields.text_columns:
                    _require_text_type(name, schema.field(name).type, file.path)
                first = 0
                for batch in table.iter_batches(batch_size=1024, columns=names):
                    columns = {name: batch.column(name).to_pylist() for name in names}
                    yield from column_documents(columns, self.fields, file.path, first)
                    first += batch.num_rows
        except InputError:
            raise
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(
                f"corpus file {file.path!r} is not a readable Parquet file: {one_line(error)}; restore or remove it"
            ) from None


def _require_parquet(file: SourceFile) -> None:
    """Say what a file is that is no Parquet file."""
    with open_source(file) as stream:
        head = stream.read(HEAD_BYTES)
    refuse_pointer(file, head)
    if head.startswith(b"PAR1"):
        return
    if compressor := compressor_of(head):
        raise InputError(f"corpus file {file.path!r} is compressed by {compressor}; decompress the Parquet file")
    what = binary_kind(head) or ("empty" if not head else "JSON or text" if head[:1] in b"{[" else None)
    raise InputError(
        f"corpus file {file.path!r} is not a readable Parquet file{f' (it is {what})' if what else ''}; restore it, or "
        "set `corpus.source` to what it is"
    )


def require_column(field: str, names: list[str], origin: str) -> None:
    """Refuse a table in which a column is missing or not the only one of its name.

    Raises:
        InputError: it is; `origin` says of which table.
    """
    if field not in names:
        columns = ", ".join(sorted(names))
        raise InputError(f"{origin}: no column {field!r} (there are: {columns}); set `corpus.text_field`")
    if names.count(field) > 1:
        raise InputError(f"{origin}: {names.count(field)} columns are named {field!r}; rename all but one")


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


def _require_text_type(field: str, kind: pa.DataType, origin: str) -> None:
    from pyarrow import types  # configs are validated without it

    stored = kind.value_type if types.is_dictionary(kind) else kind
    if not any(getattr(types, f"is_{name}")(stored) for name in TEXT_TYPES):
        raise InputError(f"{origin}: column {field!r} is {kind}, not text; set `corpus.text_field`")


def column_documents(
    columns: Mapping[str, Sequence[object]], fields: AnswerFields, origin: str, first: int = 0
) -> Iterator[Document]:
    """What the rows of some columns hold.

    Args:
        columns: the values of each, by name.
        fields: which of them hold what.
        origin: of which table, for messages.
        first: number of the first row.

    Raises:
        InputError: a value is neither text nor bytes that hold UTF-8, or no conversation.
    """
    texts = [column_texts(columns[name], name, origin, first) for name in fields.text_columns]
    if fields.messages_field is not None:
        for row, value in enumerate(columns[fields.messages_field], start=first):
            try:
                yield Conversation.of(value, fields.messages_field)
            except InputError as error:
                raise InputError(f"{origin}, row {row}: {error}") from None
    else:
        yield from texts[0] if fields.prompt_field is None else map(Answered.of, *texts)


def column_texts(values: Iterable[object], field: str, origin: str, first: int = 0) -> Iterator[str]:
    """The texts of a column, row by row.

    Args:
        values: of the column.
        field: its name.
        origin: of which table, for messages.
        first: number of the first row.

    Raises:
        InputError: a value is neither text nor bytes that hold UTF-8.
    """
    for row, value in enumerate(values, start=first):
        if isinstance(value, bytes):
            try:
                yield value.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{origin}, row {row}: column {field!r} is not UTF-8 (byte 0x{value[error.start]:02x} at "
                    f"{error.start}); convert the column to UTF-8, or set `corpus.text_field`"
                ) from None
        elif isinstance(value, str):
            yield value
        else:
            kind = "null" if value is None else type(value).__name__
            raise InputError(f"{origin}, row {row}: column {field!r} is {kind}, not text; set `corpus.text_field`")
