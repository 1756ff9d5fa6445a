"""Dense, packed and streamed replicas of one artifact: what each takes, beside what is predicted of it.

    python tests/benchmarks/forms.py FOLDER --shape tinyllama --bits 4
    python tests/benchmarks/forms.py FOLDER --shape llama2-7b --bits 4 --forms packed streamed --windows 16

The artifact has random weights of one layer's shapes, the same in every layer, so that it is made in a minute; what is
decoded, packed and multiplied is as much as if they differed. Each form runs in a process of its own: decoding or
packing, canary and causality probe, then some windows as one shard. Memory is what that process alone has resident
(unique set size) at its peak, pages of files that it maps included. Decoded and packed weights lie in FOLDER/shared, as
those of a run do in its local folder; they are made anew for each form unless `--keep` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from bench import machine
from big_models import SHAPES, draw, headers, step_of

from tokenbound.compression.artifact import assemble_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.tensor import CodedTensor, encode_tensor
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.engine.evaluate.stages import ReplicaSpec, build_replicas
from tokenbound.engine.plan.throughput import dense_speed
from tokenbound.models.forms import (
    FORMS,
    Form,
    form_needs,
    layer_sizes,
    packed_bytes,
    packed_file_bytes,
    tokens_per_second,
)
from tokenbound.models.memory import replica_memory

RESULTS = Path(__file__).parent / "results" / "forms.md"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """Of one form."""

    form: Form
    load_seconds: float
    memory_bytes: int
    tokens_per_second: float
    load_cpu_seconds: float | None = None
    """Processor time of the process and of those that it started, of which a busy machine changes little."""
    score_cpu_seconds: float | None = None


def repeated_artifact(shape: dict[str, Any], bits: float, path: Path) -> Path:
    """An artifact whose layers are all the same; one that is there already is kept."""
    if path.exists():
        return path
    settings, coded, first = RoundToNearestSettings(step=step_of(bits)), [], {}
    for name, header in headers(shape).items():
        kind = name.split(".", 3)[-1] if ".layers." in name else name
        found: CodedTensor | None = first.get(kind)
        if found is None:
            found = first[kind] = encode_tensor(name, draw(kind, header), settings)
        coded.append(replace(found, name=name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(assemble_artifact(shape, coded, settings))
    return path


class PeakMemory:
    """The largest unique set size of this process while it is measured."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, int(psutil.Process().memory_full_info().uss))


def cpu_seconds() -> float:
    """Processor time of this process, and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def some_windows(count: int, length: int, vocab: int) -> tuple[Any, Any, Any]:
    """Random ids, and all of them scored."""
    ids = np.random.default_rng(0).integers(0, vocab, (count, length + 1))
    return ids[:, :-1], ids[:, 1:], np.ones((count, length), bool)


def measure(artifact: Path, form: Form, *, threads: int, batch: int, length: int, windows: int) -> Measured:
    """Load a replica in this process and score some windows."""
    spec = ReplicaSpec(str(artifact), "bfloat16", batch, length, "cpu", threads, weights=form)
    spec = replace(spec, share=form != "dense", local_folder=str(artifact.parent / "shared"))
    scored = some_windows(windows, length, ArtifactFile(artifact).architecture["vocab_size"])
    with PeakMemory() as memory:
        started, started_cpu = time.perf_counter(), cpu_seconds()
        replica, _ = build_replicas(spec, scored[0])
        loaded, loaded_cpu = time.perf_counter(), cpu_seconds()
        replica.score(*scored)
        ended, ended_cpu = time.perf_counter(), cpu_seconds()
    return Measured(
        form,
        loaded - started,
        memory.peak_bytes,
        windows * length / (ended - loaded),
        loaded_cpu - started_cpu,
        ended_cpu - loaded_cpu,
    )


def predict(artifact: Path, *, threads: int, batch: int, length: int, windows: int) -> dict[Form, Measured]:
    """What each form is predicted to take."""
    opened = ArtifactFile(artifact)
    memory = replica_memory(opened.architecture, dtype=DTYPE, batch=batch, length=length, device="cpu")
    sizes = layer_sizes(opened.architecture)
    assert sizes is not None, "a Llama has layers"
    shard: dict[str, Any] = {"dtype": DTYPE, "device": "cpu", "cores": threads}
    shard |= {"batch_tokens": batch * length, "shard_tokens": windows * length}
    packed = packed_bytes(opened.parsed.coded)
    stored = {"artifact_bytes": opened.num_bytes, "file_bytes": packed_file_bytes(opened.parsed.coded)}
    needs = form_needs(memory, sizes, packed=packed, **stored, **shard)
    spec = ReplicaSpec("", "bfloat16", batch, length, "cpu", threads)
    dense = dense_speed(opened.architecture, spec)
    assert dense is not None, "its config says how many layers it has"
    return {
        form: Measured(form, need.load_seconds, need.device_bytes, tokens_per_second(form, dense, sizes, **shard))
        for form, need in needs.items()
    }


def table(shape: str, bits: float, options: dict[str, int], rows: list[tuple[Measured, Measured]]) -> str:
    """Markdown; predictions in brackets."""
    lines = [
        f"\n## {shape}, {bits:g} bits ({machine()}; batch {options['batch']} x {options['length']}, "
        f"{options['windows']} windows, {options['threads']} threads)\n",
        "| form | memory GB | until the first shard s | tokens/s | processor s until then | and for the shard |",
        "|---|---|---|---|---|---|",
    ]
    for found, predicted in rows:
        lines.append(
            f"| {found.form} | {found.memory_bytes / 1e9:.2f} ({predicted.memory_bytes / 1e9:.2f}) "
            f"| {found.load_seconds:.0f} ({predicted.load_seconds:.0f}) "
            f"| {found.tokens_per_second:.1f} ({predicted.tokens_per_second:.1f}) "
            f"| {found.load_cpu_seconds or 0:.0f} | {found.score_cpu_seconds or 0:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every form in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="use packed weights that are there already")
    parser.add_argument("--here", action="store_true", help="measure one form in this process and print it as JSON")
    arguments = parser.parse_args()
    path = arguments.folder / f"{arguments.shape}-{arguments.bits:g}bit-repeated.tokenbound"
    artifact = repeated_artifact(SHAPES[arguments.shape], arguments.bits, path)
    options = {name: getattr(arguments, name) for name in ("threads", "batch", "length", "windows")}
    if arguments.here:
        print(json.dumps(asdict(measure(artifact, arguments.forms[0], **options))))
        return
    predicted, rows = predict(artifact, **options), []
    for form in arguments.forms:
        if not arguments.keep:
            shutil.rmtree(arguments.folder / "shared", ignore_errors=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--here", "--forms", form]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append((Measured(**json.loads(printed.splitlines()[-1])), predicted[form]))
    text = table(arguments.shape, arguments.bits, options, rows)
    print(text)
    with arguments.results.open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
