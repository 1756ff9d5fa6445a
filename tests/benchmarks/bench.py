"""What the benchmarks share: a description of the machine, memory by process, corpora of random ids."""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tokenbound.store.run import RunDirectory


def machine() -> str:
    """Date, processors and load, for the head of a table of results."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} x {model}, Python {platform.python_version()}, load {load:.1f}"
    )


def token_file(path: Path, tokens: int, vocab_size: int, *, seed: int = 0) -> Path:
    """A flat uint16 file of ids with Zipf frequencies; one that is there already is kept."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        with path.open("wb") as stream:
            for start in range(0, tokens, 1 << 22):
                count = min(1 << 22, tokens - start)
                np.floor(vocab_size ** rng.random(count)).astype("<u2").tofile(stream)
    return path


def run_tree(tokens: Path, vocab_size: int, artifact: Path, output: Path, **windows: Any) -> dict[str, Any]:
    """A run over such a file as plain data."""
    corpus = {"source": "tokens", "paths": [str(tokens)], "dtype": "uint16", "vocab_size": vocab_size}
    rule = {"tokenizer_is": "given", "add_bos": False, "add_eos": False}
    return {
        "what": {
            "model": {"artifact": str(artifact)},
            "corpus": {**corpus, **rule},
            "windows": {"length": 512, "context": "packed", **windows},
        },
        "how": {"output": str(output), "cache": str(output.parent / "prepared"), "device": "cpu"},
    }


def write_artifact(architecture: dict[str, Any], path: Path, *, seed: int = 0) -> Path:
    """An artifact of this architecture with random weights; one that is there already is kept."""
    if path.exists():
        return path
    import torch

    from tokenbound.compression.artifact import encode_artifact
    from tokenbound.config.compress import LosslessSettings
    from tokenbound.models.memory import random_model

    torch.manual_seed(seed)
    model = random_model(architecture, torch.float32)
    kept = dict(model.named_parameters())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_artifact(architecture, {n: p.detach() for n, p in kept.items()}, LosslessSettings()))
    return path


@dataclass
class Memory:
    """Private bytes (resident, not shared) of this process and of its largest descendant, sampled over time."""

    driver: list[int] = field(default_factory=list)
    actor: list[int] = field(default_factory=list)

    def sample(self, name: str) -> None:
        """Look once; actors are the descendants whose title contains the name."""
        own = psutil.Process()
        self.driver.append(_private_bytes(own))
        sizes = [_private_bytes(child) for child in own.children(recursive=True) if name in _title(child)]
        if sizes:
            self.actor.append(max(sizes))


def _private_bytes(process: psutil.Process) -> int:
    try:
        found = process.memory_info()
        return int(found.rss - found.shared)
    except psutil.Error:
        return 0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def watching(name: str, interval_s: float = 1.0) -> Iterator[Memory]:
    """Sample memory in a thread while the block runs."""
    memory, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(interval_s):
            memory.sample(name)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def commit_rate(output: Path, replicas: int) -> float:
    """Tokens per second from the commit that ends the first wave of shards to the last: start-up is not counted."""
    run = RunDirectory(str(output))
    folder = output / "shards"
    commits = sorted((path.stat().st_mtime, run.record(int(path.stem)).tokens) for path in folder.glob("*.json"))
    first = replicas - 1
    return sum(tokens for _, tokens in commits[first + 1 :]) / (commits[-1][0] - commits[first][0])


def together(loop: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> list[tuple[float, float, Any]]:
    """Run a loop on so many processes that share the threads of the machine.

    Args:
        loop: called with the arguments and then `threads, part, parts, barrier, queue`; it prepares, waits at the
            barrier, works, and puts ``(start, stop, result)`` into the queue, in seconds of the monotonic clock.
        arguments: of every process.
        processes: how many.

    Returns:
        What each put there.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    threads = max(1, (os.cpu_count() or 1) // processes)
    workers = [
        context.Process(target=loop, args=(*arguments, threads, part, processes, barrier, queue))
        for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=3600) for _ in workers]
    for worker in workers:
        worker.join()
    return found


def span_s(found: list[tuple[float, float, Any]]) -> float:
    """Seconds from the first start to the last stop."""
    return max(stop for _, stop, _ in found) - min(start for start, _, _ in found)
