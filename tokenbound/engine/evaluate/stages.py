"""The three stages of scoring a shard: read its ids, score its windows, commit its losses.

Each stage is a plain callable from row to row, so it is tested without a cluster. One row is one shard.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from tokenbound.bounds.columns import WindowDecisions
from tokenbound.bounds.decisions import TreeChoice
from tokenbound.certificate.decisions import check_decisions, window_decisions
from tokenbound.certificate.reduce import shard_evidence
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.windows import CorpusPlan, gather
from tokenbound.engine.artifacts import named_artifact
from tokenbound.engine.cluster.metrics import count_retry
from tokenbound.engine.cluster.session import replica_name
from tokenbound.engine.evaluate.environment import scoring_environment
from tokenbound.errors import IncompleteError, InputError
from tokenbound.store.attempts import Attempt, Attempts, read_attempts, write_attempts
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.models.forms import Form
    from tokenbound.models.replica import Replica
    from tokenbound.models.sources import TensorSource
    from tokenbound.models.weights import Weights

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]


class ShardRow(TypedDict):
    """A shard to be scored."""

    shard: int
    windows: bytes
    """int64 [W] ids of its windows."""


class ReadRow(ShardRow):
    """Its windows as padded ids, [W, L] each unless said otherwise."""

    inputs: Ints
    targets: Ints
    mask: Bools
    """Which positions are scored."""
    document: Ints
    position: Ints


class ScoredRow(ShardRow):
    """Statistics of its N scored tokens, [N] each unless said otherwise."""

    vocab_size: int
    lengths: Ints
    """[W] scored tokens of each window."""
    unscored: Bools
    """[W] windows without a finite loss."""
    nll: Floats
    entropy: Floats
    rank: Ints
    token: Ints
    document: Ints
    position: Ints
    base_nll: NotRequired[Floats]
    base_entropy: NotRequired[Floats]
    alpha: NotRequired[Floats]
    decision_cell: NotRequired[Ints]
    """[D] the table of each window's decisions: their cells, ascending."""
    decision_count: NotRequired[Ints]
    """[D] how often each occurred."""
    decision_offsets: NotRequired[Ints]
    """[W + 1] where the entries of each window begin."""
    environment: NotRequired[str]
    """JSON: what scored it."""


class CommittedRow(TypedDict):
    """What is left of a shard once it is stored."""

    shard: int
    tokens: int
    unscored_windows: int


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Numbers of `mallopt`'s settings."""
_KEPT_BYTES = 1 << 30
_KEPT_BESIDE_LAYERS = 1 << 25


@dataclass(frozen=True)
class WindowSpec:
    """How windows are cut; the part of the protocol that planning needs."""

    length: int
    context: str
    stride: int | None
    segments: int
    """Segments of the corpus: a plan that a process keeps must not outlive a corpus that grew."""


@lru_cache(maxsize=4)
def open_plan(corpus_root: str, spec: WindowSpec) -> tuple[PreparedCorpus, CorpusPlan]:
    """A prepared corpus and its plan, kept per process."""
    corpus = PreparedCorpus(corpus_root)
    return corpus, corpus.plan(length=spec.length, context=spec.context, stride=spec.stride)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReadShard:
    """Window ids to padded ids."""

    corpus_root: str
    spec: WindowSpec

    def __call__(self, row: ShardRow) -> ReadRow:
        """Read one shard."""
        corpus, plan = open_plan(self.corpus_root, self.spec)
        windows = np.frombuffer(row["windows"], np.int64)
        batch = gather(corpus, plan.windows(windows), self.spec.length)
        return {
            **row,
            "inputs": batch.inputs.astype(np.int32),
            "targets": batch.targets.astype(np.int32),
            "mask": batch.mask,
            "document": batch.document,
            "position": batch.position,
        }


