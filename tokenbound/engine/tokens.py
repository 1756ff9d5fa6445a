"""Preparing a corpus once, as Ray tasks, where every run beside it finds it again."""

from __future__ import annotations

from pathlib import Path

from tokenbound.config import CorpusConfig
from tokenbound.corpus.prepare import cache_name, prepare_corpus
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.engine.cluster import plain_errors
from tokenbound.engine.parallel import ray_map
from tokenbound.store import filesystem as files


def open_corpus(config: CorpusConfig, *, output: str, cache: str | None) -> PreparedCorpus:
    """Tokenise what is new and open the prepared form; runs inside a Ray session.

    Args:
        config: the corpus.
        output: the run directory.
        cache: where prepared corpora are kept; None means `prepared/` beside the run directory.

    Raises:
        InputError: a source or the tokenizer cannot be used.
        MismatchError: a file changed under its name.
    """
    with plain_errors():
        return prepare_corpus(config, _root(config, output, cache), run=ray_map)


def _root(config: CorpusConfig, output: str, cache: str | None) -> str:
    place = cache or f"{output.rstrip('/')}/../prepared"
    name = cache_name(config)
    if not files.is_uri(place):
        return str(Path(place).resolve() / name)
    return f"{cache or output.rstrip('/').rpartition('/')[0] + '/prepared'}/{name}"
