"""`parquet`: each row is a document, the text of its column `text_field`, or bytes there that hold UTF-8.

What a row's text is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenbound.corpus.contents import HEAD_BYTES, binary_kind, compressor_of, refuse_pointer
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowText, Step, column_texts, first_step, require_column
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import PathFields, RowFields
from tokenbound.corpus.streams import one_line, open_anywhere, open_source
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetFields(RowFields, PathFields):
    """Keys of `parquet`."""


class Parquet(FileSource[ParquetFields], TextSource[ParquetFields]):
    """Parquet files with a text column."""

    name = "parquet"
    takes = ParquetFields
    suffixes = (".parquet", ".pq")

    def documents(self, file: SourceFile) -> Iterator[str | None]:
        """The text of each row."""
        import pyarrow as pa  # configs are validated without it
        import pyarrow.parquet as pq

        _require_parquet(file)
        text = RowText(self.fields.text_field, self.fields.missing)
        try:
            with open_anywhere(file) as stream:
                table = pq.ParquetFile(stream)
                schema = table.schema_arrow
                step = require_column(text.field, schema.names, file.path)
                require_text_type(text.field, step, schema.field(step.key).type, file.path)
                batches = table.iter_batches(batch_size=1024, columns=[text.field])
                # Other columns come along whose names begin like this one and a dot.
                values = (value for batch in batches for value in batch.column(step.key).to_pylist())
                yield from column_texts(values, text, step.rest, file.path)
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
