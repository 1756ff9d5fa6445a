"""Loss, entropy and rank of every token, and its decisions, from one pass over each chunk of logits.

Shape legend: N tokens, d hidden width, V vocabulary (logits width), C tokens of a chunk, R rows of a block, J decisions
of a token at most.

The head is where a scorer runs out of memory: [N, V] float32 logits of 8,192 tokens are 1.6 GB at V = 50,257.
Here at most [C, V] logits exist at a time. On a CPU the matrix product wants many rows and the element-wise
passes want operands that stay in cache, so a chunk is made by one product and read in blocks of R rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch

from tokenbound.bounds.decisions import DecisionTree
from tokenbound.errors import InputError
from tokenbound.models.decisions import ChunkMasses, TreeTensors, tree_tensors

ArrayT = TypeVar("ArrayT")

_BLOCK_FLOATS = 2**18
"""Logits of one cache-resident block on a CPU (1 MiB); measured best at V = 512 and V = 50,257."""
_CHUNK_ROWS = 256
"""Rows of a CPU matrix product; half as many cost 7 to 10 % more at V = 50,257, twice as many gain 2 %."""
_DEVICE_CHUNK_BYTES = 2**28
"""Logits of one chunk on an accelerator; large enough to fill it, small beside its memory."""
OWN_LOGITS_BYTES = 2**29
"""Logits that a model may make by itself at once, where its head is unknown."""
_FLOOR = -1e30
"""Stands for a shifted logit of -inf where it meets a probability of zero, so that 0 * -inf is not NaN."""
_EXACT_FLOAT_INTEGERS = 2**24
"""Counts of ones in float32 are exact below this; far above any vocabulary."""


@dataclass(frozen=True)
class TokenStatistics(Generic[ArrayT]):
    """What is recorded about each scored token: torch tensors [N] inside the head, NumPy arrays [B, L] outside."""

    nll: ArrayT
    """Negative log-likelihood of the target in nats, float32; NaN or inf where the logits give no finite loss."""
    entropy: ArrayT
    """Entropy of the predictive distribution in nats, float32, in [0, ln V]."""
    rank: ArrayT
    """How many other tokens have a logit at least that of the target, int32: 0 = most probable, V = no finite loss."""
    alpha: ArrayT | None = None
    """Smoothing weight of the model's own head, float32; None without one."""
    cells: ArrayT | None = None
    """Cell (level and outcome) of each decision along a tree, int16 with a further axis [J]; -1 = no decision. None
    where no tree was given."""


Rows = slice | torch.Tensor
"""Which tokens a chunk holds: a run of C tokens, or int64 [C] indices."""

Fill = Callable[[Rows, torch.Tensor], torch.Tensor]
"""Writes the float32 logits of the C tokens of a chunk into the given [C, V] buffer and returns them."""


