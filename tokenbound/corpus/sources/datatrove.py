"""`datatrove`: `.ds` files of token ids, each with a `.ds.index`, as the `DocumentTokenizer` of datatrove writes.

A `.ds` file holds ids of 2 or 4 bytes, and its index the end of each document (uint64, counted in ids); both are
little-endian. The end-of-document id belongs to the document where there is one. A `.ds.metadata` file names the
tokenizer, behind a bar how wide the ids are, and on its second line how many there are; older ones leave the width out.
"""

from __future__ import annotations

import re

import numpy as np

from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.indexed import Ends, IndexedFields, IndexedSource, read_index, stored_size
from tokenbound.corpus.sources.fields import WidthFields
from tokenbound.corpus.streams import open_source
from tokenbound.errors import InputError
from tokenbound.store.uri import split

METADATA_BYTES = 1 << 12
"""Of a `.ds.metadata` file, which has three short lines."""

METADATA = re.compile(r"[^\n]*?(?:\|([0-9]{1,4}))?\n([0-9]{1,19})(?:\n[^\n]*)?\n?")
"""The width, where it is there, and the number of ids."""


class DatatroveFields(WidthFields, IndexedFields):
    """Keys of `datatrove`."""


class Datatrove(IndexedSource[DatatroveFields]):
    """Token ids with an index of document ends."""

    name = "datatrove"
    takes = DatatroveFields
    suffixes = (".ds", ".ds.index", ".ds.metadata")
    parts = {".ds": True, ".ds.index": True, ".ds.metadata": False}  # noqa: RUF012

    def width(self, file: SourceFile) -> np.dtype[np.integer]:
        """The type that the metadata or the config names.

        Raises:
            InputError: neither does, or they contradict each other or the size of the file.
        """
        metadata = self.companion(file, ".ds.metadata")
        stored, count = _metadata(metadata)
        given = None if self.fields.dtype is None else np.dtype(self.fields.dtype).itemsize
        if stored is None and given is None:
            raise InputError(
                f"tokens file {file.path!r}: no {split(metadata.path)[1]!r} says how wide its ids are; set "
                "`corpus.dtype` to uint16 or uint32"
            )
        if stored is not None and given is not None and stored != given:
            raise InputError(
                f"tokens file {file.path!r} has ids of {stored} bytes by its metadata, but `corpus.dtype` is "
                f"{self.fields.dtype}; remove `dtype`, or correct it"
            )
        width = stored or given
        if width not in (2, 4):
            raise InputError(f"corpus file {metadata.path!r} says that ids have {width} bytes, not 2 or 4; restore it")
        if count is not None and count * width != stored_size(file):
            raise InputError(
                f"tokens file {file.path!r} has {stored_size(file)} bytes, not the {count} ids of {width} bytes that "
                "its metadata counts; restore it, or correct `corpus.dtype`"
            )
        return np.dtype(f"<u{width}")

    def index(self, file: SourceFile) -> Ends:
        """The ends of the documents, after checking that they fill the file of ids."""
        index = self.companion(file, ".ds.index")
        data = read_index(index)
        width = self.width(file).itemsize
        if len(data) % 8:
            raise _damaged(index, f"has {len(data)} bytes, no multiple of 8")
        ends = np.frombuffer(data, "<u8")
        count, rest = divmod(stored_size(file), width)
        if rest or (int(ends[-1]) if len(ends) else 0) != count or np.any(ends[1:] < ends[:-1]):
            raise _damaged(index, f"does not end its last document with the {count} ids of {width} bytes of the .ds")
        return ends.astype(np.int64)


def _metadata(file: SourceFile) -> tuple[int | None, int | None]:
    """How wide ids are and how many there are, where a metadata file says so."""
    from tokenbound.store.filesystem import exists, resolve  # configs are validated without pyarrow

    if not exists(*resolve(file.path)):
        return None, None
    with open_source(file) as stream:
        text = stream.read(METADATA_BYTES).decode("utf-8", "replace")
    found = METADATA.fullmatch(text)
    if found is None:
        raise InputError(
            f"corpus file {file.path!r} does not say how many ids there are; restore it, or remove it and "
            "set `corpus.dtype`"
        )
    width, count = found.groups()
    return None if width is None else int(width), int(count)


def _damaged(index: SourceFile, problem: str) -> InputError:
    return InputError(f"corpus file {index.path!r} is not a readable index: it {problem}; restore or remove it")
