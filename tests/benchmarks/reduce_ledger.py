"""How long the reducer takes over a ledger of N tokens, beside DuckDB on the same files.

    python tests/benchmarks/reduce_ledger.py FOLDER --tokens 1e7 1e8 1e9

Writes FOLDER/N, a run of synthetic losses in the real Parquet schema with its commit records, through the writer that
runs use. Then, in turns, the reducer of the product chooses the grid points of all lines and evaluates them exactly,
and DuckDB computes the mean smoothed loss for one alpha from the same files. A folder that is there is used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from tokenbound.bounds.claim import Claim
from tokenbound.certificate.reduce import Reduction, RunLedger, reduce_ledger, shard_evidence
from tokenbound.engine.cluster.ray_map import ray_map
from tokenbound.engine.cluster.session import cluster_resources, ray_session
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

VOCAB, WINDOW, TOP_K = 50_257, 512, (1, 10, 100)
SHARD_TOKENS = 1 << 19
"""The largest shard that runs plan by themselves; smaller ledgers are cut into 64 shards, as runs are."""
KAPPA_PER_TOKEN = 0.024
"""The code length is such that the choice among grid points is a real one at every N."""
DUCKDB_ALPHA = 0.01
FINGERPRINT = "synthetic"


@dataclass(frozen=True)
class Times:
    """Medians over the repetitions."""

    wall_s: float
    cpu_s: float
    """Of this process and all below it: what the work costs, however busy the machine is."""

    @classmethod
    def of(cls, each: list[Times]) -> Times:
        """Medians of both."""
        return cls(float(np.median([one.wall_s for one in each])), float(np.median([one.cpu_s for one in each])))


@dataclass(frozen=True)
class Measured:
    """One ledger."""

    tokens: int
    reduce: Times
    duckdb: Times
    peak_rss_bytes: int
    """Largest sum of resident sets of this process and all below it while reducing; shared pages count each time."""
    peak_pss_bytes: int
    """The same with every page counted once."""


def draw_losses(shard: int, tokens: int) -> Losses:
    """Losses with the shape of a language model's: half of the tokens easy, a heavy tail, nll following the entropy."""
    rng = np.random.default_rng([7, shard])
    entropy = np.minimum(rng.gamma(1.1, 1.6, tokens), math.log(VOCAB))
    easy = rng.random(tokens) < np.exp(-0.9 * entropy)
    nll = rng.standard_exponential(tokens) * np.where(easy, 0.15 * entropy, 0.7 + 0.9 * entropy)
    windows = -(-tokens // WINDOW)
    position = np.arange(tokens, dtype=np.int64) + shard * tokens
    return Losses(
        window_id=np.arange(windows) + shard * windows,
        offsets=np.minimum(np.arange(windows + 1) * WINDOW, tokens),
        unscored=np.zeros(windows, bool),
        document=position // 700,
        position=(position % 700).astype(np.int32),
        nll=nll.astype(np.float32),
        entropy=entropy.astype(np.float32),
        rank=np.minimum(np.expm1(np.maximum(1.4 * nll - 1, 0)), VOCAB - 1).astype(np.int32),
        token=np.minimum(20 * rng.standard_exponential(tokens) ** 3, VOCAB - 1).astype(np.int32),
    )


def shard_sizes(tokens: int) -> list[int]:
    """Tokens of each shard."""
    size = min(SHARD_TOKENS, -(-tokens // 64))
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def write_shard(root: str, sizes: list[int], shard: int) -> int:
    """Commit one shard, unless it is there; returns its tokens."""
    run = RunDirectory(root)
    if not run.exists(f"shards/{shard:05d}.json"):
        losses = draw_losses(shard, sizes[shard])
        run.commit(shard, losses, json.loads(shard_evidence(losses, VOCAB, TOP_K).to_json()), FINGERPRINT)
    return sizes[shard]


def write_ledger(root: str, tokens: int) -> RunLedger:
    """The committed run of so many tokens."""
    sizes = shard_sizes(tokens)
    assert sum(ray_map(partial(write_shard, root, sizes), range(len(sizes)))) == tokens
    return RunLedger(root, len(sizes), FINGERPRINT, VOCAB)


def reduce(ledger: RunLedger, tokens: int) -> Reduction:
    """What the product does with a complete run: choose for every line, then evaluate exactly."""
    code_bits = KAPPA_PER_TOKEN * tokens / math.log(2)
    claim = Claim(VOCAB, VOCAB, code_bits, 0.05, tokens, methods=("freedman", "azuma", "kl"), top_k=TOP_K)
    reduction = reduce_ledger(ledger, claim, run=ray_map)
    assert reduction.sums.num_tokens == tokens
    return reduction


def duckdb_mean_bits(root: str, alpha: float, threads: int) -> float:
    """Mean smoothed loss for one alpha."""
    keep, floor = 1 - alpha, alpha / VOCAB
    with duckdb.connect(config={"threads": threads}) as connection:
        query = f"""select -avg(log2({keep!r} * exp(-nll::double) + {floor!r}))
            from (select unnest(nll) as nll from read_parquet('{root}/losses/*.parquet'))"""
        return float(connection.sql(query).fetchall()[0][0])


def agrees(root: str, reduction: Reduction, threads: int) -> bool:
    """Whether DuckDB finds the reducer's mean of the azuma line."""
    azuma = next(line for line in reduction.lines if line.method == "azuma")
    return math.isclose(duckdb_mean_bits(root, azuma.parameters["alpha"], threads), azuma.empirical, rel_tol=1e-9)


def timed(function: Callable[[], Any]) -> Times:
    """Run it once."""
    start, cpu = time.perf_counter(), cpu_seconds()
    function()
    return Times(time.perf_counter() - start, cpu_seconds() - cpu)


def measure(root: str, tokens: int, repeats: int) -> Measured:
    """Reduce and query in turns; the first reduction starts the workers and is watched for memory, not timed."""
    ledger, threads = write_ledger(root, tokens), cluster_resources().cpus
    with watched_memory() as peaks:
        reduction = reduce(ledger, tokens)
    if not agrees(root, reduction, threads):
        raise AssertionError("DuckDB finds another mean loss than the reducer")
    reduce_times, duckdb_times = [], []
    for _ in range(repeats):
        reduce_times.append(timed(lambda: reduce(ledger, tokens)))
        duckdb_times.append(timed(lambda: duckdb_mean_bits(root, DUCKDB_ALPHA, threads)))
    return Measured(tokens, Times.of(reduce_times), Times.of(duckdb_times), peaks["Rss"], peaks["Pss"])


@contextmanager
def watched_memory(interval_s: float = 0.2) -> Iterator[dict[str, int]]:
    """Peaks of the summed `Rss` and `Pss`, bytes, of this process and all below it."""
    peaks, stop = {"Rss": 0, "Pss": 0}, threading.Event()

    def watch() -> None:
        ended = False
        while not ended:  # once more at the end: a short run may lie between two looks
            ended = stop.wait(interval_s)
            now = [memory(pid) for pid in process_tree()]
            for name in peaks:
                peaks[name] = max(peaks[name], sum(each.get(name, 0) for each in now))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def process_tree() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
    found = [int(Path("/proc/self").readlink().name)]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_seconds() -> float:
    """Processor time of this process and all below it."""
    ticks = 0
    for pid in process_tree():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, int]:
    """`Rss` and `Pss` of a process in bytes; empty if it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    cells = [line.split() for line in lines]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in cells if words[0] in ("Rss:", "Pss:")}


def markdown(rows: list[Measured]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| tokens | reduce, s | CPU ns/token | DuckDB mean, s | CPU ns/token | reduce over DuckDB, s | by CPU "
        "| peak PSS, GB | RSS sum, GB |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *map(_cells, rows)])


def _cells(row: Measured) -> str:
    ours, theirs, per_token = row.reduce, row.duckdb, 1e9 / row.tokens
    cells = (
        f"{row.tokens:,}",
        *(cell for each in (ours, theirs) for cell in (f"{each.wall_s:.2f}", f"{each.cpu_s * per_token:.1f}")),
        *(f"{ratio:.2f}" for ratio in (ours.wall_s / theirs.wall_s, ours.cpu_s / max(theirs.cpu_s, 1e-9))),
        *(f"{size / 1e9:.2f}" for size in (row.peak_pss_bytes, row.peak_rss_bytes)),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the ledgers are; 8.4 bytes per token")
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e7, 1e8, 1e9])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write-only", action="store_true", help="write the ledgers, measure nothing")
    arguments = parser.parse_args()
    with ray_session():
        for_each = [(f"{arguments.folder}/{int(n)}", int(n)) for n in arguments.tokens]
        if arguments.write_only:
            for root, tokens in for_each:
                print(f"{tokens:,} tokens: {timed(partial(write_ledger, root, tokens)).wall_s:.0f} s", flush=True)
            return
        print(markdown([measure(root, tokens, arguments.repeats) for root, tokens in for_each]))


if __name__ == "__main__":
    main()
