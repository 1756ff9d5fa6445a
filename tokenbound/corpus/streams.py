"""The bytes of a corpus file, block by block: opened anywhere, decompressed, checked, decoded.

Text is strict UTF-8 unless the config names another encoding or `errors: replace`. A byte order mark that begins a text
belongs to it, unless the encoding is `utf-8-sig`, or `utf-16` or `utf-32`, which need one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tokenbound.corpus.contents import (
    BOMS,
    HEAD_BYTES,
    compressor_of,
    decompressed,
    not_in_encoding,
    plain_compressor,
    refuse_binary,
    refuse_pointer,
)
from tokenbound.corpus.files import SourceFile
from tokenbound.errors import InputError, TokenboundError

if TYPE_CHECKING:
    from tokenbound.corpus.sources.fields import EncodingFields

BLOCK_BYTES = 1 << 22
"""How much is read from a file at a time."""


@contextmanager
def open_source(file: SourceFile) -> Iterator[BinaryIO]:
    """The stored bytes of a file as a stream.

    Raises:
        InputError: the file has disappeared or cannot be read.
    """
    from tokenbound.store.filesystem import is_local, open_input, resolve  # configs are validated without pyarrow

    filesystem, path = resolve(file.path)
    try:
        stream = _open_local(path) if is_local(filesystem) else open_input(filesystem, path)
    except OSError as error:
        raise InputError(f"cannot read corpus file {file.path!r}: {one_line(error)}") from None
    with stream:
        yield stream


def open_anywhere(file: SourceFile) -> BinaryIO:
    """The stored bytes of a file, to read ranges."""
    from tokenbound.store.filesystem import is_local, open_random, resolve  # configs are validated without pyarrow

    filesystem, path = resolve(file.path)
    return _open_local(path) if is_local(filesystem) else open_random(filesystem, path)


def _open_local(path: str) -> BinaryIO:
    """A local file; pyarrow would take only names that are UTF-8."""
    return Path(path).open("rb")


def stored_blocks(file: SourceFile) -> Iterator[bytes]:
    """The stored bytes of a file.

    Raises:
        InputError: the file has disappeared or cannot be read.
    """
    with open_source(file) as stream:
        try:
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
        except OSError as error:
            raise InputError(f"cannot read corpus file {file.path!r}: {one_line(error)}") from None


def peek(blocks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first `HEAD_BYTES` or more, fewer only where there are no more, and all blocks."""
    rest, head = iter(blocks), b""
    for block in rest:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head, chain([head] if head else [], rest)


def text_blocks(file: SourceFile, source: str) -> Iterator[bytes]:
    """Decompressed content in blocks, after checking that it is not known to be something else than text.

    Args:
        file: to read.
        source: name of the source, for messages.

    Raises:
        InputError: the file is damaged, a pointer, or not text.
    """
    stored, blocks = peek(stored_blocks(file))
    refuse_pointer(file, stored)
    compressor = plain_compressor(file, stored)
    try:
        head, content = peek(decompressed(compressor, blocks))
        if compressor is not None and (again := compressor_of(head)):
            raise InputError(
                f"corpus file {file.path!r} is compressed twice, by {again} and {compressor}; decompress it once"
            )
        refuse_binary(file, head, source)
        yield from content
    except TokenboundError:  # the store may have failed too
        raise
    except ValueError as error:
        raise InputError(f"corpus file {file.path!r} is damaged: {one_line(error)}; restore or remove it") from None


def whole_text(file: SourceFile, source: str, most: int) -> bytes:
    """Decompressed content of a file that is one document.

    Args:
        file: to read.
        source: name of the source, for messages.
        most: `corpus.max_document_bytes`.

    Raises:
        InputError: as for `text_blocks`, or there is more.
    """
    kept, size = list[bytes](), 0
    for block in text_blocks(file, source):
        size += len(block)
        if size > most:
            raise InputError(f"corpus file {file.path!r} {too_large(most)}")
        kept.append(block)
    return b"".join(kept)


def too_large(most: int) -> str:
    """What is wrong with a document, and what to do."""
    return (
        f"holds a document of more than {most:,} bytes (corpus.max_document_bytes); split it, or raise the limit if it "
        "fits into the memory ten times"
    )


def decoded(data: bytes, encoding: str, errors: str, file: SourceFile) -> str:
    """The text of a file.

    Args:
        data: its content, decompressed.
        encoding: as in `corpus.encoding`.
        errors: as in `corpus.errors`.
        file: for messages.

    Raises:
        InputError: the content is not in the encoding.
    """
    require_bom(data, encoding, file)
    try:
        return data.decode(encoding, errors)
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else len(data)
        raise InputError(f"corpus file {file.path!r} {not_in_encoding(data, encoding, start)}") from None


def decoded_lines(file: SourceFile, source: str, fields: EncodingFields, most: int) -> Iterator[str]:
    """The lines of a file without their newline, and without the byte order mark that may begin it.

    Args:
        file: to read.
        source: name of the source, for messages.
        fields: `corpus.encoding` and `corpus.errors`.
        most: `corpus.max_document_bytes`; memory is one line of it and one block.

    Raises:
        InputError: as for `text_blocks`, the content is not in the encoding, or a line is longer.
    """
    decoder = codecs.getincrementaldecoder(fields.encoding)(fields.errors)
    head, blocks = peek(text_blocks(file, source))
    require_bom(head, fields.encoding, file)
    pending, begun = "", False
    try:
        for block in chain(blocks, [None]):
            text = decoder.decode(block or b"", final=block is None)
            if text and not begun:
                text, begun = text.removeprefix("\ufeff"), True
            *lines, pending = (pending + text).split("\n")
            yield from lines
            if len(pending) > most:
                raise InputError(f"corpus file {file.path!r} {too_large(most)}")
    except UnicodeDecodeError as error:
        reason = not_in_encoding(error.object, fields.encoding, error.start)
        raise InputError(f"corpus file {file.path!r} {reason}") from None
    if pending:
        yield pending


def require_bom(head: bytes, encoding: str, file: SourceFile) -> None:
    """Python takes `utf-16` without a byte order mark for the machine's own order, which the file may not have.

    Raises:
        InputError: the encoding needs a mark, and the file has none.
    """
    if head and encoding in BOMS and not head.startswith(BOMS[encoding]):
        raise InputError(
            f"corpus file {file.path!r} has no byte order mark; set `corpus.encoding: {encoding}-le` or `{encoding}-be`"
        )


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
