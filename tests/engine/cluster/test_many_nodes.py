"""A head and worker nodes as processes of their own: nodes that go, come, and are cut off; one certificate.

Replicas hold their shards until the test lets them go, so what is lost is lost in the middle of the work.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_support import LocalCluster, can_make_namespaces, local_cluster, network, wait_until

from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.report.status import ReplicaStatus, RunStatus, run_status
from tokenbound.store.run import RunDirectory

pytestmark = pytest.mark.cluster

PARTITION_S = 4.0
TIMEOUT_S = 30
"""Seconds of silence after which the nodes of the partitioned cluster count as dead."""


@pytest.fixture(scope="module")
def what(tiny_checkpoint: Path, text_folder: Path) -> dict[str, Any]:
    """A run of some twelve shards, each of eight batches."""
    corpus = {"source": "text", "paths": [str(text_folder)], "tokenizer": "bytes", "tokenizer_is": "given"}
    return {
        "model": {"checkpoint": str(tiny_checkpoint)},
        "corpus": {**corpus, "add_bos": False, "add_eos": True},
        "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 1024},
    }


@pytest.fixture(scope="module")
def alone(what: dict[str, Any], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The certificate of the run on this machine alone."""
    tree = {"what": what, "how": {"output": str(tmp_path_factory.mktemp("alone") / "run")}}
    certificate = evaluate(validate(RunConfig, tree, origin="test"))
    return without_times(json.loads(certificate.model_dump_json()))


@pytest.fixture
def tree(what: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {"what": what, "how": {"output": str(tmp_path / "run")}}


def without_times(certificate: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in certificate.items() if name != "created_at"}


def write(tree: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Run:
    """A run under way on a cluster."""

    def __init__(self, cluster: LocalCluster, tree: dict[str, Any], folder: Path) -> None:
        self.cluster, self.config, self.place = cluster, write(tree, folder), Path(tree["how"]["output"])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self.cluster.run(self.config)

    def status(self) -> RunStatus | None:
        return run_status(RunDirectory(str(self.place))) if (self.place / "plan.json").exists() else None

    def at_work(self, count: int) -> list[ReplicaStatus] | None:
        """The replicas that have a shard in hand, where they are so many."""
        status = self.status()
        found = [] if status is None else [each for each in status.replicas if each.shard is not None]
        return found if len(found) == count else None

    def await_at_work(self, count: int) -> list[ReplicaStatus]:
        return wait_until(lambda: self.at_work(count), f"{count} replicas have a shard in hand")  # type: ignore[no-any-return]

    def certificate(self) -> dict[str, Any]:
        """The certificate of a run that ends well."""
        assert self.process is not None
        self.cluster.finish(self.process)
        return without_times(json.loads((self.place / "certificate.json").read_text()))


def test_a_node_joins_and_another_is_killed(tree: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    """A node that joins takes part; the first one dies with a shard in hand and nobody has room for its replica."""
    with local_cluster() as cluster:
        cluster.head()
        killed = cluster.worker()
        run = Run(cluster, tree, tmp_path)
        cluster.hold()
        run.start()
        (first,) = run.await_at_work(1)
        assert killed.owns(first.replica)
        joined = cluster.worker()
        (second,) = [each for each in run.await_at_work(2) if each.replica != first.replica]
        assert joined.owns(second.replica)
        killed.kill()
        cluster.release()
        assert run.certificate() == alone
        status = run.status()
        assert status is not None
        assert {each.replica for each in status.lost} == {first.replica}
        assert status.retries >= 1
        shards = {each.replica: each.shards for each in status.replicas}
        assert sum(shards.values()) == alone["num_shards"]
        assert shards[second.replica] > alone["num_shards"] / 2


def test_the_head_is_lost(tree: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    """With the head everything is gone but the storage; what was committed is not scored again."""
    with local_cluster() as cluster:
        head, _ = cluster.head(), cluster.worker()
        run = Run(cluster, tree, tmp_path)
        run.start()
        records = run.place / "shards"
        wait_until(lambda: len(list(records.glob("*.json"))) >= 2, "two shards are committed")
        cluster.hold()
        head.kill()
        wait_until(lambda: run.process is not None and run.process.poll() is not None, "the driver has given up")
        before = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
        assert 2 <= len(before) < alone["num_shards"]
        cluster.release()
        cluster.head()
        cluster.worker()
        run.start()
        assert run.certificate() == alone
        after = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
        assert before.items() < after.items()


@pytest.mark.skipif(not can_make_namespaces(), reason="making network namespaces needs root")
def test_a_partition_shorter_than_the_timeout(tree: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    """Nodes with addresses of their own; one is cut off with a shard in hand and comes back before it is given up."""
    health = {
        "RAY_health_check_period_ms": "3000",
        "RAY_health_check_timeout_ms": "10000",
        "RAY_health_check_failure_threshold": str(TIMEOUT_S // 3),
    }
    with network(3) as net, local_cluster(head_address=net.address(0), enter=net.enter, settings=health) as cluster:
        cluster.head()
        for node in (1, 2):
            cluster.worker(net.address(node))
        run = Run(cluster, tree, tmp_path)
        cluster.hold()
        run.start()
        replicas = run.await_at_work(2)
        assert {each.replica.partition("/")[0] for each in replicas} == {net.address(1), net.address(2)}
        net.cut(1)
        time.sleep(PARTITION_S)
        cluster.release()
        time.sleep(PARTITION_S)
        net.join(1)
        assert run.certificate() == alone
        status = run.status()
        assert status is not None
        assert status.lost == [], "the node counted as dead"
