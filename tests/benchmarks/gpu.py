"""What one GPU makes of the scoring path: Llama-7B and GPT-2-small shapes with random weights, in bfloat16.

    python tests/benchmarks/gpu.py                                  # one CUDA device, some ten minutes
    python tests/benchmarks/gpu.py --compile                        # with the passes over the logits fused
    python tests/benchmarks/gpu.py --forms FOLDER                   # also packed and streamed, from artifacts in FOLDER
    python tests/benchmarks/gpu.py --device cpu --toy --repeat 1    # whether it runs

For each shape, window length and vocabulary: scored tokens per second of the whole replica, the share of the measured
matrix ceiling that its products reach, the head's share of the time, and peak memory. The ceiling is the best rate of
three large square products on the same device. Products of a forward pass: two operations for each weight of the body
that multiplies and for each of the head, and the two products of causal attention, of which half is counted.

Packed and streamed replicas score a shard of some batches, for which the weights of a layer are made once: of a 7B
artifact with 4 bits, beside the dense rows above, and of a 70B artifact with 2 bits, which fits dense on no GPU. The
artifacts have one layer's random codes in all layers; they are made first, and kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import machine
from big_models import SHAPES
from forms import repeated_artifact, some_windows

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.errors import ReplicaOutOfMemory
from tokenbound.models.head import body_and_projection
from tokenbound.models.memory import random_model
from tokenbound.models.replica import Replica
from tokenbound.models.sources import MapSource, PackedSource

CEILING_SIZES = (4096, 8192, 16384)

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
GPT2_SMALL: dict[str, Any] = {"model_type": "gpt2", "n_positions": 4096}


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    architecture: dict[str, Any]
    length: int
    batch: int


@dataclass(frozen=True)
class Measured:
    """What came out."""

    case: Case
    tokens_per_second: float
    ceiling_share: float
    head_share: float
    peak_bytes: int


def toy_cases() -> list[Case]:
    """The same shapes made so small that a processor runs them in a second."""
    llama = {**LLAMA_7B, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {**GPT2_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 2}
    shapes = (("toy llama", llama), ("toy gpt2", gpt2))
    return [Case(f"{name}, V=500", {**shape, "vocab_size": 500}, 64, 2) for name, shape in shapes]


def cases() -> list[Case]:
    """Both shapes at both lengths and vocabularies, 16,384 tokens in a batch."""
    shapes = (("llama-7b", LLAMA_7B), ("gpt2-small", GPT2_SMALL))
    return [
        Case(f"{name}, V={vocab_size:,}", {**shape, "vocab_size": vocab_size}, length, 16_384 // length)
        for name, shape in shapes
        for vocab_size in (32_000, 128_256)
        for length in (2048, 4096)
    ]


def seconds(function: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Median over the repetitions, after one that is not counted."""
    times = []
    for _ in range(repeat + 1):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], repeat: int) -> float:
    """Operations per second of the fastest of some square products."""
    rates = []
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * size**3 / seconds(lambda left=left, right=right: left @ right, device, repeat))  # type: ignore[misc]
    return max(rates)


def operations_per_token(model: Any, length: int) -> float:
    """Of the matrix products of a forward pass, head included; embeddings are looked up and cost none."""
    body, projection = body_and_projection(model)  # type: ignore[misc]
    weights = sum(p.numel() for n, p in body.named_parameters() if p.ndim == 2 and not _is_embedding(body, n))
    config = model.config.get_text_config()
    attention = 2 * length * config.hidden_size * config.num_hidden_layers
    return float(2 * (weights + projection.weight.numel()) + attention)


