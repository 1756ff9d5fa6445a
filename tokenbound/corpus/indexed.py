"""Token ids with an index beside them that says where documents end: what the formats of several tools share.

The files of one data set differ in the end of their names. Each of them is a file of the corpus, so that the corpus
digest covers the index too; only the file of ids has ids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.sources.base import FileSource, IdSource
from tokenbound.corpus.sources.fields import PathFields, VocabFields
from tokenbound.corpus.streams import open_source
from tokenbound.errors import InputError
from tokenbound.limits import require_size
from tokenbound.store.uri import join, split

Ids = npt.NDArray[np.integer]
Ends = npt.NDArray[np.int64]

MAX_INDEX_BYTES = 1 << 32
"""Of an index, which is read whole: 200 million documents take 1.6 to 4 GB."""


class IndexedFields(VocabFields, PathFields):
    """Keys of every such source."""


X = TypeVar("X", bound=IndexedFields)


class IndexedSource(FileSource[X], IdSource[X]):
    """A source whose ids lie in one file and the ends of its documents in another.

    Attributes:
        parts: how the files of one data set end, that of the ids first, and whether each must be there.
    """

    parts: ClassVar[Mapping[str, bool]]

    def check(self) -> None:
        """Refuse a corpus without a place or a vocabulary.

        Raises:
            ValueError: the message names the key.
        """
        super().check()
        if self.fields.vocab_size is None:
            raise ValueError(f"source `{self.name}` needs `vocab_size`, the number of ids its tokenizer can emit")

    @property
    def vocab_size(self) -> int:
        """As the config says."""
        assert self.fields.vocab_size is not None, "checked when the config was validated"
        return self.fields.vocab_size

    @property
    def eos_id(self) -> None:
        """The index says where documents end."""
        return None

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """The files of each entry of `paths`, and those that belong to them.

        Raises:
            InputError: one of them is not there.
        """
        stems: dict[tuple[str, str], dict[str, SourceFile]] = {}
        for file in super().find(skipped):
            part = self._part(file)
            key = (split(file.path)[0], file.name.removesuffix(part))
            stems.setdefault(key, {})[part] = file
        return [file for known in stems.values() for file in self._completed(known)]

    def _part(self, file: SourceFile) -> str:
        """How the name of a file ends."""
        part = max((part for part in self.parts if file.name.endswith(part)), key=len, default=None)
        if part is None:
            raise InputError(
                f"corpus file {file.path!r} is none of source `{self.name}`, whose files end in "
                f"{', '.join(self.parts)}; correct `corpus.paths`, or decompress it"
            )
        return part

    def _completed(self, known: Mapping[str, SourceFile]) -> Iterator[SourceFile]:
        """All files of one data set, of which some were found."""
        own, file = next(iter(known.items()))
        folder, name = split(file.path)
        for part, required in self.parts.items():
            place = join(folder, name.removesuffix(own) + part)
            if part in known:
                yield known[part]
            elif _is_there(place):
                yield replace(file, name=file.name.removesuffix(own) + part, path=place)
            elif required:
                raise InputError(f"corpus file {file.path!r} has no {split(place)[1]!r} beside it; restore it")

    def companion(self, file: SourceFile, part: str) -> SourceFile:
        """Another file of the data set to which the file of ids belongs."""
        own, (folder, name) = self._part(file), split(file.path)
        return replace(file, name=file.name.removesuffix(own) + part, path=join(folder, name.removesuffix(own) + part))

    def has_ids(self, file: SourceFile) -> bool:
        """Whether a file is that of the ids."""
        return self._part(file) == next(iter(self.parts))

    def ids(self, file: SourceFile, block_bytes: int) -> Iterator[Ids]:
        """The ids of one file, block by block; none of an index."""
        if self.has_ids(file):
            yield from flat_blocks(file, self.width(file), block_bytes)

    def ends(self, file: SourceFile) -> Ends:
        """Where documents end; nowhere in an index."""
        return self.index(file) if self.has_ids(file) else np.empty(0, np.int64)

    @abstractmethod
    def width(self, file: SourceFile) -> np.dtype[np.integer]:
        """The type in which a file of ids stores them.

        Raises:
            InputError: what says so is damaged.
        """

    @abstractmethod
    def index(self, file: SourceFile) -> Ends:
        """int64 [documents]: the ends of the documents of a file of ids, counted in ids.

        Raises:
            InputError: the index is damaged, or is that of another file.
        """


def flat_blocks(file: SourceFile, dtype: np.dtype[np.integer], block_bytes: int) -> Iterator[Ids]:
    """The ids of a file that holds nothing else.

    Raises:
        InputError: it ends inside an id.
    """
    rest = b""
    with open_source(file) as stream:
        for block in iter(lambda: stream.read(block_bytes), b""):
            data = rest + block
            whole = len(data) - len(data) % dtype.itemsize
            rest = data[whole:]
            yield np.frombuffer(data[:whole], dtype=dtype)
    if rest:
        raise InputError(f"tokens file {file.path!r} ends inside an id of {dtype.itemsize} bytes; restore it")


def read_index(file: SourceFile) -> bytes:
    """All bytes of an index.

    Raises:
        InputError: there are more than `MAX_INDEX_BYTES`.
    """
    size = stored_size(file)
    require_size(f"index {file.path!r}: bytes", size, MAX_INDEX_BYTES, "split the data set")
    with open_source(file) as stream:
        return stream.read(size)


def stored_size(file: SourceFile) -> int:
    """Bytes of a file as it is now."""
    from tokenbound.store.filesystem import resolve
    from tokenbound.store.remote import file_infos

    filesystem, path = resolve(file.path)
    return int(file_infos(filesystem, path).size or 0)


def _is_there(place: str) -> bool:
    from tokenbound.store.filesystem import exists, resolve

    return exists(*resolve(place))
