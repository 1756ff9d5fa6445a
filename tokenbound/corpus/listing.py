"""Which files a named place holds: each is taken, left out by a rule that has a name and a count, or refused.

| rule (in `Listing.skipped`)  | what it leaves out                                                                   |
|------------------------------|--------------------------------------------------------------------------------------|
| ``hidden``                   | files and directories whose name begins with a dot, unless a glob spells the dot     |
| ``excluded``                 | files and directories that `corpus.exclude` matches, with all that is inside         |
| ``other suffix``             | files of a directory whose name does not end as the source's files do                |
| ``link to a listed file``    | symbolic links, inside a directory or glob, to a file that the same entry lists      |
| ``folder matched by a glob`` | directories that a glob matches while it matches no file inside                      |
| ``other form of a file``     | of `mds` alone: compressed shards of which the raw form is listed                    |
| ``not read by datasets``     | files of a local `hf` folder that the `datasets` library takes for no split          |
| ``broken link``              | of `python-stdlib` alone: links to modules that are not installed                    |

Broken links elsewhere, and whatever is neither a file nor a directory (pipes, sockets, devices), are refused. What
`paths` names by itself is always read.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileSystem, FileType

from tokenbound.corpus.files import Skipped
from tokenbound.errors import InputError
from tokenbound.store.filesystem import is_local
from tokenbound.store.patterns import glob_regex, split_glob
from tokenbound.store.remote import file_infos

HIDDEN = "hidden"
EXCLUDED = "excluded"
OTHER_SUFFIX = "other suffix"
LINKED = "link to a listed file"
FOLDER = "folder matched by a glob"
NOT_IN_DATASET = "not read by datasets"
BROKEN = "broken link"
OTHER_FORM = "other form of a file"

CLOSED = "closed folder"
"""What a walk calls a directory that it does not look into."""


@dataclass(frozen=True)
class Found:
    """A file of a named place."""

    name: str
    """Its path below the place."""
    path: str
    """Where it is, inside its filesystem."""
    size: int
    linked: bool = False
    """Whether it is a symbolic link, or lies behind one."""


class Closed:
    """Which names inside a directory or glob are left out, and by which rule; what is inside them is not looked at."""

    def __init__(self, exclude: Sequence[str] = (), *, glob: str = "") -> None:
        """Decide by the patterns of a config.

        Args:
            exclude: `corpus.exclude`. A pattern with a slash is compared with the path below the directory or below
                the fixed part of the glob; one without, with the last part of that path.
            glob: what of an entry of `paths` follows its fixed part. A name that begins with a dot is not hidden where
                a part of the glob that begins with one matches it.
        """
        self._exclude = {pattern: re.compile(glob_regex(pattern.rstrip("/"))) for pattern in exclude}
        self._named = [re.compile(glob_regex(part)) for part in glob.split("/") if part.startswith(".")]

    def rule(self, name: str) -> str | None:
        """The rule by which a path below the place is left out; None where it is not.

        >>> closed = Closed(["drafts", "test/*.txt"])
        >>> [closed.rule(name) for name in ("a/drafts", "test/b.txt", "a/test/b.txt", "a/.git")]
        ['excluded', 'excluded', None, 'hidden']
        """
        last = posixpath.basename(name)
        if last.startswith(".") and not any(named.fullmatch(last) for named in self._named):
            return HIDDEN
        return EXCLUDED if self.patterns(name) else None

    def patterns(self, name: str) -> list[str]:
        """The patterns of `corpus.exclude` that match a path below the place."""
        last = posixpath.basename(name)
        return [
            pattern
            for pattern, expression in self._exclude.items()
            if expression.fullmatch(name if "/" in pattern.rstrip("/") else last)
        ]

    def leave_out(self, name: str, skipped: Skipped, mark: str = "") -> bool:
        """Count a path that is left out, with a mark behind its name; whether it is."""
        rule = self.rule(name)
        if rule is None:
            return False
        skipped.add(rule, name + mark)
        if rule == EXCLUDED:
            skipped.patterns.update(self.patterns(name))
        return True


def files_below(
    filesystem: FileSystem,
    path: str,
    skipped: Skipped,
    *,
    belongs: Callable[[str], bool],
    declared: str,
    exclude: Sequence[str] = (),
) -> list[Found]:
    """The files of a directory that belong to a source, sorted by their relative paths.

    Args:
        filesystem: where the directory is.
        path: of the directory.
        skipped: where what is left out is counted.
        belongs: whether a name ends as the source's files do.
        declared: the entry of `corpus.paths`, for messages.
        exclude: `corpus.exclude`.

    Raises:
        InputError: a link is broken, a file is none, or a directory cannot be read.
    """
    found, closed = [], Closed(exclude)
    for item in _walk(filesystem, path, declared, skipped, closed, below=lambda name: True, matches=lambda name: True):
        if belongs(item.name):
            found.append(item)
        else:
            skipped.add(OTHER_SUFFIX, item.name)
    return _each_once(found, skipped)


def files_matching(
    filesystem: FileSystem, path: str, skipped: Skipped, *, declared: str, exclude: Sequence[str] = ()
) -> list[Found]:
    """The files that a glob names, with their paths below its fixed part, sorted by them.

    Raises:
        InputError: a link that matches is broken, a match is no file, or a directory cannot be read.
    """
    base, pattern = split_glob(path)
    matches = re.compile(glob_regex(pattern)).fullmatch
    folders, closed = list[str](), Closed(exclude, glob=pattern)
    walk = _walk(filesystem, base, declared, skipped, closed, below=_below(pattern), matches=matches, folders=folders)
    found = [*walk]
    names = [item.name for item in found]
    for folder in sorted(folders):
        if matches(folder) and not any(name.startswith(f"{folder}/") for name in names):
            skipped.add(FOLDER, folder)
    return _each_once(found, skipped)


def _below(pattern: str) -> Callable[[str], bool]:
    """Whether something inside a directory may match a pattern; of the base, "", whether in a directory inside it.

    >>> inside = _below("day-*/x.jsonl")
    >>> inside("day-1"), inside("other"), inside("day-1/deeper"), inside(""), _below("*.jsonl")("")
    (True, False, False, True, False)
    """
    parts = pattern.split("/")
    expressions = [None if "**" in part else re.compile(glob_regex(part)) for part in parts]

    def may_hold(name: str) -> bool:
        if not name:
            return len(parts) > 1 or expressions[0] is None
        names = name.split("/")
        for index, part in enumerate(names):
            if index >= len(parts) - 1:
                return index < len(parts) and expressions[index] is None
            expression = expressions[index]
            if expression is None:
                return True
            if not expression.fullmatch(part):
                return False
        return True

    return may_hold


def _each_once(found: list[Found], skipped: Skipped) -> list[Found]:
    """One name for each file, one without a link where there is one, else the first; sorted by name."""
    if not any(item.linked for item in found):
        return sorted(found, key=lambda item: item.name)
    chosen: dict[str, Found] = {}
    for item in sorted(found, key=lambda item: (item.linked, item.name)):
        target = os.path.realpath(item.path)
        if target in chosen:
            skipped.add(LINKED, item.name)
        else:
            chosen[target] = item
    return sorted(chosen.values(), key=lambda item: item.name)


def _walk(
    filesystem: FileSystem,
    base: str,
    declared: str,
    skipped: Skipped,
    closed: Closed,
    *,
    below: Callable[[str], bool],
    matches: Callable[[str], object],
    folders: list[str] | None = None,
) -> Iterator[Found]:
    """Files below a directory whose relative paths match; those left out are counted, special ones refused.

    Args:
        filesystem: where the directory is.
        base: the directory.
        declared: the entry of `corpus.paths`, for messages.
        skipped: where files and directories that are left out are counted.
        closed: which these are.
        below: whether something inside a directory may match.
        matches: whether a file does.
        folders: where the directories that were met are noted.
    """
    walk = _walk_local if is_local(filesystem) else _walk_remote
    for kind, item in walk(filesystem, base, below, closed):
        if kind == "folder":
            if folders is not None:
                folders.append(item.name)
        elif kind == CLOSED:
            if below(item.name) or matches(item.name):
                closed.leave_out(item.name, skipped, "/")
        elif not matches(item.name) or closed.leave_out(item.name, skipped):
            continue
        elif kind == "loop":
            skipped.add(LINKED, item.name)
        elif kind == "file":
            yield item
        else:
            raise InputError(f"corpus path {declared!r}: {item.path!r} is {kind}; restore it, or move it out of there")


def _walk_local(
    filesystem: FileSystem, base: str, below: Callable[[str], bool], closed: Closed
) -> Iterator[tuple[str, Found]]:
    """Everything below a local directory, and what it is; names need not be UTF-8."""

    def visit(folder: str, prefix: str, above: tuple[str, ...], linked: bool) -> Iterator[tuple[str, Found]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cannot list the corpus folder {folder!r}: {error.strerror or error}") from None
        for entry in entries:
            link = entry.is_symlink()
            name, behind = prefix + entry.name, linked or link
            kind, size = _kind(entry.path, link)
            item = Found(name, entry.path, size, behind)
            if kind != "folder":
                yield kind, item
            elif closed.rule(name):
                yield CLOSED, item
            elif link and os.path.realpath(entry.path) in above:
                yield "loop", item
            else:
                yield "folder", item
                if below(name):
                    yield from visit(entry.path, f"{name}/", (*above, os.path.realpath(entry.path)), behind)

    yield from visit(base, "", (os.path.realpath(base),), False)


def _kind(path: str, link: bool) -> tuple[str, int]:
    """What stands at a local path, behind links, and its size."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        return ("a broken link" if link else f"unreadable ({error.strerror or error})"), 0
    if stat.S_ISDIR(found.st_mode):
        return "folder", 0
    if stat.S_ISREG(found.st_mode):
        return "file", found.st_size
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(found.st_mode), "a device"), 0


