"""Preparing a corpus once, as Ray tasks, where every run beside it finds it again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenbound.config.run import CorpusConfig, WindowsConfig
from tokenbound.corpus.documents import find_files
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.prepared import CorpusRule, PreparedCorpus
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.progress import told
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.evaluate.stages import WindowSpec, open_plan
from tokenbound.store import filesystem as files
from tokenbound.store.uri import is_uri, join, split

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class CorpusStream:
    """All segments of a prepared corpus as one flat stream of ids."""

    def __init__(self, corpus: PreparedCorpus) -> None:
        self.corpus = corpus
        self.starts = np.cumsum([0, *(segment.tokens for segment in corpus.manifest.segments)])

    def __len__(self) -> int:
        """Number of ids."""
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Ids at positions [start, stop), across segments."""
        return np.concatenate([self.corpus.read_ids(*cut) for cut in self._cuts(start, stop)])

    def targets(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Which ids at positions [start, stop) are learned; None where all are."""
        parts = [self.corpus.targets_between(*cut) for cut in self._cuts(start, stop)]
        wanted = [part for part in parts if part is not None]
        return np.concatenate(wanted) if wanted else None

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(segment, first, end) of the pieces of a range."""
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        for segment in range(first, last + 1):
            low, high = int(self.starts[segment]), int(self.starts[segment + 1])
            yield segment, max(start, low) - low, min(stop, high) - low


def check_corpus(config: CorpusConfig) -> CorpusRule:
    """What decides the ids of a corpus whose files are there; reads none of them and needs no Ray.

    Raises:
        InputError: a source or the tokenizer cannot be used.
    """
    find_files(config)
    return corpus_rule(config)


def open_corpus(config: CorpusConfig, *, output: str, cache: str | None) -> PreparedCorpus:
    """Tokenise what is new and open the prepared form; runs inside a Ray session.

    Args:
        config: the corpus.
        output: the run directory.
        cache: where prepared corpora are kept; None means `prepared/` beside the run directory.

    Raises:
        InputError: a source or the tokenizer cannot be used, or there is something to prepare and no place to write it.
        MismatchError: a file changed under its name.
    """
    root = corpus_root(config, output, cache)
    files.remove_abandoned(root)
    with plain_errors():
        return prepare_corpus(config, root, run=_told_map)


def _told_map(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Like the executor's; says from time to time how far it is."""
    listed = list(items)
    return told(executor().map(function, listed), "reading the corpus", len(listed))


def corpus_root(config: CorpusConfig, output: str, cache: str | None) -> str:
    """Where the prepared form of a corpus lies.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    return join(cache_place(output, cache), cache_name(config))


def cache_place(output: str, cache: str | None) -> str:
    """Where prepared corpora are kept: as asked, or beside the output."""
    if not is_uri(cache or output):
        return str(Path(cache or f"{output.rstrip('/')}/../prepared").resolve())
    return cache or join(split(output)[0], "prepared")


SEED = 0
"""Of the choice of calibration windows; package constant, so it costs nothing."""


@dataclass(frozen=True)
class Text:
    """The tokens that a compressor may look at."""

    corpus_root: str
    spec: WindowSpec

    @property
    def num_tokens(self) -> int:
        """Scored tokens of the corpus."""
        return open_plan(self.corpus_root, self.spec)[1].num_tokens

    def windows(self, tokens: int, *, skip: int = 0) -> list[int]:
        """Random window ids that hold about so many tokens, after the first `skip` of the same order."""
        total = open_plan(self.corpus_root, self.spec)[1].num_windows
        order = np.random.default_rng(SEED).permutation(total)
        count = max(1, math.ceil(tokens / self.spec.length))
        skip = min(skip, max(0, total - count))
        return [int(window) for window in order[skip : skip + count]]


def text_of(corpus: PreparedCorpus, windows: WindowsConfig) -> Text:
    """The tokens of a prepared corpus, cut as it will be scored."""
    segments = len(corpus.manifest.segments)
    return Text(corpus.root, WindowSpec(windows.length, windows.context, windows.stride, segments))