def _is_embedding(body: Any, name: str) -> bool:
    return isinstance(body.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding)


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, *, ceiling_per_s: float, repeat: int, compile: bool = False
) -> Measured:
    """Build the model with random weights on the device and score random ids at one shape."""
    torch.manual_seed(0)
    with torch.device(device):
        model = random_model(case.architecture, dtype)
    replica = Replica(model, batch=case.batch, length=case.length, device=device, compile=compile)
    assert replica.head is not None, "these shapes have heads that are recognised"
    rng = np.random.default_rng(0)
    ids = rng.integers(0, replica.vocab_size, (case.batch, case.length + 1))
    mask = np.ones((case.batch, case.length), bool)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole_s = seconds(lambda: replica.score(ids[:, :-1], ids[:, 1:], mask), device, repeat)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    hidden = torch.randn(case.batch * case.length, replica.head.weight.shape[1], device=device, dtype=dtype)
    targets = torch.from_numpy(ids[:, 1:].reshape(-1).copy()).to(device)
    head = replica.head
    head_s = seconds(lambda: head.statistics(hidden, targets, compile=replica.compile), device, repeat)
    rate = case.batch * case.length / whole_s
    share = rate * operations_per_token(model, case.length) / ceiling_per_s
    return Measured(case, rate, share, head_s / whole_s, peak)


FORM_CASES = (("llama2-7b", 4.0), ("llama2-70b", 2.0))
"""Shapes of `big_models`, and bits of their artifacts."""
SHARD_BATCHES = 4


def measure_form(
    form: str,
    shape: str,
    bits: float,
    folder: Path,
    device: torch.device,
    *,
    ceiling_per_s: float,
    length: int = 2048,
    batch: int = 8,
) -> Measured:
    """Score a shard of random ids with a packed or streamed replica of an artifact; loading is not counted."""
    artifact = ArtifactFile(repeated_artifact(SHAPES[shape], bits, folder / f"{shape}-{bits:g}bit.tokenbound"))
    case = Case(f"{shape}, {bits:g} bits, {form}", artifact.architecture, length, batch)
    workers = min(16, torch.get_num_threads())
    source = PackedSource(artifact, device, workers=workers) if form == "packed" else MapSource(artifact.tensors)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    replica = Replica.from_source(
        artifact.architecture, source, dtype=torch.bfloat16, device=device, batch=case.batch, length=length
    )
    windows = some_windows(SHARD_BATCHES * case.batch, length, replica.vocab_size)
    whole_s = seconds(lambda: replica.score(*windows), device, 1)
    rate = SHARD_BATCHES * case.batch * length / whole_s
    share = rate * operations_per_token(replica.model, length) / ceiling_per_s
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(case, rate, share, float("nan"), peak)


def row(each: Measured) -> str:
    """One line of the table."""
    case = each.case
    return (
        f"| {case.name} | {case.batch} x {case.length} | {each.tokens_per_second:,.0f} | {each.ceiling_share:.0%} "
        f"| {each.head_share:.0%} | {each.peak_bytes / 1e9:.1f} |"
    )


def line(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> str:
    """A row of the table, also of a case that does not fit into memory."""
    try:
        return row(measure(case, device, dtype, **options))
    except ReplicaOutOfMemory as error:
        return f"| {case.name} | {case.batch} x {case.length} | {str(error).partition(';')[0]} | | | |"


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="Fuse the passes over the logits.")
    parser.add_argument("--forms", type=Path, help="Also measure packed and streamed replicas, from artifacts here.")
    parser.add_argument("--toy", action="store_true", help="Tiny shapes: whether it runs, not how fast.")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    device, dtype = torch.device(chosen.device), torch.bfloat16
    found = ceiling(device, dtype, (64, 128) if chosen.toy else CEILING_SIZES, chosen.repeat)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{machine()}; {name}, torch {torch.__version__}, ceiling {found / 1e12:.3g} TFLOP/s in bfloat16")
    print("| shape | batch | tokens/s | of the ceiling | head's share of time | peak GB |\n|---|---|---|---|---|---|")
    for case in toy_cases() if chosen.toy else cases():
        options = {"ceiling_per_s": found, "repeat": chosen.repeat, "compile": chosen.compile}
        print(line(case, device, dtype, **options), flush=True)
        torch.cuda.empty_cache()
    for shape, bits in () if chosen.forms is None else (("toy", 4.0),) if chosen.toy else FORM_CASES:
        for form in ("packed", "streamed"):
            size = {"length": 64, "batch": 2} if chosen.toy else {}
            print(row(measure_form(form, shape, bits, chosen.forms, device, ceiling_per_s=found, **size)), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
