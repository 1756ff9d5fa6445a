"""What a source is: the keys of `what.corpus` that it takes, its files, and how one is read.

A source of text takes a file like this one, and one test. It reads each saying of a fortune file as a document:

    import re
    from collections.abc import Iterator

    from tokenbound.corpus.files import SourceFile
    from tokenbound.corpus.sources.base import FileSource, TextSource
    from tokenbound.corpus.sources.fields import EncodingFields, PathFields
    from tokenbound.corpus.streams import decoded, text_blocks
    from tokenbound.errors import InputError


    class FortuneFields(EncodingFields, PathFields):
        separator: str = "%"
        \"\"\"The line between two sayings.\"\"\"


    class Fortune(FileSource[FortuneFields], TextSource[FortuneFields]):
        name = "fortune"
        takes = FortuneFields
        suffixes = (".fortune",)

        def documents(self, file: SourceFile) -> Iterator[str]:
            content = b"".join(text_blocks(file, self.name))
            text = decoded(content, self.fields.encoding, self.fields.errors, file)
            sayings = re.split(f"(?m)^{re.escape(self.fields.separator)}$", text)
            if len(sayings) == 1:
                raise InputError(f"{file.path!r}: no line {self.fields.separator!r}; correct `corpus.separator`")
            yield from (saying.strip() for saying in sayings)

A run then says `corpus: {source: fortune, paths: [wit.fortune], separator: "%%", tokenizer: bytes, ...}`; a key that
`FortuneFields` does not have is refused. What follows from the fields needs nothing else:

* every field that is not in `located_by` is part of the rule by which ids are made, hence of the corpus digest;
* every field is on the certificate, and in the name under which the prepared corpus is kept;
* shared keys (`text_field`, `encoding`, ...) are taken by inheriting from the classes of `fields`.

Three rules make a corpus reproducible. A file's documents depend on its bytes and the fields alone. They come in an
order that is always the same. What cannot be read is an `InputError` that names file, place and cure; nothing is left
out silently. Imports of pyarrow and heavier packages stand inside functions: configs are validated without them.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tokenbound.corpus.answers import Document
from tokenbound.corpus.contents import compressor_of, without_compression
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.sources.fields import (
    EVERYWHERE,
    ExcludeFields,
    Fields,
    LimitFields,
    PartFields,
    PathFields,
    RowFields,
    SpecialTokenFields,
)
from tokenbound.corpus.streams import peek, stored_blocks
from tokenbound.limits import MAX_DOCUMENT_BYTES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Fields)
P = TypeVar("P", bound=PathFields)


class Source(ABC, Generic[F]):
    """A kind of corpus; an instance is one corpus of it.

    Derive from `TextSource` or `IdSource`, and from `FileSource` where the documents lie in files that `paths` names.

    Attributes:
        name: what configs call it under `corpus.source`.
        takes: the keys of `what.corpus` that apply to it, shared ones included.
        located_by: keys that say where the documents are, and not how they are read; names and digests of the files are
            in the corpus digest instead of them.
        has_files: whether a `SourceFile` is a file, of which it is worth saying that it is empty.
        remark: a sentence that is printed below the certificate of a run.
        max_document_bytes: of the largest document that is read; `corpus.max_document_bytes`.
    """

    name: ClassVar[str]
    takes: ClassVar[type[Fields]]
    located_by: ClassVar[tuple[str, ...]] = ()
    has_files: ClassVar[bool] = True
    remark: ClassVar[str | None] = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __init__(self, fields: F) -> None:
        """Take what a config says, as `takes` validated it."""
        self.fields = fields

    @classmethod
    def keys(cls) -> frozenset[str]:
        """All keys of `what.corpus` that apply."""
        return EVERYWHERE | cls.takes.model_fields.keys()

    @classmethod
    def applies(cls, key: str) -> bool:
        """Whether a key of `what.corpus` does."""
        applying = cls.keys()
        return key in applying

    def check(self) -> None:
        """Refuse fields that do not go together; called when a config is validated, before anything is read.

        Raises:
            ValueError: the message names the keys and the cure.
        """
        return

    def ignored(self) -> Mapping[str, str]:
        """Keys that apply to the source but not beside the other fields, each with the reason."""
        return {}

    def deciding(self) -> dict[str, object]:
        """The fields that decide what is read from the files, as plain data: the corpus digest covers them."""
        fields = self.fields.model_dump(mode="json", exclude={*EVERYWHERE, *self.located_by})
        return {key: value for key, value in fields.items() if key not in self.ignored()}

    def surroundings(self) -> dict[str, object]:
        """What else decides which files there are, as plain data; part of the name of the prepared corpus."""
        return {}

    def facts(self) -> dict[str, str]:
        """What else the certificate says of the corpus."""
        return {}

    @abstractmethod
    def find(self, skipped: Skipped) -> list[SourceFile]:
        """All files in their one order, not yet digested.

        Args:
            skipped: where what is left out is counted, by the name of a rule of `tokenbound.corpus.listing`.

        Raises:
            InputError: a place is missing, or names nothing that the source reads.
        """

    def digest(self, file: SourceFile) -> SourceFile:
        """The same file with its size and SHA-256 as they are now, computed from every byte.

        Raises:
            InputError: the file has disappeared.
        """
        chunks, digest, size = stored_blocks(file), hashlib.sha256(), 0
        if file.splittable:  # the content decides: under whatever name, only plain lines can be read in parts
            head, chunks = peek(chunks)
            file = replace(file, splittable=compressor_of(head) is None)
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
        return replace(file, bytes=size, sha256=digest.hexdigest())


class TextSource(Source[F]):
    """A source whose documents are texts, which a tokenizer turns into ids."""

    @classmethod
    def keys(cls) -> frozenset[str]:
        """All keys of `what.corpus` that apply."""
        shared = (SpecialTokenFields, PartFields, LimitFields)
        return super().keys().union(*(kind.model_fields for kind in shared))

    def ignored(self) -> Mapping[str, str]:
        """The field of the text, where other fields make the documents."""
        fields = self.fields.row_fields if isinstance(self.fields, RowFields) else ()
        if any(field.key != "text_field" for field in fields):
            return {"text_field": f"documents are made of {' and '.join(repr(field.name) for field in fields)}"}
        return {}

    @abstractmethod
    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """The documents of one file, in order, one at a time.

        Bytes are for the tokenizer `bytes` alone. None stands for a row that `missing: skip` leaves out; it is counted.

        Raises:
            InputError: the content cannot be read; the message names the file and the line or row.
        """


class IdSource(Source[F]):
    """A source whose files hold token ids."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids the tokenizer that made them can emit (V_tok); larger ones are refused."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None:
        """The id that ends each document, which it belongs to; None where a file is one document."""

    @abstractmethod
    def ids(self, file: SourceFile, block_bytes: int) -> Iterator[npt.NDArray[np.integer]]:
        """The ids of one file, block by block, in the type in which they are stored.

        Ids outside the vocabulary are looked for by the caller.

        Args:
            file: to read.
            block_bytes: about how much to read at a time; it changes no id.

        Raises:
            InputError: the file holds something else.
        """

    def ends(self, file: SourceFile) -> npt.NDArray[np.int64] | None:
        """Where an index says that the documents of a file end, counted in ids and ascending; None without one.

        Raises:
            InputError: the index is damaged.
        """
        return None


