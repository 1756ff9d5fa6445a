"""Where documents come from: files of several kinds, and Hugging Face datasets.

A corpus is an ordered list of `SourceFile`s. A file's *name* is its path below what the config names (a file's
own name, a path below the directory, a path below the fixed part of a glob), so that a corpus keeps its identity
when it moves to another machine, and a new file never changes the name of an old one. Names need not be UTF-8. Which
files a directory or glob holds, and what is left out, is said in `tokenbound.corpus.listing`.

| source          | one document is                             | read as                                          |
|-----------------|---------------------------------------------|--------------------------------------------------|
| `python-stdlib` | one ``*.py`` file of this Python's library  | bytes for the tokenizer `bytes`, else text       |
| `text`          | one file                                    | text in `encoding`, decompressed by its content  |
| `jsonl`         | one line                                    | text in `encoding`, decompressed by its content  |
| `parquet`, `hf` | one row                                     | text, or bytes that hold UTF-8                   |
| `tokens`        | the ids up to and including each `eos_id`   | ids; see `tokenbound.corpus.prepare`             |

Text is strict UTF-8 unless the config names another encoding or `errors: replace`. `python-stdlib` goes to the `bytes`
tokenizer byte for byte, because some test data among its modules is in no encoding at all. A byte order mark that
begins a line of JSON is skipped; one that begins a `text` file belongs to the document, unless the encoding is
`utf-8-sig`, or `utf-16` or `utf-32`, which need one. An empty file is read: it is an empty document, or none where
documents are lines.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import posixpath
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSystem, FileType

from tokenbound.config import CorpusConfig
from tokenbound.corpus import listing
from tokenbound.corpus.contents import (
    BOMS,
    HEAD_BYTES,
    binary_kind,
    compressor_of,
    decompressed,
    not_in_encoding,
    plain_compressor,
    refuse_binary,
    refuse_pointer,
    wide_encoding,
    without_compression,
)
from tokenbound.corpus.listing import Skipped
from tokenbound.errors import InputError
from tokenbound.store.filesystem import is_local, open_input, open_random, resolve
from tokenbound.store.remote import file_infos
from tokenbound.store.uri import is_uri, reroot

BLOCK_BYTES = 1 << 22
"""How much is read from a file at a time."""

DATASET_ROWS = 1 << 14
"""Rows of one `hf` source file: small enough to be a unit of work, fixed so that names stay the same."""

LENGTH_BYTES = 8
"""Size of the length before each text in the digest of dataset rows."""

STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})
"""Directories below the standard library that are not part of it."""

SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet", ".pq"),
    "tokens": (".bin", ".npy"),
}
"""What a directory contributes to a source, in upper or lower case and behind it the suffix of a compressor; `text`
takes every file."""


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, or one range of rows of a dataset."""

    name: str
    """Unique in the corpus and independent of where the corpus lies."""
    path: str
    """Where it is read from: a local path, a URI, or the dataset's name."""
    bytes: int
    """Stored size; for dataset rows, the UTF-8 bytes of their texts (0 until digested)."""
    sha256: str = ""
    """Hex digest of the stored bytes; for dataset rows, of their length-prefixed texts. Empty until digested."""
    splittable: bool = False
    """Whether parts of the file can be read without the rest (uncompressed JSON lines)."""
    span: tuple[int, int] | None = None
    """Byte range to read; a line belongs to the span in which it starts. Null: the whole file."""


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, and how many were left out by which rule."""

    files: list[SourceFile]
    skipped: dict[str, int] = field(default_factory=dict)
    """Files and directories left out, by the name of the rule: see `tokenbound.corpus.listing`."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first names of each rule."""


def list_files(config: CorpusConfig) -> list[SourceFile]:
    """All files of a corpus in their one order, each with the SHA-256 of its content.

    Reads every byte once. To spread that over machines, map `digest_file` over `find_files`.

    Raises:
        InputError: a path is missing or listed twice, two files share a name, or there is no file at all.
    """
    return [digest_file(config, file) for file in find_files(config)]


def find_files(config: CorpusConfig) -> list[SourceFile]:
    """All files of a corpus in their one order, not yet digested: those of `find_corpus`."""
    return find_corpus(config).files