def _walk_remote(
    filesystem: FileSystem, base: str, below: Callable[[str], bool], closed: Closed
) -> Iterator[tuple[str, Found]]:
    """The same on an object store, where one request lists all that lies below."""
    known: set[str] = set()
    recursive = below("")
    for info in file_infos(filesystem, FileSelector(base, recursive=recursive, allow_not_found=True)):
        name = posixpath.relpath(info.path, base)
        parts = name.split("/")
        folder = info.type == FileType.Directory
        folders = ["/".join(parts[: index + 1]) for index in range(len(parts) if folder else len(parts) - 1)]
        if place := next(filter(closed.rule, folders), None):
            if place not in known:
                known.add(place)
                yield CLOSED, Found(place, info.path, 0)
        elif folder:
            yield "folder", Found(name, info.path, 0)
        elif info.type == FileType.File:
            yield "file", Found(name, info.path, info.size)


def special_kind(path: str) -> str | None:
    """What stands at a local path that is neither a file nor a directory; None where nothing does.

    >>> special_kind("/nowhere/at/all") is None
    True
    """
    link = os.path.islink(path)  # noqa: PTH114
    if not link and not os.path.exists(path):  # noqa: PTH110
        return None
    kind, _ = _kind(path, link)
    return None if kind in ("file", "folder") else kind
