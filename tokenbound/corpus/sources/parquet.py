"""`parquet`: each row is a document, the text of its column `text_field`, or bytes there that hold UTF-8.

What a row's text is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.columns import column_texts, require_column, require_kind, require_text_type
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowText
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import PathFields, RowFields
from tokenbound.corpus.streams import one_line, open_anywhere
from tokenbound.errors import InputError


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

        require_kind(file, "Parquet", (b"PAR1",))
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