def find_corpus(config: CorpusConfig) -> Listing:
    """All files of a corpus in their one order, not yet digested, and what was left out of the places named.

    The order is that of the config's `paths`; inside a directory or glob, that of the relative paths (by code
    point).

    Raises:
        InputError: a path is missing, a broken link or listed twice, two files share a name, or there is no file.
    """
    skipped = Skipped()
    if config.source == "python-stdlib":
        files = _find_stdlib(config, skipped)
    elif config.source == "hf":
        files = _find_rows(config, skipped)
    else:
        files = _refuse_repeats([file for path in config.paths for file in _expand(path, config, skipped)])
    if not files:
        raise InputError(f"corpus is empty: source `{config.source}` found no file; check `corpus.paths`")
    return Listing(files, dict(sorted(skipped.counts.items())), dict(skipped.examples))


def digest_file(config: CorpusConfig, file: SourceFile) -> SourceFile:
    """The same file with its size and SHA-256 as they are now, computed from every byte.

    Raises:
        InputError: the file has disappeared.
    """
    chunks = _row_chunks(config, file) if config.source == "hf" else _blocks(file)
    digest = hashlib.sha256()
    size = 0
    if file.splittable:  # the content decides: under whatever name, only plain lines can be read in parts
        head, chunks = _peek(chunks)
        file = replace(file, splittable=compressor_of(head) is None)
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    if config.source == "hf":
        start, stop = _row_range(file)
        size -= LENGTH_BYTES * (stop - start)
    return replace(file, bytes=size, sha256=digest.hexdigest())


def read_documents(config: CorpusConfig, file: SourceFile) -> Iterator[bytes | str]:
    """The documents of one file, in order, one at a time.

    Raises:
        InputError: content is not in the encoding, or not JSON, a text field is missing or not text, a compressed
            file is damaged, or a file holds something else than its source; the message names the file and the line
            or row.
    """
    if config.source in ("python-stdlib", "text"):
        return _read_text(config, file)
    if config.source == "jsonl":
        return _read_jsonl(config, file)
    if config.source == "parquet":
        return _read_parquet(file, config.text_field)
    if config.source == "hf":
        return _read_rows(config, file)
    raise InputError("source `tokens` holds ids, not documents of text")


# --- finding files ---------------------------------------------------------------------------------------------


def _find_stdlib(config: CorpusConfig, skipped: Skipped) -> list[SourceFile]:
    if config.paths:
        raise InputError("source `python-stdlib` reads this Python's own library; remove `paths`")
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_EXCLUDED]
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        for path in paths:
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path
            elif path.is_symlink():
                skipped.add(listing.BROKEN, path.name)
    files: dict[str, SourceFile] = {}
    for name in sorted(found):
        # Debian links some modules under two names; the second is the same file, not another document.
        target = str(found[name].resolve())
        if target in files:
            skipped.add(listing.LINKED, name)
        else:
            files[target] = SourceFile(name, str(found[name]), found[name].stat().st_size)
    return list(files.values())


def _expand(declared: str, config: CorpusConfig, skipped: Skipped) -> list[SourceFile]:
    """Files that one entry of `paths` stands for."""
    source = config.source
    filesystem, path = _resolve_input(declared)
    info = _file_info(filesystem, path)
    if info.type == FileType.File:
        alone = listing.Found(posixpath.basename(path), path, info.size)
        return [_source_file(declared, filesystem, alone, config)]
    if is_local(filesystem) and (special := listing.special_kind(path)):
        raise InputError(f"corpus path {declared!r} is {special}, not a file; correct `corpus.paths`")
    if info.type == FileType.Directory:
        found = listing.files_below(
            filesystem, path, skipped, belongs=lambda name: _belongs(name, source), declared=declared
        )
    elif glob.has_magic(path):
        found = listing.files_matching(filesystem, path, skipped, declared=declared)
    else:
        raise InputError(f"corpus path {declared!r} does not exist; correct `corpus.paths`")
    if not found:
        left_out = ", ".join(f"{count} by the rule `{rule}`" for rule, count in sorted(skipped.counts.items()))
        raise InputError(
            f"corpus path {declared!r} contains no file for source `{source}`"
            f"{f' (left out: {left_out})' if left_out else ''}; correct `corpus.paths`"
        )
    return [_source_file(declared, filesystem, item, config) for item in found]