class FileSource(Source[P]):
    """A source whose documents lie in files that `paths` names.

    Attributes:
        suffixes: what a directory contributes, in upper or lower case and behind it the suffix of a compressor; empty:
            every file.
        exclude: globs of what is left out; `corpus.exclude`.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def keys(cls) -> frozenset[str]:
        """All keys of `what.corpus` that apply."""
        return super().keys() | ExcludeFields.model_fields.keys()

    @property
    def is_splittable(self) -> bool:
        """Whether an uncompressed file can be read in parts, by its `span`."""
        return False

    def check(self) -> None:
        """Refuse a corpus without a place.

        Raises:
            ValueError: there is none.
        """
        if not self.fields.paths:
            raise ValueError(f"source `{self.name}` needs `paths`")

    @classmethod
    def belongs(cls, name: str) -> bool:
        """Whether a file found in a directory is of the source's kind, by its name."""
        return not cls.suffixes or without_compression(name).endswith(cls.suffixes)

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """The files of each entry of `paths`; inside a directory or glob by their relative paths (by code point)."""
        from tokenbound.corpus.places import expand, refuse_repeats  # pyarrow, which a config does without

        expanded = (
            expand(path, skipped, source=self.name, belongs=self.belongs, exclude=self.exclude)
            for path in self.fields.paths
        )
        found = refuse_repeats([file for files in expanded for file in files])
        if unused := sorted({*self.exclude} - skipped.patterns):
            logger.warning("corpus.exclude: %r matches nothing in the places of corpus.paths", unused[0])
        return [replace(file, splittable=True) for file in found] if self.is_splittable else found
