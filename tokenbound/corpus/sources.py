"""Where documents come from: files of several kinds, and Hugging Face datasets.

A corpus is an ordered list of `SourceFile`s. A file's *name* is its path below what the config names (a file's
own name, a path below the directory, a path below the fixed part of a glob), so that a corpus keeps its identity
when it moves to another machine, and a new file never changes the name of an old one.

| source          | one document is                             | read as                                |
|-----------------|---------------------------------------------|----------------------------------------|
| `python-stdlib` | one ``*.py`` file of this Python's library  | bytes                                  |
| `text`          | one file                                    | bytes (decompressed by extension)      |
| `jsonl`         | one line                                    | text, strict UTF-8                     |
| `parquet`, `hf` | one row                                     | text                                   |
| `tokens`        | the ids up to and including each `eos_id`   | ids; see `tokenbound.corpus.prepare`   |

Bytes go to the `bytes` tokenizer as they are; a Hugging Face tokenizer sees them decoded as UTF-8 with undecodable
bytes replaced by U+FFFD.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import os
import posixpath
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSystem, FileType

from tokenbound.config import CorpusConfig
from tokenbound.errors import InputError
from tokenbound.store.filesystem import is_local, open_input, open_random, resolve
from tokenbound.store.patterns import matching, walk
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
"""What a directory contributes to a source; `text` takes every file."""

COMPRESSED = (".gz", ".xz", ".zst")
"""Extensions by which `text` and `jsonl` files are decompressed."""


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


def list_files(config: CorpusConfig) -> list[SourceFile]:
    """All files of a corpus in their one order, each with the SHA-256 of its content.

    Reads every byte once. To spread that over machines, map `digest_file` over `find_files`.

    Raises:
        InputError: a path is missing or listed twice, two files share a name, or there is no file at all.
    """
    return [digest_file(config, file) for file in find_files(config)]


def find_files(config: CorpusConfig) -> list[SourceFile]:
    """All files of a corpus in their one order, not yet digested.

    The order is that of the config's `paths`; inside a directory or glob, that of the relative paths (by code
    point). Hidden files and directories (a leading dot) are left out of directories and globs.

    Raises:
        InputError: a path is missing or listed twice, two files share a name, or there is no file at all.
    """
    if config.source == "python-stdlib":
        files = _find_stdlib(config)
    elif config.source == "hf":
        files = _find_rows(config)
    else:
        files = _refuse_repeats([file for path in config.paths for file in _expand(path, config.source)])
    if not files:
        raise InputError(f"corpus is empty: source `{config.source}` found no file; check `corpus.paths`")
    return files


def digest_file(config: CorpusConfig, file: SourceFile) -> SourceFile:
    """The same file with its size and SHA-256 as they are now, computed from every byte.

    Raises:
        InputError: the file has disappeared.
    """
    chunks = _row_chunks(config, file) if config.source == "hf" else _blocks(file)
    digest = hashlib.sha256()
    size = 0
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
        InputError: a line is not UTF-8 or not JSON, a text field is missing or not text, or a compressed file
            is damaged; the message names the file and the line or row.
    """
    if config.source in ("python-stdlib", "text"):
        return _read_text(file)
    if config.source == "jsonl":
        return _read_jsonl(file, config.text_field)
    if config.source == "parquet":
        return _read_parquet(file, config.text_field)
    if config.source == "hf":
        return _read_rows(config, file)
    raise InputError("source `tokens` holds ids, not documents of text")


# --- finding files ---------------------------------------------------------------------------------------------


def _find_stdlib(config: CorpusConfig) -> list[SourceFile]:
    if config.paths:
        raise InputError("source `python-stdlib` reads this Python's own library; remove `paths`")
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_EXCLUDED]
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        found |= {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    files: dict[str, SourceFile] = {}
    for name in sorted(found):
        # Debian links some modules under two names; the second is the same file, not another document.
        target = str(found[name].resolve())
        files.setdefault(target, SourceFile(name, str(found[name]), found[name].stat().st_size))
    return list(files.values())


def _expand(declared: str, source: str) -> list[SourceFile]:
    """Files that one entry of `paths` stands for."""
    filesystem, path = _resolve_input(declared)
    info = _file_info(filesystem, path)
    if info.type == FileType.File:
        return [_source_file(declared, filesystem, info, posixpath.basename(path), source)]
    if info.type == FileType.Directory:
        found = walk(filesystem, path)
        wanted = [item for item in found if _belongs(item[0], source)]
    elif glob.has_magic(path):
        wanted = matching(filesystem, path)
    else:
        raise InputError(f"corpus path {declared!r} does not exist; correct `corpus.paths`")
    if not wanted:
        raise InputError(f"corpus path {declared!r} contains no file for source `{source}`; correct `corpus.paths`")
    return [_source_file(declared, filesystem, info, name, source) for name, info in wanted]


def _resolve_input(declared: str) -> tuple[FileSystem, str]:
    filesystem, path = resolve(declared)
    return filesystem, path.rstrip("/") or "/"


def _file_info(filesystem: FileSystem, path: str) -> FileInfo:
    try:
        return cast(FileInfo, file_infos(filesystem, path))
    except OSError as error:
        raise InputError(f"cannot look at {path!r}: {_one_line(error)}") from None


def _belongs(name: str, source: str) -> bool:
    """Whether a file found in a directory is of the source's kind."""
    if source == "text":
        return True
    stem = name
    if source == "jsonl":
        stem = next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)
    return stem.endswith(SUFFIXES[source])


