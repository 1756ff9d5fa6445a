"""`jsonl`: each line is a JSON object, whose field `text_field` is one document; blank lines are none.

Files are in `encoding`, decompressed by their content. A byte order mark that begins a line is skipped. What a row's
document is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from tokenbound.corpus.answers import Conversation, Document
from tokenbound.corpus.contents import not_in_encoding, refuse_binary, refuse_pointer, wide_encoding
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.row_text import RowField, Value, first_step, row_document
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import EncodingFields, MessageFields, PathFields
from tokenbound.corpus.streams import (
    BLOCK_BYTES,
    decoded_lines,
    one_line,
    open_anywhere,
    open_source,
    peek,
    text_blocks,
    too_large,
)
from tokenbound.errors import InputError

SOURCE = "jsonl"

BYTE_LINES = ("utf-8", "utf-8-sig")
"""Encodings in which the byte 10 is always the end of a line; other text is decoded before it is cut."""


class JsonlFields(EncodingFields, MessageFields, PathFields):
    """Keys of `jsonl`."""


class Jsonl(FileSource[JsonlFields], TextSource[JsonlFields]):
    """Files of JSON objects, one per line."""

    name = SOURCE
    takes = JsonlFields
    suffixes = (".jsonl", ".json", ".ndjson")

    @property
    def is_splittable(self) -> bool:
        """Whether lines can be told apart without decoding what is before them."""
        return self.fields.encoding in BYTE_LINES

    def documents(self, file: SourceFile, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Document | None]:
        """What each line holds; of a span, of the lines that start in it, read in blocks of a size."""
        lines: Iterator[bytes] | Iterator[str]
        first, asked = 0, self.fields.row_fields
        if not self.is_splittable:
            lines = decoded_lines(file, self.name, self.fields, self.max_document_bytes)
        elif file.span:
            first, lines = _span_lines(file, block_bytes, self.max_document_bytes)
        else:
            lines = _lines(text_blocks(file, self.name), file, self.max_document_bytes)
        for number, line in enumerate(cast(Iterator[bytes | str], lines)):
            if line.strip():
                try:
                    yield _line_document(line, self.fields, asked)
                except InputError as error:
                    place = number + 1 + (_count_lines(file, first) if first else 0)
                    raise InputError(f"{file.path!r}, line {place}: {error}") from None


def _lines(blocks: Iterable[bytes], file: SourceFile, most: int) -> Iterator[bytes]:
    """Lines without their newline; memory is one line of so many bytes at most, and one block."""
    pending, size = list[bytes](), 0
    for block in blocks:
        head, *rest = block.split(b"\n")
        pending.append(head)
        size += len(head)
        if size > most or any(len(line) > most for line in rest):
            raise InputError(f"corpus file {file.path!r} {too_large(most)}")
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending, size = [rest[-1]], len(rest[-1])
    if last := b"".join(pending):
        yield last


def _span_lines(file: SourceFile, block_bytes: int, most: int) -> tuple[int, Iterator[bytes]]:
    """Where the first line that starts inside the span begins, and the lines that do."""
    assert file.span is not None
    start, stop = file.span
    stream = open_anywhere(file)
    # Reading from one byte earlier tells whether a line starts exactly at `start`.
    stream.seek(max(start - 1, 0))
    lines = _lines(iter(lambda: stream.read(block_bytes), b""), file, most)
    if start == 0:
        head, blocks = peek(iter(lambda: stream.read(block_bytes), b""))
        refuse_pointer(file, head)
        refuse_binary(file, head, SOURCE)
        return 0, _until(_lines(blocks, file, most), 0, stop)
    begin = start + len(next(lines, b""))
    return begin, _until(lines, begin, stop)


def _until(lines: Iterator[bytes], begin: int, stop: int) -> Iterator[bytes]:
    while begin < stop:
        line = next(lines, None)
        if line is None:
            return
        yield line
        begin += len(line) + 1


def _count_lines(file: SourceFile, stop: int) -> int:
    """Lines before a byte position; only read when an error is reported."""
    with open_source(file) as stream:
        return stream.read(stop).count(b"\n")


def _line_document(line: bytes | str, fields: JsonlFields, asked: Sequence[RowField]) -> Document | None:
    try:
        text = line.decode("utf-8-sig", fields.errors) if isinstance(line, bytes) else line.removeprefix("\ufeff")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        assert isinstance(line, bytes)
        raise InputError(not_in_encoding(line, fields.encoding, error.start).removeprefix("is ")) from None
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(line, bytes) and (wide := wide_encoding(line)):
            raise InputError(f"looks like {wide.upper()}; set `corpus.encoding: {wide}`") from None
        raise InputError(f"not a JSON object: {one_line(error)}; write one object per line") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"not readable JSON: {one_line(error)}; correct the line") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object; write one object per line")
    try:
        for field in asked:
            _refuse_repeats(text, row, field.name)
        return row_document([_without_lone_surrogates(field.of(row)) for field in asked])
    except RecursionError:
        raise InputError("nested too deeply; correct the line") from None


class _Pairs(list[tuple[str, object]]):
    """The keys and values of a JSON object as they are written."""


def _refuse_repeats(text: str, row: dict[str, object], path: str) -> None:
    """Refuse a line that has the field twice: Python's parser would take the last and say nothing.

    Args:
        text: the line.
        row: what the parser made of it.
        path: of the field.

    Raises:
        InputError: one of the objects on the way has its key more than once.
    """
    if path in row and text.count(json.dumps(path, ensure_ascii=False)) < 2:
        return  # nearly every line
    written: object = json.loads(text, object_pairs_hook=_Pairs)
    while isinstance(written, _Pairs) and (step := first_step([key for key, _ in written], path)):
        found = [value for key, value in written if key == step.key]
        if len(found) > 1:
            raise InputError(f"field {step.key!r} is there more than once; keep one")
        written, path = found[0], step.rest


def _without_lone_surrogates(value: Value | None) -> Value | None:
    r"""JSON may spell half a surrogate pair, which no UTF-8 can hold; it becomes U+FFFD.

    >>> _without_lone_surrogates("a\ud800b")
    'a\ufffdb'
    """
    if isinstance(value, Conversation):
        text = json.dumps(value.messages, ensure_ascii=False)
        mended = _encodable(text)
        return value if mended == text else Conversation(tuple(json.loads(mended)))
    return None if value is None else _encodable(value)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
