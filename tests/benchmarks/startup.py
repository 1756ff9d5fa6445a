"""Seconds from the command to the first committed shard, and where they go.

    python tests/benchmarks/startup.py FOLDER

The model is the one that the package ships, the corpus a small file of ids, and a shard two batches, so that hardly
anything of the last phase is scoring. Every repetition is a fresh process with a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from bench import machine, run_tree, token_file

PHASES = ("interpreter and imports", "Ray", "corpus, model and plan", "workers, to the first shard", "first commit")
TOKENS, VOCAB = 1 << 16, 257


def phases(folder: Path) -> dict[str, float]:
    """Run the engine in this process, which must be fresh, and say when each phase ended."""
    from tokenbound.config.run import RunConfig, validate
    from tokenbound.demo import demo_artifact
    from tokenbound.engine.cluster.session import ray_session
    from tokenbound.engine.evaluate.preparation import prepare
    from tokenbound.engine.evaluate.run import evaluate

    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    artifact = folder / "demo.tokenbound"
    artifact.write_bytes(demo_artifact())
    ids = token_file(folder / "ids.bin", TOKENS + 1, VOCAB)
    config = validate(RunConfig, run_tree(ids, VOCAB, artifact, output, shard_tokens=1 << 14), origin="benchmark")
    ends = [psutil.Process().create_time(), time.time()]
    with ray_session():
        ends.append(time.time())
        prepare(config)
        ends.append(time.time())
        evaluate(config)
    ends += [min(path.stat().st_mtime for path in (output / name).iterdir()) for name in ("attempts", "shards")]
    return {name: stop - start for name, start, stop in zip(PHASES, ends[:-1], ends[1:], strict=True)}


def main() -> None:
    """Print the median of every phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="Measure in this process and print JSON.")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.once:
        print(json.dumps(phases(folder)))
        return
    command = [sys.executable, __file__, str(folder), "--once"]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for _ in range(chosen.repeat)
    ]
    print(machine(), "| phase | s |", "|---|---|", sep="\n")
    for name in PHASES:
        print(f"| {name} | {statistics.median(run[name] for run in runs):.1f} |")
    print(f"| in all | {statistics.median(sum(run.values()) for run in runs):.1f} |")


if __name__ == "__main__":
    main()
