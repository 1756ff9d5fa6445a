"""The register of draws: in what order configurations were tried on a corpus, and what that order costs each.

It lies beside the prepared corpora, one folder for each corpus by the digest of its tokens, one small file for each
configuration. A configuration is entered before its first window is scored and keeps its ordinal for ever, so that
repeating it is free and a better-looking redraw is not. The k-th pays L_E(k) bits in every line, and its sample spends
delta_s * 2^-L_E(k).

Why that is enough. Write k for an ordinal and j for the draw of a growing corpus (`evaluation`).

* Of one corpus each ordinal has one holder, so all of its certificates together fail with probability at most
  sum_k delta * 2^-L_E(k) <= delta, because Elias-delta lengths are those of a prefix code (Kraft).
* Of a corpus that grows, an ordinal is held once among all its prefixes, with one exception: draws that spend
  delta_s / (j(j+1)) each. These may take an ordinal again that the same *group* held in an earlier draw. A group is
  what the bound on the full corpus is about (the claim under the prior `code`, which holds for all models and lengths
  at once; claim and model for a holdout), so its share is spent once; and the draws spend at most
  sum_j delta_s * 2^-L_E(k) / (j(j+1)) <= delta_s * 2^-L_E(k), because j is never given twice to different prefixes.
* With every token scored a claim holds for all prefixes at once: its entry on an earlier one serves the longer.

Two configurations never hold one ordinal, though stores have no locks. A writer puts a *bid* of its own under the
ordinal, then lists, and enters its configuration only if no other one is there; otherwise it takes its bid back and
bids again, higher. Each writes before it lists, so of two that bid for one ordinal the one that lists last sees the
other's bid: at most one is entered. The bid of whoever is entered stays, so no listing can miss both it and the entry.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.uri import join

FOLDER = "draws"
_KEY, _GROUP, _CORPUS = 32, 16, 32
"""Hexadecimal digits of the digests in names."""
_NAME = re.compile(rf"(\d{{6,}})-([0-9a-f]{{{_KEY}}})-([0-9a-f]{{{_GROUP}}})-(\d+)(?:\.json|-[0-9a-f]{{8}}(\.bid))")
_ATTEMPTS = 1000

Ordinal = Literal["auto"] | int


@dataclass(frozen=True)
class Configuration:
    """What is tried on a corpus."""

    keys: tuple[str, ...]
    """Digests that name it; all but the last are those it had while the corpus was shorter."""
    group: str
    """Digest of what its bound on the full corpus is about."""
    evaluation: int | None = None
    """Ordinal of the draw in a growing corpus."""
    words: dict[str, Any] = field(default_factory=dict)
    """What the entry says to people; never read back."""

    @property
    def key(self) -> str:
        """Its present name."""
        return self.keys[-1][:_KEY]


@dataclass(frozen=True)
class Entry:
    """One file of the register."""

    corpus: str
    """Beginning of the digest of the corpus's tokens."""
    ordinal: int
    key: str
    group: str
    evaluation: int | None
    settled: bool
    """False: a bid that is not entered, yet or ever."""


@dataclass(frozen=True)
class Selection:
    """The place of a configuration among those tried."""

    ordinal: int
    counted_by: Literal["register", "config"]
    """`config`: a number that the config gave, not below what the register asks for."""
    shipped: int
    """Ordinals that the package itself had used on this corpus before."""


@cache
def shipped_draws() -> dict[str, int]:
    """How many configurations this package's authors tried on samples of a corpus, by the digest of its tokens."""
    tree = json.loads(resources.files("tokenbound").joinpath("data/draws.json").read_text(encoding="utf-8"))
    return {str(digest): int(number) for digest, number in tree["draws"].items()}


def held_ordinals(entries: Sequence[Entry], wanted: Configuration) -> list[int]:
    """The ordinals under which a configuration is entered, ascending."""
    keys = {key[:_KEY] for key in wanted.keys}
    return sorted({entry.ordinal for entry in entries if entry.settled and entry.key in keys})


