"""Local copies of checkpoints and tokenizers that lie on an object store, for libraries that read disks."""

from __future__ import annotations

import hashlib
import logging
import posixpath
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath

from pyarrow.fs import FileInfo

from tokenbound.errors import InputError
from tokenbound.gguf_file import parts_of
from tokenbound.store.filesystem import resolve
from tokenbound.store.local_folder import shared_copy
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

    The processes of a machine share the copy, in the default folder of `store.local_folder`; it stays as long as one of
    them lives. Objects that were replaced on the store since are fetched anew.

    Raises:
        InputError: there is nothing at the URI that a model consists of, or this machine has no place for it.
        IncompleteError: the store failed again and again.
    """
    return _fetched(name) if is_uri(name) else name


def temporary_folder() -> Path:
    """An empty folder on this machine that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tokenbound-copy-", ignore_cleanup_errors=True)
    _folders.append(folder)
    return Path(folder.name)


@cache
def _fetched(uri: str) -> str:
    files = model_files(uri)
    path = resolve(uri)[1]
    # What is there now: another size or time is another copy.
    key = hashlib.sha256(repr([uri, *((info.path, info.size, info.mtime_ns) for info in files)]).encode()).hexdigest()
    is_file = files[0].path == path  # a GGUF file may have parts beside it
    inside = "" if is_file else f"{base_name(uri)}/"
    named = {f"{inside}{posixpath.basename(info.path)}": info for info in files}
    return str(shared_copy(uri, key, named) / base_name(uri))


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
