"""`hf`: each row of a split of a Hugging Face dataset is a document, the text of its column `text_field`.

What a row's document is, and what becomes of a row without one, is said in `tokenbound.corpus.row_text`. The dataset
lies on disk, in a local directory, behind a builder such as `json`, or on the hub.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbound.corpus.answers import Document, document_bytes
from tokenbound.corpus.columns import column_documents, find_columns
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.row_text import RowField
from tokenbound.corpus.sources.base import TextSource
from tokenbound.corpus.sources.fields import DatasetFields, MessageFields, PathFields
from tokenbound.corpus.streams import one_line
from tokenbound.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILE_ROWS = 1 << 14
"""Rows of one source file: small enough to be a unit of work, fixed so that names stay the same."""

LENGTH_BYTES = 8
"""Size of the length before each text in the digest of dataset rows."""


class HfFields(DatasetFields, MessageFields, PathFields):
    """Keys of `hf`."""


class Hf(TextSource[HfFields]):
    """Rows of a Hugging Face dataset, in ranges that take the place of files."""

    name = "hf"
    takes = HfFields
    located_by = tuple(DatasetFields.model_fields)
    has_files = False

    def check(self) -> None:
        """Refuse a dataset without a name.

        Raises:
            ValueError: there is none.
        """
        if self.fields.name is None:
            raise ValueError(f"source `{self.name}` needs `name`")

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """Fixed ranges of rows; only the last one changes its name when a dataset grows."""
        from tokenbound.corpus import listing  # pyarrow, which a config does without

        for name in self._unread():
            skipped.add(listing.NOT_IN_DATASET, name)
        return row_ranges(len(self._rows()), self.fields.split, str(self.fields.name))

    def documents(self, file: SourceFile) -> Iterator[Document | None]:
        """What a range of rows holds."""
        start, stop = _range_of(file)
        table, fields = self._rows(), self.fields.row_fields
        steps = find_columns(fields, table.column_names, f"dataset {self.fields.name!r}")
        slices = (table[begin : min(begin + 1024, stop)] for begin in range(start, stop, 1024))
        rows = (row for values in slices for row in zip(*(values[step.key] for step in steps), strict=True))
        yield from column_documents(rows, fields, steps, file.path, start)

    def digest(self, file: SourceFile) -> SourceFile:
        """The range with the size of its rows, and a digest that covers each with its length before it."""
        digest, size = hashlib.sha256(), 0
        for document in (document for document in self.documents(file) if document is not None):
            data = document_bytes(document)
            digest.update(len(data).to_bytes(LENGTH_BYTES, "big") + data)
            size += len(data)
        return replace(file, bytes=size, sha256=digest.hexdigest())

    def _rows(self) -> Dataset:
        given = self.fields
        return _load_dataset(str(given.name), given.subset, given.split, given.revision, given.paths, given.row_fields)

    def _unread(self) -> list[str]:
        """Files of a local folder that the library takes for no split; hidden ones it leaves out by itself.

        Raises:
            InputError: the dataset cannot be loaded.
        """
        self._rows()  # says what is wrong, if anything is
        name = str(self.fields.name)
        if not Path(name).is_dir() or _is_saved_dataset(Path(name)) or self.fields.paths:
            return []
        from datasets import load_dataset_builder

        from tokenbound.corpus import listing
        from tokenbound.store.filesystem import resolve

        builder = load_dataset_builder(name, self.fields.subset)
        taken = {os.path.realpath(str(path)) for paths in (builder.config.data_files or {}).values() for path in paths}
        filesystem, path = resolve(name)
        found = listing.files_below(filesystem, path, Skipped(), belongs=lambda name: True, declared=name)
        return [item.name for item in found if os.path.realpath(item.path) not in taken]


def row_ranges(rows: int, split: str, dataset: str, *, file_rows: int = FILE_ROWS) -> list[SourceFile]:
    """The ranges of a dataset's rows, named by them.

    >>> [file.name for file in row_ranges(3, "train", "x", file_rows=2)]
    ['train/000000000000-000000000002', 'train/000000000002-000000000003']
    """
    ranges = [(start, min(start + file_rows, rows)) for start in range(0, rows, file_rows)]
    return [SourceFile(f"{split}/{start:012d}-{stop:012d}", dataset, 0) for start, stop in ranges]


def _range_of(file: SourceFile) -> tuple[int, int]:
    start, stop = file.name.rpartition("/")[2].split("-")
    return int(start), int(stop)


@lru_cache(maxsize=2)
def _load_dataset(
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    paths: tuple[str, ...],
    fields: tuple[RowField, ...],
) -> Dataset:
    """A map-style dataset of the columns that are read, from disk, a local directory, a builder or the hub."""
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
            f"dataset {name!r}, split {split!r}, cannot be loaded: {one_line(error.__cause__ or error)}; correct "
            "`corpus.name`, `subset`, `split`, `revision` or `paths`"
        ) from None
    steps = find_columns(fields, rows.column_names, f"dataset {name!r}")
    return rows.select_columns(list({step.key: None for step in steps}))


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


def _of_split(loaded: Dataset | DatasetDict, split: str) -> Dataset:
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
