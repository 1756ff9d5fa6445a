"""What a replica must pass before it scores anything: the causality probe and the canary.

The bounds need that the logits which predict token i are a function of the tokens before i alone, to the last bit
and at the planned batch shape. Attention in both directions breaks that, and so does arithmetic that looks across a
tensor: outlier columns found at run time, one activation scale per tensor, expert capacity shared by a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from tokenbound.errors import InputError
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
_Observation = list[npt.NDArray[Any]]


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
    windows = _without(_batch_of(replica, inputs), loud := _loudest_id(replica))
    cuts, kept = _cuts(replica.batch, replica.length), _only_row(replica, replica.batch // 2)
    trials: list[tuple[Ids | int, Ids]] = [
        (_replaced(replica, windows), np.maximum(cuts, kept)),
        (loud, cuts[::-1]),
        (0, cuts),
    ]
    changed = [_behind(windows, content, first_changed) for content, first_changed in trials]
    observed = _observe_each(replica, [windows, *changed], _next_ids(windows))
    baseline = next(observed)
    for number, ((_, first_changed), seen) in enumerate(zip(trials, observed, strict=True)):
        if _differ(replica, baseline, seen, first_changed):
            padding = number == len(trials) - 1
            _refuse("depends on the padding behind its window" if padding else _diagnosis(replica, windows, loud, kept))


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
    statistics, hidden = replica.score_and_hidden(windows, targets, np.ones(windows.shape, dtype=bool))
    seen = [statistics.nll, statistics.entropy, statistics.rank]
    seen += [] if statistics.alpha is None else [statistics.alpha]
    return seen if hidden is None else [*seen, _bits(hidden)]


def _observe_each(replica: Replica, batches: Sequence[Ids], targets: Ids) -> Iterator[_Observation]:
    """What is observed of each batch in turn; where weights come and go with layers, they come once for all batches."""
    if replica.chain is None:
        yield from (_observe(replica, batch, targets) for batch in batches)
        return
    everything = _observe(replica, np.concatenate(batches), np.tile(targets, (len(batches), 1)))
    for first in range(0, len(batches) * replica.batch, replica.batch):
        yield [part[first : first + replica.batch] for part in everything]


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
    if mask is None:
        mask = np.broadcast_to(np.arange(replica.length) < max(1, replica.length - 1), windows.shape)
    statistics = replica.score(windows, _next_ids(windows), mask)
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
