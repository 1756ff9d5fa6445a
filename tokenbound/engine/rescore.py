"""Scoring random windows again from artifact and corpus, so that forged losses do not verify."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.certificate import Certificate
from tokenbound.config import RunConfig
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.windows import gather
from tokenbound.engine.scoring import ReplicaSpec, ScoreShard, WindowSpec, open_plan
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.identity import smallest_batch
from tokenbound.ledger import RunLedger
from tokenbound.store.copies import local_copy
from tokenbound.store.filesystem import anchored
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

TOLERANCE_NATS = {"float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
"""Largest difference of one token's loss between two machines, nats, by dtype of the body; its mean over a window may
be a tenth."""

FLIP_SHARE = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.05}
"""Largest share of a window's tokens, one token apart, that two machines may put on different sides of a top-k."""


def rescore(
    certificate: Certificate,
    config: RunConfig,
    *,
    losses: str,
    artifact: bytes,
    windows: int,
    base: str | None = None,
    device: str = "cpu",
) -> float:
    """Prepare the corpus again, draw windows that nobody could foresee, score them and compare.

    Args:
        certificate: one whose losses and artifact have been verified.
        config: its run config; only the corpus and window sections are used.
        losses: its run directory.
        artifact: its artifact's bytes.
        windows: how many windows to draw.
        base: where a delta's base is; default where the config says.
        device: where to score.

    Returns:
        The largest difference of a token's nll, nats.

    Raises:
        IncompleteError: the model is a delta and nothing says where its base is.
        MismatchError: the corpus is another one, or a recorded loss is not what the model gives.
    """
    with tempfile.TemporaryDirectory() as cache:
        corpus = prepare_corpus(config.what.corpus, cache, segments=_segments(certificate, losses))
        manifest = corpus.manifest
        if (manifest.corpus_sha256, manifest.tokens_sha256) != (certificate.corpus_sha256, certificate.tokens_sha256):
            raise MismatchError("this corpus is not the certificate's: files, tokenizer or BOS/EOS rule differ")
        protocol = certificate.protocol
        segments = len(manifest.segments)
        spec = WindowSpec(protocol["length"], protocol["context"], protocol["stride"], segments)
        plan = open_plan(cache, spec)[1]
        planned = {
            "num_tokens": plan.num_tokens,
            "num_windows": plan.num_windows,
            "tokenizer_vocab_size": manifest.vocab_size,
        }
        if certificate.sampling is not None:
            planned["max_window_tokens"] = plan.max_window_tokens
        claimed = {**certificate.model_dump(), **(certificate.sampling.model_dump() if certificate.sampling else {})}
        for name, value in planned.items():
            if claimed[name] != value:
                raise MismatchError(f"{name}: the certificate says {claimed[name]}, the corpus has {value}")
        ledger = certificate.ledger(losses)
        shape = protocol["dtype"], smallest_batch(protocol), protocol["length"]
        found = _base_of(certificate, base or config.what.model.base)
        score = ScoreShard(ReplicaSpec(artifact, *shape, device, threads=1, base=found))
        return max(
            _compare(score, corpus, plan, spec, recorded, row, certificate) for recorded, row in _draw(ledger, windows)
        )


def _base_of(certificate: Certificate, base: str | None) -> str | None:
    """Where the base of a delta is, after checking that it is the certificate's; None for a whole model."""
    from tokenbound.models.delta import read_base

    recorded = certificate.scoring_identity.get("base")
    if recorded is None:
        return None
    if base is None:
        raise IncompleteError("the certificate is of a delta; give its base with --base to score windows again")
    found = read_base(local_copy(anchored(base))).identity
    if found != recorded:
        raise MismatchError(f"base {base} is not the certificate's: digests {found}, not {recorded}")
    return anchored(base)


def _segments(certificate: Certificate, losses: str) -> list[list[str]] | None:
    """How the corpus grew, as the run noted; only a hint: the digests of the certificate decide."""
    found = RunDirectory(losses).read_json("plan.json").get("segments")
    return None if found is None else found[: int(certificate.corpus.get("segments", len(found)))]


