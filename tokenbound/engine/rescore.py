"""Scoring random windows again from artifact and corpus, so that forged losses do not verify."""

from __future__ import annotations

import secrets
import tempfile

import numpy as np

from tokenbound.certificate import Certificate
from tokenbound.config import RunConfig
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.windows import gather
from tokenbound.engine.scoring import ReplicaSpec, ScoreShard, WindowSpec, open_plan
from tokenbound.errors import MismatchError
from tokenbound.identity import smallest_batch
from tokenbound.ledger import RunLedger
from tokenbound.store.losses import Losses

TOLERANCE_NATS = {"float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
"""Largest difference of one token's loss between two machines, by dtype of the body; its mean over a window may be "
"a tenth."""


def rescore(
    certificate: Certificate, config: RunConfig, *, losses: str, artifact: bytes, windows: int, device: str = "cpu"
) -> float:
    """Prepare the corpus again, draw windows that nobody could foresee, score them and compare.

    Args:
        certificate: one whose losses and artifact have been verified.
        config: its run config; only the corpus and window sections are used.
        losses: its run directory.
        artifact: its artifact's bytes.
        windows: how many windows to draw.
        device: where to score.

    Returns:
        The largest difference of a token's nll, nats.

    Raises:
        MismatchError: the corpus is another one, or a recorded loss is not what the model gives.
    """
    with tempfile.TemporaryDirectory() as cache:
        corpus = prepare_corpus(config.what.corpus, cache)
        manifest = corpus.manifest
        if (manifest.corpus_sha256, manifest.tokens_sha256) != (certificate.corpus_sha256, certificate.tokens_sha256):
            raise MismatchError("this corpus is not the certificate's: files, tokenizer or BOS/EOS rule differ")
        protocol = certificate.protocol
        spec = WindowSpec(protocol["length"], protocol["context"], protocol["stride"])
        plan = open_plan(cache, spec)[1]
        planned = {"num_tokens": plan.num_tokens, "num_windows": plan.num_windows}
        if certificate.sampling is not None:
            planned["max_window_tokens"] = plan.max_window_tokens
        claimed = {**certificate.model_dump(), **(certificate.sampling.model_dump() if certificate.sampling else {})}
        for name, value in planned.items():
            if claimed[name] != value:
                raise MismatchError(f"{name}: the certificate says {claimed[name]}, the corpus has {value}")
        ledger = certificate.ledger(losses)
        score = ScoreShard(
            ReplicaSpec(artifact, protocol["dtype"], smallest_batch(protocol), protocol["length"], device, threads=1)
        )
        return max(
            _compare(score, corpus, plan, spec, recorded, row, protocol["dtype"])
            for recorded, row in _draw(ledger, windows)
        )


def _draw(ledger: RunLedger, count: int) -> list[tuple[Losses, int]]:
    """Random recorded windows: (losses of the shard, row), from the system's entropy."""
    sizes = np.cumsum([0, *(ledger.record(shard).windows for shard in range(ledger.num_shards))])
    sizes[-1] = sizes[-1] if ledger.last_windows is None else sizes[-2] + ledger.last_windows
    drawn = sorted({secrets.randbelow(int(sizes[-1])) for _ in range(count)})
    shards = np.searchsorted(sizes, drawn, side="right") - 1
    opened = {int(shard): ledger.losses(int(shard)) for shard in set(shards)}
    return [(opened[int(shard)], int(window - sizes[shard])) for shard, window in zip(shards, drawn, strict=True)]


def _compare(
    score: ScoreShard, corpus: object, plan: object, spec: WindowSpec, recorded: Losses, row: int, dtype: str
) -> float:
    window = recorded.window_id[row : row + 1]
    batch = gather(corpus, plan.windows(window), spec.length)  # type: ignore[arg-type, attr-defined]
    scored = score(
        {
            "shard": 0,
            "windows": window.tobytes(),
            "inputs": batch.inputs,
            "targets": batch.targets,
            "mask": batch.mask,
            "document": batch.document,
            "position": batch.position,
        }
    )
    cut = slice(int(recorded.offsets[row]), int(recorded.offsets[row + 1]))
    if recorded.token is not None and not np.array_equal(recorded.token[cut], scored["token"]):
        raise MismatchError(f"window {int(window[0])}: the recorded tokens are not the corpus's")
    if bool(recorded.unscored[row]):
        return 0.0
    off = np.abs(recorded.nll[cut].astype(np.float64) - scored["nll"])
    tolerance = TOLERANCE_NATS[dtype]
    if len(off) != len(scored["nll"]) or off.max() > tolerance or off.mean() > tolerance / 10:
        raise MismatchError(
            f"window {int(window[0])}: recorded losses differ from the model's by up to {off.max():.4f} nats "
            f"(tolerance {tolerance})"
        )
    return float(off.max())
