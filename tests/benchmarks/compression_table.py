"""What each way to compress one model costs: bytes, bits per weight, loss, and the bounds that follow.

    python tests/benchmarks/compression_table.py CHECKPOINT RUN_CONFIG --work DIR [--rows TEXT ...] [--tokens N]
                                                 [--artifacts FILE ...]

Every row is a real encoded file: the methods of practice have their codes in plain bytes and the whole file under gzip,
ours are artifacts. All are scored in one process on the same windows, drawn apart from those that calibrate. Bounds
take these losses for those of the whole corpus of m tokens, and of one ten times as large: estimates, to compare
methods by. Finished rows are kept in the work directory, so that a run which was stopped goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenbound.compression.artifact import decode_artifact, encode_artifact, parse_artifact
from tokenbound.compression.bytestreams import zstd_level
from tokenbound.compression.calibration import Calibration, collect_calibration
from tokenbound.compression.codecs import CODECS, groups
from tokenbound.compression.dtypes import dtype_of, tensor_bytes
from tokenbound.compression.quantizers import gptq
from tokenbound.config.compress import AutoSettings, E8Settings, GptqSettings, KfacSettings
from tokenbound.config.run import RunConfig, load_config
from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.session import ray_session
from tokenbound.engine.compress.predicted_bound import CALIBRATION_TOKENS, CANDIDATE_TOKENS, bound_if_all
from tokenbound.engine.compress.run import encode_checkpoint
from tokenbound.engine.corpus import Text, open_corpus, text_of
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import Checkpoint, read_checkpoint
from tokenbound.models.replica import Replica

BATCH = 8
RATES = (2.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table; bounds in bits per token, at m and ten times m."""

    method: str
    bytes: int
    bits_per_weight: float
    loss_bits: float
    azuma: float
    azuma_10m: float
    freedman: float
    freedman_10m: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """One checkpoint and the text that it is measured on."""

    path: str
    text: Text
    tokens: int
    work: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The float model."""
        return read_checkpoint(self.path)

    @cached_property
    def identity(self) -> str:
        """Digest of the weights, of the corpus and of how much of it is scored."""
        digest = hashlib.sha256(f"{self.text} {self.tokens}".encode())
        for name, tensor in sorted(self.checkpoint.tensors.items()):
            digest.update(name.encode() + tensor_bytes(tensor).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, windows: list[int]) -> Any:
        """Inputs, targets and mask of windows."""
        corpus, plan = open_plan(self.text.corpus_root, self.text.spec)
        return gather(corpus, plan.windows(windows), self.text.spec.length)

    @cached_property
    def calibration(self) -> Calibration:
        """Kept in the work directory: all rows share it."""
        kept = self.work / f"calibration-{self.identity}.pt"
        if not kept.exists():
            model = self.build(self.checkpoint.tensors)
            batch = self.batch(self.text.windows(CALIBRATION_TOKENS))
            parts = [slice(i, i + BATCH) for i in range(0, len(batch.inputs), BATCH)]
            pairs = ((torch.from_numpy(batch.inputs[p]), torch.from_numpy(batch.mask[p])) for p in parts)
            torch.save(collect_calibration(model, pairs), kept)
        calibration: Calibration = torch.load(kept, weights_only=False)
        return calibration

    def build(self, tensors: Tensors) -> Any:
        """A float32 model of this architecture."""
        return build_model(self.checkpoint.architecture, tensors, dtype=torch.float32, device="cpu")

    def score(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray, int]:
        """Losses and entropies (nats) of the scored windows, and V."""
        seen = math.ceil((CALIBRATION_TOKENS + CANDIDATE_TOKENS) / self.text.spec.length)
        batch = self.batch(self.text.windows(self.tokens, skip=seen))
        replica = Replica(self.build(tensors), batch=BATCH, length=self.text.spec.length)
        parts = [slice(i, i + BATCH) for i in range(0, len(batch.inputs), BATCH)]
        found = [replica.score(batch.inputs[p], batch.targets[p], batch.mask[p]) for p in parts]
        nll, entropy = (np.concatenate([getattr(f, k) for f in found])[batch.mask] for k in ("nll", "entropy"))
        return np.maximum(nll, 0), np.maximum(entropy, 0), replica.vocab_size


# Methods: each gives the bytes that are counted and the tensors that are scored

Made = tuple[int, Tensors]


def float16(bench: Bench) -> Made:
    tensors = {name: tensor.to(torch.float16) for name, tensor in bench.checkpoint.tensors.items()}
    plain = b"".join(tensor_bytes(tensor).tobytes() for tensor in tensors.values())
    return len(zstd_level(19).compress(plain, asbytes=True)), {n: t.float() for n, t in tensors.items()}


def nearest(bench: Bench, *, bits: int, group: int) -> Made:
    """Round to nearest with group scales, everything but linear layers in float16."""
    plain, tensors = [], {}
    for name, tensor in bench.checkpoint.tensors.items():
        curvature = bench.calibration.curvature(name)
        if tensor.ndim != 2 or curvature is None or curvature.is_embedding:
            half = tensor.to(torch.float16)
            plain.append(tensor_bytes(half).tobytes())
            tensors[name] = half.float()
            continue
        codes = gptq.quantize_groups(tensor.float(), bits, group, None)
        tensors[name] = torch.from_numpy(groups.group_values(codes))
        plain += [packed(codes.codes, bits), packed(codes.zeros, bits), codes.scales.tobytes()]
    return len(gzip.compress(b"".join(plain), 9)), tensors


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Unsigned codes in so many bits each, as deployed formats keep them."""
    planes = (codes.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8)).tobytes()