def _resolve_input(declared: str) -> tuple[FileSystem, str]:
    filesystem, path = resolve(declared)
    return filesystem, path.rstrip("/") or "/"


def _file_info(filesystem: FileSystem, path: str) -> FileInfo:
    try:
        return cast(FileInfo, file_infos(filesystem, path))
    except OSError as error:
        raise InputError(f"cannot look at {path!r}: {_one_line(error)}") from None


def _belongs(name: str, source: str) -> bool:
    """Whether a file found in a directory is of the source's kind, by its name.

    >>> _belongs("A.JSONL.bz2", "jsonl"), _belongs("README.md", "jsonl"), _belongs("README.md", "text")
    (True, False, True)
    """
    return source == "text" or without_compression(name).endswith(SUFFIXES[source])


def _source_file(declared: str, filesystem: FileSystem, found: listing.Found, config: CorpusConfig) -> SourceFile:
    path = found.path if is_local(filesystem) else reroot(declared, found.path)
    splittable = config.source == "jsonl" and config.encoding in BYTE_LINES
    return SourceFile(name=found.name, path=path, bytes=found.size, splittable=splittable)


def _refuse_repeats(files: list[SourceFile]) -> list[SourceFile]:
    """Each token counts once: one file under two entries is an error, and so are two files of one name."""
    targets: dict[str, str] = {}
    names: dict[str, str] = {}
    for file in files:
        target = file.path if is_uri(file.path) else os.path.realpath(file.path)
        if target in targets:
            raise InputError(f"corpus file {file.path!r} is listed twice (also as {targets[target]!r}); remove one")
        if file.name in names:
            raise InputError(
                f"corpus files {names[file.name]!r} and {file.path!r} would share the name {file.name!r}; "
                "give their common parent directory, or a glob below it, in `corpus.paths`"
            )
        targets[target] = names[file.name] = file.path
    return files


# --- reading bytes ---------------------------------------------------------------------------------------------


@contextmanager
def open_source(file: SourceFile) -> Iterator[BinaryIO]:
    """The stored bytes of a file as a stream.

    Raises:
        InputError: the file has disappeared or cannot be read.
    """
    filesystem, path = resolve(file.path)
    try:
        stream = _open_local(path) if is_local(filesystem) else open_input(filesystem, path)
    except OSError as error:
        raise InputError(f"cannot read corpus file {file.path!r}: {_one_line(error)}") from None
    with stream:
        yield stream


def _open_anywhere(file: SourceFile) -> BinaryIO:
    """The stored bytes of a file, to read ranges."""
    filesystem, path = resolve(file.path)
    return _open_local(path) if is_local(filesystem) else open_random(filesystem, path)


def _open_local(path: str) -> BinaryIO:
    """A local file; pyarrow would take only names that are UTF-8."""
    return Path(path).open("rb")


def _blocks(file: SourceFile) -> Iterator[bytes]:
    with open_source(file) as stream:
        try:
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
        except OSError as error:
            raise InputError(f"cannot read corpus file {file.path!r}: {_one_line(error)}") from None