def next_ordinal(
    entries: Sequence[Entry], wanted: Configuration, corpus: str, *, floor: int = 0, lost: Collection[int] = ()
) -> int:
    """The ordinal that a new configuration takes.

    Args:
        entries: of this corpus and all that it was before it grew.
        wanted: the new configuration.
        corpus: name of this corpus in the register.
        floor: ordinals that are not in the register and were used.
        lost: ordinals that others were found to bid for as well.

    >>> held = [Entry("c", 1, "a", "g", None, True), Entry("c", 4, "b", "g", None, True)]
    >>> new = Configuration(("new",), "g")
    >>> next_ordinal(held, new, "c"), next_ordinal([], new, "c", floor=13)
    (5, 14)
    """
    under_way = {entry.ordinal for entry in entries if (entry.corpus, entry.key) == (corpus, wanted.key)}
    free = (under_way or _paid_before(entries, wanted, corpus)).difference(lost)
    return min(free) if free else 1 + max([floor, *lost, *(entry.ordinal for entry in entries)])


def _paid_before(entries: Sequence[Entry], wanted: Configuration, corpus: str) -> set[int]:
    """Ordinals that earlier draws of the same group hold, and nothing of the corpus as it is."""
    here = {entry.ordinal for entry in entries if entry.corpus == corpus}
    return {entry.ordinal for entry in entries if entry.settled and _same_events(entry, wanted, corpus)} - here


def next_evaluation(entries: Sequence[Entry], corpus: str) -> int:
    """The ordinal of a draw from this corpus: that of its earlier draws at this length, else behind all before.

    >>> held = [Entry("short", 1, "a", "g", 1, True), Entry("longer", 1, "b", "g", 2, True)]
    >>> next_evaluation(held, "longer"), next_evaluation(held, "longest")
    (2, 3)
    """
    drawn = [(entry.corpus, entry.evaluation) for entry in entries if entry.evaluation is not None]
    here = [evaluation for name, evaluation in drawn if name == corpus]
    return min(here) if here else 1 + max([0, *(evaluation for _, evaluation in drawn)])


def _same_events(entry: Entry, wanted: Configuration, corpus: str) -> bool:
    """Whether an entry is of an earlier draw whose bound on the full corpus is that of the wanted one."""
    draws = entry.evaluation is not None and wanted.evaluation is not None
    return draws and entry.corpus != corpus and entry.group == wanted.group[:_GROUP]


def _rivals(entries: Sequence[Entry], ordinal: int, wanted: Configuration, corpus: str) -> list[str]:
    """Keys of others that hold, or bid for, an ordinal."""
    keys = {key[:_KEY] for key in wanted.keys}
    others = (entry for entry in entries if entry.ordinal == ordinal and entry.key not in keys)
    return sorted({entry.key for entry in others if not _same_events(entry, wanted, corpus)})


