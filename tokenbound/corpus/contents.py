"""What a file holds, told from its first bytes: compressors are undone, and what is not text is called by its name.

Names do not decide: a file that was renamed, downloaded half-way or checked out without its content is still what its
bytes say. A name that promises a compressor which the bytes contradict is refused.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from tokenbound.errors import InputError

if TYPE_CHECKING:
    from zlib import _Decompress

    Decompressor: TypeAlias = _Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor

HEAD_BYTES = 1 << 12
"""How much of a file is looked at to tell what it holds."""

POINTER_BYTES = 1024
"""Pointer files are no longer than this."""

COMPRESSORS = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), (".gz", ".gzip")),
    # The block after the header decides: a document may begin with "BZh9".
    "bzip2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"), (".bz2",)),
    "xz": (re.compile(rb"\xfd7zXZ\0"), (".xz",)),
    "zstd": (re.compile(rb"(?:[\x50-\x5f]\x2a\x4d\x18|\x28\xb5\x2f\xfd)"), (".zst", ".zstd")),
}
"""Compressors that are undone: how their files begin, and how they are named."""

UNREAD_COMPRESSORS = (".lz4", ".br", ".lzma", ".lz", ".z", ".sz", ".snappy", ".lzo")
"""Names of compressors that are not undone."""

COMPRESSED_SUFFIXES = (*(suffix for _, names in COMPRESSORS.values() for suffix in names), *UNREAD_COMPRESSORS)

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
"""Names of archives, which are refused where they take the place of a file."""

MAGIC = {
    "a zip archive": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
    "a tar archive": rb".{257}ustar(?:\0|  \0)",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "a Unix archive": rb"!<arch>\n",
    "a cpio archive": rb"07070[127][0-9A-Fa-f]{60}",
    "a Parquet file": rb"PAR1[\0-\x1f]",
    "an Arrow file": rb"ARROW1\0\0",
    "an ORC file": rb"ORC\n?[\0-\x1f]",
    "an Avro file": rb"Obj\x01",
    "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    "an SQLite database": rb"SQLite format 3\0",
    "a NumPy array": rb"\x93NUMPY",
    "an lz4 file": rb"\x04\x22\x4d\x18",
    "an lzip file": rb"LZIP\x01",
    "a file made by compress (.Z)": rb"\x1f[\x9d\xa0]",
    "a legacy .lzma file": rb"\x5d\0\0[\0-\xff]{2}.{8}\0",
    "a snappy file": rb"\xff\x06\0\0sNaPpY",
    "a PDF document": rb"%PDF-\d",
    "an Office document": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "an image": rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP",
    "a program": rb"\x7fELF|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe",
}
"""How the usual files that are not text begin; whatever else holds a NUL is called binary."""

_MAGIC = {what: re.compile(pattern, re.DOTALL) for what, pattern in MAGIC.items()}

UNPACK = {"a zip archive", "a tar archive", "a 7z archive", "a rar archive", "a Unix archive", "a cpio archive"}

POINTERS = {
    "a git-lfs pointer": (
        re.compile(rb"version https://(?:git-lfs\.github|hawser\.github)\.com/spec/"),
        "git lfs pull",
    ),
    "a git-annex pointer": (re.compile(rb"/annex/objects/\S+\n?$"), "git annex get"),
    "a DVC pointer": (
        re.compile(rb"(?:md5: [0-9a-f]{32}\n|deps:\n|wdir:.*\n)*outs:\n- (?:md5|etag|hash): "),
        "dvc pull",
    ),
}
"""Files that version control leaves in the place of a large one, and the command that fetches it."""

BOMS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class Named(Protocol):
    """What messages say of a file."""

    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def name(self) -> str:
        """Its name in the corpus."""

    @property
    def bytes(self) -> int:
        """Its stored size."""


def compressor_of(head: bytes) -> str | None:
    """The compressor that made a file, by its first bytes.

    >>> import gzip
    >>> compressor_of(gzip.compress(b"x")), compressor_of(b"BZh9 is how bzip2 begins")
    ('gzip', None)
    """
    return next((name for name, (magic, _) in COMPRESSORS.items() if magic.match(head)), None)


def without_compression(name: str) -> str:
    """A file's name in lower case without the suffixes of compressors and archives.

    >>> without_compression("A.JSONL.GZ"), without_compression("a.jsonl"), without_compression("a.jsonl.tar.xz")
    ('a.jsonl', 'a.jsonl', 'a.jsonl')
    """
    stem = name.lower()
    while suffix := next((end for end in (*COMPRESSED_SUFFIXES, *ARCHIVE_SUFFIXES) if stem.endswith(end)), None):
        stem = stem.removesuffix(suffix)
    return stem


def binary_kind(head: bytes) -> str | None:
    r"""What a file is that is known not to be text, by its first bytes.

    >>> binary_kind(b"PAR1\x15"), binary_kind(b"plain")
    ('a Parquet file', None)
    """
    return next((what for what, magic in _MAGIC.items() if magic.match(head)), None)


def refuse_pointer(file: Named, head: bytes) -> None:
    """Refuse what version control left in the place of a file.

    Raises:
        InputError: it is a pointer; the message says how to fetch the file.
    """
    if file.bytes > POINTER_BYTES:
        return
    for what, (magic, command) in POINTERS.items():
        if magic.match(head):
            raise InputError(
                f"corpus file {file.path!r} is {what}, not the file itself; run `{command}` to fetch the content, or "
                "move the pointer out of the corpus"
            )


def refuse_binary(file: Named, head: bytes, source: str) -> None:
    """Refuse a file that is known not to be text.

    Args:
        file: for the message.
        head: first bytes, decompressed.
        source: kind of source that asked for text.

    Raises:
        InputError: the file is one of `MAGIC`.
    """
    what = binary_kind(head)
    if what is None:
        return
    if what in UNPACK:
        cure = "extract it and name the extracted files"
    elif what == "a Parquet file":
        cure = "set `corpus.source: parquet`"
    elif what == "an Arrow file":
        cure = "set `corpus.source: arrow`"
    elif what == "a NumPy array":
        cure = "set `corpus.source: tokens` if it holds token ids"
    else:
        cure = "convert it to text, or move it out of the corpus"
    raise InputError(f"corpus file {file.path!r} is {what}, which source `{source}` cannot read; {cure}")


def is_void(file: Named) -> bool:
    """Whether a file is empty although even nothing, once compressed, would have some bytes: it holds no document."""
    return not file.bytes and file.name.lower().endswith(COMPRESSED_SUFFIXES)


def plain_compressor(file: Named, head: bytes) -> str | None:
    """The compressor to undo, after checking that the name does not promise another one; None for an empty file.

    Raises:
        InputError: the name ends like that of a compressor which did not make the content.
    """
    found, lower = compressor_of(head), file.name.lower()
    suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if lower.endswith(suffix)), None)
    if suffix is None:
        return found
    promised = next((name for name, (_, names) in COMPRESSORS.items() if suffix in names), None)
    if promised is None:
        raise InputError(
            f"corpus file {file.path!r} is named {suffix}, a compression that is not supported; decompress it, or use "
            f"{', '.join(COMPRESSORS)}"
        )
    if not head:  # nothing to undo: what was to be compressed never came
        return None
    if promised != found:
        really = found or binary_kind(head) or "not compressed"
        raise InputError(
            f"corpus file {file.path!r} is named {suffix} but its content is not {promised} (it is {really}); restore "
            "or rename it"
        )
    return found


def decompressed(compressor: str | None, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Undo a compressor block by block; memory is a few blocks.

    Several compressed streams one after another are one content, as the command-line tools read them. What is left
    behind the last one is an error, not ignored.

    Raises:
        ValueError: the content is damaged, ends early, or has something else behind it.

    >>> b"".join(decompressed("bzip2", [bz2.compress(b"a") + bz2.compress(b"b")]))
    b'ab'
    """
    if compressor is None:
        yield from blocks
    elif compressor == "zstd":
        yield from _unzstd(blocks)
    else:
        yield from _undo(_STREAMS[compressor], blocks)


