"""`tokens`: ids that files hold already: flat little-endian `.bin` files and one-dimensional `.npy` arrays.

A document is the ids up to and including each `eos_id`. A flat file does not say how wide its ids are or where they
begin, so what contradicts the config is looked for: ids outside the vocabulary, a size that is no multiple of the
width, every second id zero, a header, another kind of file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from tokenbound.corpus import contents
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.sources.base import FileSource, IdSource
from tokenbound.corpus.sources.fields import PathFields, StoredIdFields
from tokenbound.corpus.streams import open_source
from tokenbound.errors import InputError

NPY_MAGIC = b"\x93NUMPY"

HEADERS = {20240520: "llm.c", 20240801: "llm.c"}
"""First 32-bit number of flat files that begin with a header, and whose they are."""

FEW_HALVES = 16
"""Upper halves of 32-bit ids are below this in every vocabulary of less than a million ids."""

FEW_IDS = 8
"""In fewer ids than this, zeros at every second place mean nothing."""

HEADER_BYTES = 1024
"""Longer than the header of any one-dimensional `.npy`."""


Ids = npt.NDArray[np.integer]

WIDTHS = {"uint16": 1 << 16, "uint32": 1 << 32}
"""How many ids each type of flat token files can tell apart."""


class TokensFields(StoredIdFields, PathFields):
    """Keys of `tokens`."""


class Tokens(FileSource[TokensFields], IdSource[TokensFields]):
    """Files of token ids."""

    name = "tokens"
    takes = TokensFields
    suffixes = (".bin", ".npy")

    def check(self) -> None:
        """Refuse ids that do not fit.

        Raises:
            ValueError: the message names the keys and the cure.
        """
        self._check_widths()
        super().check()
        if self.fields.vocab_size is None:
            raise ValueError(f"source `{self.name}` needs `vocab_size`, the number of ids its tokenizer can emit")

    def _check_widths(self) -> None:
        dtype, eos_id, vocab_size = self.fields.dtype, self.fields.eos_id, self.fields.vocab_size
        if vocab_size is None:
            return
        if dtype is not None and vocab_size > WIDTHS[dtype]:
            raise ValueError(
                f"`vocab_size` {vocab_size} does not fit `dtype: {dtype}`, which holds ids up to {WIDTHS[dtype] - 1}; "
                "set `dtype: uint32`, or correct `vocab_size`"
            )
        if eos_id is not None and eos_id >= vocab_size:
            raise ValueError(f"`eos_id` {eos_id} is outside `vocab_size` {vocab_size}; correct one of them")

    @property
    def vocab_size(self) -> int:
        """As the config says."""
        assert self.fields.vocab_size is not None, "checked when the config was validated"
        return self.fields.vocab_size

    @property
    def eos_id(self) -> int | None:
        """As the config says."""
        return self.fields.eos_id

    def ids(self, file: SourceFile, block_bytes: int) -> Iterator[Ids]:
        """The ids of one file, block by block, in the type in which they are stored.

        Raises:
            InputError: the file is no file of ids, its width contradicts the config, or it ends early.
        """
        with open_source(file) as stream:
            head = stream.read(HEADER_BYTES)
        _refuse_other_kinds(file, head)
        with open_source(file) as stream:
            is_array = head.startswith(NPY_MAGIC)
            dtype, count = _npy_layout(stream, file, self) if is_array else _flat_layout(file, self.fields.dtype)
            widths = None if is_array else _Widths(dtype)
            rest = b""
            for block in iter(lambda: stream.read(block_bytes), b""):
                data = rest + block
                whole = len(data) - len(data) % dtype.itemsize
                rest = data[whole:]
                ids = np.frombuffer(data[:whole], dtype=dtype)
                count -= len(ids)
                if widths is not None:
                    widths.see(ids)
                yield ids
            if widths is not None:
                widths.refuse(file)
        if count or rest:
            raise InputError(
                f"tokens file {file.path!r} does not hold as many ids as its size or header says; restore it"
            )


def check_ids(ids: Ids, first: int, file: SourceFile, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Args:
        ids: a block of a file.
        first: index of its first id in the file.
        file: for the message.
        vocab_size: how many ids there are.

    Raises:
        InputError: an id is outside; the message says where, and whether another width or byte order would fit.
    """
    if not len(ids) or (ids.max() < vocab_size and ids.min() >= 0):
        return
    index = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
    other = _fitting_layout(ids, vocab_size - 1)
    cure = f"its ids fit as {other}" if other else "correct `vocab_size` or `dtype`"
    raise InputError(
        f"tokens file {file.path!r} holds id {int(ids[index])} at index {first + index}, outside `corpus.vocab_size` "
        f"{vocab_size}; {cure}"
    )


