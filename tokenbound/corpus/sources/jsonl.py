"""`jsonl`: each line is a JSON object, whose field `text_field` is one document; blank lines are none.

With `prompt_field` or `messages_field` an object is a prompt with its answer, or a conversation.

Files are in `encoding`, decompressed by their content. A byte order mark that begins a line is skipped.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import cast

from tokenbound.corpus.answers import Answered, Conversation, Document
from tokenbound.corpus.contents import not_in_encoding, refuse_binary, refuse_pointer, wide_encoding
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import AnswerFields, EncodingFields, PathFields
from tokenbound.corpus.streams import (
    BLOCK_BYTES,
    one_line,
    open_anywhere,
    open_source,
    peek,
    require_bom,
    text_blocks,
    too_large,
)
from tokenbound.errors import InputError

SOURCE = "jsonl"

BYTE_LINES = ("utf-8", "utf-8-sig")
"""Encodings in which the byte 10 is always the end of a line; other text is decoded before it is cut."""


class JsonlFields(EncodingFields, AnswerFields, PathFields):
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

    def documents(self, file: SourceFile, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Document]:
        """What each line holds; of a span, of the lines that start in it, read in blocks of a size."""
        lines: Iterator[bytes] | Iterator[str]
        first = 0
        if not self.is_splittable:
            lines = _decoded_lines(self.fields, file, self.max_document_bytes)
        elif file.span:
            first, lines = _span_lines(file, block_bytes, self.max_document_bytes)
        else:
            lines = _lines(text_blocks(file, self.name), file, self.max_document_bytes)
        for number, line in enumerate(cast(Iterator[bytes | str], lines)):
            if line.strip():
                try:
                    yield _line_document(line, self.fields)
                except InputError as error:
                    place = number + 1 + (_count_lines(file, first) if first else 0)
                    raise InputError(f"{file.path!r}, line {place}: {error}") from None


def _decoded_lines(fields: JsonlFields, file: SourceFile, most: int) -> Iterator[str]:
    """Lines of a file in another encoding, without their newline."""
    decoder = codecs.getincrementaldecoder(fields.encoding)(fields.errors)
    head, blocks = peek(text_blocks(file, SOURCE))
    require_bom(head, fields.encoding, file)
    pending = ""
    try:
        for block in chain(blocks, [None]):
            *lines, pending = (pending + decoder.decode(block or b"", final=block is None)).split("\n")
            yield from lines
            if len(pending) > most:
                raise InputError(f"corpus file {file.path!r} {too_large(most)}")
    except UnicodeDecodeError as error:
        reason = not_in_encoding(error.object, fields.encoding, error.start)
        raise InputError(f"corpus file {file.path!r} {reason}") from None
    if pending:
        yield pending


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


def _line_document(line: bytes | str, fields: JsonlFields) -> Document:
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
    for name in fields.columns:
        if text.count(json.dumps(name, ensure_ascii=False)) > 1 and _times(text, name) > 1:
            raise InputError(f"field {name!r} is there more than once; keep one")
    if fields.messages_field is not None:
        return _conversation(row.get(fields.messages_field), fields.messages_field)
    texts = [_checked_text(row.get(name), name, row) for name in fields.text_columns]
    return texts[0] if fields.prompt_field is None else Answered.of(*texts)


def _times(text: str, name: str) -> int:
    """How often the outermost object of a line has a key; Python's parser would take the last and say nothing."""
    outermost = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    return sum(key == name for key, _ in outermost)


def _checked_text(value: object, field: str, columns: Iterable[str]) -> str:
    if isinstance(value, str):
        return _without_lone_surrogates(value)
    if field not in columns:
        names = ", ".join(sorted(columns)) or "none"
        raise InputError(f"no field {field!r} (there are: {names}); set `corpus.text_field`")
    raise InputError(
        f"field {field!r} must be a string, got {type(value).__name__}; set `corpus.text_field` or fix the row"
    )


def _conversation(value: object, field: str) -> Conversation:
    """The messages of a field; in none of their texts there is half a surrogate pair."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        mended = _without_lone_surrogates(text)
        return Conversation.of(value if mended == text else json.loads(mended), field)
    except RecursionError:
        raise InputError(f"field {field!r} is nested too deeply; correct the line") from None


def _without_lone_surrogates(text: str) -> str:
    r"""JSON may spell half a surrogate pair, which no UTF-8 can hold; it becomes U+FFFD.

    >>> _without_lone_surrogates("a\ud800b")
    'a\ufffdb'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
