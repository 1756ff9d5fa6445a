"""`mds`: each sample of the shards that MosaicML Streaming writes is a document, the text of its column `text_field`.

A folder of shards has an `index.json` that lists them, each raw (`.mds`), compressed, or both; all must be there, and
each is read once. A shard is, little-endian: the number of samples (uint32), where each begins and the last ends
(uint32, bytes of the shard), a JSON text that describes the columns, and the samples. A sample is the sizes of its
columns of no fixed size (uint32), and the columns one after another. Shards of several files (CSV, JSON) are read by
the sources of these formats.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from tokenbound.corpus.answers import Document
from tokenbound.corpus.columns import document_inside, find_columns
from tokenbound.corpus.contents import COMPRESSORS, decompressed
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.row_text import RowField, Step
from tokenbound.corpus.sources.base import FileSource, TextSource
from tokenbound.corpus.sources.fields import PathFields, RowFields
from tokenbound.corpus.streams import one_line, stored_blocks, too_large
from tokenbound.errors import InputError, TokenboundError
from tokenbound.store.uri import join, split

INDEX = "index.json"

INDEX_BYTES = 1 << 26
"""Of `index.json`: 100,000 shards take some 50 MB."""

COLUMNS_BYTES = 1 << 20
"""Of the text that describes the columns of a shard, which has some hundred bytes."""

MOST_SAMPLES = 1 << 24
"""Of a shard, whose table is read whole: the writer starts another shard at 64 MB unless it is told otherwise."""

TEXT_ENCODINGS = ("str", "bytes")
"""Encodings of columns that may hold text."""


class MdsFields(RowFields, PathFields):
    """Keys of `mds`."""


class Mds(FileSource[MdsFields], TextSource[MdsFields]):
    """Shards of MosaicML Streaming."""

    name = "mds"
    takes = MdsFields
    suffixes = (".mds",)

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """The shards of each entry of `paths`, one form of each.

        Raises:
            InputError: a shard is in no index, or a shard of an index is not there.
        """
        from tokenbound.corpus import listing  # pyarrow, which a config does without

        found = super().find(skipped)
        shards = {folder: _listed(folder) for folder in {split(file.path)[0] for file in found}}
        present = {file.path for file in found}
        kept = []
        for file in found:
            folder, name = split(file.path)
            raw = shards[folder].get(name)
            if raw is None:
                raise InputError(f"corpus file {file.path!r} is not a shard of the {INDEX!r} beside it; move it away")
            if raw != name and join(folder, raw) in present:
                skipped.add(listing.OTHER_FORM, file.name)
            else:
                kept.append(file)
        return kept

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What each sample holds."""
        fields = self.fields.row_fields
        try:
            shard = _Bytes(decompressed(_compressor(file.name), stored_blocks(file)))
            offsets, layout = _header(shard)
            steps = _columns(fields, layout, file.path)
            indices = [layout.names.index(step.key) for step in steps]
            for number, sample in enumerate(self._samples(shard, offsets, file)):
                values = layout.columns(sample, indices)
                try:
                    yield document_inside(values, fields, steps)
                except InputError as error:
                    raise InputError(f"{file.path}, sample {number}: {error}") from None
        except TokenboundError:
            raise
        except ValueError as error:
            raise InputError(
                f"corpus file {file.path!r} is not a readable MDS shard: {one_line(error)}; restore or remove it"
            ) from None

    def _samples(self, shard: _Bytes, offsets: npt.NDArray[np.int64], file: SourceFile) -> Iterator[bytes]:
        """The samples of a shard behind its header.

        Raises:
            ValueError: the shard ends early, or something follows.
            InputError: a sample is too large.
        """
        for size in np.diff(offsets).tolist():
            if size > self.max_document_bytes:
                raise InputError(f"corpus file {file.path!r} {too_large(self.max_document_bytes)}")
            yield shard.read(size)
        shard.require_end()


@dataclass(frozen=True)
class _Layout:
    """The columns of a shard."""

    names: list[str]
    encodings: list[str]
    sizes: list[int | None]
    """Bytes of each column; null where every sample says it."""

    def columns(self, sample: bytes, indices: Iterable[int]) -> list[bytes]:
        """Some columns of a sample.

        Raises:
            ValueError: the sizes in the sample are not those of the sample.
        """
        free = sum(size is None for size in self.sizes)
        if len(sample) < 4 * free:
            raise ValueError("a sample ends before its sizes do")
        given = iter(np.frombuffer(sample, "<u4", free).tolist())
        sizes = [next(given) if size is None else size for size in self.sizes]
        if 4 * free + sum(sizes) != len(sample):
            raise ValueError("the columns of a sample do not fill it")
        ends = list(accumulate(sizes, initial=4 * free))
        return [sample[ends[index] : ends[index + 1]] for index in indices]


