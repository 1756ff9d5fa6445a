"""The documents of a corpus: its files in their one order, each digested and read as its source says.

Which files a directory or glob holds, and what is left out, is said in `tokenbound.corpus.listing`; what one document
is, in `tokenbound.corpus.sources`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenbound.corpus.answers import Document
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.files import Listing, Skipped, SourceFile
from tokenbound.corpus.sources import TextSource
from tokenbound.corpus.streams import too_large
from tokenbound.errors import InputError


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
    files = config.reader().find(skipped)
    if not files:
        raise InputError(f"corpus is empty: source `{config.source}` found no file; check `corpus.paths`")
    return Listing(files, dict(sorted(skipped.counts.items())), dict(skipped.examples))


def digest_file(config: CorpusConfig, file: SourceFile) -> SourceFile:
    """The same file with its size and SHA-256 as they are now, computed from every byte.

    Raises:
        InputError: the file has disappeared.
    """
    return config.reader().digest(file)


def read_documents(config: CorpusConfig, file: SourceFile) -> Iterator[Document]:
    """The documents of one file, in order, one at a time.

    Raises:
        InputError: content is not in the encoding, or not JSON, a text field is missing or not text, a compressed
            file is damaged, or a file holds something else than its source; the message names the file and the line
            or row.
    """
    return (document for document in read_rows(config, file) if document is not None)


def read_rows(config: CorpusConfig, file: SourceFile) -> Iterator[Document | None]:
    """The same, with None for each row that `missing: skip` leaves out.

    Raises:
        InputError: as for `read_documents`.
    """
    source = config.reader()
    if not isinstance(source, TextSource):
        raise InputError(f"source `{config.source}` holds ids, not documents of text")
    return _of_bounded_size(source.documents(file), file, source.max_document_bytes)


def _of_bounded_size(documents: Iterator[Document | None], file: SourceFile, most: int) -> Iterator[Document | None]:
    """The same documents; a source that reads a large one whole is not trusted to have looked."""
    for number, document in enumerate(documents, start=1):
        if document is not None and len(document) > most:
            raise InputError(f"corpus file {file.path!r}, document {number}: {too_large(most).removeprefix('holds ')}")
        yield document
