"""The engine, Ray included, against a bare loop over packed windows that computes nll from full logits and no more.

    python tests/benchmarks/engine.py FOLDER --shape gpt2 --tokens 1e5 --repeat 3

Both score the same model (random weights) on the same ids, in turns, windows of 512 in batches of 16. The bare loop is
the better of one process with all threads and one-thread processes, each with its share of the windows; building the
model and a first batch are not counted. The engine also computes entropy and rank and writes, commits and hashes every
loss; its start-up is not counted: time runs from the commit that ends the first wave of shards to the last.

With `--decisions` two more tables follow: the engine with the line `bits` beside itself without, in turns; and what a
replica alone spends computing on one thread, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import commit_rate, machine, run_tree, span_s, together, token_file, write_artifact

from tokenbound.bounds.decisions import TreeChoice, code_lengths
from tokenbound.certificate.decisions import window_decisions
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.cluster.session import ray_session
from tokenbound.engine.evaluate.run import evaluate

LENGTH, BATCH = 512, 16

SHAPES: dict[str, dict[str, Any]] = {
    "stories": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 4,
        "n_embd": 256,
        "n_head": 4,
        "vocab_size": 50_257,
        "n_positions": 512,
    },
}


def bare_seconds(architecture: dict[str, Any], ids: Path, tokens: int, processes: int) -> float:
    """Seconds for all windows, on so many processes that share the threads of the machine."""
    return span_s(together(_bare_loop, (architecture, str(ids), tokens), processes))


def _bare_loop(
    architecture: dict[str, Any],
    ids: str,
    tokens: int,
    threads: int,
    part: int,
    parts: int,
    barrier: Any,
    queue: Any,
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from tokenbound.models.memory import random_model

    torch.set_num_threads(threads)
    model = random_model(architecture, torch.float32)
    stream = np.memmap(ids, "<u2", "r")
    windows = range(part * LENGTH * BATCH, tokens, parts * LENGTH * BATCH)

    def score(start: int) -> torch.Tensor:
        rows = np.asarray(stream[start : start + LENGTH * BATCH + 1]).astype(np.int64)
        inputs, targets = torch.from_numpy(rows[:-1]).view(-1, LENGTH), torch.from_numpy(rows[1:])
        logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")

    with torch.inference_mode():
        score(0)
        barrier.wait()
        started = time.monotonic()
        for start in windows:
            score(start)
    queue.put((started, time.monotonic(), None))


def engine_rate(tree: dict[str, Any]) -> float:
    """Scored tokens per second between the end of the first wave of shards and the last commit."""
    shutil.rmtree(tree["how"]["output"], ignore_errors=True)
    evaluate(validate(RunConfig, tree, origin="benchmark"))
    return commit_rate(Path(tree["how"]["output"]), tree["how"]["replicas"])


def engine_tree(folder: Path, shape: str, tokens: int, *, compile: bool) -> dict[str, Any]:
    """The run of a shape as plain data; `tokens` is made a multiple of what all replicas score at once."""
    architecture, replicas = SHAPES[shape], os.cpu_count() or 1
    tokens -= tokens % (LENGTH * BATCH * replicas)
    ids = token_file(folder / f"{shape}-{tokens}.bin", tokens + 1, architecture["vocab_size"])
    artifact = write_artifact(architecture, folder / f"{shape}.tokenbound")
    tree = run_tree(ids, architecture["vocab_size"], artifact, folder / f"run-{shape}", batch=BATCH)
    tree["how"] |= {"replicas": replicas, "compile": compile}
    shards = 8 * replicas
    tree["what"]["windows"]["shard_tokens"] = max(LENGTH * BATCH, tokens // shards // (LENGTH * BATCH) * LENGTH * BATCH)
    return tree


def measure(folder: Path, shape: str, tokens: int, repeat: int, *, compile: bool = False) -> str:
    """One row of the table: medians over the repetitions, ratios within each."""
    architecture, replicas = SHAPES[shape], os.cpu_count() or 1
    tokens -= tokens % (LENGTH * BATCH * replicas)
    tree = engine_tree(folder, shape, tokens, compile=compile)
    ids = Path(tree["what"]["corpus"]["paths"][0])
    bare, engine = [], []
    for _ in range(repeat):
        seconds = min(bare_seconds(architecture, ids, tokens, processes) for processes in (1, replicas))
        bare.append(tokens / seconds)
        engine.append(engine_rate(tree))
    ratios = [ours / theirs for ours, theirs in zip(engine, bare, strict=True)]
    name = shape + ", compiled head" * compile
    return (
        f"| {name} | {tokens:,} | {statistics.median(bare):,.0f} | {statistics.median(engine):,.0f} "
        f"| {statistics.median(ratios):.2f} | {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
    )


def measure_decisions(folder: Path, shape: str, tokens: int, repeat: int, *, compile: bool = False) -> str:
    """One row of the table of decisions: the engine without and with them, in turns."""
    tree = engine_tree(folder, shape, tokens, compile=compile)
    rates: dict[str, list[float]] = {"plain": [], "bits": []}
    for _ in range(repeat):
        for name, methods in (("plain", ["freedman", "azuma", "kl"]), ("bits", ["freedman", "azuma", "kl", "bits"])):
            tree["what"]["bound"] = {"methods": methods}
            rates[name].append(engine_rate(tree))
    ratios = [plain / bits for plain, bits in zip(rates["plain"], rates["bits"], strict=True)]
    name = shape + ", compiled head" * compile
    return (
        f"| {name} | {statistics.median(rates['plain']):,.0f} | {statistics.median(rates['bits']):,.0f} "
        f"| {statistics.median(ratios):.3f} | {', '.join(f'{ratio:.3f}' for ratio in ratios)} |"
    )


def replica_row(shape: str, repeat: int, *, compile: bool = False) -> str:
    """Processor time of one batch of one replica without decisions and along each kind of tree."""
    import torch

    from tokenbound.models.memory import random_model
    from tokenbound.models.replica import Replica

    torch.set_num_threads(1)
    architecture, rng = SHAPES[shape], np.random.default_rng(0)
    size = architecture["vocab_size"]
    counted = TreeChoice("counts", code_lengths(rng.zipf(1.3, size) % 100_000))
    trees = {"none": None, "zipf": TreeChoice("zipf"), "balanced": TreeChoice("balanced"), "counts": counted}
    model = random_model(architecture, torch.float32)
    replicas = {
        name: Replica(model, batch=BATCH, length=LENGTH, compile=compile, tree=tree) for name, tree in trees.items()
    }
    ids, every = rng.integers(0, size, (BATCH, LENGTH + 1)), np.ones((BATCH, LENGTH), bool)
    times: dict[str, list[float]] = {name: [] for name in replicas}
    for _ in range(repeat + 1):
        for name, replica in replicas.items():
            started = time.process_time()
            found = replica.score(ids[:, :-1], ids[:, 1:], every)
            if found.cells is not None:
                window_decisions(found.cells)
            times[name].append(time.process_time() - started)
    fastest = {name: min(each[1:]) / every.size for name, each in times.items()}
    cells = " | ".join(f"{1e6 * own:.1f} ({own / fastest['none']:.3f})" for own in fastest.values())
    return f"| {shape + ', compiled head' * compile} | {cells} |"


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=float, default=2e5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="Set how.compile.")
    parser.add_argument("--decisions", action="store_true", help="Also measure what recording decisions costs.")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    print("| shape | tokens | bare, tokens/s | engine, tokens/s | engine / bare | each |\n|---|---|---|---|---|---|")
    with ray_session():
        for shape in chosen.shape:
            row = measure(chosen.folder.resolve(), shape, int(chosen.tokens), chosen.repeat, compile=chosen.compile)
            print(row, flush=True)
        if chosen.decisions:
            print("\n| shape | engine, tokens/s | with decisions | time ratio | each |\n|---|---|---|---|---|")
            options: dict[str, Any] = {"compile": chosen.compile}
            for shape in chosen.shape:
                measured = chosen.folder.resolve(), shape, int(chosen.tokens), chosen.repeat
                print(measure_decisions(*measured, **options), flush=True)
    if chosen.decisions:
        print("\n| replica, us/token (ratio) | no decisions | zipf | balanced | counts |\n|---|---|---|---|---|")
        for shape in chosen.shape:
            print(replica_row(shape, chosen.repeat, compile=chosen.compile), flush=True)


if __name__ == "__main__":
    main()
