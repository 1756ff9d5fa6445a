"""Forward and backward of structured layers against `nn.Linear` of the same shape.

    python tests/benchmarks/layers.py --device cpu --repeat 7

All start from the same inputs and take turns in one process of one thread; ratios are medians over the repetitions. On
a CPU the time is the thread's own, so that other processes matter less. `operations` is the share of the dense layer's
multiplications that a layer needs in its forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import machine
from torch import nn

from tokenbound.models.structured.kronecker import KroneckerLinear
from tokenbound.models.structured.monarch import MonarchLinear

WIDTH, TOKENS = 1024, 4096
"""Inputs and outputs of the layer, and how many tokens it takes at once."""


def layers(width: int) -> dict[str, nn.Module]:
    """What takes turns, by name; the dense layer first."""
    found: dict[str, nn.Module] = {"dense": nn.Linear(width, width, bias=False)}
    for blocks in (4, 16, 32):
        if width % blocks == 0 and blocks * blocks <= width:
            found[f"monarch, {blocks} blocks"] = MonarchLinear(nn.Linear(width, width, bias=False), blocks)
    for terms in (1, 4):
        found[f"kronecker, {terms} terms"] = KroneckerLinear(nn.Linear(width, width, bias=False), terms)
    return found


def operations(layer: nn.Module, width: int) -> float:
    """Multiplications for each token in the forward pass, as a share of the dense layer's."""
    if isinstance(layer, MonarchLinear):
        return sum(parameter.numel() for parameter in layer.parameters()) / width**2
    if isinstance(layer, KroneckerLinear):
        (terms, m1, n1), (_, m2, n2) = layer.left.shape, layer.right.shape
        return terms * (n1 * n2 * m2 + n1 * m1 * m2) / width**2
    return 1.0


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call: of the processor, or on the clock until a GPU is done."""
    if device.type == "cpu":
        started = time.process_time()
        function()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def passes(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The forward pass alone, and both."""

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(slope)

    return {"forward": forward, "both": both}


def measure(width: int, tokens: int, device: torch.device, repeat: int) -> list[dict[str, Any]]:
    """A row for each layer: milliseconds, and time over the dense layer's."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    slope = torch.randn(tokens, width, device=device)
    chosen = {name: layer.to(device) for name, layer in layers(width).items()}
    calls = {name: passes(layer, x, slope) for name, layer in chosen.items()}
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in chosen for kind in ("forward", "both")}
    for turn in range(repeat + 1):
        for name, kind in times:
            found = seconds(calls[name][kind], device)
            if turn:  # the first is slower than the rest
                times[name, kind].append(found)
    return [_row(name, layer, times, width) for name, layer in chosen.items()]


def _row(name: str, layer: nn.Module, times: dict[tuple[str, str], list[float]], width: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": name,
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        "operations": operations(layer, width),
    }
    for kind in ("forward", "both"):
        own, dense = times[name, kind], times["dense", kind]
        row[f"{kind}_ms"] = 1e3 * statistics.median(own)
        row[f"{kind}_ratio"] = statistics.median(a / b for a, b in zip(own, dense, strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, {TOKENS:,} tokens of width {WIDTH}, one thread\n")
    print("| layer | parameters | operations | forward, ms | of dense | forward and backward, ms | of dense |")
    print("|---|---|---|---|---|---|---|")
    for row in measure(WIDTH, TOKENS, torch.device(arguments.device), arguments.repeat):
        print(
            f"| {row['layer']} | {row['parameters']:,} | {row['operations']:.3f} | {row['forward_ms']:.1f} | "
            f"{row['forward_ratio']:.2f} | {row['both_ms']:.1f} | {row['both_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