@dataclass(frozen=True)
class ReplicaSpec:
    """What a scoring actor needs to build its replica."""

    artifact: str
    """Where the artifact is, a path or URI that every actor can read: a restarted one opens it again."""
    dtype: str
    batch: int
    length: int
    device: str
    threads: int
    """CPU threads of one replica."""
    artifact_sha256: str | None = None
    """The digest that the artifact must have."""
    run: str | None = None
    """The run directory in which attempts at shards are counted; None counts none."""
    local_folder: str | None = None
    """`how.local_folder`."""
    base: str | None = None
    """Where the base of a delta is: a checkpoint or artifact that every actor can read."""
    compile: bool = False
    """Fuse the passes over the logits."""
    session: str = ""
    """Names this start of the run; deaths are counted within it."""
    retries: int = 3
    """How often a shard may lose its actor before the run gives up."""
    share: bool = False
    """Decode or pack the weights once on each machine, for all replicas there; what others left there is used."""
    gpus: int = 1
    """GPUs over which one replica is spread, layer by layer."""
    tree: TreeChoice | None = None
    """Along which the model's decisions are recorded too; those of a base are not."""
    weights: Form = "dense"
    """How a replica holds its weights."""


class ScoreShard:
    """Padded ids to token statistics, on one replica that this process builds at its first shard.

    Of a delta, the base scores the same windows beside it.

    The replica is not built in the constructor: an error there would be an actor's death, with its text lost.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.replica: Replica | None = None
        self.base: Replica | None = None
        self.environment = ""

    def __call__(self, row: ReadRow) -> ScoredRow:
        """Score one shard: flat statistics, targets and positions, and per window `lengths` and `unscored`."""
        if self.spec.run is not None:
            run = RunDirectory(self.spec.run)
            count_attempt(run, int(row["shard"]), self.spec.session, self.spec.retries, replica_name())
        if self.replica is None:
            self.replica, self.base = build_replicas(self.spec, row["inputs"])
            spec = self.spec
            found = scoring_environment(device=spec.device, compiled=spec.compile, threads=spec.threads)
            self.environment = json.dumps(found)  # of this process, where the losses are made
        inputs, targets, mask = row["inputs"], row["targets"], row["mask"]
        scored = self.replica.score(inputs, targets, mask)
        nll, entropy, rank = scored.nll, scored.entropy, scored.rank
        unscored = _unscored(nll, entropy, mask)
        result: ScoredRow = {
            "shard": row["shard"],
            "windows": row["windows"],
            "vocab_size": self.replica.vocab_size,
            "environment": self.environment,
            "lengths": mask.sum(axis=1).astype(np.int64),
            "unscored": unscored,
            "nll": nll[mask],
            "entropy": np.maximum(entropy[mask], 0.0),
            "rank": rank[mask],
            "token": targets[mask].astype(np.int32),
            "document": row["document"][mask],
            "position": row["position"][mask],
        }
        if scored.alpha is not None:
            result["alpha"] = scored.alpha[mask]
        if scored.cells is not None:
            tables = window_decisions(scored.cells)
            result["decision_cell"], result["decision_count"] = tables.cell, tables.count
            result["decision_offsets"] = tables.offsets
        if self.base is not None:
            base = self.base.score(inputs, targets, mask)
            result["unscored"] = unscored | _unscored(base.nll, base.entropy, mask)
            result["base_nll"] = base.nll[mask]
            result["base_entropy"] = np.maximum(base.entropy[mask], 0.0)
        return result


def _unscored(nll: Floats, entropy: Floats, mask: Bools) -> Bools:
    """Windows [W] with a scored token that has no finite loss, or one that no rounding explains."""
    sound = np.isfinite(nll) & np.isfinite(entropy) & (nll >= -1e-5)
    return np.asarray((mask & ~sound).any(axis=1))


def count_attempt(run: RunDirectory, shard: int, session: str, retries: int, replica: str = "") -> None:
    """Note that a replica begins a shard: Ray restarts dead actors for ever, a shard that kills them must not.

    Raises:
        IncompleteError: the shard lost its actor more than `retries` times since this start of the run.
    """
    attempts = read_attempts(run, shard)
    begun = attempts.begun if attempts.session == session else ()
    if len(begun) > retries:
        raise IncompleteError(
            f"{run.uri}: shard {shard} lost its actor {len(begun)} times; look at its windows and at the memory of the "
            "machine, then run again"
        )
    if begun:
        count_retry(run.uri)
    write_attempts(run, shard, Attempts(session, (*begun, Attempt(replica, time.time()))))


def build_replicas(spec: ReplicaSpec, inputs: Ints) -> tuple[Replica, Replica | None]:
    """Decode the artifact, and let the replica, and that of a delta's base, pass the canary and the causality probe.

    Returns:
        The model's replica, and the base's or None.

    Raises:
        InputError: a model fails either, or does not fit the windows; or base and delta differ in vocabulary.
        MismatchError: the delta was made on another base.
    """
    from tokenbound.models.shared import shared_weights
    from tokenbound.models.weights import decode_weights, read_base

    if spec.device == "cpu":
        settle_on_cpu(spec.threads, releases=spec.weights != "dense")
    artifact = named_artifact(spec.artifact, sha256=spec.artifact_sha256, folder=spec.local_folder, field="artifact")
    if spec.weights != "dense":
        return _by_layers(spec, artifact, inputs), None
    base = None if spec.base is None else read_base(spec.base)
    shared = spec.share and base is None
    weights = shared_weights(artifact, spec.local_folder) if shared else decode_weights(artifact, base)
    replica = _checked_replica(spec, weights, inputs)
    if base is None:
        return replica, None
    beside = _checked_replica(replace(spec, tree=None), base, inputs)
    if beside.vocab_size != replica.vocab_size:
        raise InputError(
            f"the base predicts {beside.vocab_size} ids and the fine-tune {replica.vocab_size}; their losses cannot be "
            "compared, so encode the fine-tune as a whole model"
        )
    return replica, beside


def settle_on_cpu(threads: int, *, releases: bool = False) -> None:
    """Give this process its threads, and let it keep the memory that one batch frees for the next.

    By default the C library hands large blocks back to the system, which zeroes their pages anew for every layer: of a
    small GPT-2 that takes 5 % of the time. Where the library has no such setting nothing is changed.

    Args:
        threads: for torch.
        releases: whether layers come and go: what one frees then goes back at once, and the threads of its batches
            share one heap.
    """
    import ctypes

    import torch

    torch.set_num_threads(threads)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        kept_bytes = _KEPT_BESIDE_LAYERS if releases else _KEPT_BYTES
        set_option(_M_TRIM_THRESHOLD, kept_bytes)
        set_option(_M_MMAP_THRESHOLD, kept_bytes)
        if releases:
            set_option(_M_ARENA_MAX, 1)


def _by_layers(spec: ReplicaSpec, artifact: ArtifactFile, inputs: Ints) -> Replica:
    """A replica whose layers have weights only while they run.

    Raises:
        InputError: the model has no such layers, is a delta, or fails the canary or the probe.
    """
    import torch

    from tokenbound.models.replica import Replica

    if artifact.base is not None or spec.base is not None:
        raise InputError(f"how.weights: {spec.weights}: an artifact on a base is scored dense; set how.weights: dense")
    device = torch.device(spec.device)
    replica = Replica.from_source(
        artifact.architecture,
        layer_source(spec, artifact, device),
        dtype=getattr(torch, spec.dtype),
        form=spec.weights,
        batch=spec.batch,
        length=spec.length,
        device=device,
        compile=spec.compile,
        tree=spec.tree,
    )
    return _checked(replica, inputs)


def layer_source(spec: ReplicaSpec, artifact: ArtifactFile, device: torch.device) -> TensorSource:
    """Where the weights of layers come from: where machines share, packed weights in a file; else the artifact itself.

    Args:
        spec: of a packed or streamed replica.
        artifact: a whole model.
        device: where packed weights stay.
    """
    from tokenbound.models.shared import shared_packed_file
    from tokenbound.models.sources import MapSource, PackedFileSource, PackedSource

    is_packed = spec.weights == "packed"
    file = shared_packed_file(artifact, spec.local_folder, on_disk=not is_packed) if spec.share else None
    if file is not None:
        return PackedFileSource(artifact, file, device, resident=is_packed)
    return PackedSource(artifact, device, workers=spec.threads) if is_packed else MapSource(artifact.tensors)


def _checked_replica(spec: ReplicaSpec, weights: Weights, inputs: Ints) -> Replica:
    import torch

    from tokenbound.models.build import build_model
    from tokenbound.models.replica import Replica
    from tokenbound.models.spread import spread_over_gpus

    dtype = getattr(torch, spec.dtype)
    shape: dict[str, Any] = {"batch": spec.batch, "length": spec.length}
    options: dict[str, Any] = {"device": spec.device, "compile": spec.compile, "tree": spec.tree}
    if spec.gpus == 1:
        replica = Replica.from_weights(weights, dtype=dtype, **shape, **options)
    else:
        model = build_model(weights.architecture, weights.tensors, dtype=dtype, device="cpu")
        model = spread_over_gpus(model, weights.architecture, gpus=spec.gpus, dtype=dtype, **shape)
        replica = Replica(model, **shape, **options)
    return _checked(replica, inputs)


def _checked(replica: Replica, inputs: Ints) -> Replica:
    """A replica that has passed the canary and the causality probe."""
    from tokenbound.models.probe import check_replica

    replica.check_vocabulary(int(inputs.max()))
    check_replica(replica, inputs[: replica.batch])
    return replica


@dataclass(frozen=True)
class CommitShard:
    """Token statistics to a committed shard."""

    run_uri: str
    scoring_fingerprint: str
    top_k: tuple[int, ...]
    store_tokens: bool
    batch: int | None = None
    """Windows of a forward pass, where they are fewer than the protocol asks for."""
    tree: TreeChoice | None = None
    """Along which decisions were recorded."""

    def __call__(self, row: ScoredRow) -> CommittedRow:
        """Write the losses, then the record.

        Raises:
            MismatchError: the decisions are not those of the tokens.
        """
        losses = _losses_of(row)
        run, shard = RunDirectory(self.run_uri), int(row["shard"])
        if self.tree is not None:
            check_decisions(losses, self.tree.over(int(row["vocab_size"])), f"shard {shard}")
        losses = losses if self.store_tokens else replace(losses, token=None)
        unscored = int(losses.unscored.sum())
        if unscored:
            reason = "NaN, infinite or negative loss"
            run.quarantine(shard, [{"window_id": int(w), "reason": reason} for w in losses.window_id[losses.unscored]])
        evidence = shard_evidence(losses, int(row["vocab_size"]), self.top_k)
        known = json.loads(row["environment"]) if row.get("environment") else None
        run.commit(shard, losses, json.loads(evidence.to_json()), self.scoring_fingerprint, self.batch, known)
        return {"shard": shard, "tokens": losses.num_tokens, "unscored_windows": unscored}


def _losses_of(row: ScoredRow) -> Losses:
    lengths, unscored = np.asarray(row["lengths"]), np.asarray(row["unscored"], bool)
    failed = np.repeat(unscored, lengths)
    nan = np.float32(np.nan)

    def finite(values: Floats | None) -> npt.NDArray[np.float32] | None:
        return None if values is None else np.where(failed, nan, values).astype(np.float32)

    return Losses(
        window_id=np.frombuffer(row["windows"], np.int64),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        unscored=unscored,
        document=np.asarray(row["document"]),
        position=np.asarray(row["position"]),
        nll=np.where(failed, nan, row["nll"]).astype(np.float32),
        entropy=np.where(failed, nan, row["entropy"]).astype(np.float32),
        rank=np.where(failed, row["vocab_size"], np.asarray(row["rank"])).astype(np.int32),
        token=np.asarray(row["token"]),
        base_nll=finite(row.get("base_nll")),
        base_entropy=finite(row.get("base_entropy")),
        alpha=finite(row.get("alpha")),
        tables=_tables_of(row),
    )


def _tables_of(row: ScoredRow) -> WindowDecisions | None:
    if "decision_cell" not in row:
        return None
    cell, count = np.asarray(row["decision_cell"]), np.asarray(row["decision_count"])
    return WindowDecisions(cell.astype(np.int16), count.astype(np.int32), np.asarray(row["decision_offsets"], np.int64))