class _Stream(NamedTuple):
    start: Callable[[], Decompressor]
    errors: tuple[type[Exception], ...]
    padding: int
    """Zero bytes that may lie behind a stream come in multiples of this; 0 where none may."""


_STREAMS = {
    "gzip": _Stream(lambda: zlib.decompressobj(wbits=31), (zlib.error,), 1),
    "bzip2": _Stream(bz2.BZ2Decompressor, (OSError, ValueError), 0),
    "xz": _Stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (lzma.LZMAError,), 4),
}

OUTPUT_BYTES = 1 << 22
"""Decompressed at a time: a few bytes may unpack to gigabytes."""


def _undo(stream: _Stream, blocks: Iterable[bytes]) -> Iterator[bytes]:
    current, padded = stream.start(), 0
    begun = False
    for block in blocks:
        rest = block
        while rest:
            if not begun:
                stripped = rest.lstrip(b"\0") if stream.padding else rest
                padded += len(rest) - len(stripped)
                rest = stripped
                if not rest:
                    break
                if stream.padding and padded % stream.padding:
                    raise ValueError("unexpected bytes between its compressed streams")
                padded, begun = 0, True
            try:
                yield from _output(current, rest)
            except stream.errors as error:
                raise ValueError(str(error)) from None
            rest = b""
            if current.eof:
                rest, current, begun = current.unused_data, stream.start(), False
    if begun:
        raise ValueError("it ends before its compressed content does")
    if stream.padding and padded % stream.padding:
        raise ValueError("unexpected bytes behind its compressed content")


