"""The head with loss, entropy and rank against `cross_entropy` on full logits, which gives the loss alone; and the head
with decisions along a tree as well.

    python tests/benchmarks/head.py --device cpu --repeat 7

Both start from the same hidden states of 4,096 tokens and take turns in one process; the ratio is the median over the
repetitions. On a processor the time is what this process spent computing, so that other work on the machine does not
count as ours. Peak memory is what each allocates beyond its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import machine
from torch.nn.functional import cross_entropy

from tokenbound.bounds.decisions import decision_tree
from tokenbound.errors import InputError
from tokenbound.models.head import token_statistics
from tokenbound.models.memory import LiveBytes

TOKENS = 4096
SHAPES = ((64, 512), (256, 32_000), (256, 50_257), (256, 128_256))
"""d and V."""


def contenders(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What takes turns, by name; the compiled head only where there is a compiler."""

    tree = decision_tree("zipf", len(weight))

    def nll_only() -> Any:
        with torch.inference_mode():
            return cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")

    found: dict[str, Callable[[], Any]] = {
        "nll only": nll_only,
        "eager": lambda: token_statistics(hidden, weight, None, targets),
        "eager, decisions": lambda: token_statistics(hidden, weight, None, targets, tree=tree),
    }
    try:
        token_statistics(hidden, weight, None, targets, compile=True)
    except InputError as error:
        print(f"not compiled: {error}")
        return found
    return {
        **found,
        "compiled": lambda: token_statistics(hidden, weight, None, targets, compile=True),
        "compiled, decisions": lambda: token_statistics(hidden, weight, None, targets, compile=True, tree=tree),
    }


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _wait(device)
    started = clock()
    function()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most that one call holds at once."""
    with torch.inference_mode(), LiveBytes() as live:
        function()
    return live.peak


def measure(width: int, vocab_size: int, device: torch.device, repeat: int, tokens: int = TOKENS) -> list[str]:
    """Rows of the table for one shape."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, width, device=device, dtype=dtype) / width**0.5
    targets = torch.randint(vocab_size, (tokens,), device=device)
    turns = contenders(hidden, weight, targets)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeat + 1):
        for name, function in turns.items():
            times[name].append(seconds(function, device))
    rows = []
    for name, function in turns.items():
        ratios = [own / base for own, base in zip(times[name][1:], times["nll only"][1:], strict=True)]
        memory = "" if name.startswith("compiled") else f"{peak_bytes(function) / 1e6:,.0f}"
        rows.append(
            f"| {width} | {vocab_size:,} | {name} | {1e6 * statistics.median(times[name][1:]) / tokens:.1f} "
            f"| {statistics.median(ratios):.2f} | {memory} |"
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, nargs="+", default=[vocab_size for _, vocab_size in SHAPES])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{machine()}; {chosen.threads} thread(s), {TOKENS:,} tokens")
    print("| d | V | head | us/token | time / nll only | peak MB |\n|---|---|---|---|---|---|")
    for width, vocab_size in (shape for shape in SHAPES if shape[1] in chosen.vocab):
        print(*measure(width, vocab_size, torch.device(chosen.device), chosen.repeat), sep="\n", flush=True)


if __name__ == "__main__":
    main()
