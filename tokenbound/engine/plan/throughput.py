"""How fast replicas are here: every replica that the run would have scores random windows for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from tokenbound.bounds.columns import Piece
from tokenbound.bounds.decisions import DecisionTable
from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.corpus import Text
from tokenbound.engine.evaluate.graph import Placement
from tokenbound.engine.evaluate.stages import ReplicaSpec, build_replicas, open_plan, settle_on_cpu

if TYPE_CHECKING:
    from tokenbound.models.replica import Replica

MAX_PROBES = 8
"""Replicas that are measured at once; on a larger cluster the others are taken to be as fast."""

PROBE_TOKENS = 1 << 22
"""Scored tokens that a probe may look at; it stops when its time is over."""


@dataclass(frozen=True)
class Probe:
    """What the probing replicas found, together."""

    tokens_per_second: float
    """Of one replica, while the others ran: the mean."""
    vocab_size: int
    """V, the width of the logits."""
    nll: NDArray[np.float32]
    """[n] nats, of the scored tokens."""
    entropy: NDArray[np.float32]
    """[n] nats."""
    rank: NDArray[np.int32]
    """[n]."""
    decisions: DecisionTable | None = None
    """Of these tokens, where the run would record decisions."""

    @property
    def piece(self) -> Piece:
        """The same losses as bounds read them."""
        columns = {"nll": self.nll, "entropy": self.entropy, "rank": self.rank}
        return Piece(columns, None, None, 0, None if self.decisions is None else self.decisions.as_window())


@dataclass(frozen=True)
class _Job:
    spec: ReplicaSpec
    architecture: Mapping[str, Any] | None
    """Given where there is no artifact: the weights are then random, which changes losses and no time."""
    text: Text
    seconds: float
    parts: int


def measure_speed(
    architecture: Mapping[str, Any],
    spec: ReplicaSpec,
    text: Text,
    *,
    placement: Placement,
    seconds: float,
) -> Probe:
    """Score random windows of the corpus on as many replicas at once as the run would have; inside a Ray session.

    Args:
        architecture: of the model.
        spec: how replicas score; without an artifact they measure the architecture with random weights.
        text: the corpus, cut into windows.
        placement: how many replicas there are, and on which device.
        seconds: how long each of them scores, its start not counted.

    Raises:
        InputError: the model fails the canary or the causality probe.
        ReplicaOutOfMemory: the batch does not fit.
    """
    parts = min(placement.replicas, MAX_PROBES, max(1, open_plan(text.corpus_root, text.spec)[1].num_windows))
    job = ray.put(_Job(spec, None if spec.artifact else architecture, text, seconds, parts))
    task = ray.remote(_measure).options(**placement.actor_options)
    with plain_errors():
        found: list[Probe] = ray.get([task.remote(job, part) for part in range(parts)])
    return Probe(
        tokens_per_second=float(np.mean([each.tokens_per_second for each in found])),
        vocab_size=found[0].vocab_size,
        nll=np.concatenate([each.nll for each in found]),
        entropy=np.concatenate([each.entropy for each in found]),
        rank=np.concatenate([each.rank for each in found]),
        decisions=merged_tables([each.decisions for each in found]),
    )


def merged_tables(tables: Sequence[DecisionTable | None]) -> DecisionTable | None:
    """The table of all; None where decisions were not recorded."""
    known = [table for table in tables if table is not None]
    return reduce(add, known) if known else None


def extrapolated_speed(architecture: Mapping[str, Any], spec: ReplicaSpec, placement: Placement) -> float | None:
    """As `dense_speed`, on one replica's processors; inside a Ray session."""
    task = ray.remote(dense_speed).options(**placement.actor_options)
    with plain_errors():
        found: float | None = ray.get(task.remote(dict(architecture), spec))
    return found


def dense_speed(architecture: Mapping[str, Any], spec: ReplicaSpec, *, repeat: int = 2) -> float | None:
    """Tokens per second of a dense replica that is too large to make: from models of one and of two layers.

    Args:
        architecture: of the whole model.
        spec: how it scores; its artifact is not looked at.
        repeat: passes of which the fastest counts.

    Returns:
        None where the config does not say how many layers it has.
    """
    from tokenbound.models.forms import layer_sizes, shallow

    seconds = []
    for layers in (1, 2):
        few = shallow(architecture, layers)
        if few is None:
            return None
        seconds.append(_seconds_of_a_batch(few, spec, repeat))
    sizes = layer_sizes(architecture)
    if sizes is None:
        return None
    whole = seconds[0] + (sizes.layers - 1) * max(0.0, seconds[1] - seconds[0])
    return spec.batch * spec.length / whole


def _seconds_of_a_batch(architecture: Mapping[str, Any], spec: ReplicaSpec, repeat: int) -> float:
    from tokenbound.models.probe import probe_ids

    replica = _random_replica(architecture, spec)
    inputs = probe_ids(replica)
    mask = np.ones(inputs.shape, bool)
    found = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        replica.score(inputs, inputs, mask)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def _measure(job: _Job, part: int) -> Probe:
    corpus, plan = open_plan(job.text.corpus_root, job.text.spec)
    batch, length = job.spec.batch, job.spec.length
    windows = job.text.windows(PROBE_TOKENS)[part :: job.parts] or job.text.windows(1)
    replica = _replica(job, gather(corpus, plan.windows(windows[:batch]), length).inputs)
    found: list[tuple[Any, ...]] = []
    tables: list[DecisionTable | None] = []
    started = time.perf_counter()
    for first in range(0, len(windows), batch):
        each = gather(corpus, plan.windows(windows[first : first + batch]), length)
        scored = replica.score(each.inputs, each.targets, each.mask)
        found.append((scored.nll[each.mask], scored.entropy[each.mask], scored.rank[each.mask]))
        tokens = int(each.mask.sum())
        tables.append(None if scored.cells is None else DecisionTable.of_cells(scored.cells, tokens))
        if time.perf_counter() - started >= job.seconds:
            break
    elapsed_s = time.perf_counter() - started
    nll, entropy, rank = (np.concatenate(column) for column in zip(*found, strict=True))
    return Probe(
        len(nll) / elapsed_s,
        replica.vocab_size,
        np.maximum(nll, 0),
        np.maximum(entropy, 0),
        rank.astype(np.int32),
        merged_tables(tables),
    )


def _replica(job: _Job, inputs: NDArray[Any]) -> Replica:
    if job.architecture is None:
        return build_replicas(job.spec, inputs)[0]
    replica = _random_replica(job.architecture, job.spec)
    replica.score(inputs, inputs, np.ones(inputs.shape, bool))  # the first pass is slower than the rest
    return replica


def _random_replica(architecture: Mapping[str, Any], spec: ReplicaSpec) -> Replica:
    import torch

    from tokenbound.models.memory import random_model
    from tokenbound.models.replica import Replica
    from tokenbound.models.spread import spread_over_gpus

    if spec.device == "cpu":
        settle_on_cpu(spec.threads)
    dtype = getattr(torch, spec.dtype)
    shape: dict[str, Any] = {"batch": spec.batch, "length": spec.length}
    with torch.device(spec.device if spec.gpus == 1 else "cpu"):
        model = random_model(architecture, dtype)
    if spec.gpus > 1:
        model = spread_over_gpus(model, architecture, gpus=spec.gpus, dtype=dtype, **shape)
    return Replica(model, **shape, device=spec.device, compile=spec.compile, tree=spec.tree)
