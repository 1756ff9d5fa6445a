"""Files below a directory and files that a glob names, the same on every filesystem."""

from __future__ import annotations

import glob
import posixpath
import re

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from tokenbound.store.filesystem import resolve
from tokenbound.store.remote import file_infos
from tokenbound.store.uri import reroot


def walk(filesystem: FileSystem, base: str, *, recursive: bool = True) -> list[tuple[str, FileInfo]]:
    """Files below ``base`` with their relative posix paths, sorted by them, hidden ones left out."""
    infos = file_infos(filesystem, FileSelector(base, recursive=recursive, allow_not_found=True))
    files = [(posixpath.relpath(info.path, base), info) for info in infos if info.type == FileType.File]
    return sorted((item for item in files if not _is_hidden(item[0])), key=lambda item: item[0])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def matching(filesystem: FileSystem, path: str) -> list[tuple[str, FileInfo]]:
    """Files that a glob names, with their paths below its fixed part, sorted by them."""
    base, pattern = split_glob(path)
    matches = re.compile(glob_regex(pattern)).fullmatch
    found = walk(filesystem, base, recursive="/" in pattern or "**" in pattern)
    return [item for item in found if matches(item[0])]


def matching_places(pattern: str) -> list[str]:
    """URIs of the files that a glob in a URI names; ``?`` begins its options there and is no wildcard."""
    filesystem, path = resolve(pattern)
    return [reroot(pattern, str(info.path)) for _, info in matching(filesystem, path)]


def split_glob(path: str) -> tuple[str, str]:
    """The directory before the first wildcard, and the pattern below it.

    >>> split_glob("/data/day-*/x.jsonl")
    ('/data', 'day-*/x.jsonl')
    """
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: ``**/`` any directories, ``*`` and ``?`` inside a name, ``[...]`` sets."""
    tokens = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return "".join(
        tokens.get(piece)
        or (f"[{'^' if piece[1] == '!' else ''}{piece[1:-1].lstrip('!')}]" if piece[:1] == "[" else re.escape(piece))
        for piece in pieces
    )