class Register:
    """The register of one corpus, on any pyarrow filesystem.

    Args:
        cache: where prepared corpora are kept.
        corpora: digests of the tokens of this corpus, behind those it had before it grew.
    """

    def __init__(self, cache: str, corpora: Sequence[str]) -> None:
        shipped = shipped_draws()
        self.shipped = max(shipped.get(digest, 0) for digest in corpora)
        self.corpora = tuple(digest[:_CORPUS] for digest in corpora)
        self.root = join(cache, FOLDER)
        self.uri = join(self.root, self.corpus)

    @property
    def corpus(self) -> str:
        """Name of the corpus as it is."""
        return self.corpora[-1]

    def entries(self) -> list[Entry]:
        """Every file of this corpus and its earlier lengths.

        Raises:
            MismatchError: a file is not of the register.
        """
        grown = len(self.corpora) > 1
        filesystem, folder = files.resolve(self.root if grown else self.uri)
        paths = [path.split("/")[-2:] for path in files.list_paths(filesystem, folder, recursive=grown)]
        return [self._entry(corpus, name) for corpus, name in paths if corpus in self.corpora]

    def _entry(self, corpus: str, name: str) -> Entry:
        found = _NAME.fullmatch(name)
        if found is None:
            raise MismatchError(f"{join(self.root, corpus, name)} is not an entry of the register of draws; remove it")
        ordinal, key, group, evaluation, bid = found.groups()
        return Entry(corpus, int(ordinal), key, group, int(evaluation) or None, bid is None)

    def look_up(self, wanted: Configuration, asked: Ordinal = "auto") -> Selection | None:
        """The place of a configuration that is entered; None for a new one. Writes nothing."""
        held = held_ordinals(self.entries(), wanted)
        if not held or (asked != "auto" and asked not in held):
            return None
        return self._selection(held[0] if asked == "auto" else asked, asked)

    def check(self, wanted: Configuration, asked: Ordinal = "auto") -> int:
        """The ordinal that a configuration has or would get; writes nothing.

        Raises:
            InputError: an ordinal of a claim or of a draw below what the register asks for.
        """
        return self._choose(self.entries(), wanted, asked)

    def evaluation(self) -> int:
        """The ordinal of a draw from this corpus, where it grows."""
        return next_evaluation(self.entries(), self.corpus)

    def assign(self, wanted: Configuration, asked: Ordinal = "auto") -> Selection:
        """Enter a configuration, or find it.

        Args:
            wanted: the configuration.
            asked: `auto`, or the ordinal that the config gives.

        Raises:
            InputError: as for :meth:`check`, or the register cannot be written.
            IncompleteError: other writers were always there first.
        """
        known, rank, lost = self.entries(), 0, set[int]()
        for _ in range(_ATTEMPTS):
            ordinal = self._choose(known, wanted, asked, lost)
            if ordinal in held_ordinals(known, wanted):
                return self._selection(ordinal, asked)
            ordinal += rank
            bid = f"-{uuid.uuid4().hex[:8]}.bid"
            self._write(ordinal, wanted, bid)
            known = self.entries()
            rivals = _rivals(known, ordinal, wanted, self.corpus)
            if not rivals:
                self._write(ordinal, wanted, ".json")
                return self._selection(ordinal, asked)
            files.delete(*files.resolve(self._place(ordinal, wanted, bid)))
            lost.add(ordinal)  # those who met here go on to different ordinals
            rank = sorted([*rivals, wanted.key]).index(wanted.key) if asked == "auto" else 0
        raise IncompleteError(f"{self.uri}: others were always there first; run the same command again")

    def _choose(self, known: Sequence[Entry], wanted: Configuration, asked: Ordinal, lost: Collection[int] = ()) -> int:
        self._check_evaluation(known, wanted)
        held = held_ordinals(known, wanted)
        if asked == "auto":
            return held[0] if held else next_ordinal(known, wanted, self.corpus, floor=self.shipped, lost=lost)
        needed = 1 + max([self.shipped, *(entry.ordinal for entry in known if entry.key != wanted.key)])
        if asked < needed and asked not in {*held, *_paid_before(known, wanted, self.corpus)}:
            cure = f"auto, {held[0]}" if held else "auto"
            raise InputError(
                f"what.bound.trial: {asked} is below {needed}, the number of this configuration in the register of "
                f"draws {self.uri}; set it to {cure}, or at least {needed}"
            )
        return asked

    def _check_evaluation(self, known: Sequence[Entry], wanted: Configuration) -> None:
        """Refuse an ordinal of a draw that an earlier length of the corpus has used.

        Raises:
            InputError: it is used.
        """
        asked = wanted.evaluation
        used = max([0, *(entry.evaluation or 0 for entry in known if entry.corpus != self.corpus)])
        if asked is not None and asked <= used and not held_ordinals(known, wanted):
            raise InputError(
                f"what.sample.evaluation: {asked} is below {used + 1}, the number of this draw in the register of "
                f"draws {self.root}; set it to at least {used + 1}"
            )

    def _selection(self, ordinal: int, asked: Ordinal) -> Selection:
        return Selection(ordinal, "register" if asked == "auto" else "config", self.shipped)

    def _place(self, ordinal: int, wanted: Configuration, ending: str) -> str:
        evaluation = wanted.evaluation or 0
        return join(self.uri, f"{ordinal:06d}-{wanted.key}-{wanted.group[:_GROUP]}-{evaluation}{ending}")

    def _write(self, ordinal: int, wanted: Configuration, ending: str) -> None:
        tree = {"ordinal": ordinal, **wanted.words}
        filesystem, path = files.resolve(self._place(ordinal, wanted, ending))
        try:
            files.write_bytes(filesystem, path, json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(
                f"how.cache: the register of draws {self.uri} cannot be written ({error.strerror}); choose a cache "
                "that you may write to, so that what is tried is counted"
            ) from None
