"""The table of faults: what happens to a command, when, and how it must end.

Each row breaks one run of a tiny model, and is checked the same way: the exit code, the one line on stderr, that no
process is left, that no certificate is there unless the run ended well, and that the same command then goes on to the
certificate of a run without a fault. `python tests/faults/run.py` writes what came out to `results.md`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
LIMIT_S = 400.0
"""Much longer than a command takes on a busy machine."""
KNOWABLE_S = 60.0
"""Within which a command must end once its fault is there."""
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def make_checkpoint(folder: Path) -> Path:
    """A random byte-level Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


@dataclass
class Bench:
    """Where faults are tried: a model, a corpus, and the certificate of a run without a fault."""

    folder: Path
    wanted: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_checkpoint(self.folder / "model")
        (self.folder / "texts").mkdir()
        for i in range(12):
            words = " ".join(f"word{(i * j) % 17} and {j}" for j in range(40 + i * 15))
            (self.folder / "texts" / f"{i:02d}.txt").write_text(words)
        assert self.start(self.config("whole")).wait(LIMIT_S) == 0
        self.wanted = self.certificate("whole")

    def config(self, name: str, *, corpus: Mapping[str, Any] | None = None, **how: Any) -> Path:
        """The config of a run of that name."""
        source = {"source": "text", "paths": [str(self.folder / "texts")]}
        bytes_ = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
        what = {
            "model": {"checkpoint": str(self.folder / "model")},
            "corpus": {**source, **bytes_, **(corpus or {})},
            "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 320},
        }
        path = self.folder / f"{name}.yaml"
        place = {"output": str(self.folder / name), "cache": str(self.folder / "prepared" / name)}
        path.write_text(yaml.safe_dump({"what": what, "how": {**place, **how}}))
        return path

    def start(self, config: Path, command: str = "evaluate", **environment: str) -> subprocess.Popen[str]:
        """A command in a session of its own; its stderr is kept beside the config."""
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        settings = {key: value for key, value in settings.items() if key != "RAY_ADDRESS"}
        return subprocess.Popen(
            [sys.executable, "-m", "tokenbound", command, str(config)],
            env={**settings, **environment},
            stdout=subprocess.DEVNULL,
            stderr=config.with_suffix(".stderr").open("w"),
            start_new_session=True,
            text=True,
            cwd=self.folder,
        )

    def certificate(self, name: str) -> dict[str, Any]:
        """The certificate of a run, without the time at which it was made."""
        found: dict[str, Any] = json.loads((self.folder / name / "certificate.json").read_text())
        del found["created_at"]
        return found

    def scoring(self, name: str, process: subprocess.Popen[str], shards: int = 3) -> None:
        """Wait until a run has committed some shards."""
        deadline = time.monotonic() + LIMIT_S
        while len(list((self.folder / name / "shards").glob("*.json"))) < shards:
            assert process.poll() is None, "the run ended before its fault"
            assert time.monotonic() < deadline, "the run committed nothing"
            time.sleep(0.02)


@dataclass
class Outcome:
    """What a fault came to."""

    code: int
    seconds: float
    """From the fault to the end of the command."""
    line: str
    """What it said at last."""
    left: list[str] = field(default_factory=list)
    """Names of its processes that were still there three seconds later."""
    resumed: bool | None = None
    """Whether the same command then made the same certificate; None where there is nothing to resume."""


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    when: str
    code: int
    line: str
    """Pattern of the one line; empty: none."""
    inflict: Callable[[Bench, str], tuple[subprocess.Popen[str], float, list[psutil.Process]]]
    """Starts the command and breaks it; returns it, when the fault was there, and what it had started."""
    resumes: bool = True


def try_fault(bench: Bench, fault: Fault) -> Outcome:
    """Break one run and see how it ends."""
    name = re.sub(r"\W+", "-", fault.name)
    process, since, started = fault.inflict(bench, name)
    code = process.wait(LIMIT_S)
    seconds = time.monotonic() - since
    said = (bench.folder / f"{name}.stderr").read_text().splitlines()
    lines = [line for line in said if not LOG_LINE.match(line)]
    outcome = Outcome(code, seconds, " / ".join(lines))
    time.sleep(3)
    for each in started:
        with suppress(psutil.Error):
            if each.status() != psutil.STATUS_ZOMBIE:
                outcome.left.append(each.name())
                each.kill()
    if fault.resumes:
        if code:
            assert not (bench.folder / name / "certificate.json").exists(), "a broken run left a certificate"
        assert bench.start(bench.folder / f"{name}.yaml").wait(LIMIT_S) == 0, "it cannot be resumed"
        outcome.resumed = bench.certificate(name) == bench.wanted
    return outcome


def check(fault: Fault, outcome: Outcome) -> None:
    """What every row promises.

    Raises:
        AssertionError: it was not kept.
    """
    assert outcome.code == fault.code, outcome
    assert outcome.seconds < KNOWABLE_S or not fault.code, outcome
    assert re.fullmatch(fault.line, outcome.line), outcome
    assert not outcome.left, outcome
    assert outcome.resumed is not False, outcome


def _tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _while_scoring(act: Callable[[subprocess.Popen[str], list[psutil.Process]], object]) -> Any:
    def inflict(bench: Bench, name: str) -> tuple[subprocess.Popen[str], float, list[psutil.Process]]:
        process = bench.start(bench.config(name))
        bench.scoring(name, process)
        started = _tree(process)
        act(process, started)
        return process, time.monotonic(), started

    return inflict


