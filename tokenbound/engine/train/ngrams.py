"""Counting n-grams over a prepared corpus as Ray tasks, and the artifact whose bound is best."""

from __future__ import annotations

import logging
from functools import partial

import torch

from tokenbound.compression.artifact import assemble_artifact
from tokenbound.compression.codecs import NGRAMS
from tokenbound.compression.dtypes import dtype_code
from tokenbound.compression.ngram_codec import encode_ngrams
from tokenbound.compression.rate import choose_rate
from tokenbound.compression.tensor import CodedTensor
from tokenbound.config.compress import LosslessSettings
from tokenbound.config.family import FAMILY, MarkovFamily
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.compress.predicted_bound import CANDIDATE_TOKENS, ArtifactPlace, predicted_bound_bits
from tokenbound.engine.corpus import CorpusStream, Text
from tokenbound.errors import InputError
from tokenbound.models.structured.ngram_lm import NUMBERS
from tokenbound.store import filesystem as files
from tokenbound.store.run import sha256_hex
from tokenbound.training.ngram_fit import (
    Counts,
    Fitted,
    build_grams,
    check_order,
    count_ngrams,
    fit_tree,
    merge_counts,
    tree_numbers,
)

logger = logging.getLogger(__name__)

TOKENS_PER_TASK = 1 << 23
"""Tokens that one task counts."""
RATES = (0.5, 50.0)
"""Pruning rates between which the best is sought: bits of loss on the corpus for a bit of code."""
TRIES = 8


def count_corpus(corpus: PreparedCorpus, order: int, vocab_size: int) -> Counts:
    """All n-grams of order + 1 tokens of a corpus; the first `order` tokens are only context."""
    total = len(CorpusStream(corpus))
    ranges = [
        (max(0, start - order), min(total, start + TOKENS_PER_TASK)) for start in range(0, total, TOKENS_PER_TASK)
    ]
    with plain_errors():
        return merge_counts(list(executor().map(partial(_count_range, corpus.root, order, vocab_size), ranges)))


def _count_range(root: str, order: int, vocab_size: int, bounds: tuple[int, int]) -> Counts:
    return count_ngrams(CorpusStream(PreparedCorpus(root)).read(*bounds), order, vocab_size)


def fit_markov(
    corpus: PreparedCorpus,
    family: MarkovFamily,
    vocab_size: int,
    text: Text,
    *,
    place: str,
    tokenizer: bytes | None = None,
) -> tuple[bytes, Fitted]:
    """Count, prune at the rate whose bound is best, and encode.

    Args:
        corpus: all of it is counted.
        family: how long contexts are.
        vocab_size: V.
        text: tokens on which the bound of each rate is predicted.
        place: where the artifact of each rate lies while it is scored; it is removed afterwards.
        tokenizer: bytes to be counted with the model, or None.

    Returns:
        The artifact and what it holds.

    Raises:
        InputError: n-grams so long do not fit into 63 bits, or the corpus is no longer than one.
    """
    check_order(vocab_size, family.order)
    if corpus.manifest.tokens <= family.order:
        raise InputError(f"the corpus has {corpus.manifest.tokens} tokens, fewer than family.order + 1")
    grams = build_grams(count_corpus(corpus, family.order, vocab_size), family.order, vocab_size)
    windows, made = text.windows(CANDIDATE_TOKENS), dict[float, tuple[bytes, Fitted]]()

    def bound_at(rate: float) -> float:
        fitted = fit_tree(grams, vocab_size, rate)
        data = encode_markov(fitted, family, tokenizer)
        made[rate] = data, fitted
        files.write_bytes(*files.resolve(place), data)
        value = predicted_bound_bits(ArtifactPlace(place, sha256_hex(data)), len(data), text, windows)
        logger.info("pruning rate %.3g: %d bytes, predicted bound %.4f bits/token", rate, len(data), value)
        return value

    best = made[choose_rate(bound_at, *RATES, max_tries=TRIES if family.order else 2).rate]
    files.delete(*files.resolve(place))
    return best


def encode_markov(fitted: Fitted, family: MarkovFamily, tokenizer: bytes | None = None) -> bytes:
    """A fitted tree as an artifact; the family stands in its architecture."""
    architecture = {
        "model_type": "markov",
        "vocab_size": fitted.tree.vocab_size,
        FAMILY: family.model_dump(mode="json"),
    }
    numbers = tree_numbers(fitted)
    coded = CodedTensor(NUMBERS, numbers.shape, dtype_code(torch.int32, NUMBERS), NGRAMS, encode_ngrams(numbers))
    return assemble_artifact(architecture, [coded], LosslessSettings(), tokenizer=tokenizer)
