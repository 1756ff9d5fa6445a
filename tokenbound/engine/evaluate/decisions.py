"""What the ids of a corpus say of its decisions, before anything is scored."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.decisions import TreeChoice, code_lengths
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.summary import CorpusDecisions
from tokenbound.corpus.windows import gather
from tokenbound.engine.evaluate.stages import WindowSpec, open_plan

TOKENS_AT_ONCE = 1 << 20
"""Ids that are held at a time."""


def counted_lengths(corpus: PreparedCorpus, vocab_size: int) -> bytes:
    """Code lengths of ids by how often each occurs in the first segment of a corpus; counted once in each process.

    Args:
        corpus: the ids, all below V.
        vocab_size: V.
    """
    return _counted_lengths(corpus.root, corpus.manifest.segments[0].sha256, vocab_size)


@lru_cache(maxsize=4)
def _counted_lengths(corpus_root: str, segment_sha256: str, vocab_size: int) -> bytes:
    return code_lengths(_first_counts(PreparedCorpus(corpus_root), vocab_size))


def _first_counts(corpus: PreparedCorpus, vocab_size: int) -> NDArray[np.int64]:
    counts, size = np.zeros(vocab_size, np.int64), corpus.manifest.segments[0].tokens
    for start in range(0, size, TOKENS_AT_ONCE):
        ids = corpus.read_ids(0, start, min(start + TOKENS_AT_ONCE, size))
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


@lru_cache(maxsize=4)
def corpus_decisions(corpus_root: str, spec: WindowSpec, tree: TreeChoice, vocab_size: int) -> CorpusDecisions:
    """Count the decisions of every window of a corpus.

    Args:
        corpus_root: where the ids are.
        spec: how windows are cut.
        tree: along which decisions are scored.
        vocab_size: V.
    """
    corpus, plan = open_plan(corpus_root, spec)
    depth, total, most = tree.over(vocab_size).depth, 0, 0
    step = max(1, TOKENS_AT_ONCE // spec.length)
    for start in range(0, plan.num_windows, step):
        windows = np.arange(start, min(start + step, plan.num_windows))
        batch = gather(corpus, plan.windows(windows), spec.length)
        decisions = np.where(batch.mask, depth[np.where(batch.mask, batch.targets, 0)], 0)
        by_window = decisions.sum(axis=1)
        total, most = total + int(by_window.sum()), max(most, int(by_window.max()))
    return CorpusDecisions(total, most)