class _Widths:
    """Whether every second id of a flat file is zero, as when wider ids are read in halves."""

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self.dtype, self.seen = dtype, 0
        self.highest = [0, 0, 0, 0]
        """Largest id at each place modulo 4."""

    def see(self, ids: Ids) -> None:
        for place in range(4):
            there = ids[(place - self.seen) % 4 :: 4]
            self.highest[place] = max(self.highest[place], int(there.max(initial=0)))
        self.seen += len(ids)

    def refuse(self, file: SourceFile) -> None:
        first, second, third, fourth = self.highest
        even, odd = max(first, third), max(second, fourth)
        if self.seen < FEW_IDS or not ((odd == 0 and even > 0) or (odd < FEW_HALVES and even > 16 * FEW_HALVES)):
            return
        bits = 8 * self.dtype.itemsize * (2 if third or self.seen % 4 else 4)
        cure = "set `corpus.dtype: uint32`" if bits == 32 else "store its ids as uint32"
        every_second = f"at most {odd}" if odd else "0"
        raise InputError(
            f"tokens file {file.path!r}: read as {self.dtype.name}, every second id is {every_second}, so its ids look "
            f"like {bits}-bit ones; {cure}"
        )


def _fitting_layout(ids: Ids, max_id: int) -> str | None:
    """A width or byte order in which a block of ids fits the vocabulary; None where none of the usual ones does."""
    data, own = ids.tobytes(), ids.dtype
    # The wider first: halves of wide ids are small, and fit too.
    for layout, words in LAYOUTS.items():
        dtype = np.dtype(layout)
        if dtype == own or len(data) % dtype.itemsize:
            continue
        if int(np.frombuffer(data, dtype).max(initial=0)) <= max_id:
            return words
    return None


LAYOUTS = {
    "<u4": "`dtype: uint32`; set it",
    ">u4": "big-endian 32-bit ids; store them little-endian",
    "<u2": "`dtype: uint16`; set it",
    ">u2": "big-endian 16-bit ids; store them little-endian",
}
"""Ways in which flat ids are stored, and the cure where they are stored so."""


def _refuse_other_kinds(file: SourceFile, head: bytes) -> None:
    contents.refuse_pointer(file, head)
    suffix = next((suffix for suffix in contents.COMPRESSED_SUFFIXES if file.name.lower().endswith(suffix)), None)
    what = contents.binary_kind(head)
    compressor = _really_compressed(head)
    if suffix or compressor:
        raise InputError(
            f"tokens file {file.path!r} is {f'compressed by {compressor}' if compressor else f'named {suffix}'}; files "
            "of ids are read as they are: decompress it"
        )
    if file.name.lower().endswith(".npy") and not head.startswith(NPY_MAGIC):
        raise InputError(
            f"tokens file {file.path!r} is not a readable .npy file: it does not begin like one; restore it, or name "
            "it .bin if it is flat"
        )
    if what is not None and not head.startswith(NPY_MAGIC) and what in STRONG_MAGIC:
        raise InputError(f"tokens file {file.path!r} is {what}, not flat ids; store the ids as .bin or .npy")
    number = int.from_bytes(head[:4], "little")
    if number in HEADERS and len(head) == HEADER_BYTES:
        raise InputError(
            f"tokens file {file.path!r} begins with a header of {HEADERS[number]} (256 32-bit numbers), which would be "
            "read as ids; remove the first 1024 bytes"
        )


STRONG_MAGIC = ("a zip archive", "a tar archive", "a 7z archive", "a Parquet file", "an Arrow file", "an HDF5 file")
"""Kinds whose first bytes, or the text around them, are too long to be ids by chance."""


def _really_compressed(head: bytes) -> str | None:
    """The compressor of a file whose first bytes do unpack: a few bytes of magic may be ids."""
    compressor = contents.compressor_of(head)
    if compressor is None:
        return None
    try:
        for _ in contents.decompressed(compressor, [head]):
            return compressor
    except ValueError as error:
        return compressor if "ends before" in str(error) or "runcated" in str(error) else None
    return compressor


def _flat_layout(file: SourceFile, given: str | None) -> tuple[np.dtype[np.generic], int]:
    if given is None:
        raise InputError(f"tokens file {file.path!r} has no header; set `corpus.dtype` to uint16 or uint32")
    dtype = np.dtype(given).newbyteorder("<")
    if file.bytes % dtype.itemsize:
        fits = "; it is one of the 2 of `uint16`: set `corpus.dtype: uint16`" if file.bytes % 2 == 0 else ""
        raise InputError(
            f"tokens file {file.path!r} has {file.bytes} bytes, no multiple of the {dtype.itemsize} of "
            f"`{given}`{fits or '; correct `corpus.dtype` or restore the file'}"
        )
    return dtype, file.bytes // dtype.itemsize


def _npy_layout(stream: IO[bytes], file: SourceFile, source: Tokens) -> tuple[np.dtype[np.generic], int]:
    """Read the header; what follows it is the ids. Nothing is unpickled."""
    given = source.fields.dtype
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    except ValueError as error:
        raise InputError(
            f"tokens file {file.path!r} is not a readable .npy file: {' '.join(str(error).split())}; restore it"
        ) from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise InputError(f"tokens file {file.path!r} holds {dtype} {list(shape)}; save a one-dimensional integer array")
    if given is not None and dtype.name != given:
        raise InputError(
            f"tokens file {file.path!r} is an array of {dtype.name}, but `corpus.dtype` is {given}; remove "
            "`dtype`, which is for flat files, or correct it"
        )
    if np.iinfo(dtype).max < source.vocab_size - 1:
        raise InputError(
            f"tokens file {file.path!r} is an array of {dtype.name}, whose ids end at {np.iinfo(dtype).max}, below "
            f"`corpus.vocab_size` {source.vocab_size}; correct `vocab_size`, or store the ids in a wider type"
        )
    return dtype, shape[0]
