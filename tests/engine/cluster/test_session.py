"""The local Ray session that the package starts."""

from __future__ import annotations

import ipaddress
import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from tokenbound.engine.cluster.session import ray_session
from tokenbound.errors import IncompleteError
from tokenbound.signals import first_signal

SESSION = """
import json, os, signal, threading, time
import psutil, ray
from tokenbound.engine.cluster.session import ray_session
from tokenbound.signals import first_signal

@ray.remote(num_cpus=1)
class Scorer:
    def ready(self):
        return True

@ray.remote(num_cpus=0)
def pid():
    return os.getpid()

@ray.remote(num_cpus=0)
def work():
    time.sleep(600)

def listening():
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN:
                yield process.name(), socket.laddr.ip

with first_signal() as received, ray_session():
    scorers = [Scorer.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    ray.get([scorer.ready.remote() for scorer in scorers])
    before, listeners = ray.get(pid.remote()), list(listening())
    time.sleep(4)
    kept = before == ray.get(pid.remote())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        ray.get(work.remote())
    except KeyboardInterrupt:
        print(json.dumps({"kept": kept, "listening": listeners, "received": received}))
"""


@pytest.fixture(scope="module")
def session() -> dict[str, Any]:
    """What a session of its own saw."""
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, timeout=240, check=True)
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_sigterm_means_what_the_program_says_and_shows_no_stacks(session: dict[str, Any]) -> None:
    assert session["received"] == [signal.SIGTERM]
    assert session["stderr"] == ""


def test_sigterm_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: sys.exit(signal.SIGTERM))  # as Ray answers it meanwhile
    with first_signal() as received, pytest.raises(KeyboardInterrupt), ray_session():
        pass
    assert received == [signal.SIGTERM]


def test_idle_task_processes_are_kept_beside_scorers(session: dict[str, Any]) -> None:
    assert session["kept"]


def test_nothing_listens_beyond_loopback(session: dict[str, Any]) -> None:
    assert {"gcs_server", "raylet"} <= {name for name, _ in session["listening"]}
    for name, address in session["listening"]:
        found = ipaddress.ip_address(address)
        assert (getattr(found, "ipv4_mapped", None) or found).is_loopback, f"{name} listens on {address}"


@pytest.mark.parametrize("what", ["The current node timed out during startup.", "Failed to connect to GCS."])
def test_a_session_that_does_not_start_in_time_is_one_line(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise Exception(f"{what} Please check ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(IncompleteError, match="Run again"), ray_session():
        pass
