"""`arrow`: each row of an Arrow IPC file, or of a stream of one, is a document, the text of its column `text_field`.

Folders that the `datasets` library saved or cached hold such streams. Beside its rows the library leaves files of its
own there (`cache-*.arrow`), which are not read: `state.json` says which files are the dataset, and all of them must be
there.
"""

from __future__ import annotations

import fnmatch
import io
import json
import posixpath
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, BinaryIO

from tokenbound.corpus.answers import Document
from tokenbound.corpus.columns import batch_documents, damage_named, find_typed_columns, require_kind
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import MessageFields, PathFields
from tokenbound.corpus.streams import open_anywhere
from tokenbound.errors import InputError
from tokenbound.store.uri import join, split

if TYPE_CHECKING:
    import pyarrow as pa

IPC_FILE, IPC_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
"""How the two forms begin."""

STREAM_END = IPC_STREAM + bytes(4)
"""How a stream ends."""

STATE, INFO, CACHED = "state.json", "dataset_info.json", "cache-*"
"""Files by which a folder of `datasets` is known, and the names of what the library computed from its rows."""

STATE_BYTES = 1 << 24
"""Of `state.json`: 100,000 files take some 6 MB."""

SLICE_ROWS = 1024
"""Rows that become Python objects at a time."""


class ArrowFields(MessageFields, PathFields):
    """Keys of `arrow`."""


class Arrow(FileSource[ArrowFields], TextSource[ArrowFields]):
    """Arrow files with columns of text."""

    name = "arrow"
    takes = ArrowFields
    suffixes = (".arrow", ".arrows", ".feather", ".ipc")

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """The files of each entry of `paths`, of a folder of `datasets` those of the dataset.

        Raises:
            InputError: a file of a dataset is not there.
        """
        from tokenbound.corpus import listing  # pyarrow, which a config does without
        from tokenbound.store.filesystem import anchored

        found = super().find(skipped)
        saved = {folder: _saved_files(folder) for folder in {split(file.path)[0] for file in found}}
        files, named = [], {anchored(path) for path in self.fields.paths}
        for file in found:
            folder, name = split(file.path)
            if file.path in named or _is_of_dataset(folder, name, saved[folder]):
                files.append(file)
            else:
                skipped.add(listing.NOT_IN_DATASET, file.name)
        return files

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What each row holds."""
        fields = self.fields.row_fields
        is_file = require_kind(file, "Arrow", (IPC_FILE, IPC_STREAM)) == IPC_FILE
        with damage_named(file, "Arrow"):
            schema = _schema(file, is_file)
            steps = find_typed_columns(fields, schema, file.path)
            batches = _slices(file, is_file, schema, {step.key for step in steps})
            yield from batch_documents(batches, fields, steps, file.path)


def _schema(file: SourceFile, is_file: bool) -> pa.Schema:
    from pyarrow import ipc

    with open_anywhere(file) as stream, (ipc.open_file if is_file else ipc.open_stream)(stream) as reader:
        return reader.schema


def _slices(file: SourceFile, is_file: bool, schema: pa.Schema, names: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Some columns in slices, each checked: Arrow itself believes the offsets that a file holds."""
    from pyarrow import ipc

    options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
    with open_anywhere(file) as stream:
        if is_file:
            with ipc.open_file(stream, options=options) as reader:
                for index in range(reader.num_record_batches):
                    yield from _cut(reader.get_batch(index))
            return
        with ipc.open_stream(stream, options=options) as reader:
            for batch in reader:
                yield from _cut(batch)
        _require_end(stream, file)


def _require_end(stream: BinaryIO, file: SourceFile) -> None:
    """Refuse a stream that was cut between two batches, or has something behind it: it would pass for a shorter one."""
    read = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, end - len(STREAM_END)))
    if read != end or stream.read() != STREAM_END:
        problem = f"{end - read} bytes follow its end" if read < end else "it does not say that it ends"
        raise InputError(
            f"corpus file {file.path!r} is a damaged Arrow stream: {problem}; restore it, or write it again"
        )


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)
    for start in range(0, batch.num_rows, SLICE_ROWS):
        yield batch.slice(start, SLICE_ROWS)


def _is_of_dataset(folder: str, name: str, saved: frozenset[str] | None) -> bool:
    """Whether a file is among the rows of the dataset in its folder, or in a folder that is none."""
    if saved is not None:
        return name in saved
    return not (fnmatch.fnmatchcase(name, CACHED) and _is_there(join(folder, INFO)))


def _saved_files(folder: str) -> frozenset[str] | None:
    """The files of a dataset that `save_to_disk` wrote into a folder; None where it wrote none.

    Raises:
        InputError: what it says of itself is damaged, or a file is not there.
    """
    from tokenbound.store.filesystem import read_range, resolve  # configs are validated without pyarrow

    filesystem, path = resolve(join(folder, STATE))
    try:
        data = read_range(filesystem, path, 0, STATE_BYTES)
    except FileNotFoundError:
        return None
    try:
        names = frozenset(item["filename"] for item in json.loads(data)["_data_files"])
        plain = all(name == posixpath.basename(name) for name in names)
    except (ValueError, KeyError, TypeError, RecursionError):
        names, plain = frozenset(), False
    if not plain:
        raise InputError(f"corpus file {join(folder, STATE)!r} does not list the files of a dataset; save it again")
    for name in sorted(names):
        if not _is_there(join(folder, name)):
            raise InputError(f"corpus file {join(folder, name)!r} is listed in {STATE} but is not there; restore it")
    return names


def _is_there(place: str) -> bool:
    from tokenbound.store.filesystem import exists, resolve

    return exists(*resolve(place))
