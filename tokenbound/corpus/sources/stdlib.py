"""`python-stdlib`: each ``*.py`` file of this Python's library is one document.

The `bytes` tokenizer takes them byte for byte, because some test data among the modules is in no encoding at all; other
tokenizers take text in `encoding`.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenbound.corpus.files import Skipped, SourceFile
from tokenbound.corpus.sources.base import TextSource
from tokenbound.corpus.sources.fields import EncodingFields, PathFields, TokenizerFields
from tokenbound.corpus.streams import decoded, stored_blocks, text_blocks
from tokenbound.errors import InputError

EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})
"""Directories below the standard library that are not part of it."""


class StdlibFields(TokenizerFields, EncodingFields, PathFields):
    """Keys of `python-stdlib`."""


class Stdlib(TextSource[StdlibFields]):
    """The modules of this Python's library."""

    name = "python-stdlib"
    takes = StdlibFields
    remark = "The standard library differs between Python builds, so your figures may differ from published ones."

    @property
    def keeps_bytes(self) -> bool:
        """Whether the bytes of the files are the ids, whatever they spell: some modules of Python are not UTF-8."""
        return self.fields.tokenizer == "bytes"

    def ignored(self) -> Mapping[str, str]:
        """The encoding, where bytes stay bytes."""
        reason = f"tokenizer `bytes` takes the bytes of `{self.name}` as they are"
        return dict.fromkeys(EncodingFields.model_fields, reason) if self.keeps_bytes else {}

    def surroundings(self) -> dict[str, object]:
        """The Python whose library it is."""
        return {"python": [library(), sys.version]}

    def facts(self) -> dict[str, str]:
        """The Python whose library was read."""
        build = " ".join(platform.python_build())
        return {"python": f"{platform.python_implementation()} {platform.python_version()} ({build})"}

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """The modules, sorted by their paths.

        Raises:
            InputError: `paths` are given.
        """
        if self.fields.paths:
            raise InputError(f"source `{self.name}` reads this Python's own library; remove `paths`")
        return modules_below(Path(library()), skipped)

    def documents(self, file: SourceFile) -> Iterator[bytes | str]:
        """The module, as bytes or text."""
        if self.keeps_bytes:
            yield b"".join(stored_blocks(file))
        else:
            content = b"".join(text_blocks(file, self.name))
            yield decoded(content, self.fields.encoding, self.fields.errors, file)


def library() -> str:
    """Where this Python's library is."""
    return sysconfig.get_path("stdlib")


def modules_below(root: Path, skipped: Skipped) -> list[SourceFile]:
    """The ``*.py`` files below a library, each once, sorted by their paths.

    Args:
        root: the library.
        skipped: where links that lead nowhere, or to a module that is listed, are counted.
    """
    from tokenbound.corpus import listing  # pyarrow, which a config does without

    found: dict[str, Path] = {}
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in EXCLUDED]
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        for path in paths:
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path
            elif path.is_symlink():
                skipped.add(listing.BROKEN, path.name)
    files: dict[str, SourceFile] = {}
    for name in sorted(found):
        # Debian links some modules under two names; the second is the same file, not another document.
        target = str(found[name].resolve())
        if target in files:
            skipped.add(listing.LINKED, name)
        else:
            files[target] = SourceFile(name, str(found[name]), found[name].stat().st_size)
    return list(files.values())