def chunk_shape(vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Choose tokens per matrix product and rows per block of element-wise passes.

    Args:
        vocab_size: V, width of the logits.
        device: where the head runs.

    Returns:
        ``(chunk_tokens, block_rows)``; the first is a multiple of the second.

    Example:
        >>> chunk_shape(512, torch.device("cpu")), chunk_shape(50_257, torch.device("cpu"))
        ((512, 512), (256, 8))
    """
    if device.type != "cpu":
        rows = _power_of_two_at_most(_DEVICE_CHUNK_BYTES // (4 * vocab_size))
        return rows, rows
    rows = min(2 * _power_of_two_at_most(max(1, (_BLOCK_FLOATS - 1) // vocab_size)), 1024)
    return max(rows, _CHUNK_ROWS), rows


def _power_of_two_at_most(number: int) -> int:
    return 1 << max(0, int(number).bit_length() - 1)


@torch.inference_mode()
def logits_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk_tokens: int | None = None,
    compile: bool = False,
    tree: DecisionTree | None = None,
) -> TokenStatistics[torch.Tensor]:
    """Loss, entropy and rank from logits [N, V] of any dtype, widened to float32 chunk by chunk.

    Args:
        logits: [N, V], left as they are.
        targets: [N] int64 ids in [0, V).
        chunk_tokens: C; default from `chunk_shape`.
        compile: fuse the passes over a chunk with `torch.compile`.
        tree: along which decisions are recorded too; over V ids.

    Returns:
        Tensors [N]: nll and entropy in nats (float32), rank (int32); with a tree cells (int16 [N, J]).

    Raises:
        InputError: `compile` was asked for where there is no compiler.
    """

    def fill(rows: Rows, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(logits[rows])

    return chunked_statistics(fill, targets, logits.shape[-1], chunk_tokens=chunk_tokens, compile=compile, tree=tree)


def chunked_statistics(
    fill: Fill,
    targets: torch.Tensor,
    vocab_size: int,
    *,
    chunk_tokens: int | None = None,
    scored: torch.Tensor | None = None,
    compile: bool = False,
    tree: DecisionTree | None = None,
) -> TokenStatistics[torch.Tensor]:
    """Drive `fill` over chunks of C tokens and collect the statistics of each; see `token_statistics`."""
    assert vocab_size < _EXACT_FLOAT_INTEGERS, "ranks are counted in float32"
    if compile:
        require_compiler(targets.device)
    if tree is not None and tree.vocab_size != vocab_size:
        raise ValueError(f"a tree over {tree.vocab_size} ids does not fit {vocab_size} logits")
    decisions = None if tree is None else tree_tensors(tree, targets.device)
    result = _chunk_loop(fill, targets, vocab_size, chunk_tokens, scored, decisions, compile=compile, floor=False)
    # A vocabulary row masked with -inf gives 0 * -inf in the entropy. It is rare, so the pass that avoids it is
    # made only then, over the same chunks: no other value changes. True NaN logits have a NaN nll and stay NaN.
    if not compile and bool((result.entropy.isnan() & ~result.nll.isnan()).any()):
        return _chunk_loop(fill, targets, vocab_size, chunk_tokens, scored, decisions, compile=False, floor=True)
    return result


def _chunk_loop(
    fill: Fill,
    targets: torch.Tensor,
    vocab_size: int,
    chunk_tokens: int | None,
    scored: torch.Tensor | None,
    tree: TreeTensors | None,
    *,
    compile: bool,
    floor: bool,
) -> TokenStatistics[torch.Tensor]:
    tokens, device = targets.shape[0], targets.device
    chunk, block = chunk_shape(vocab_size, device)
    chunk = min(chunk_tokens or chunk, max(tokens, 1))
    block = chunk if compile else min(block, chunk)
    result, part = _unscored(tokens, device, tree), _unscored(chunk, device, None)
    buffer = torch.empty(chunk, vocab_size, dtype=torch.float32, device=device)
    scratch = torch.empty(0 if compile else block, vocab_size, dtype=torch.float32, device=device)
    ranges = None if tree is None else ChunkMasses.empty(tree, chunk)
    for rows, count in _chunks(tokens, chunk, scored, device):
        logits, wanted = fill(rows, buffer), targets[rows]
        if compile:
            _fused_chunk(part, logits, wanted, ranges)
        else:
            for first in range(0, chunk, block):
                some = slice(first, min(first + block, chunk))
                beside = None if ranges is None else ranges.part(some)
                _eager_block(_part(part, some), logits[some], wanted[some], scratch, beside, floor=floor)
        into = rows if isinstance(rows, slice) else rows[:count]
        result.nll[into] = part.nll[:count]
        result.entropy[into] = part.entropy[:count]
        result.rank[into] = part.rank[:count]
        if ranges is not None and result.cells is not None:
            result.cells[into] = ranges.cells(wanted)[:count]
    return result


def _chunks(tokens: int, chunk: int, scored: torch.Tensor | None, device: torch.device) -> Iterator[tuple[Rows, int]]:
    """The scored tokens in chunks of exactly C, and how many of each chunk count.

    The last one is filled up with its last token: a product of another height could have other bits.
    """
    index = torch.arange(tokens) if scored is None else scored.nonzero().squeeze(1)
    padded = torch.cat([index, index[-1:].expand(-len(index) % chunk)]).to(device, non_blocking=True)
    for start in range(0, len(index), chunk):
        whole = scored is None and start + chunk <= tokens
        rows = slice(start, start + chunk) if whole else padded[start : start + chunk]
        yield rows, min(chunk, len(index) - start)


def _part(statistics: TokenStatistics[torch.Tensor], some: slice) -> TokenStatistics[torch.Tensor]:
    return TokenStatistics(statistics.nll[some], statistics.entropy[some], statistics.rank[some])


def _unscored(tokens: int, device: torch.device, tree: TreeTensors | None) -> TokenStatistics[torch.Tensor]:
    def filled(value: float, dtype: torch.dtype, *more: int) -> torch.Tensor:
        return torch.full((tokens, *more), value, dtype=dtype, device=device)

    return TokenStatistics(
        nll=filled(torch.nan, torch.float32),
        entropy=filled(torch.nan, torch.float32),
        rank=filled(-1, torch.int32),
        cells=None if tree is None else filled(-1, torch.int16, tree.num_decisions),
    )


def _eager_block(
    out: TokenStatistics[torch.Tensor],
    logits_RV: torch.Tensor,
    targets: torch.Tensor,
    scratch_RV: torch.Tensor,
    ranges: ChunkMasses | None,
    *,
    floor: bool,
) -> None:
    """Statistics of one block in place: `logits_RV` is consumed, `scratch_RV` is the only other [R, V] array."""
    scratch_RV = scratch_RV[: len(logits_RV)]
    target_logits = logits_RV.gather(1, targets.unsqueeze(1))
    # A float comparison and a float sum are vectorised, a sum of booleans is not. The comparison is made on the
    # logits themselves: subtracting the maximum first could merge two different logits into a tie.
    at_least = torch.ge(logits_RV, target_logits, out=scratch_RV).sum(1)
    peak = logits_RV.amax(1, keepdim=True)
    shifted = logits_RV.sub_(peak)
    if floor:
        shifted.clamp_(min=_FLOOR)
    weights = torch.exp(shifted, out=scratch_RV)
    partition = weights.sum(1)
    if ranges is not None:  # before the weights are overwritten
        ranges.take(weights, targets)
    # torch.sum is a cascade; a BLAS dot product over 50,257 terms is off by 1e-4.
    mean_shifted = weights.mul_(shifted).sum(1) / partition
    log_partition = partition.log()
    nll = log_partition - (target_logits - peak).squeeze(1)
    _store(out, nll, log_partition - mean_shifted, at_least, logits_RV.shape[1])


def _fused_chunk(
    out: TokenStatistics[torch.Tensor], logits_RV: torch.Tensor, targets: torch.Tensor, ranges: ChunkMasses | None
) -> None:
    """Statistics of a chunk by the compiled form of `_eager_block`; `logits_RV` is left as it is."""
    if ranges is not None and ranges.tree.sums_neighbours:
        nll, entropy, at_least, peak, blocks = _fused()(logits_RV, targets, ranges.tree.block_ids)
        ranges.take_sums(blocks, logits_RV, peak, targets)
    else:
        nll, entropy, at_least = _fused()(logits_RV, targets, 0)
        if ranges is not None:
            ranges.take((logits_RV - logits_RV.amax(1, keepdim=True)).exp_(), targets)
    _store(out, nll, entropy, at_least, logits_RV.shape[1])


def _fused_block(logits_RV: torch.Tensor, targets: torch.Tensor, block_ids: int) -> tuple[torch.Tensor, ...]:
    """The arithmetic of `_eager_block` without side effects, for `torch.compile` to fuse into two passes.

    Returns:
        nll, entropy and the count of logits that reach the target's, [R]; with blocks also the maximum [R, 1] and the
        sums of exp(logit - maximum) over the whole blocks of so many ids.
    """
    # A fused CPU loop adds 50,257 terms one after the other and is off by 3e-5 in float32; elsewhere sums are trees.
    wide = torch.float64 if logits_RV.device.type == "cpu" else torch.float32
    target_logits = logits_RV.gather(1, targets.unsqueeze(1))
    at_least = (logits_RV >= target_logits).float().sum(1)
    peak = logits_RV.amax(1, keepdim=True)
    shifted = (logits_RV - peak).clamp(min=_FLOOR)
    weights = shifted.exp()
    partition = weights.sum(1, dtype=wide)
    log_partition = partition.log()
    entropy = log_partition - (weights * shifted).sum(1, dtype=wide) / partition
    found = log_partition - (target_logits - peak).squeeze(1), entropy, at_least
    if not block_ids:
        return found
    # Taken from the logits anew: weights that are used again would be written to memory, at four times the cost.
    rows, whole = len(logits_RV), logits_RV.shape[1] // block_ids
    blocks = (logits_RV[:, : whole * block_ids] - peak).view(rows, whole, block_ids).exp().sum(2)
    return *found, peak, blocks


@cache
def _fused() -> Callable[..., tuple[torch.Tensor, ...]]:
    return torch.compile(_fused_block, dynamic=False)


def _store(
    out: TokenStatistics[torch.Tensor],
    nll: torch.Tensor,
    entropy: torch.Tensor,
    at_least: torch.Tensor,
    vocab_size: int,
) -> None:
    out.nll.copy_(nll)
    out.entropy.copy_(entropy)
    out.rank.copy_(torch.where(nll.isfinite(), at_least - 1, float(vocab_size)))


def require_compiler(device: torch.device) -> None:
    """Check that `torch.compile` can work on this device.

    Raises:
        InputError: there is no C++ compiler, or on CUDA no Triton.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in candidates):
        raise InputError("compile: no C++ compiler found (g++ or clang++); install one or set `compile: false`")
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise InputError("compile: CUDA needs the `triton` package; install it or set `compile: false`")
