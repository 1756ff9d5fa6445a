"""What a replica must pass before it scores anything: the causality probe and the canary.

The bounds need that the logits which predict token i are a function of the tokens before i alone, to the last bit
and at the planned batch shape. Attention in both directions breaks that, and so does arithmetic that looks across a
tensor: outlier columns found at run time, one activation scale per tensor, expert capacity shared by a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from tokenbound.errors import InputError
from tokenbound.models.chunks import TokenStatistics
from tokenbound.models.quantized.deployed import is_quantized
from tokenbound.models.replica import Replica, WindowStatistics

CANARY_TEXT = (
    "Once upon a time there was a small town by the sea. Every morning the baker opened the shop before sunrise, and "
    'the smell of fresh bread went through the streets. One day a stranger came and asked, "How far is it to the '
    'next town?" The baker thought for a moment and said that it depends on how fast one walks.\n'
)
"""Fixed English text for the canary, to be tokenised by the caller."""

_SANE_MULTIPLE = 10.0
"""The canary's mean loss may be this many times ln V. Random ids cost a sharp model 2-3 times ln V; a model whose
weights were misread or overflow costs hundreds of times as much, or NaN."""

Ids = npt.NDArray[np.int64]
Scored = tuple[WindowStatistics, torch.Tensor | None]
"""What `Replica.score_and_hidden` gives of a batch."""
_Observation = list[npt.NDArray[Any]]


def check_replica(replica: Replica, inputs: npt.NDArray[Any] | None = None) -> None:
    """Require that a replica passes the canary and the causality probe.

    Where weights come and go with layers, they come once for both.

    Args:
        replica: what is to score.
        inputs: see `probe_causality`.

    Raises:
        InputError: it fails either.
        ReplicaOutOfMemory: the batch does not fit.
    """
    canary_ids, probe = probe_ids(replica), _Probe.of(replica, inputs)
    mask = _all_but_last(replica, canary_ids)
    first = _Batch(canary_ids, _next_ids(canary_ids), mask)
    scored = _score_each(replica, [first, *probe.batches])
    _mean_of_sane(replica, next(scored)[0], mask)
    probe.check(replica, scored)


@dataclass(frozen=True)
class _Batch:
    """Windows [B, L] to be scored together."""

    windows: Ids
    targets: Ids
    mask: npt.NDArray[np.bool_]


def _score_each(replica: Replica, batches: Sequence[_Batch]) -> Iterator[Scored]:
    """Score each batch when it is asked for; where weights come and go with layers, all at once."""
    if replica.chain is None:
        yield from (replica.score_and_hidden(batch.windows, batch.targets, batch.mask) for batch in batches)
        return
    columns = zip(*((batch.windows, batch.targets, batch.mask) for batch in batches), strict=True)
    statistics, hidden = replica.score_and_hidden(*(np.concatenate(column) for column in columns))
    for first in range(0, len(batches) * replica.batch, replica.batch):
        rows = slice(first, first + replica.batch)
        yield _windows_of(statistics, rows), None if hidden is None else hidden[rows]


def _windows_of(statistics: WindowStatistics, rows: slice) -> WindowStatistics:
    return TokenStatistics(
        nll=statistics.nll[rows],
        entropy=statistics.entropy[rows],
        rank=statistics.rank[rows],
        alpha=None if statistics.alpha is None else statistics.alpha[rows],
        cells=None if statistics.cells is None else statistics.cells[rows],
    )


def probe_ids(replica: Replica, *, seed: int = 0) -> Ids:
    """Fixed ids [B, L] below the model's vocabulary size; the same on every machine."""
    size = min(replica.vocab_size, replica.input_vocab_size)
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, size, size=(replica.batch, replica.length), dtype=np.int64)


def probe_causality(replica: Replica, inputs: npt.NDArray[Any] | None = None) -> None:
    """Require that no loss depends on later tokens, on other windows of its batch or on padding.

    Four forward passes at the planned shape: the windows as they are; other tokens from a position i of each row on
    (a different i in every row, and one row left as it is); the loudest token of the vocabulary from another i on,
    which moves statistics taken across a tensor; zeros from i on, which is what truncation looks like at a fixed
    shape. Hidden states and recorded statistics before i must be identical, bit by bit. Two more passes say what is
    wrong where they are not.

    Args:
        replica: what is to score.
        inputs: int [W, L] ids of some real windows, W <= B, or None for fixed random ids.

    Raises:
        InputError: a loss changed; the message says what it depends on.
        ReplicaOutOfMemory: the batch does not fit.
    """
    probe = _Probe.of(replica, inputs)
    probe.check(replica, _score_each(replica, probe.batches))


