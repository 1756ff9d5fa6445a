"""The metrics of a run, as Ray exports them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = """
import sys, time
import ray
from tokenbound.config.run import RunConfig, load_config
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.cluster.metrics import count_halving, count_retry, count_storage_retry

local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
ray.init(_metrics_export_port=int(sys.argv[2]), **local)
config = load_config(RunConfig, sys.argv[1])
evaluate(config)
count_retry(config.how.output)
count_halving(config.how.output)
count_storage_retry("upload")
print("done", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("count", [("count_shard", "run-é", 3, 1.0), ("count_retry", "run-é"), ("count_halving", "é")])
def test_a_metric_takes_any_run_directory_and_never_stops_a_run(
    count: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenbound.engine.cluster import metrics

    tags: list[str] = []

    def fail(metric: Any, value: float, labels: dict[str, str]) -> None:
        tags.extend(labels.values())
        raise RuntimeError("the exporter\nis gone")

    monkeypatch.setattr("ray.util.metrics.Counter.inc", fail)
    monkeypatch.setattr("ray.util.metrics.Gauge.set", fail)
    name, *arguments = count
    for _ in range(2):
        getattr(metrics, name)(*arguments)
    assert all(tag.isascii() for tag in tags)
    assert tags
    assert [record.getMessage() for record in caplog.records] == [
        "metrics of this run are incomplete: the exporter is gone"
    ]


@pytest.mark.slow
def test_prometheus_sees_the_run(run_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus", reason="Ray exports metrics with ray[default]")
    tree = run_tree()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run.yaml"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "done"
            plan = json.loads((tmp_path / "run" / "plan.json").read_text())
            shards = len(list((tmp_path / "run" / "shards").iterdir()))
            wanted = {
                "ray_tokenbound_tokens_scored_total": plan["num_tokens"],
                "ray_tokenbound_shards_committed_total": shards,
                "ray_tokenbound_shard_retries_total": 1,
                "ray_tokenbound_out_of_memory_halvings_total": 1,
                "ray_tokenbound_storage_retries_total": 1,
            }
            assert _wait_for(f"http://127.0.0.1:{port}/metrics", set(wanted)) == wanted
        finally:
            process.kill()


def _wait_for(url: str, names: set[str]) -> dict[str, float]:
    deadline, found = time.monotonic() + 60, dict[str, float]()
    while time.monotonic() < deadline and set(found) != names:
        time.sleep(1)
        try:
            page = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
        for line in page.splitlines():
            name = line.partition("{")[0]
            if name in names:
                found[name] = float(line.rpartition(" ")[2])
    return found