def _kill(name: str) -> Any:
    def act(process: subprocess.Popen[str], started: list[psutil.Process]) -> None:
        next(each for each in started if each.name() == name).kill()

    return _while_scoring(act)


def _kill_scorer(process: subprocess.Popen[str], started: list[psutil.Process]) -> None:
    next(each for each in started if "ScoreShard" in " ".join([each.name(), *each.cmdline()])).kill()


def _stop_for_a_while(process: subprocess.Popen[str], started: list[psutil.Process]) -> None:
    everything = [psutil.Process(process.pid), *started]
    for each in everything:
        each.suspend()
    time.sleep(30)
    for each in everything:
        each.resume()


def _kill_all(process: subprocess.Popen[str], started: list[psutil.Process]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def _with(
    corpus: Callable[[Bench], Mapping[str, Any]] | None = None,
    how: Mapping[str, Any] | None = None,
    environment: Callable[[Bench], Mapping[str, str]] | None = None,
) -> Any:
    def inflict(bench: Bench, name: str) -> tuple[subprocess.Popen[str], float, list[psutil.Process]]:
        config = bench.config(name, corpus=corpus(bench) if corpus else None, **(how or {}))
        return bench.start(config, **(environment(bench) if environment else {})), time.monotonic(), []

    return inflict


def _bomb(bench: Bench) -> Mapping[str, Any]:
    path = bench.folder / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(64):
            stream.write(b" " * (1 << 24))
    return {"source": "jsonl", "paths": [str(path)]}


def _readable_token(bench: Bench) -> Mapping[str, str]:
    home = Path(tempfile.mkdtemp(dir="/tmp"))
    home.chmod(0o755)
    (home / ".ray").mkdir(mode=0o755)
    (home / ".ray" / "auth_token").write_text("secret" * 8)
    (home / ".ray" / "auth_token").chmod(0o644)
    return {"HOME": str(home)}


def _pipe(bench: Bench, name: str) -> tuple[subprocess.Popen[str], float, list[psutil.Process]]:
    """A run of which one losses file is a pipe that nobody writes to."""
    import shutil

    shutil.copytree(bench.folder / "whole", bench.folder / name)
    path = bench.folder / name / "losses" / "00001.parquet"
    path.unlink()
    os.mkfifo(path)
    config = bench.config(name)
    return bench.start(config.with_suffix(""), "verify"), time.monotonic(), []


LOST = (
    r"tokenbound: the local Ray session was lost: its {} ended; what is done is kept: run the same command again to "
    r"resume"
)
SCORING = "three shards are committed"

FAULTS = (
    Fault(
        "dead RAY_ADDRESS",
        "at the start",
        3,
        r"tokenbound: RAY_ADDRESS '127\.0\.0\.1:1': no Ray cluster answered within 5 s \(how\.ray_timeout_s\).*",
        _with(how={"ray_timeout_s": 5.0}, environment=lambda bench: {"RAY_ADDRESS": "127.0.0.1:1"}),
        resumes=False,
    ),
    Fault(
        "ray:// address",
        "at the start",
        2,
        r"tokenbound: how\.ray_address 'ray://10\.0\.0\.7:10001': ray:// addresses are not supported.*",
        _with(how={"ray_address": "ray://10.0.0.7:10001"}),
        resumes=False,
    ),
    Fault(
        "RAY_TMPDIR too long for a socket",
        "at the start",
        2,
        r"tokenbound: RAY_TMPDIR '/tmp/x+' has 65 bytes.*set RAY_TMPDIR to a shorter folder",
        _with(environment=lambda bench: {"RAY_TMPDIR": "/tmp/" + "x" * 60}),
        resumes=False,
    ),
    Fault(
        "token that others can read",
        "at the start",
        2,
        r"tokenbound: /tmp/\w+/\.ray/auth_token can be read by other users of this machine.*",
        _with(environment=_readable_token),
        resumes=False,
    ),
    Fault(
        "a line of 1 GiB in a small .gz",
        "while the corpus is read",
        2,
        r"tokenbound: corpus file '.*bomb\.jsonl\.gz' holds a document of more than 134,217,728 bytes.*",
        _with(corpus=_bomb),
        resumes=False,
    ),
    Fault(
        "a pipe in the place of losses",
        "verify",
        4,
        r"tokenbound: .*00001\.parquet changed after it was committed.*",
        _pipe,
        resumes=False,
    ),
    Fault("control server killed", SCORING, 3, LOST.format("gcs_server"), _kill("gcs_server")),
    Fault("raylet killed", SCORING, 3, LOST.format("raylet"), _kill("raylet")),
    Fault("scorer killed", SCORING, 0, "", _while_scoring(_kill_scorer)),
    Fault(
        "SIGTERM",
        SCORING,
        143,
        r"tokenbound: stopped by SIGTERM; what is done is kept: run the same command again to resume",
        _while_scoring(lambda process, started: process.terminate()),
    ),
    Fault("SIGKILL", SCORING, -9, "", _while_scoring(_kill_all)),
    Fault("SIGSTOP of everything for 30 s", SCORING, 0, "", _while_scoring(_stop_for_a_while)),
)
