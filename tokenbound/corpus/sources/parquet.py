"""`parquet`: each row is a document, the text of its column `text_field`, or bytes there that hold UTF-8.

What a row's document is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.answers import Document
from tokenbound.corpus.columns import column_documents, find_typed_columns, require_kind
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import MessageFields, PathFields
from tokenbound.corpus.streams import one_line, open_anywhere
from tokenbound.errors import InputError


class ParquetFields(MessageFields, PathFields):
    """Keys of `parquet`."""


class Parquet(FileSource[ParquetFields], TextSource[ParquetFields]):
    """Parquet files with columns of text."""

    name = "parquet"
    takes = ParquetFields
    suffixes = (".parquet", ".pq")

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What each row holds."""
        import pyarrow as pa  # configs are validated without it
        import pyarrow.parquet as pq

        require_kind(file, "Parquet", (b"PAR1",))
        fields = self.fields.row_fields
        try:
            with open_anywhere(file) as stream:
                table = pq.ParquetFile(stream)
                steps = find_typed_columns(fields, table.schema_arrow, file.path)
                # Other columns come along whose names begin like these and a dot.
                batches = table.iter_batches(batch_size=1024, columns=[field.name for field in fields])
                rows = (
                    row
                    for batch in batches
                    for row in zip(*(batch.column(step.key).to_pylist() for step in steps), strict=True)
                )
                yield from column_documents(rows, fields, steps, file.path)
        except InputError:
            raise
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(
                f"corpus file {file.path!r} is not a readable Parquet file: {one_line(error)}; restore or remove it"
            ) from None
