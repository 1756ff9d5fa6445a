r"""`megatron`: a `.bin` file of token ids and the `.idx` beside it, as Megatron-LM and GPT-NeoX write them.

The index holds, little-endian: ``MMIDIDX\0\0``, a version (uint64, 1), a code of the type of the ids (uint8), the
number of sequences and of document bounds (uint64 each), the length of each sequence (int32), where each begins in the
`.bin` (int64, bytes), and the sequence at which each document begins, with the number of sequences behind the last
(int64). A document is its sequences one after another; an end-of-document id belongs to it where there is one.
"""

from __future__ import annotations

import struct

import numpy as np

from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.indexed import Ends, IndexedFields, IndexedSource, read_index, stored_size
from tokenbound.corpus.streams import open_source
from tokenbound.errors import InputError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, document bounds."""

WIDTHS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Types of ids by their code; 6 and 7 are floats."""


class MegatronFields(IndexedFields):
    """Keys of `megatron`."""


class Megatron(IndexedSource[MegatronFields]):
    """Token ids with an index of sequences and documents."""

    name = "megatron"
    takes = MegatronFields
    suffixes = (".bin", ".idx")
    parts = {".bin": True, ".idx": True}  # noqa: RUF012

    def width(self, file: SourceFile) -> np.dtype[np.integer]:
        """The type that the index names."""
        index = self.companion(file, ".idx")
        with open_source(index) as stream:
            _, _, code, _, _ = _header(stream.read(HEADER.size), index)
        return np.dtype(WIDTHS[code])

    def index(self, file: SourceFile) -> Ends:
        """The ends of the documents, after checking that the sequences fill the file of ids one after another."""
        index = self.companion(file, ".idx")
        data = read_index(index)
        _, _, code, sequences, bounds = _header(data[: HEADER.size], index)
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if len(data) != expected:
            modes = " (it holds the modes of a multimodal data set)" if len(data) == expected + sequences else ""
            raise _damaged(index, f"has {len(data)} bytes, not the {expected} of its counts{modes}")
        lengths, pointers, documents = _tables(data, sequences, bounds)
        if sequences and int(lengths.min()) < 0:
            raise _damaged(index, "holds a sequence of a negative length")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        width = np.dtype(WIDTHS[code]).itemsize
        if not np.array_equal(pointers, starts[:-1] * width):
            raise _damaged(index, "does not place its sequences one after another")
        if int(starts[-1]) * width != stored_size(file):
            raise _damaged(index, f"is for {int(starts[-1]) * width} bytes of ids; the .bin has {stored_size(file)}")
        if not bounds or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
            raise _damaged(index, "does not divide its sequences into documents")
        return starts[documents[1:]]


def _tables(data: bytes, sequences: int, bounds: int) -> tuple[Ends, Ends, Ends]:
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    return lengths.astype(np.int64), pointers, np.frombuffer(data, "<i8", bounds, HEADER.size + 12 * sequences)


def _header(data: bytes, index: SourceFile) -> tuple[bytes, int, int, int, int]:
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise _damaged(index, "does not begin like one")
    header: tuple[bytes, int, int, int, int] = HEADER.unpack(data)
    _, version, code, _, _ = header
    if version != 1 or code not in WIDTHS:
        raise _damaged(index, f"has version {version} and type {code} of ids, not version 1 and an integer type")
    return header


def _damaged(index: SourceFile, problem: str) -> InputError:
    return InputError(f"corpus file {index.path!r} is not a readable index: it {problem}; restore or remove it")
