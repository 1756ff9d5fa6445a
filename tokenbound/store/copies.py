"""Local copies of checkpoints, tokenizers and artifacts that lie on an object store, for libraries that read disks."""

from __future__ import annotations

import logging
import posixpath
import shutil
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath

from pyarrow.fs import FileInfo, FileSystem

from tokenbound.errors import InputError
from tokenbound.gguf_file import parts_of
from tokenbound.store.filesystem import open_input, resolve
from tokenbound.store.patterns import walk
from tokenbound.store.remote import file_infos
from tokenbound.store.uri import base_name, is_uri

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".tokenbound")
"""What is read of a model's folder: neither states of optimizers nor pickles are fetched."""

_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def local_copy(name: str) -> str:
    """A local path of what a config names; a path or hub id is itself, a folder or file at a URI is fetched once.

    Each process fetches for itself and keeps the copy until it ends.

    Raises:
        InputError: there is nothing at the URI that a model consists of.
        IncompleteError: the store failed again and again.
    """
    return _fetched(name) if is_uri(name) else name


@cache
def _fetched(uri: str) -> str:
    files = model_files(uri)
    filesystem, path = resolve(uri)
    folder = tempfile.TemporaryDirectory(prefix="tokenbound-copy-", ignore_cleanup_errors=True)
    _folders.append(folder)
    logger.info("fetching %s: %d files, %d bytes", uri, len(files), sum(info.size for info in files))
    target = Path(folder.name, base_name(uri))
    if files[0].path == path:
        for info in files:
            _fetch(filesystem, info.path, target.with_name(posixpath.basename(info.path)))
        return str(target)
    target.mkdir()
    for info in files:
        _fetch(filesystem, info.path, target / posixpath.basename(info.path))
    return str(target)


def model_files(uri: str) -> list[FileInfo]:
    """The files of a model's folder at a URI, or the one file that it names (all parts of a split GGUF file), by name.

    Raises:
        InputError: there are none.
    """
    filesystem, path = resolve(uri)
    info = file_infos(filesystem, path)
    if info.is_file:
        parts = [part.as_posix() for part in parts_of(PurePosixPath(path))[1:]]
        return [info, *(file_infos(filesystem, part) for part in parts)]
    found = [info for name, info in walk(filesystem, path, recursive=False) if name.endswith(SUFFIXES)]
    if not found:
        raise InputError(f"{uri} holds no file of a model ({', '.join(SUFFIXES)}); give the folder of a checkpoint")
    return found


def _fetch(filesystem: FileSystem, path: str, target: Path) -> None:
    with open_input(filesystem, path) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 23)
