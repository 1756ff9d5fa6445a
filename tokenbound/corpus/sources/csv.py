"""`csv`: each row below the header is a document, the cell of its column `text_field`; blank lines are none.

Files are in `encoding`, decompressed by their content; cells are separated by tabs in files named `.tsv` or `.tab`, by
commas in others, or by `delimiter`. A cell in double quotes may hold delimiters, line ends and doubled quotes. Tables
cannot tell a cell without text from none, so an empty cell is a row without a text (`tokenbound.corpus.row_text`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from tokenbound.corpus.answers import Document
from tokenbound.corpus.columns import document_inside, find_columns
from tokenbound.corpus.contents import not_in_encoding, wide_encoding, without_compression
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowField, Step
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import EncodingFields, PathFields, RowFields, TableFields
from tokenbound.corpus.streams import decoded_lines, one_line, too_large
from tokenbound.errors import InputError

TABBED = (".tsv", ".tab")
"""Names of files whose cells are separated by tabs."""


class CsvFields(TableFields, EncodingFields, RowFields, PathFields):
    """Keys of `csv`."""


class Csv(FileSource[CsvFields], TextSource[CsvFields]):
    """Tables of text with a header."""

    name = "csv"
    takes = CsvFields
    suffixes = (".csv", *TABBED)

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What each row holds."""
        given, fields = self.fields, self.fields.row_fields
        lines = _Lines(decoded_lines(file, self.name, given, self.max_document_bytes), file, self.max_document_bytes)
        delimiter = self.delimiter(file.name)
        rows = _rows(lines, file, delimiter, given.quoting)
        _, header = next(rows, (0, list[str]()))
        if not header:
            return
        _refuse_wide(delimiter.join(header), given.encoding, file)
        steps = _columns(fields, header, file.path)
        cells = [header.index(step.key) for step in steps]
        for number, row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"{file.path!r}, line {number}: {len(row)} cells, but the header has {len(header)}; quote cells "
                    "that hold a delimiter, set `corpus.delimiter`, or `corpus.quoting: none` where quotes are text"
                )
            try:
                yield document_inside([row[cell] or None for cell in cells], fields, steps)
            except InputError as error:
                raise InputError(f"{file.path!r}, line {number}: {error}") from None

    def delimiter(self, name: str) -> str:
        """What separates the cells of a file of this name."""
        return self.fields.delimiter or ("\t" if without_compression(name).endswith(TABBED) else ",")


class _Lines:
    """Lines of a file with their ends, of which one row may take so much and no more."""

    def __init__(self, lines: Iterable[str], file: SourceFile, most: int) -> None:
        self._lines, self._file, self._most = iter(lines), file, most
        self.taken = 0
        """Characters since the last row; an open quote takes line after line."""

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.taken += len(line) + 1
            if self.taken > self._most:
                raise InputError(f"corpus file {self._file.path!r} {too_large(self._most)}; or close its quotes")
            yield f"{line}\n"


def _rows(lines: _Lines, file: SourceFile, delimiter: str, quoting: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    _allow_long_cells()
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        for row in reader:
            lines.taken = 0
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        # A lone carriage return: some tools take it for the end of a line, others write it into cells as it is.
        cure = "quote cells that hold line ends, and end lines with a newline"
        if "new-line" not in str(error):
            cure = "double the quotes inside quoted cells, or set `corpus.quoting: none` where quotes are text"
        raise InputError(
            f"{file.path!r}, line {reader.line_num}: not a row of a table ({one_line(error)}); {cure}"
        ) from None


def _allow_long_cells() -> None:
    """Python's limit of 131,072 characters is one for the whole process; rows are limited by `_Lines`."""
    longest = (1 << 31) - 1
    if csv.field_size_limit() < longest:
        csv.field_size_limit(longest)


def _columns(fields: Sequence[RowField], header: list[str], path: str) -> list[Step]:
    """Which cells of a row make its document."""
    named = any(header == [field.name] for field in fields)
    if len(header) == 1 and not named and (found := [mark for mark in ";\t|," if mark in header[0]]):
        raise InputError(
            f"{path}: its header is one cell, {header[0][:80]!r}; set `corpus.delimiter: {found[0]!r}` if that is what "
            "separates the cells"
        )
    steps = find_columns(fields, header, path)
    for field, step in zip(fields, steps, strict=True):
        if step.rest:
            raise InputError(
                f"{path}: no column {field.name!r}, and cells have no fields inside; set `corpus.{field.key}`"
            )
    return steps


def _refuse_wide(header: str, encoding: str, file: SourceFile) -> None:
    """Name UTF-16 without a mark, which UTF-8 takes for text full of NULs."""
    data = header.encode(encoding, "replace")
    if b"\0" in data and (wide := wide_encoding(data)) and wide != encoding:
        raise InputError(f"corpus file {file.path!r} {not_in_encoding(data, encoding, data.index(0))}")
