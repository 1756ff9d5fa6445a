"""The engine, Ray included, against a bare loop over packed windows that computes nll from full logits and no more.

    python tests/benchmarks/engine.py FOLDER --shape gpt2 --tokens 1e5 --repeat 3

Both score the same model (random weights) on the same ids, in turns, windows of 512 in batches of 16. The bare loop is
the better of one process with all threads and one-thread processes, each with its share of the windows; building the
model and a first batch are not counted. The engine also computes entropy and rank and writes, commits and hashes every
loss; its start-up is not counted: time runs from the commit that ends the first wave of shards to the last.
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


def measure(folder: Path, shape: str, tokens: int, repeat: int, *, compile: bool = False) -> str:
    """One row of the table: medians over the repetitions, ratios within each."""
    architecture, replicas = SHAPES[shape], os.cpu_count() or 1
    tokens -= tokens % (LENGTH * BATCH * replicas)
    ids = token_file(folder / f"{shape}-{tokens}.bin", tokens + 1, architecture["vocab_size"])
    artifact = write_artifact(architecture, folder / f"{shape}.tokenbound")
    tree = run_tree(ids, architecture["vocab_size"], artifact, folder / f"run-{shape}", batch=BATCH)
    tree["how"] |= {"replicas": replicas, "compile": compile}
    shards = 8 * replicas
    tree["what"]["windows"]["shard_tokens"] = max(LENGTH * BATCH, tokens // shards // (LENGTH * BATCH) * LENGTH * BATCH)
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


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=float, default=2e5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="Set how.compile.")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    print("| shape | tokens | bare, tokens/s | engine, tokens/s | engine / bare | each |\n|---|---|---|---|---|---|")
    with ray_session():
        for shape in chosen.shape:
            row = measure(chosen.folder.resolve(), shape, int(chosen.tokens), chosen.repeat, compile=chosen.compile)
            print(row, flush=True)


if __name__ == "__main__":
    main()
