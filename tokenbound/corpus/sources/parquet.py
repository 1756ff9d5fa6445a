"""`parquet`: each row is a document, the text of its column `text_field`, or bytes there that hold UTF-8.

What a row's document is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.answers import Document
from tokenbound.corpus.columns import batch_documents, damage_named, find_typed_columns, require_kind
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import MessageFields, PathFields
from tokenbound.corpus.streams import open_anywhere


class ParquetFields(MessageFields, PathFields):
    """Keys of `parquet`."""


class Parquet(FileSource[ParquetFields], TextSource[ParquetFields]):
    """Parquet files with columns of text."""

    name = "parquet"
    takes = ParquetFields
    suffixes = (".parquet", ".pq")

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What each row holds."""
        import pyarrow.parquet as pq  # configs are validated without it

        require_kind(file, "Parquet", (b"PAR1",))
        fields = self.fields.row_fields
        with damage_named(file, "Parquet"), open_anywhere(file) as stream:
            table = pq.ParquetFile(stream)
            steps = find_typed_columns(fields, table.schema_arrow, file.path)
            # Other columns come along whose names begin like these and a dot.
            batches = table.iter_batches(batch_size=1024, columns=[field.name for field in fields])
            yield from batch_documents(batches, fields, steps, file.path)