def _peek(blocks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first `HEAD_BYTES` or more, fewer only where there are no more, and all blocks."""
    rest, head = iter(blocks), b""
    for block in rest:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head, chain([head] if head else [], rest)


def _plain_blocks(file: SourceFile, source: str) -> Iterator[bytes]:
    """Decompressed content in blocks, after checking that it is not known to be something else than text."""
    stored, blocks = _peek(_blocks(file))
    refuse_pointer(file, stored)
    compressor = plain_compressor(file, stored)
    try:
        head, content = _peek(decompressed(compressor, blocks))
        if compressor is not None and (again := compressor_of(head)):
            raise InputError(
                f"corpus file {file.path!r} is compressed twice, by {again} and {compressor}; decompress it once"
            )
        refuse_binary(file, head, source)
        yield from content
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"corpus file {file.path!r} is damaged: {_one_line(error)}; restore or remove it") from None


def _read_text(config: CorpusConfig, file: SourceFile) -> Iterator[bytes | str]:
    if config.keeps_bytes:
        yield b"".join(_blocks(file))
        return
    data = b"".join(_plain_blocks(file, config.source))
    text = _decoded(data, config, file)
    if config.source == "text" and "\0" in text:
        wide = wide_encoding(data)
        if wide is not None and wide != config.encoding:
            raise InputError(f"corpus file {file.path!r} {not_in_encoding(data, config.encoding, data.index(0))}")
        raise InputError(
            f"corpus file {file.path!r} is binary (a zero byte at {data.index(0)}), which source `text` cannot read; "
            "move it out of the corpus, or convert it to text"
        )
    yield text


def _decoded(data: bytes, config: CorpusConfig, file: SourceFile) -> str:
    _require_bom(data, config, file)
    try:
        return data.decode(config.encoding, config.errors)
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else len(data)
        raise InputError(f"corpus file {file.path!r} {not_in_encoding(data, config.encoding, start)}") from None


def _require_bom(head: bytes, config: CorpusConfig, file: SourceFile) -> None:
    """Python takes `utf-16` without a byte order mark for the machine's own order, which the file may not have."""
    if head and config.encoding in BOMS and not head.startswith(BOMS[config.encoding]):
        raise InputError(
            f"corpus file {file.path!r} has no byte order mark; set `corpus.encoding: {config.encoding}-le` or "
            f"`{config.encoding}-be`"
        )


# --- JSON lines ------------------------------------------------------------------------------------------------


BYTE_LINES = ("utf-8", "utf-8-sig")
"""Encodings in which the byte 10 is always the end of a line; other text is decoded before it is cut."""


def _read_jsonl(config: CorpusConfig, file: SourceFile) -> Iterator[str]:
    lines: Iterator[bytes] | Iterator[str]
    first = 0
    if config.encoding not in BYTE_LINES:
        lines = _decoded_lines(config, file)
    elif file.span:
        first, lines = _span_lines(file)
    else:
        lines = _lines(_plain_blocks(file, config.source))
    for number, line in enumerate(cast(Iterator[bytes | str], lines)):
        if line.strip():
            try:
                yield _line_text(line, config)
            except InputError as error:
                place = number + 1 + (_count_lines(file, first) if first else 0)
                raise InputError(f"{file.path!r}, line {place}: {error}") from None


def _decoded_lines(config: CorpusConfig, file: SourceFile) -> Iterator[str]:
    """Lines of a file in another encoding, without their newline."""
    decoder = codecs.getincrementaldecoder(config.encoding)(config.errors)
    head, blocks = _peek(_plain_blocks(file, config.source))
    _require_bom(head, config, file)
    pending = ""
    try:
        for block in chain(blocks, [None]):
            *lines, pending = (pending + decoder.decode(block or b"", final=block is None)).split("\n")
            yield from lines
    except UnicodeDecodeError as error:
        reason = not_in_encoding(error.object, config.encoding, error.start)
        raise InputError(f"corpus file {file.path!r} {reason}") from None
    if pending:
        yield pending


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their newline; memory is one line and one block."""
    pending: list[bytes] = []
    for block in blocks:
        head, *rest = block.split(b"\n")
        pending.append(head)
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if last := b"".join(pending):
        yield last


def _span_lines(file: SourceFile) -> tuple[int, Iterator[bytes]]:
    """Where the first line that starts inside the span begins, and the lines that do."""
    assert file.span is not None
    start, stop = file.span
    stream = _open_anywhere(file)
    # Reading from one byte earlier tells whether a line starts exactly at `start`.
    stream.seek(max(start - 1, 0))
    lines = _lines(iter(lambda: stream.read(BLOCK_BYTES), b""))
    if start == 0:
        head, blocks = _peek(iter(lambda: stream.read(BLOCK_BYTES), b""))
        refuse_pointer(file, head)
        refuse_binary(file, head, "jsonl")
        return 0, _until(_lines(blocks), 0, stop)
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


def _line_text(line: bytes | str, config: CorpusConfig) -> str:
    try:
        text = line.decode("utf-8-sig", config.errors) if isinstance(line, bytes) else line.removeprefix("\ufeff")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        assert isinstance(line, bytes)
        raise InputError(not_in_encoding(line, config.encoding, error.start).removeprefix("is ")) from None
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(line, bytes) and (wide := wide_encoding(line)):
            raise InputError(f"looks like {wide.upper()}; set `corpus.encoding: {wide}`") from None
        raise InputError(f"not a JSON object: {_one_line(error)}; write one object per line") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"not readable JSON: {_one_line(error)}; correct the line") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object; write one object per line")
    name = config.text_field
    if text.count(json.dumps(name, ensure_ascii=False)) > 1 and _times(text, name) > 1:
        raise InputError(f"field {name!r} is there more than once; keep one")
    return _checked_text(row.get(name), name, row)


def _times(text: str, name: str) -> int:
    """How often the outermost object of a line has a key; Python's parser would take the last and say nothing."""
    outermost = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    return sum(key == name for key, _ in outermost)


def _checked_text(value: Any, field: str, columns: Iterable[str]) -> str:
    if isinstance(value, str):
        return _without_lone_surrogates(value)
    if field not in columns:
        names = ", ".join(sorted(columns)) or "none"
        raise InputError(f"no field {field!r} (there are: {names}); set `corpus.text_field`")
    raise InputError(
        f"field {field!r} must be a string, got {type(value).__name__}; set `corpus.text_field` or fix the row"
    )


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


# --- Parquet and datasets --------------------------------------------------------------------------------------


def _read_parquet(file: SourceFile, field: str) -> Iterator[str]:
    _require_parquet(file)
    try:
        with _open_anywhere(file) as stream:
            table = pq.ParquetFile(stream)
            schema = table.schema_arrow
            _require_column(field, schema.names, file.path)
            _require_text_type(field, schema.field(field).type, file.path)
            batches = table.iter_batches(batch_size=1024, columns=[field])
            yield from _texts((value for batch in batches for value in batch.column(0).to_pylist()), field, file.path)
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(
            f"corpus file {file.path!r} is not a readable Parquet file: {_one_line(error)}; restore or remove it"
        ) from None


def _require_parquet(file: SourceFile) -> None:
    """Say what a file is that is no Parquet file."""
    with open_source(file) as stream:
        head = stream.read(HEAD_BYTES)
    refuse_pointer(file, head)
    if head.startswith(b"PAR1"):
        return
    if compressor := compressor_of(head):
        raise InputError(f"corpus file {file.path!r} is compressed by {compressor}; decompress the Parquet file")
    what = binary_kind(head) or ("empty" if not head else "JSON or text" if head[:1] in b"{[" else None)
    raise InputError(
        f"corpus file {file.path!r} is not a readable Parquet file{f' (it is {what})' if what else ''}; restore it, or "
        "set `corpus.source` to what it is"
    )


def _require_column(field: str, names: list[str], origin: str) -> None:
    if field not in names:
        columns = ", ".join(sorted(names))
        raise InputError(f"{origin}: no column {field!r} (there are: {columns}); set `corpus.text_field`")
    if names.count(field) > 1:
        raise InputError(f"{origin}: {names.count(field)} columns are named {field!r}; rename all but one")


TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
    pa.types.is_null,
)
"""Types of columns that may hold text; in binary ones it is UTF-8."""


