"""Range coding with adaptive models, bit-identical on every machine.

The range coder is `constriction`'s; the models are ours. A model is a vector of integer frequencies that sum
to exactly 2^24. `constriction` takes probabilities as float64, gives each symbol one unit of its 24-bit
weight and shares the remaining 2^24 - A in proportion (`perfect=False`). We pass integers that already sum to
2^24 - A: its normalisation is then a division of equal numbers (exactly 1.0), its running sums are integers
below 2^24 (exact in float32 too, whatever the order), and the model it builds is the one we wrote down.
Nothing here uses exp, log, or a float sum that could round, so an artifact made anywhere decodes anywhere;
the tests hold `constriction` to an integer range coder written out in Python.

Writing and reading share one protocol, `Pass`, so that what is built on it is written once for both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.container import ArtifactError

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Contexts = NDArray[np.uint8]

PRECISION_BITS = 24
"""Width of `constriction`'s default probabilities."""
TOTAL = 1 << PRECISION_BITS

COUNT_UNIT = 256
"""What one observation adds to a count; the prior is expressed in the same unit."""
RENEWAL = 16
"""Models are renewed when what they have not seen is one part in this many of what they have."""
COUNT_LIMIT = 1 << 29
"""Counts of a context are halved when their sum passes this."""
PIECE = 1 << 16
"""Tokens that are handled at once where no more need be: a limit to memory that changes no code."""


class Pass(Protocol):
    """One run through a message: writing known tokens or reading unknown ones."""

    def code(self, tokens: Tokens | None, contexts: Contexts | None, count: int = 0) -> Tokens:
        """Code one vector and return its tokens.

        Args:
            tokens: What to write; None when reading.
            contexts: Context of each token, or None for context 0 throughout.
            count: How many tokens to read where `contexts` is None.
        """
        ...


def constriction_streams() -> ModuleType:
    """The library's stream coders; imported late, because `inspect` and configs never need them."""
    import constriction  # heavy, and untyped

    stream: ModuleType = constriction.stream
    return stream


def frequencies(counts: Ints) -> Ints:
    """Integer frequencies less one, each row summing to 2^24 - A: what `constriction` is given.

    Args:
        counts: Positive counts [contexts, A].
    """
    free = TOTAL - counts.shape[1]
    shares: Ints = counts * free // counts.sum(axis=1, keepdims=True)
    rows = np.arange(len(counts))
    shares[rows, counts.argmax(axis=1)] += free - shares.sum(axis=1)
    return shares


class AdaptiveModels:
    """Counts of every context, and the `constriction` model made from each when it was last worth it.

    What was coded is counted when it amounts to a sixteenth of all that was coded before: often at first, then
    ever more rarely, which costs next to no rate and almost all of the time that counting would take.
    """

    def __init__(self, prior: Ints) -> None:
        self._counts = prior.copy()
        self._alphabet = prior.shape[1]
        self._categorical = constriction_streams().model.Categorical
        self._waiting: list[NDArray[Any]] = []
        self._waiting_count = 0
        self._fresh = np.zeros(prior.size, np.int64)
        self._fresh_count = 0
        self._seen = 0
        self.models: list[Any] = [None] * len(prior)
        self._rebuild(range(len(prior)))

    def _rebuild(self, which: Iterable[int]) -> None:
        rows = list(which)
        for context, row in zip(rows, frequencies(self._counts[rows]).astype(np.float64), strict=True):
            self.models[context] = self._categorical(row, perfect=False)

    def observe(self, tokens: Tokens, contexts: Contexts | None) -> None:
        """Take note of a coded vector, and renew the models where that is due."""
        for part in _pieces(len(tokens)):
            keys = tokens[part] if contexts is None else contexts[part] * np.int32(self._alphabet) + tokens[part]
            self._waiting.append(keys)
            self._waiting_count += len(keys)
            if self._waiting_count >= PIECE:
                self._tally()
        if (self._fresh_count + self._waiting_count) * RENEWAL >= self._seen:
            self._tally()
            self._renew()

    def _tally(self) -> None:
        """Count what waits; together, because counting a short vector costs as much as counting a long one."""
        if self._waiting:
            self._fresh += np.bincount(np.concatenate(self._waiting), minlength=self._fresh.size)
        self._fresh_count += self._waiting_count
        self._waiting, self._waiting_count = [], 0

    def _renew(self) -> None:
        fresh = self._fresh.reshape(self._counts.shape)
        self._counts += fresh * COUNT_UNIT
        full = self._counts.sum(axis=1) > COUNT_LIMIT
        self._counts[full] = (self._counts[full] + 1) >> 1
        self._rebuild(np.flatnonzero(fresh.any(axis=1)).tolist())
        self._seen += self._fresh_count
        self._fresh[:], self._fresh_count = 0, 0


def _pieces(count: int) -> list[slice]:
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]


def _runs(contexts: Contexts | None, count: int) -> Iterator[tuple[int, slice | NDArray[np.intp]]]:
    """The order in which a vector is coded: context after context, and where the tokens of each stand."""
    if contexts is None or len(contexts) == 0 or bool((contexts == contexts[0]).all()):
        context = 0 if contexts is None or not len(contexts) else int(contexts[0])
        yield from ((context, part) for part in _pieces(count))
        return
    order = np.argsort(contexts, kind="stable")
    ends = np.cumsum(np.bincount(contexts)).tolist()
    starts = [0, *ends[:-1]]
    yield from ((k, order[a:b]) for k, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b)


class WritingPass:
    """Encodes; `finish` gives the bytes."""

    def __init__(self, prior: Ints) -> None:
        self._models = AdaptiveModels(prior)
        self._encoder = constriction_streams().queue.RangeEncoder()

    def code(self, tokens: Tokens | None, contexts: Contexts | None, count: int = 0) -> Tokens:
        """Write one vector of tokens."""
        assert tokens is not None
        for context, places in _runs(contexts, len(tokens)):
            self._encoder.encode(np.ascontiguousarray(tokens[places], np.int32), self._models.models[context])
        self._models.observe(tokens, contexts)
        return tokens

    def finish(self) -> bytes:
        """The coded words, little-endian, without the zero bytes that the reader puts back."""
        words: NDArray[np.uint32] = self._encoder.get_compressed()
        return words.astype("<u4", copy=False).tobytes().rstrip(b"\0")


class ReadingPass:
    """Decodes the bytes of a `WritingPass` made with the same prior."""

    def __init__(self, prior: Ints, data: bytes | memoryview) -> None:
        self._models = AdaptiveModels(prior)
        words = bytes(data) + b"\0" * (-len(data) % 4)
        self._decoder = constriction_streams().queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def code(self, tokens: Tokens | None, contexts: Contexts | None, count: int = 0) -> Tokens:
        """Read one vector: as many tokens as there are contexts, or `count` in context 0."""
        try:
            out = self._read(contexts, count)
        except (AssertionError, ValueError) as error:  # what constriction raises on impossible data
            raise ArtifactError("artifact: a coded stream is not one that the encoder writes") from error
        self._models.observe(out, contexts)
        return out

    def _read(self, contexts: Contexts | None, count: int) -> Tokens:
        out = np.empty(count if contexts is None else len(contexts), np.int32)
        for context, places in _runs(contexts, len(out)):
            size = places.stop - places.start if isinstance(places, slice) else len(places)
            out[places] = self._decoder.decode(self._models.models[context], size)
        return out