def _output(current: Decompressor, data: bytes) -> Iterator[bytes]:
    """What one block unpacks to, in pieces of at most `OUTPUT_BYTES`."""
    if isinstance(current, bz2.BZ2Decompressor | lzma.LZMADecompressor):  # bz2 and lzma keep what they did not get to
        piece = current.decompress(data, OUTPUT_BYTES)
        yield piece
        while not current.needs_input and not current.eof:
            yield current.decompress(b"", OUTPUT_BYTES)
        return
    yield current.decompress(data, OUTPUT_BYTES)
    while current.unconsumed_tail and not current.eof:
        yield current.decompress(current.unconsumed_tail, OUTPUT_BYTES)
    while not current.eof and (piece := current.decompress(b"", OUTPUT_BYTES)):
        yield piece


def _unzstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    import pyarrow as pa  # configs are validated without it

    try:
        stream = pa.CompressedInputStream(pa.PythonFile(_Reader(blocks), mode="r"), "zstd")
        yield from iter(lambda: stream.read(OUTPUT_BYTES), b"")
    except OSError as error:
        raise ValueError(str(error)) from None


class _Reader:
    """Blocks as the few methods of a file that pyarrow calls."""

    closed = False

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks, self._rest = iter(blocks), b""

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def readable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing to let go of."""


def not_in_encoding(data: bytes, encoding: str, start: int) -> str:
    r"""Why some bytes are not in an encoding, and which key to set.

    Args:
        data: what could not be decoded, from the beginning of the file or line.
        encoding: what was tried.
        start: index of the first byte that is invalid.

    >>> not_in_encoding("d\u00e9j\u00e0".encode("latin-1"), "utf-8", 1)[:60]
    'is not UTF-8 (byte 0xe9 at 1): it looks like Latin-1 or Wind'
    """
    tried = encoding.upper() if encoding.startswith("utf") else encoding
    place = f"is not {tried} (byte 0x{data[start]:02x} at {start})" if start < len(data) else f"is not {tried}"
    wide = wide_encoding(data)
    if wide is not None and wide != encoding:
        return f"{place}: it looks like {wide.upper()}; set `corpus.encoding: {wide}`, or convert it to UTF-8"
    if encoding.startswith("utf-8") and _looks_like_latin(data):
        return (
            f"{place}: it looks like Latin-1 or Windows-1252; set `corpus.encoding: latin-1` (or `cp1252`), convert it "
            "to UTF-8, or set `corpus.errors: replace`"
        )
    return f"{place}; set `corpus.encoding` to what it is, convert it to UTF-8, or set `corpus.errors: replace`"


def wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, told from a byte order mark or from where the NULs are; None for neither.

    >>> wide_encoding("text".encode("utf-16")), wide_encoding("text".encode("utf-16-le")), wide_encoding(b"text")
    ('utf-16', 'utf-16-le', None)
    """
    for name, marks in BOMS.items():
        if data.startswith(marks):
            return name
    sample = data[: HEAD_BYTES - HEAD_BYTES % 4]
    if len(sample) < 4 or b"\0" not in sample:
        return None
    nuls = [sample[index::4].count(0) / max(1, len(sample[index::4])) for index in range(4)]
    if min(nuls[1:]) > 0.6 and nuls[0] < 0.2:
        return "utf-32-le"
    if min(nuls[:3]) > 0.6 and nuls[3] < 0.2:
        return "utf-32-be"
    even, odd = (nuls[0] + nuls[2]) / 2, (nuls[1] + nuls[3]) / 2
    if odd > 0.6 and even < 0.2:
        return "utf-16-le"
    if even > 0.6 and odd < 0.2:
        return "utf-16-be"
    return None


def _looks_like_latin(data: bytes) -> bool:
    """Whether no byte is a control character, as in a text in a Western single-byte code."""
    return not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in data[:HEAD_BYTES])