def _draw(ledger: RunLedger, count: int) -> list[tuple[Losses, int]]:
    """Random recorded windows: (losses of the shard, row), from the system's entropy."""
    sizes = np.cumsum([0, *(ledger.record(shard).windows for shard in range(ledger.num_shards))])
    sizes[-1] = sizes[-1] if ledger.last_windows is None else sizes[-2] + ledger.last_windows
    drawn = sorted({secrets.randbelow(int(sizes[-1])) for _ in range(count)})
    shards = np.searchsorted(sizes, drawn, side="right") - 1
    opened = {int(shard): ledger.losses(int(shard)) for shard in set(shards)}
    return [(opened[int(shard)], int(window - sizes[shard])) for shard, window in zip(shards, drawn, strict=True)]


def _compare(
    score: ScoreShard,
    corpus: object,
    plan: object,
    spec: WindowSpec,
    recorded: Losses,
    row: int,
    certificate: Certificate,
) -> float:
    dtype = certificate.protocol["dtype"]
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
    if scored["vocab_size"] != certificate.vocab_size:
        raise MismatchError(
            f"vocab_size: the certificate says {certificate.vocab_size}, the model's logits have {scored['vocab_size']}"
        )
    cut = slice(int(recorded.offsets[row]), int(recorded.offsets[row + 1]))
    if recorded.token is not None and not np.array_equal(recorded.token[cut], scored["token"]):
        raise MismatchError(f"window {int(window[0])}: the recorded tokens are not the corpus's")
    for name in ("document", "position"):
        if not np.array_equal(getattr(recorded, name)[cut], scored[name]):
            raise MismatchError(f"window {int(window[0])}: the recorded column {name} is not the corpus's")
    if bool(recorded.unscored[row]):
        return 0.0
    if (recorded.alpha is None) != ("alpha" not in scored):
        raise MismatchError(f"window {int(window[0])}: the column `alpha` and the model's smoothing head do not agree")
    if recorded.rank is None:
        raise MismatchError(f"window {int(window[0])}: no ranks are recorded")
    _require_same_errors(recorded.rank[cut], scored["rank"], certificate.top_k, dtype)
    columns = [name for name in ("nll", "entropy", "alpha", "base_nll", "base_entropy") if name in scored]
    return max(_largest_difference(recorded, cut, scored[name], name, dtype) for name in columns)


def _require_same_errors(recorded: NDArray[Any], scored: NDArray[Any], top_k: Sequence[int], dtype: str) -> None:
    """Which tokens were among the k most probable, up to what two machines can differ in near ties.

    Raises:
        MismatchError: too many tokens changed sides.
    """
    for k in top_k:
        flipped = int(((recorded >= k) != (scored >= k)).sum())
        if flipped > 1 + FLIP_SHARE[dtype] * len(scored):
            raise MismatchError(f"{flipped} of a window's {len(scored)} recorded ranks are not the model's at top-{k}")


def _largest_difference(recorded: Losses, cut: slice, scored: NDArray[Any], name: str, dtype: str) -> float:
    """Of one column over one window, nats.

    Raises:
        MismatchError: more than two machines can differ.
    """
    column = getattr(recorded, name)
    if column is None or len(column[cut]) != len(scored):
        raise MismatchError(f"a window's {name} is not recorded for every token")
    found, expected = column[cut].astype(np.float64), scored.astype(np.float64)
    # What an alpha does to a loss is at most the ratio of the two, in nats.
    off = np.abs(np.log(found / expected) if name == "alpha" else found - expected)
    tolerance = TOLERANCE_NATS[dtype]
    if off.max(initial=0.0) > tolerance or off.mean() > tolerance / 10:
        raise MismatchError(
            f"a window's recorded {name} differs from the model's by up to {off.max():.4f} nats (tolerance {tolerance})"
        )
    return float(off.max(initial=0.0))
