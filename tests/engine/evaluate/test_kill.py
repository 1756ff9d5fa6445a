"""kill -9 in the middle, start again, same certificate; SIGTERM, and a line that says so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}


def start(config: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tokenbound", "evaluate", str(config)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


def wait_for_shards(folder: Path) -> None:
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_certificate(tmp_path: Path, run_tree: Callable[..., dict[str, Any]]) -> None:
    windows = {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 320}
    configs = []
    for name in ("whole", "killed"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run_tree(name, windows=windows)))
        configs.append(path)
    assert start(configs[0]).wait(300) == 0
    process = start(configs[1])
    shards = tmp_path / "killed/shards"
    wait_for_shards(shards)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert len(before) >= 3
    assert not (tmp_path / "killed/certificate.json").exists()
    assert start(configs[1]).wait(300) == 0
    after = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert all(after[name] == stamp for name, stamp in before.items())
    certificates = [json.loads((tmp_path / name / "certificate.json").read_text()) for name in ("whole", "killed")]
    for certificate in certificates:
        del certificate["created_at"]
    assert certificates[0] == certificates[1]


@pytest.mark.slow
def test_a_stopped_run_says_that_it_goes_on(tmp_path: Path, run_tree: Callable[..., dict[str, Any]]) -> None:
    windows = {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 320}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree("stopped", windows=windows)))
    process = start(path, subprocess.PIPE)
    wait_for_shards(tmp_path / "stopped/shards")
    process.terminate()
    error = process.communicate(timeout=240)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    said = [line for line in error.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert said == ["tokenbound: stopped by SIGTERM; what is done is kept: run the same command again to resume"]
    assert not (tmp_path / "stopped/certificate.json").exists()
    assert start(path).wait(300) == 0
