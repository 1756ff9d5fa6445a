"""Which files an entry of `corpus.paths` stands for: a file, a directory or a glob, here or in an object store."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import cast

from pyarrow.fs import FileInfo, FileSystem, FileType

from tokenbound.corpus import listing
from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.errors import InputError, TokenboundError
from tokenbound.store.filesystem import is_local, resolve
from tokenbound.store.remote import file_infos
from tokenbound.store.uri import is_uri, reroot


def expand(
    declared: str, skipped: Skipped, *, source: str, belongs: Callable[[str], bool], exclude: Sequence[str] = ()
) -> list[SourceFile]:
    """Files that one entry of `paths` stands for.

    Args:
        declared: the entry.
        skipped: where what is left out of a directory or glob is counted.
        source: name of the source, for messages.
        belongs: whether a file in a directory is one of the source's, by its name.
        exclude: `corpus.exclude`.

    Raises:
        InputError: nothing is there, or nothing that the source reads.
    """
    filesystem, path = _resolve_input(declared)
    info = _file_info(filesystem, path)
    if info.type == FileType.File:
        return [_source_file(declared, filesystem, listing.Found(posixpath.basename(path), path, info.size))]
    if is_local(filesystem) and (special := listing.special_kind(path)):
        raise InputError(f"corpus path {declared!r} is {special}, not a file; correct `corpus.paths`")
    if info.type == FileType.Directory:
        found = listing.files_below(filesystem, path, skipped, belongs=belongs, declared=declared, exclude=exclude)
    elif glob.has_magic(path):
        found = listing.files_matching(filesystem, path, skipped, declared=declared, exclude=exclude)
        if not found and (cure := _cure(declared)) != _cure(""):
            raise InputError(f"corpus path {declared!r} matches nothing; {cure}")
    else:
        raise InputError(f"corpus path {declared!r} does not exist; {_cure(declared)}")
    if not found:
        left_out = ", ".join(f"{count} by the rule `{rule}`" for rule, count in sorted(skipped.counts.items()))
        raise InputError(
            f"corpus path {declared!r} contains no file for source `{source}`"
            f"{f' (left out: {left_out})' if left_out else ''}; correct `corpus.paths`"
        )
    return [_source_file(declared, filesystem, item) for item in found]


def _cure(declared: str) -> str:
    """What to do about a path at which nothing is; what a shell would have replaced stands in a config as it is.

    >>> _cure("$DATA/train.jsonl"), _cure("{a,b}.jsonl")[:32]
    ('variables such as $DATA are not replaced here; write the path itself', 'alternatives in braces are not e')
    """
    if variable := re.search(r"\$\{?\w+\}?", declared):
        return f"variables such as {variable[0]} are not replaced here; write the path itself"
    if re.search(r"\{[^{}]*,[^{}]*\}", declared):
        return "alternatives in braces are not expanded here; list them as entries of `corpus.paths`"
    return "correct `corpus.paths`"


def refuse_repeats(files: list[SourceFile]) -> list[SourceFile]:
    """Each token counts once: one file under two entries is an error, and so are two files of one name.

    Raises:
        InputError: there are such files.
    """
    targets: dict[str, str] = {}
    names: dict[str, str] = {}
    for file in files:
        target = file.path if is_uri(file.path) else os.path.realpath(file.path)
        if target in targets:
            raise InputError(f"corpus file {file.path!r} is listed twice (also as {targets[target]!r}); remove one")
        if file.name in names:
            raise InputError(
                f"corpus files {names[file.name]!r} and {file.path!r} would share the name {file.name!r}; "
                "give their common parent directory, or a glob below it, in `corpus.paths`"
            )
        targets[target] = names[file.name] = file.path
    return files


def _resolve_input(declared: str) -> tuple[FileSystem, str]:
    filesystem, path = resolve(declared)
    return filesystem, path.rstrip("/") or "/"


def _file_info(filesystem: FileSystem, path: str) -> FileInfo:
    try:
        return cast(FileInfo, file_infos(filesystem, path))
    except TokenboundError:
        raise
    except (OSError, ValueError) as error:  # the hub's client calls a place that cannot be one a value
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"cannot look at {path!r}: {reason}; correct `corpus.paths`") from None


def _source_file(declared: str, filesystem: FileSystem, found: listing.Found) -> SourceFile:
    path = found.path if is_local(filesystem) else reroot(declared, found.path)
    return SourceFile(name=found.name, path=path, bytes=found.size)