def _require_text_type(field: str, kind: pa.DataType, origin: str) -> None:
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(stored) for is_text in TEXT_TYPES):
        raise InputError(f"{origin}: column {field!r} is {kind}, not text; set `corpus.text_field`")


def _texts(values: Iterable[Any], field: str, origin: str, first: int = 0) -> Iterator[str]:
    for row, value in enumerate(values, start=first):
        if isinstance(value, bytes):
            try:
                yield value.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{origin}, row {row}: column {field!r} is not UTF-8 (byte 0x{value[error.start]:02x} at "
                    f"{error.start}); convert the column to UTF-8, or set `corpus.text_field`"
                ) from None
        elif isinstance(value, str):
            yield value
        else:
            kind = "null" if value is None else type(value).__name__
            raise InputError(f"{origin}, row {row}: column {field!r} is {kind}, not text; set `corpus.text_field`")


def _find_rows(config: CorpusConfig, skipped: Skipped) -> list[SourceFile]:
    """Fixed ranges of rows; only the last one changes its name when a dataset grows."""
    for name in _unread(config):
        skipped.add(listing.NOT_IN_DATASET, name)
    rows = len(_dataset(config))
    starts = range(0, rows, DATASET_ROWS)
    ranges = [(start, min(start + DATASET_ROWS, rows)) for start in starts]
    return [SourceFile(f"{config.split}/{start:012d}-{stop:012d}", str(config.name), 0) for start, stop in ranges]


