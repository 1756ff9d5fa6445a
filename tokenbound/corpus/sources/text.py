"""`text`: each file is one document, in `encoding`, decompressed by its content; an empty file is an empty document."""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.contents import not_in_encoding, wide_encoding
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import EncodingFields, PathFields
from tokenbound.corpus.streams import decoded, text_blocks
from tokenbound.errors import InputError


class TextFields(EncodingFields, PathFields):
    """Keys of `text`."""


class Text(FileSource[TextFields], TextSource[TextFields]):
    """Files of plain text."""

    name = "text"
    takes = TextFields

    def documents(self, file: SourceFile) -> Iterator[str]:
        """The file's text."""
        encoding, data = self.fields.encoding, b"".join(text_blocks(file, self.name))
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
