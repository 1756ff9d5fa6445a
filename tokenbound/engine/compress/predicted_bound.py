"""The bound that an artifact would get, predicted from losses on a part of the corpus."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray

from tokenbound.bounds.certify import certify
from tokenbound.bounds.choice import choose_tunings
from tokenbound.bounds.claim import Claim, Line
from tokenbound.bounds.columns import Piece
from tokenbound.bounds.decisions import DecisionTable
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.exact import line_sums
from tokenbound.bounds.reduction import separate_bounds
from tokenbound.certificate.derived import code_split
from tokenbound.certificate.identity import DEFAULT_PROTOCOL
from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.corpus import Text
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.store.losses import TABLE_COLUMNS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)


CALIBRATION_TOKENS = 1 << 18
"""Tokens that a calibration sees; feedback over columns gains from more, averages over layers would not."""


CANDIDATE_TOKENS = 1 << 15
"""Tokens on which the rate search scores each candidate."""


BoundName = Literal["azuma", "freedman"]


Losses = tuple[Any, Any, int]
"""nll and entropy in nats [n], and V."""


@dataclass(frozen=True)
class ArtifactPlace:
    """Where tasks find an artifact."""

    place: str
    """Path or URI."""
    sha256: str
    base: str | None = None
    """Of a delta: where its base is, a checkpoint or artifact."""
    folder: str | None = None
    """`how.local_folder`."""


def predicted_bound_bits(artifact: ArtifactPlace, num_bytes: int, text: Text, windows: list[int]) -> float:
    """What the freedman bound would be if every token of the corpus had the losses of these windows. Not a bound."""
    return bound_if_all(score_artifact(artifact, text, windows), num_bytes, text.num_tokens)


def bound_if_all(losses: Losses, num_bytes: int, num_tokens: int, *, method: BoundName = "freedman") -> float:
    """What a bound would be if every token of a corpus of this size had these losses. Not a bound.

    Args:
        losses: nll and entropy in nats [n], and V.
        num_bytes: of the artifact.
        num_tokens: of the corpus, counted as n where it is smaller.
        method: which bound.

    Returns:
        Bits per token, infinite where nothing can be said.
    """
    nll, entropy, vocab_size = losses
    bits = math.fsum(code_split(num_bytes, DEFAULT_PROTOCOL).values())
    claim = Claim(vocab_size, vocab_size, bits, 0.05, len(nll), (method,), has_rank=False)
    value = lines_if_all(claim.with_larger_corpus(max(num_tokens, len(nll))), nll, entropy)[0].value
    return math.inf if value is None else value


def lines_if_all(claim: Claim, nll: ArrayLike, entropy: ArrayLike, rank: ArrayLike | None = None) -> tuple[Line, ...]:
    """The lines of a claim if every token of its corpus had these losses. Not bounds.

    Args:
        claim: what would be claimed; its `num_tokens` is that of the corpus, at least n.
        nll: [n] nats.
        entropy: [n] nats.
        rank: [n], where the claim has `kl` lines.
    """
    evidence = Evidence.from_losses(nll, entropy, rank, vocab_size=claim.vocab_size, top_k=claim.top_k)
    tunings = choose_tunings(evidence, claim)
    return certify(tunings, line_sums(tunings, nll, entropy, rank), claim)


def separate_lines_if_all(claim: Claim, piece: Piece) -> tuple[Line, ...]:
    """The lines of the bounds with a pass of their own, as far as the columns are there. Not bounds.

    Args:
        claim: as for `lines_if_all`, one that says what if.
        piece: the losses, without worst-case windows.
    """
    tables = piece.decisions
    count = int(piece["nll"].size)
    decisions = None if tables is None else DecisionTable.of_cells(tables.cell, count, tables.count)
    evidence = Evidence.from_losses(
        piece["nll"], piece["entropy"], piece["rank"], vocab_size=claim.vocab_size, decisions=decisions
    )
    known = {*piece.columns, *(TABLE_COLUMNS if tables is not None else ())}
    found = []
    for bound in separate_bounds(claim):
        if known.issuperset(bound.columns):
            tuning = bound.choose(evidence, claim, None)
            found.append(bound.certify(tuning, bound.sums(tuning, piece), claim, None))
    return tuple(found)


def price_of_bits(unquantized: ArtifactPlace, num_bytes: int, text: Text) -> float:
    """Nats of mean loss per bit of code at which the freedman bound stays the same: the exchange rate of training.

    The slope of the bound in the code length over its slope in the loss, at a size of `num_bytes` and the losses of the
    unquantized model on a few windows of the corpus: training on the grid ends near those, wherever it starts.
    """
    windows = text.windows(CANDIDATE_TOKENS, skip=math.ceil(CALIBRATION_TOKENS / text.spec.length))
    return exchange_rate_nats(score_artifact(unquantized, text, windows), num_bytes, text.num_tokens)


def exchange_rate_nats(losses: Losses, num_bytes: int, num_tokens: int) -> float:
    """As `price_of_bits`, from losses; by central differences, wide enough for bounds tuned on a grid."""
    nll, entropy, vocab_size = losses

    def bound(size: float, loss: float) -> float:
        scaled = (nll * np.float32(loss), entropy * np.float32(loss), vocab_size)
        return bound_if_all(scaled, round(num_bytes * size), num_tokens)

    per_bit = (bound(1 + SIZE_STEP, 1) - bound(1 - SIZE_STEP, 1)) / (16 * SIZE_STEP * num_bytes)
    per_nat = (bound(1, 1 + LOSS_STEP) - bound(1, 1 - LOSS_STEP)) / (2 * LOSS_STEP * float(nll.mean(dtype=np.float64)))
    return per_bit / per_nat if math.isfinite(per_bit) and per_nat > 0 else 0.0


SIZE_STEP, LOSS_STEP = 0.05, 0.02
"""Relative steps of the differences in `exchange_rate_nats`."""


def score_artifact(artifact: ArtifactPlace, text: Text, windows: list[int]) -> Losses:
    """Losses of an artifact on some windows."""
    parts = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(windows)))
    task = partial(_score_part, artifact, text)
    with plain_errors():
        scored = list(executor().map(task, [windows[part::parts] for part in range(parts)]))
    return np.concatenate([s[0] for s in scored]), np.concatenate([s[1] for s in scored]), scored[0][2]


def _score_part(artifact: ArtifactPlace, text: Text, windows: list[int]) -> Losses:
    import torch

    from tokenbound.compression.artifact_file import open_artifact
    from tokenbound.models.replica import Replica
    from tokenbound.models.weights import decode_weights, read_base

    torch.set_num_threads(1)
    corpus, plan = open_plan(text.corpus_root, text.spec)
    batch = gather(corpus, plan.windows(windows), text.spec.length)
    opened = open_artifact(artifact.place, sha256=artifact.sha256, folder=artifact.folder)
    weights = decode_weights(opened, None if artifact.base is None else read_base(artifact.base))
    replica = Replica.from_weights(weights, dtype=torch.float32, batch=8, length=text.spec.length)
    found = [
        replica.score(batch.inputs[i : i + 8], batch.targets[i : i + 8], batch.mask[i : i + 8])
        for i in range(0, len(windows), 8)
    ]
    nll, entropy = (np.concatenate([getattr(f, name) for f in found])[batch.mask] for name in ("nll", "entropy"))
    return np.maximum(nll, 0), np.maximum(entropy, 0), replica.vocab_size