def practice(bench: Bench, *, settings: GptqSettings | E8Settings) -> Made:
    """GPTQ or E8 as practised: plain codes, scales and float16 rest in one file under gzip."""
    data = encode_artifact(
        bench.checkpoint.architecture, bench.checkpoint.tensors, settings, calibration=bench.calibration
    )
    plain = b"".join(
        CODECS[item.codec].plain(memoryview(item.payload), item.shape, dtype_of(item.dtype))
        for item in parse_artifact(data).coded
    )
    return min(len(gzip.compress(plain, 9)), len(data)), decode_artifact(data).tensors


def entropy_coded(bench: Bench, *, settings: KfacSettings) -> Made:
    data = encode_artifact(
        bench.checkpoint.architecture, bench.checkpoint.tensors, settings, calibration=bench.calibration
    )
    return len(data), decode_artifact(data).tensors


def pipeline(bench: Bench, *, settings: AutoSettings) -> Made:
    """What `tokenbound compress` does, on Ray."""
    data = encode_checkpoint(bench.path, settings, text=bench.text)
    (bench.work / f"auto-{bench.identity}.tokenbound").write_bytes(data)
    return len(data), decode_artifact(data).tensors


def given(bench: Bench, *, path: Path) -> Made:
    """An artifact of the same architecture that was made elsewhere, by training for instance."""
    data = path.read_bytes()
    return len(data), decode_artifact(data).tensors


METHODS: dict[str, Callable[[Bench], Made]] = {
    "float32": lambda bench: (
        sum(t.nbytes for t in bench.checkpoint.tensors.values()),
        bench.checkpoint.tensors,
    ),
    "fp16, zstd-19": float16,
    "RTN 4 bit g128, fp16 embeddings, gzip": partial(nearest, bits=4, group=128),
    **{
        f"GPTQ {bits} bit g128, fp16 embeddings, gzip": partial(practice, settings=GptqSettings(bits=bits))
        for bits in (4, 3, 2)
    },
    **{
        f"E8P-like {bits} bit, fp16 embeddings, gzip": partial(practice, settings=E8Settings(bits=bits))
        for bits in (4, 3, 2)
    },
    **{f"kfac rate {rate:g}": partial(entropy_coded, settings=KfacSettings(rate=rate)) for rate in RATES},
    "auto": partial(pipeline, settings=AutoSettings()),
}


# The table