def _row_range(file: SourceFile) -> tuple[int, int]:
    start, stop = file.name.rpartition("/")[2].split("-")
    return int(start), int(stop)


def _read_rows(config: CorpusConfig, file: SourceFile) -> Iterator[str]:
    start, stop = _row_range(file)
    rows = _dataset(config)
    for begin in range(start, stop, 1024):
        values = rows[begin : min(begin + 1024, stop)][config.text_field]
        yield from _texts(values, config.text_field, file.path, begin)


def _row_chunks(config: CorpusConfig, file: SourceFile) -> Iterator[bytes]:
    """What the digest of a range of rows covers: each text with its length before it."""
    for text in _read_rows(config, file):
        data = text.encode()
        yield len(data).to_bytes(LENGTH_BYTES, "big") + data


def _dataset(config: CorpusConfig) -> Any:
    return _load_dataset(config.name, config.subset, config.split, config.revision, config.paths, config.text_field)


@lru_cache(maxsize=2)
def _load_dataset(
    name: str, subset: str | None, split: str, revision: str | None, paths: tuple[str, ...], field: str
) -> Any:
    """A map-style dataset of one text column, from disk, a local directory, a builder or the hub."""
    import datasets  # heavy, and only this source needs it

    _require_applied(name, subset, revision, paths)
    try:
        if _is_saved_dataset(Path(name)):
            rows = _of_split(datasets.load_from_disk(name), split)
        else:
            files = list(paths) or None
            rows = datasets.load_dataset(name, subset, split=split, revision=revision, data_files=files)
    except Exception as error:
        # The library raises its own, the hub's and the filesystem's errors; every one means "cannot be loaded".
        raise InputError(
            f"dataset {name!r}, split {split!r}, cannot be loaded: {_one_line(error.__cause__ or error)}; correct "
            "`corpus.name`, `subset`, `split`, `revision` or `paths`"
        ) from None
    _require_column(field, rows.column_names, f"dataset {name!r}")
    return rows.select_columns([field])


def _require_applied(name: str, subset: str | None, revision: str | None, paths: tuple[str, ...]) -> None:
    """Refuse what the library would ignore.

    Raises:
        InputError: a key does not apply to this kind of dataset.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if _is_saved_dataset(Path(name)):
        where, given = "a dataset written by `save_to_disk`", {"subset": subset, "revision": revision, "paths": paths}
    elif Path(name).is_dir():
        where, given = "a local directory", {"revision": revision}
    elif name in _PACKAGED_DATASETS_MODULES:
        where, given = "a builder of the `datasets` library", {"subset": subset, "revision": revision}
    else:
        return
    for key, value in given.items():
        if value:
            shown = ", ".join(value) if isinstance(value, tuple) else value
            raise InputError(f"corpus.{key}: {shown} does not apply to {name!r}, which is {where}; remove it")


def _of_split(loaded: Any, split: str) -> Any:
    """The rows of a saved dataset that a split or slice names.

    A dataset saved alone has one split: the one it remembers, else `train`. Taking it for another would mislabel the
    corpus.
    """
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        own = str(loaded.split or "train")
        if split == own:  # which may itself be the slice that was saved
            return loaded
        loaded = {own: loaded}
    spans = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in loaded.items()})
    pieces = [loaded[span.splitname].select(range(span.from_, span.to)) for span in spans]
    return datasets.concatenate_datasets(pieces)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _unread(config: CorpusConfig) -> list[str]:
    """Files of a local `hf` folder that the library takes for no split; hidden ones it leaves out by itself.

    Raises:
        InputError: the dataset cannot be loaded.
    """
    _dataset(config)  # says what is wrong, if anything is
    folder = Path(str(config.name))
    if not folder.is_dir() or _is_saved_dataset(folder) or config.paths:
        return []
    from datasets import load_dataset_builder

    builder = load_dataset_builder(str(config.name), config.subset)
    taken = {os.path.realpath(str(path)) for paths in (builder.config.data_files or {}).values() for path in paths}
    filesystem, path = resolve(str(config.name))
    found = listing.files_below(filesystem, path, Skipped(), belongs=lambda name: True, declared=str(config.name))
    return [item.name for item in found if os.path.realpath(item.path) not in taken]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
