"""A model that does not fit into memory, from random weights to a certificate that is verified again.

    python tests/benchmarks/big_models.py FOLDER --shape tinyllama --method lossless
    python tests/benchmarks/big_models.py FOLDER --shape llama2-7b --bits 4 --weights streamed

The smallest shape begins as a bfloat16 checkpoint in shards that `compress` encodes; the others as an artifact, whose
integers the real codec writes. Neither is ever held: tensors are drawn, written and forgotten one by one. Then
`evaluate` scores a few windows of random ids, and `verify --rescore 1` checks the certificate and scores one of them
again. Memory is the sum over all processes of what each alone has resident (unique set size), and the object store's
shared memory, at the moment when both together are largest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from bench import machine, run_tree, token_file

from tokenbound.compression.artifact import IndexEntry, artifact_parts
from tokenbound.compression.methods import settings_record
from tokenbound.compression.tensor import CodedTensor, encode_tensor
from tokenbound.compression.tensor_map import Header
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.models.safetensors_file import write_safetensors

RESULTS = Path(__file__).parent / "results" / "big_models.md"
SHARD_BYTES = 1 << 29
"""Of a checkpoint's file."""
SCALE = 0.02
"""Standard deviation of a weight."""
VOCAB = 32_000


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict[str, Any]:
    """The config of a Llama of these sizes."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


SHAPES = {
    "toy": llama(64, 176, 2, 4, 2, 512),
    "tinyllama": llama(2048, 5632, 22, 32, 4, 2048),
    "llama2-7b": llama(4096, 11008, 32, 32, 32, 4096),
    "llama2-13b": llama(5120, 13824, 40, 40, 40, 4096),
    "llama2-70b": llama(8192, 28672, 80, 64, 8, 4096),
}
CHECKPOINTS = ("toy", "tinyllama")
"""Shapes that begin as a checkpoint."""


def headers(shape: dict[str, Any]) -> dict[str, Header]:
    """Dtype and shape of every tensor of a Llama."""
    hidden, middle, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for index in range(shape["num_hidden_layers"]):
        sizes |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    sizes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    return {f"{name}.weight": (torch.bfloat16, size) for name, size in sizes.items()}


def draw(name: str, header: Header) -> torch.Tensor:
    """Random weights that the name decides; of a norm, ones."""
    dtype, size = header
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    out = torch.empty(size, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for rows in torch.split(out, max(1, (1 << 24) // size[1])):
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(SCALE))
    return out


def step_of(bits: float) -> float:
    """Steps in standard deviations at which normal weights have this entropy."""
    return math.sqrt(2 * math.pi * math.e) / 2**bits


def write_checkpoint(shape: dict[str, Any], folder: Path) -> Path:
    """A sharded checkpoint of random weights; one that is there already is kept."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for name, (dtype, size) in headers(shape).items():
        if filled > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = dtype, size
        filled += dtype.itemsize * math.prod(size)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        drawn = ((name, draw(name, header)) for name, header in shard.items())
        write_safetensors(folder / file, shard, drawn, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_big_artifact(shape: dict[str, Any], bits: float, path: Path, workers: int) -> Path:
    """An artifact of random weights on a grid, coded tensor by tensor; one that is there already is kept."""
    if path.exists():
        return path
    spool = path.with_name(path.name + ".spool")
    spool.mkdir(parents=True, exist_ok=True)
    settings = RoundToNearestSettings(step=step_of(bits))
    largest_first = sorted(headers(shape).items(), key=lambda item: -math.prod(item[1][1]))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        entries = list(pool.map(partial(_code, settings, str(spool)), largest_first))
    parts = artifact_parts(shape, entries, lambda entry: (spool / entry.name).read_bytes(), settings_record(settings))
    with path.open("wb") as file:
        file.writelines(parts)
    shutil.rmtree(spool)
    return path


def _code(settings: RoundToNearestSettings, spool: str, item: tuple[str, Header]) -> IndexEntry:
    torch.set_num_threads(1)
    coded: CodedTensor = encode_tensor(item[0], draw(*item), settings)
    Path(spool, item[0]).write_bytes(coded.payload)
    return IndexEntry.of(coded)


@dataclass(frozen=True)
class Peak:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    """Processor time of all its processes, of which a busy machine changes little."""
    memory_bytes: int
    """Unique set sizes of all its processes and the shared memory of its object store, at their largest sum."""
    largest: str
    """The process that had most at that moment."""


class _Sampler:
    def __init__(self, root: psutil.Process) -> None:
        self.root, self.peak, self.largest = root, 0, ""
        self.shared = _shared_bytes()
        self.cpu: dict[int, float] = {}
        """Processor seconds of each process, when it was last seen."""

    def sample(self) -> None:
        """Look once."""
        sizes: list[tuple[int, str]] = []
        try:
            family = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
                sizes.append((int(process.memory_full_info().uss), " ".join(process.cmdline())[:40]))
            except psutil.Error:
                continue
        total = sum(size for size, _ in sizes) + max(0, _shared_bytes() - self.shared)
        if sizes and total > self.peak:
            self.peak = total
            size, title = max(sizes)
            self.largest = f"{title.split('(')[0].strip()} {size / 1e9:.2f} GB"


def _shared_bytes() -> int:
    return shutil.disk_usage("/dev/shm").used


@contextmanager
def _watched(process: psutil.Process, interval_s: float = 0.3) -> Iterator[_Sampler]:
    sampler, done = _Sampler(process), threading.Event()

    def watch() -> None:
        while not done.wait(interval_s):
            sampler.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        done.set()
        thread.join()


def command(*arguments: str, log: Path) -> Peak:
    """Run tokenbound's command line; what it says goes to a file."""
    started = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen([sys.executable, "-m", "tokenbound", *arguments], stdout=sink, stderr=sink)
        with _watched(psutil.Process(process.pid)) as sampler:
            code = process.wait()
    if code:
        raise SystemExit(f"tokenbound {' '.join(arguments)} ended with {code}:\n{log.read_text()[-2000:]}")
    return Peak(time.perf_counter() - started, sum(sampler.cpu.values()), sampler.peak, sampler.largest)


@dataclass(frozen=True)
class Measured:
    """One model."""

    case: str
    artifact_bytes: int
    tokens: int
    peaks: dict[str, Peak]
    """By command."""


def measure(folder: Path, arguments: argparse.Namespace) -> Measured:
    """Make the model, certify it and verify the certificate."""
    shape, name = SHAPES[arguments.shape], f"{arguments.shape}-{_kind(arguments)}"
    artifact, peaks = folder / f"{name}.tokenbound", {}
    started = time.perf_counter()
    if arguments.shape in CHECKPOINTS:
        checkpoint = write_checkpoint(shape, folder / arguments.shape)
        print(f"checkpoint: {time.perf_counter() - started:.0f} s", flush=True)
        method = ["--method", arguments.method]
        method += ["--set", f"step={step_of(arguments.bits)}"] if arguments.method == "rtn" else []
        peaks["compress"] = command(
            "compress", str(checkpoint), str(artifact), *method, log=folder / f"{name}-compress.log"
        )
        print(f"compress: {peaks['compress']}", flush=True)
    else:
        write_big_artifact(shape, arguments.bits, artifact, arguments.workers)
        print(f"artifact: {time.perf_counter() - started:.0f} s", flush=True)
    length, tokens = arguments.length, arguments.windows * arguments.length
    run = folder / f"{name}-{arguments.weights or 'default'}"
    shutil.rmtree(run, ignore_errors=True)
    ids = token_file(folder / f"ids-{tokens}.bin", tokens + 1, VOCAB)
    tree = run_tree(ids, VOCAB, artifact, run, length=length, batch=arguments.batch)
    tree["what"]["model"]["dtype"] = "bfloat16"
    tree["how"] |= {"weights": arguments.weights} if arguments.weights else {}
    tree["how"] |= {"replicas": arguments.replicas} if arguments.replicas else {}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    peaks["evaluate"] = command("evaluate", str(config), log=folder / f"{name}-evaluate.log")
    print(f"evaluate: {peaks['evaluate']}", flush=True)
    peaks["verify"] = command("verify", str(run), "--rescore", "1", log=folder / f"{name}-verify.log")
    print(f"verify: {peaks['verify']}", flush=True)
    case = f"{arguments.shape}, {_kind(arguments)}, {arguments.weights or 'default'}"
    return Measured(case, artifact.stat().st_size, tokens, peaks)


def _kind(arguments: argparse.Namespace) -> str:
    return "lossless" if arguments.method == "lossless" else f"{arguments.bits:g} bit"


HEAD = """# Models larger than memory: seconds and memory from the weights to a verified certificate

Memory is the sum over all processes of what each alone has resident (unique set size), with the object store's shared
memory, at its largest; `tests/benchmarks/big_models.py` says how it is made. GB are 10^9 bytes. Seconds are those of a
machine whose load is in the last column; processor seconds are summed over all processes, and half of them is what two
free processors need.

| model | artifact GB | tokens | compress s | CPU s | GB | evaluate s | CPU s | GB | verify s | CPU s | GB | measured |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def _gb(peak: Peak) -> str:
    return f"{peak.memory_bytes / 1e9:.2f}"


def row(measured: Measured) -> str:
    """A line of the table."""
    cells = [measured.case, f"{measured.artifact_bytes / 1e9:.3f}", f"{measured.tokens:,}"]
    for name in ("compress", "evaluate", "verify"):
        peak = measured.peaks.get(name)
        cells += ["", "", ""] if peak is None else [f"{peak.seconds:.0f}", f"{peak.cpu_seconds:.0f}", _gb(peak)]
    return f"| {' | '.join([*cells, machine()])} |\n"


def record(measured: Measured, path: Path) -> None:
    """Put a line into the file of results, in the place of an older one of the same case."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else HEAD.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"| {measured.case} |")]
    path.write_text("".join([*kept, row(measured)]))


def main(given: list[str] | None = None) -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model and run lie; they are kept")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama")
    parser.add_argument("--bits", type=float, default=4, help="bits per weight of the grid")
    parser.add_argument("--method", choices=("rtn", "lossless"), default="rtn", help="of a shape with a checkpoint")
    parser.add_argument("--weights", help="how.weights; default: as the package chooses")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--replicas", type=int, help="how.replicas")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make an artifact")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(given)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    measured = measure(arguments.folder.absolute(), arguments)
    record(measured, arguments.results)
    print(row(measured))


if __name__ == "__main__":
    main()
