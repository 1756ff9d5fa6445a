"""The whole engine over N tokens with a scorer that has no model: what grows is the corpus and nothing else.

    python tests/benchmarks/scale.py FOLDER --tokens 1e7 1e8 1e9
    python tests/benchmarks/scale.py FOLDER --tokens 1e7 --replicas 64

Ids are read from a flat file, windows planned, losses drawn from the ids and their positions, written in the plain
schema, committed, reduced and certified, by the code that every run uses; only the scoring actor is another. Memory is
private bytes: of this process, and of the largest actor. With more replicas than processors, Ray is told that the
machine has so many: what is tested then is scheduling.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from bench import commit_rate, machine, run_tree, token_file, watching, write_artifact

from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.cluster import session as cluster
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.evaluate.stages import ScoreShard

VOCAB = 50_257
SHAPE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": VOCAB, "n_positions": 512}


class SyntheticScorer(ScoreShard):
    """Losses like a language model's from a hash of token and position: as uneven as real ones, as costly to store."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Draw where the product would score."""
        mask = row["mask"]
        token, position = row["targets"][mask].astype(np.int32), row["position"][mask]
        document = row["document"][mask]
        share = _uniform(token.astype(np.uint64), position.astype(np.uint64) + document.astype(np.uint64))
        entropy = (9.0 * _uniform(position.astype(np.uint64), token.astype(np.uint64))).astype(np.float32)
        nll = (-np.log(share) * (0.05 + 0.9 * entropy)).astype(np.float32)
        return {
            "shard": row["shard"],
            "windows": row["windows"],
            "vocab_size": VOCAB,
            "lengths": mask.sum(axis=1).astype(np.int64),
            "unscored": np.zeros(len(mask), bool),
            "nll": nll,
            "entropy": entropy,
            "rank": np.minimum(np.expm1(np.minimum(nll, 10.0)), VOCAB - 1).astype(np.int32),
            "token": token,
            "document": document,
            "position": position,
        }


def _uniform(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1) from two integers each (a multiplicative hash with its high bits folded in)."""
    mixed = left * np.uint64(0x9E3779B97F4A7C15) + right * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(40)).astype(np.float32) + 0.5) * np.float32(2.0**-24)


@dataclass(frozen=True)
class Measured:
    """One size."""

    tokens: int
    shards: int
    total_s: float
    """From the command to the certificate, the session and the file of ids not counted."""
    tokens_per_second: float
    """Scored and committed, from the end of the first wave of shards to the last."""
    losses_bytes: int
    driver_bytes: tuple[int, int]
    """Private bytes of this process, one quarter through and at the end."""
    actor_bytes: tuple[int, int]


def measure(folder: Path, tokens: int, replicas: int) -> Measured:
    """Run the engine once over so many tokens."""
    output = folder / f"run-{tokens}"
    shutil.rmtree(output, ignore_errors=True)
    ids = token_file(folder / f"ids-{tokens}.bin", tokens + 1, VOCAB)
    tree = run_tree(ids, VOCAB, write_artifact(SHAPE, folder / "tiny.tokenbound"), output)
    tree["how"]["replicas"] = replicas
    started = time.perf_counter()
    with watching("MapWorker") as memory:
        certificate = evaluate(validate(RunConfig, tree, origin="benchmark"))
    total_s = time.perf_counter() - started
    assert certificate.num_scored_tokens == certificate.num_tokens == tokens
    return Measured(
        tokens,
        certificate.num_shards,
        total_s,
        commit_rate(output, replicas),
        sum(path.stat().st_size for path in (output / "losses").iterdir()),
        _quarter_and_end(memory.driver),
        _quarter_and_end(memory.actor),
    )


def _quarter_and_end(sizes: list[int]) -> tuple[int, int]:
    return (sizes[len(sizes) // 4], sizes[-1]) if sizes else (0, 0)


def markdown(rows: list[Measured]) -> str:
    """The sizes as a table."""
    head = "| tokens | shards | s | tokens/s, scoring | tokens/s, all | bytes/token | driver MB | actor MB |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(_row, rows)])


def _row(each: Measured) -> str:
    driver, actor = map(_megabytes, (each.driver_bytes, each.actor_bytes))
    return (
        f"| {each.tokens:,} | {each.shards:,} | {each.total_s:.0f} | {each.tokens_per_second:,.0f} "
        f"| {each.tokens / each.total_s:,.0f} | {each.losses_bytes / each.tokens:.2f} | {driver} | {actor} |"
    )


def _megabytes(sizes: tuple[int, int]) -> str:
    return " -> ".join(f"{size / 1e6:.0f}" for size in sizes)


@contextmanager
def session(replicas: int) -> Iterator[None]:
    """A local Ray that has a logical processor for every replica, and never fewer than the machine."""
    if replicas > (os.cpu_count() or 1):
        ray.init(num_cpus=replicas, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with cluster.ray_session():
        yield
    if ray.is_initialized():
        ray.shutdown()


class Synthetic(Executor):
    """Ray, with scorers that make their losses up."""

    def stream(self, rows: Any, *, scorer: Any, **stages: Any) -> Any:
        """As usual, with another scorer."""
        return super().stream(rows, scorer=SyntheticScorer, **stages)


def main() -> None:
    """Measure the sizes, smallest first, in one Ray session."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e7, 1e8, 1e9])
    parser.add_argument("--replicas", type=int, default=2)
    chosen = parser.parse_args()
    print(machine(), flush=True)
    rows = []
    with session(chosen.replicas), use_executor(Synthetic()):
        for tokens in chosen.tokens:
            rows.append(measure(chosen.folder.resolve(), int(tokens), chosen.replicas))
            print(_row(rows[-1]), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