def _source_file(declared: str, filesystem: FileSystem, info: FileInfo, name: str, source: str) -> SourceFile:
    path = info.path if is_local(filesystem) else reroot(declared, info.path)
    splittable = source == "jsonl" and not name.endswith(COMPRESSED)
    return SourceFile(name=name, path=path, bytes=info.size, splittable=splittable)


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
        stream = open_input(filesystem, path)
    except OSError as error:
        raise InputError(f"cannot read corpus file {file.path!r}: {_one_line(error)}") from None
    with stream:
        yield stream


def _blocks(file: SourceFile) -> Iterator[bytes]:
    with open_source(file) as stream:
        yield from iter(lambda: stream.read(BLOCK_BYTES), b"")


@contextmanager
def _open_decompressed(file: SourceFile) -> Iterator[IO[bytes]]:
    with open_source(file) as stream:
        if file.path.endswith(".gz"):
            with gzip.open(stream) as content:
                yield cast(IO[bytes], content)
        elif file.path.endswith(".xz"):
            with lzma.open(stream) as content:
                yield cast(IO[bytes], content)
        elif file.path.endswith(".zst"):
            yield cast(IO[bytes], pa.CompressedInputStream(stream, "zstd"))
        else:
            yield stream


def _plain_blocks(file: SourceFile) -> Iterator[bytes]:
    """Decompressed content in blocks."""
    try:
        with _open_decompressed(file) as stream:
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
    except InputError:
        raise
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"corpus file {file.path!r} is damaged: {_one_line(error)}; restore or remove it") from None


def _read_text(file: SourceFile) -> Iterator[bytes]:
    yield b"".join(_plain_blocks(file))


# --- JSON lines ------------------------------------------------------------------------------------------------


def _read_jsonl(file: SourceFile, field: str) -> Iterator[str]:
    first, lines = _span_lines(file) if file.span else (0, _lines(_plain_blocks(file)))
    for number, line in enumerate(lines):
        if line.strip():
            try:
                yield _line_text(line, field)
            except InputError as error:
                place = number + 1 + (_count_lines(file, first) if first else 0)
                raise InputError(f"{file.path}, line {place}: {error}") from None


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
    filesystem, path = resolve(file.path)
    stream = open_random(filesystem, path)
    # Reading from one byte earlier tells whether a line starts exactly at `start`.
    stream.seek(max(start - 1, 0))
    lines = _lines(iter(lambda: stream.read(BLOCK_BYTES), b""))
    begin = start if start == 0 else start + len(next(lines, b""))
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


def _line_text(line: bytes, field: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start} of the line); convert the file to UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not a JSON object: {_one_line(error)}; write one object per line") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object; write one object per line")
    return _checked_text(row.get(field), field, row)


def _checked_text(value: Any, field: str, columns: Iterable[str]) -> str:
    if isinstance(value, str):
        return _without_lone_surrogates(value)
    if field not in columns:
        names = ", ".join(sorted(columns)) or "none"
        raise InputError(f"no field {field!r} (there are: {names}); set `corpus.text_field`")
    raise InputError(f"field {field!r} is {type(value).__name__}, not text; set `corpus.text_field` or mend the row")


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
    filesystem, path = resolve(file.path)
    try:
        with open_random(filesystem, path) as stream:
            table = pq.ParquetFile(stream)
            _require_column(field, table.schema_arrow.names, file.path)
            batches = table.iter_batches(batch_size=1024, columns=[field])
            yield from _texts((value for batch in batches for value in batch.column(0).to_pylist()), field, file.path)
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"corpus file {file.path!r} is no readable Parquet: {_one_line(error)}") from None


def _require_column(field: str, names: list[str], origin: str) -> None:
    if field not in names:
        columns = ", ".join(sorted(names))
        raise InputError(f"{origin}: no column {field!r} (there are: {columns}); set `corpus.text_field`")


def _texts(values: Iterable[Any], field: str, origin: str, first: int = 0) -> Iterator[str]:
    for row, value in enumerate(values, start=first):
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise InputError(f"{origin}, row {row}: column {field!r} is {kind}, not text; set `corpus.text_field`")
        yield value


def _find_rows(config: CorpusConfig) -> list[SourceFile]:
    """Fixed ranges of rows; only the last one changes its name when a dataset grows."""
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

    try:
        if _is_saved_dataset(Path(name)):
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else _of_split(loaded, split)
        else:
            files = list(paths) or None
            rows = datasets.load_dataset(name, subset, split=split, revision=revision, data_files=files)
    except Exception as error:
        # The library raises its own, the hub's and the filesystem's errors; every one means "cannot be loaded".
        raise InputError(
            f"dataset {name!r}, split {split!r}, cannot be loaded: {_one_line(error.__cause__ or error)}"
        ) from None
    _require_column(field, rows.column_names, f"dataset {name!r}")
    return rows.select_columns([field])


def _of_split(rows: Any, split: str) -> Any:
    """A dataset saved alone remembers its split; taking it for another would mislabel the corpus."""
    if rows.split is not None and str(rows.split) != split:
        raise InputError(f"it is split {str(rows.split)!r}; set `corpus.split`")
    return rows


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
