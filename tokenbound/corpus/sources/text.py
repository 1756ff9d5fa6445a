"""`text`: each file is one document, in `encoding`, decompressed by its content; an empty file is an empty document.

An empty file that is named like a compressed one is none: its content never came.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.contents import is_void, not_in_encoding, wide_encoding
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import EncodingFields, PathFields
from tokenbound.corpus.streams import decoded, whole_text
from tokenbound.errors import InputError


class TextFields(EncodingFields, PathFields):
    """Keys of `text`."""


class Text(FileSource[TextFields], TextSource[TextFields]):
    """Files of plain text."""

    name = "text"
    takes = TextFields

    def documents(self, file: SourceFile) -> Iterator[str]:
        """The file's text."""
        if is_void(file):
            return
        encoding, data = self.fields.encoding, whole_text(file, self.name, self.max_document_bytes)
        text = decoded(data, encoding, self.fields.errors, file)
        if "\0" in text:
            wide = wide_encoding(data)
            if wide is not None and wide != encoding:
                raise InputError(f"corpus file {file.path!r} {not_in_encoding(data, encoding, data.index(0))}")
            raise InputError(
                f"corpus file {file.path!r} is binary (a zero byte at {data.index(0)}), which source `{self.name}` "
                "cannot read; move it out of the corpus, or convert it to text"
            )
        yield text