@dataclass(frozen=True)
class _Probe:
    """Windows, and what is put behind them in each trial."""

    windows: Ids
    loud: int
    kept: Ids
    """Cuts that leave one row as it is."""
    trials: Sequence[tuple[Ids | int, Ids]]
    """Content, and from where on in each row it stands."""

    @classmethod
    def of(cls, replica: Replica, inputs: npt.NDArray[Any] | None) -> _Probe:
        windows = _without(_batch_of(replica, inputs), loud := _loudest_id(replica))
        cuts, kept = _cuts(replica.batch, replica.length), _only_row(replica, replica.batch // 2)
        replaced = _replaced(replica, windows)
        return cls(windows, loud, kept, [(replaced, np.maximum(cuts, kept)), (loud, cuts[::-1]), (0, cuts)])

    @property
    def batches(self) -> list[_Batch]:
        """The windows as they are, and as each trial changes them."""
        changed = [_behind(self.windows, content, first) for content, first in self.trials]
        return [_whole(each, _next_ids(self.windows)) for each in (self.windows, *changed)]

    def check(self, replica: Replica, scored: Iterator[Scored]) -> None:
        """Refuse a model of which a trial changed what lies before the change."""
        baseline = _observation(*next(scored))
        for number, ((_, first), seen) in enumerate(zip(self.trials, scored, strict=True)):
            if _differ(replica, baseline, _observation(*seen), first):
                is_padding = number == len(self.trials) - 1
                _refuse(
                    "depends on the padding behind its window"
                    if is_padding
                    else _diagnosis(replica, self.windows, self.loud, self.kept)
                )


def _diagnosis(replica: Replica, windows: Ids, loud: int, kept: Ids) -> str:
    baseline = _observe(replica, windows, _next_ids(windows))
    if _differs(replica, baseline, windows, windows, np.full(replica.batch, replica.length)):
        return "changes when the same batch is scored again"
    if replica.batch > 1 and any(
        _differs(replica, baseline, windows, _behind(windows, content, kept), kept)
        for content in (loud, _replaced(replica, windows))
    ):
        return "depends on the other windows of its batch"
    return "depends on later tokens"


def _refuse(complaint: str) -> NoReturn:
    raise InputError(
        f"the model is not causal as it runs here: the loss of a token {complaint}, so no bound holds for it; use a "
        "causal language model, without activation scales or expert capacity shared across a batch"
    )


def _only_row(replica: Replica, row: int) -> Ids:
    """Cuts that keep one row whole and nothing of the others."""
    return np.where((np.arange(replica.batch) == row) & (replica.batch > 1), replica.length, 0)


def _batch_of(replica: Replica, inputs: npt.NDArray[Any] | None) -> Ids:
    windows = probe_ids(replica)
    if inputs is not None:
        windows[: len(inputs)] = np.asarray(inputs)[: replica.batch]
    return windows


def _next_ids(windows: Ids) -> Ids:
    return np.roll(windows, -1, axis=1)


def _cuts(batch: int, length: int) -> Ids:
    """First changed position of each row: spread over the window, so that early and late positions are watched."""
    last = max(1, length - 1)
    return 1 + (np.arange(1, batch + 1) * last) // (batch + 1) if batch > 1 else np.array([max(1, length // 2)])


def _behind(windows: Ids, content: Ids | int, cuts: Ids) -> Ids:
    """The windows with `content` from position `cuts[row]` on."""
    return np.where(np.arange(windows.shape[1]) < cuts[:, None], windows, content)


def _replaced(replica: Replica, windows: Ids) -> Ids:
    """A different id at every position."""
    size = min(replica.vocab_size, replica.input_vocab_size)
    shift = np.random.Generator(np.random.PCG64(1)).integers(1, max(2, size), size=windows.shape, dtype=np.int64)
    return np.asarray((windows + shift) % size)


def _loudest_id(replica: Replica) -> int:
    """The id with the largest embedding entry.

    Only the changed part of a batch holds it, so a scale or an outlier column that is found across the tensor must
    move; random ids of a small vocabulary would leave it in place.
    """
    size = min(replica.vocab_size, replica.input_vocab_size)
    embeddings = replica.model.get_input_embeddings()
    weight = embeddings.weight.dequantize() if is_quantized(embeddings) else embeddings.weight
    return int(weight[:size].abs().amax(1).float().argmax())


def _without(windows: Ids, unwanted: int) -> Ids:
    return np.where(windows == unwanted, unwanted - 1 if unwanted else min(1, int(windows.max())), windows)


def _observe(replica: Replica, windows: Ids, targets: Ids) -> _Observation:
    batch = _whole(windows, targets)
    return _observation(*replica.score_and_hidden(batch.windows, batch.targets, batch.mask))


def _whole(windows: Ids, targets: Ids) -> _Batch:
    """A batch of which every position is scored."""
    return _Batch(windows, targets, np.ones(windows.shape, dtype=bool))


def _observation(statistics: WindowStatistics, hidden: torch.Tensor | None) -> _Observation:
    seen = [statistics.nll, statistics.entropy, statistics.rank]
    seen += [each for each in (statistics.alpha, statistics.cells) if each is not None]
    return seen if hidden is None else [*seen, _bits(hidden)]


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor as bytes, last axis widened: NaN equals NaN, and bfloat16 is no obstacle."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy()


def _differs(replica: Replica, baseline: _Observation, windows: Ids, changed: Ids, cuts: Ids) -> bool:
    """Whether anything observed before `cuts[row]` is not bit-identical once the windows are changed behind it."""
    return _differ(replica, baseline, _observe(replica, changed, _next_ids(windows)), cuts)


def _differ(replica: Replica, baseline: _Observation, seen: _Observation, cuts: Ids) -> bool:
    watched = np.arange(replica.length) < cuts[:, None]
    return any(
        before[watched].tobytes() != after[watched].tobytes() for before, after in zip(baseline, seen, strict=True)
    )


def canary(
    replica: Replica,
    inputs: npt.NDArray[Any] | None = None,
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    max_nats: float | None = None,
) -> float:
    """Score a fixed batch and require sane numbers: broken weights are found before a corpus is paid for.

    Args:
        replica: what is to score.
        inputs: int [W, L] fixed ids, W <= B, for example of `CANARY_TEXT`; None for fixed random ids.
        mask: bool [W, L], which predictions count; default all but the last of each window.
        max_nats: largest mean loss that is accepted; default 10 ln V.

    Returns:
        The mean loss in nats.

    Raises:
        InputError: a loss or entropy is NaN, infinite or out of range, or the mean is beyond `max_nats`.
        ReplicaOutOfMemory: the batch does not fit.
    """
    windows = probe_ids(replica) if inputs is None else np.asarray(inputs, dtype=np.int64)
    mask = _all_but_last(replica, windows) if mask is None else mask
    return _mean_of_sane(replica, replica.score(windows, _next_ids(windows), mask), mask, max_nats)


def _all_but_last(replica: Replica, windows: Ids) -> npt.NDArray[np.bool_]:
    """Mask [W, L] of the positions whose next id is in the window."""
    return np.broadcast_to(np.arange(replica.length) < max(1, replica.length - 1), windows.shape)


def _mean_of_sane(
    replica: Replica, statistics: WindowStatistics, mask: npt.NDArray[np.bool_], max_nats: float | None = None
) -> float:
    """The canary's mean loss; see there for what is refused."""
    _refuse_not_finite(replica, statistics, mask)
    _refuse_out_of_range(replica, statistics, mask)
    mean = float(statistics.nll[mask].mean(dtype=np.float64))
    limit = _SANE_MULTIPLE * math.log(max(2, replica.vocab_size)) if max_nats is None else max_nats
    if mean > limit:
        raise InputError(
            f"canary: the model's loss on a fixed text is {mean:.1f} nats per token, beyond {limit:.1f}; its weights "
            "and its config or tokenizer do not belong together"
        )
    return mean


def _refuse_not_finite(replica: Replica, statistics: WindowStatistics, mask: npt.NDArray[np.bool_]) -> None:
    finite = np.isfinite(statistics.nll[mask]) & np.isfinite(statistics.entropy[mask])
    if finite.all():
        return
    broken = [
        name
        for name, parameter in replica.model.named_parameters()
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all())
    ]
    cause = (
        f"weight {broken[0]} holds NaN or inf; use a sound checkpoint"
        if broken
        else "the arithmetic overflows; set model.dtype to bfloat16 or float32"
    )
    raise InputError(f"canary: {int((~finite).sum())} of {finite.size} losses are NaN or infinite: {cause}")


def _refuse_out_of_range(replica: Replica, statistics: WindowStatistics, mask: npt.NDArray[np.bool_]) -> None:
    entropy, rank = statistics.entropy[mask], statistics.rank[mask]
    highest = math.log(replica.vocab_size) + 1e-3
    if statistics.nll[mask].min() < -1e-5 or entropy.min() < -1e-3 or entropy.max() > highest:
        raise InputError(
            f"canary: losses or entropies outside their range ([0, inf) and [0, ln {replica.vocab_size}]); the device "
            "computes wrongly, run on another one (how.device: cpu)"
        )
    assert rank.min() >= 0, "ranks are counted from the logits that gave these losses"
    assert rank.max() < replica.vocab_size, "ranks are counted from the logits that gave these losses"