class _Bytes:
    """What is left of a shard, in pieces of the sizes that are asked for."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks, self._block, self._at = iter(blocks), b"", 0

    def read(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            ValueError: there are fewer.
        """
        pieces = list[bytes]()
        while True:
            piece = self._block[self._at : self._at + size]
            self._at, size = self._at + len(piece), size - len(piece)
            pieces.append(piece)
            if not size:
                return b"".join(pieces)
            block = next(self._blocks, None)
            if block is None:
                raise ValueError("it ends before its samples do")
            self._block, self._at = block, 0

    def require_end(self) -> None:
        """Refuse what follows.

        Raises:
            ValueError: something does.
        """
        if self._at < len(self._block) or any(self._blocks):
            raise ValueError("something follows its last sample")


def _columns(fields: Sequence[RowField], layout: _Layout, path: str) -> list[Step]:
    """Which columns of a shard make a document; they hold text.

    Raises:
        InputError: there is none for a field, or it holds something else.
    """
    steps = find_columns(fields, layout.names, path)
    for field, step in zip(fields, steps, strict=True):
        kind = layout.encodings[layout.names.index(step.key)]
        if step.rest or kind not in TEXT_ENCODINGS:
            raise InputError(f"{path}: column {field.name!r} is {kind!r}, not text; set `corpus.{field.key}`")
    return steps


def _header(shard: _Bytes) -> tuple[npt.NDArray[np.int64], _Layout]:
    """Where samples begin, int64 [samples + 1], and their columns.

    Raises:
        ValueError: they contradict each other, or there are too many.
    """
    count = int.from_bytes(shard.read(4), "little")
    if count > MOST_SAMPLES:
        raise ValueError(f"it would hold {count:,} samples, more than the {MOST_SAMPLES:,} that are taken")
    offsets = np.frombuffer(shard.read(4 * (count + 1)), "<u4").astype(np.int64)
    size = int(offsets[0]) - 4 - 4 * (count + 1)
    if not 0 <= size <= COLUMNS_BYTES or np.any(np.diff(offsets) < 0):
        raise ValueError("its samples do not begin one after another behind its header")
    return offsets, _layout(shard.read(size))


def _layout(data: bytes) -> _Layout:
    try:
        tree = json.loads(data)
        names, encodings, sizes = (tree[f"column_{key}"] for key in ("names", "encodings", "sizes"))
        fits = tree["format"] == "mds" and len(names) == len(encodings) == len(sizes)
        texts = all(isinstance(item, str) for item in (*names, *encodings))
        counts = all(size is None or (type(size) is int and 0 <= size < 1 << 32) for size in sizes)
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = texts = counts = False
    if not (fits and texts and counts):
        raise ValueError("it does not describe its columns")
    return _Layout(names, encodings, sizes)


def _compressor(name: str) -> str | None:
    """What a shard is compressed by; its first bytes, a count, could be those of any compressor.

    Raises:
        ValueError: nothing that is undone here.
    """
    found = next((kind for kind, (_, ends) in COMPRESSORS.items() if name.lower().endswith(ends)), None)
    if found is None and not name.lower().endswith(Mds.suffixes):
        raise ValueError(f"its compression is not supported; use {', '.join(COMPRESSORS)}")
    return found


def _listed(folder: str) -> dict[str, str]:
    """The names of all shards of a folder, each with that of its raw form.

    Raises:
        InputError: there is no index, it is damaged, or a shard is in neither form.
    """
    from tokenbound.store.filesystem import exists, read_range, resolve  # configs are validated without pyarrow

    place = join(folder, INDEX)
    try:
        tree = json.loads(read_range(*resolve(place), 0, INDEX_BYTES))
        shards = [(shard["raw_data"], shard.get("zip_data")) for shard in tree["shards"]]
        forms = [[form["basename"] for form in both if form] for both in shards]
        formats = {shard["format"] for shard in tree["shards"]}
        plain = all(name and name == posixpath.basename(name) for names in forms for name in names) and all(forms)
    except FileNotFoundError:
        raise InputError(f"corpus folder {folder!r} has MDS shards but no {INDEX!r}; restore it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        forms, formats, plain = [], set(), False
    if not plain or formats - {"mds"}:
        raise InputError(f"corpus file {place!r} does not list shards of MDS; restore it, or set `corpus.source`")
    for names in forms:
        if not any(exists(*resolve(join(folder, name))) for name in names):
            missing = join(folder, names[0])
            raise InputError(f"corpus file {missing!r} is listed in {INDEX} but is not there; restore it")
    return {name: names[0] for names in forms for name in names}