def measure(bench: Bench, method: str) -> Row:
    """One row, from the work directory where it is there."""
    kept = bench.work / f"row-{hashlib.sha256(f'{bench.identity} {method}'.encode()).hexdigest()[:16]}.json"
    if kept.exists():
        return Row(**json.loads(kept.read_text()))
    started = time.monotonic()
    num_bytes, tensors = METHODS[method](bench)
    losses = bench.score(tensors)
    m = bench.text.num_tokens
    bounds = [bound_if_all(losses, num_bytes, n, method=kind) for kind in ("azuma", "freedman") for n in (m, 10 * m)]
    weights = sum(tensor.numel() for tensor in bench.checkpoint.tensors.values())
    loss = float(losses[0].mean(dtype=np.float64)) / math.log(2)
    row = Row(method, num_bytes, 8 * num_bytes / weights, loss, *bounds, time.monotonic() - started)
    kept.write_text(json.dumps(asdict(row)))
    return row


def bytes_at_loss(rows: list[Row], loss: float) -> float | None:
    """Bytes of the entropy-coded curve at a loss: log-linear between its neighbours."""
    curve = sorted((row.loss_bits, row.bytes) for row in rows)
    for (low, many), (high, few) in pairwise(curve):
        if low <= loss <= high:
            return math.exp(np.interp(loss, [low, high], [math.log(many), math.log(few)]))
    return None


def summary(rows: dict[str, Row]) -> list[str]:
    """The two ratios; the rate that is best for a corpus of m tokens is not the best for ten times as many."""
    lines = []
    curve = [row for name, row in rows.items() if name.startswith("kfac")]
    gptq_row = rows.get("GPTQ 2 bit g128, fp16 embeddings, gzip")
    if gptq_row is not None and (equal := bytes_at_loss(curve, gptq_row.loss_bits)) is not None:
        lines.append(f"bytes at the loss of GPTQ 2 bit + gzip: {equal / gptq_row.bytes:.3f} of it")
    e8 = [row for name, row in rows.items() if name.startswith("E8P")]
    curve += [rows["auto"]] if "auto" in rows else []
    if e8 and curve and "float32" in rows:
        floor = rows["float32"].loss_bits
        for label, azuma, freedman in (("m", "azuma", "freedman"), ("10 m", "azuma_10m", "freedman_10m")):
            ours = min(curve, key=lambda row: getattr(row, freedman))
            gap = (getattr(ours, freedman) - floor) / (min(getattr(row, azuma) for row in e8) - floor)
            lines.append(f"gap over the float loss at {label}, {ours.method} to E8P practice: {gap:.3f}")
    return lines


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = (
        "| method | bytes | bits/weight | loss | azuma m / 10m | freedman m / 10m | s |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join(
        [head]
        + [
            f"| {r.method} | {r.bytes:,} | {r.bits_per_weight:.2f} | {r.loss_bits:.4f} | {r.azuma:.3f} / "
            f"{r.azuma_10m:.3f} | {r.freedman:.3f} / {r.freedman_10m:.3f} | {r.seconds:.0f} |"
            for r in rows
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("config", help="run config: its corpus and windows are used")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows that contain one of these texts")
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--artifacts", type=Path, nargs="*", default=[], help="artifacts to score as rows of their own")
    options = parser.parse_args()
    for path in options.artifacts:
        METHODS[f"{path.parent.name}, {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"] = partial(given, path=path)
    options.work.mkdir(parents=True, exist_ok=True)
    run = load_config(RunConfig, options.config)
    with ray_session(run.how.ray_address):
        corpus = open_corpus(run.what.corpus, output=run.how.output, cache=run.how.cache)
        bench = Bench(options.checkpoint, text_of(corpus, run.what.windows), options.tokens, options.work)
        rows = {}
        for name in METHODS:
            if any(text in name for text in options.rows):
                rows[name] = measure(bench, name)
                print(table([rows[name]]).split("\n")[-1], flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {time.strftime('%Y-%m-%d')}, m = {bench.text.num_tokens:,}")
    print(table(list(rows.values())), *summary(rows), sep="\n")


if __name__ == "__main__":
    main()
