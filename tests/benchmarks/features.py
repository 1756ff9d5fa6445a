"""Tokens per second and core of the features of windows, which control variates need: counting, and code lengths.

    OMP_NUM_THREADS=1 python tests/benchmarks/features.py [--tokens 20000000] [--corpus PREPARED]

Of random ids with Zipf frequencies, bytes and a vocabulary of 50,257, or of a prepared corpus. Random ids repeat no
n-grams as text does, so nearly every look-up misses the cache: text is faster. Speeds are of processor time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, token_file

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.ngram_features import FeatureRule, compute_features
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.prepared import PreparedCorpus


@dataclass
class Clock:
    """Maps one item after the other and keeps the processor time of each pass."""

    seconds: list[float]

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> list[Any]:
        started = time.process_time()
        found = [function(item) for item in items]
        self.seconds.append(time.process_time() - started)
        return found


def row(name: str, corpus: PreparedCorpus) -> str:
    """One corpus: millions of tokens per second of both passes, and of the whole."""
    rule = FeatureRule.of(corpus.manifest, length=512, context="packed", stride=None)
    clock = Clock([])
    compute_features(corpus.root, rule, clock)
    counting, lengths = clock.seconds
    speeds = [corpus.manifest.tokens / 1e6 / seconds for seconds in (counting, lengths, counting + lengths)]
    orders = f"1-{rule.orders[-1]}"
    return f"| {name} | {corpus.manifest.tokens:,} | {orders} | {' | '.join(f'{speed:.1f}' for speed in speeds)} |"


def random_corpus(folder: Path, tokens: int, vocab_size: int) -> PreparedCorpus:
    """Zipf ids, prepared."""
    path = token_file(folder / f"{vocab_size}.bin", tokens, vocab_size)
    rule = {"tokenizer_is": "given", "add_bos": False, "add_eos": False, "dtype": "uint16", "vocab_size": vocab_size}
    config = CorpusConfig(source="tokens", paths=(str(path),), **rule)
    return prepare_corpus(config, str(folder / f"prepared-{vocab_size}"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--corpus", help="a prepared corpus, beside the random ones")
    asked = parser.parse_args()
    print(f"{machine()}\n\n| corpus | tokens | orders | counting M/s | lengths M/s | together M/s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for vocab_size in (257, 50_257):
            print(row(f"random, V = {vocab_size:,}", random_corpus(Path(folder), asked.tokens, vocab_size)))
    if asked.corpus:
        print(row(Path(asked.corpus).name[:8], PreparedCorpus(asked.corpus)))


if __name__ == "__main__":
    main()
