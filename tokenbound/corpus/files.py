"""Files of a corpus: what is known of each before and after it is read.

A corpus is an ordered list of `SourceFile`s. A file's *name* is its path below what the config names (a file's
own name, a path below the directory, a path below the fixed part of a glob), so that a corpus keeps its identity
when it moves to another machine, and a new file never changes the name of an old one. Names need not be UTF-8.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

EXAMPLES = 3
"""Names that a log line gives for each rule."""


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, or one range of rows of a dataset."""

    name: str
    """Unique in the corpus and independent of where the corpus lies."""
    path: str
    """Where it is read from: a local path, a URI, or the dataset's name."""
    bytes: int
    """Stored size; for dataset rows, the UTF-8 bytes of their texts (0 until digested)."""
    sha256: str = ""
    """Hex digest of the stored bytes; for dataset rows, of their length-prefixed texts. Empty until digested."""
    splittable: bool = False
    """Whether parts of the file can be read without the rest (uncompressed JSON lines)."""
    span: tuple[int, int] | None = None
    """Byte range to read; a line belongs to the span in which it starts. Null: the whole file."""


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, and how many were left out by which rule."""

    files: list[SourceFile]
    skipped: dict[str, int] = field(default_factory=dict)
    """Files and directories left out, by the name of the rule: see `tokenbound.corpus.listing`."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first names of each rule."""


@dataclass
class Skipped:
    """What was left out, by the name of the rule."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    patterns: set[str] = field(default_factory=set)
    """Patterns of `corpus.exclude` that left something out."""

    def add(self, rule: str, name: str) -> None:
        """Count one file or directory."""
        self.counts[rule] += 1
        if len(self.examples[rule]) < EXAMPLES:
            self.examples[rule].append(name)
