"""A session that is lost ends its command; one that is only stopped, or shut down, does not."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tokenbound.engine.cluster.watch import JoinedSession, watched

SLEEP = [
    sys.executable,
    "-c",
    "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(1, flush=True); input()",
]


@dataclass
class Losing:
    """A session that is lost at once."""

    ended: list[bool] = field(default_factory=list)

    def lost(self) -> str | None:
        return "its raylet ended"

    def end(self) -> None:
        self.ended.append(True)


def test_a_loss_is_told_once_and_the_rest_is_ended() -> None:
    session, told = Losing(), list[str]()
    with watched(session, "the local Ray session", leave=told.append, interval_s=0.01, confirm_s=0.01):
        time.sleep(0.2)
    assert told == [
        "the local Ray session was lost: its raylet ended; what is done is kept: run the same command again to resume"
    ]
    assert session.ended == [True]


def test_a_session_that_is_being_shut_down_is_not_lost() -> None:
    session, told = Losing(), list[str]()
    with watched(session, "the local Ray session", leave=told.append, interval_s=0.01, confirm_s=5):
        time.sleep(0.05)
    assert (told, session.ended) == ([], [])


def test_a_lost_session_ends_the_process_with_its_line_and_code() -> None:
    program = """
import time
from tokenbound.engine.cluster.watch import watched
class Losing:
    def lost(self): return "its raylet ended"
    def end(self): pass
with watched(Losing(), "the local Ray session", interval_s=0.01, confirm_s=0.01):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("tokenbound: the local Ray session was lost: its raylet ended;")


def test_what_a_dead_process_started_is_ended_too() -> None:
    """In a process of its own: what is ended is all that the process of a session started, the suite's Ray too."""
    program = f"""
import subprocess, psutil
from tokenbound.engine.cluster.watch import LocalSession
process = subprocess.Popen({SLEEP!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
process.stdout.readline()
(agent,) = psutil.Process(process.pid).children()
session = LocalSession({{"raylet": process}})
assert session.lost() is None
process.kill()
process.wait()
assert session.lost() == "its raylet ended"
assert agent.is_running()
session.end()
psutil.wait_procs([agent], timeout=10)
assert not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n", done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_cluster_may_be_away_for_a_while() -> None:
    now = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        control, here = free_port(), ("127.0.0.1", raylet.getsockname()[1])
        session = JoinedSession(("127.0.0.1", control), here, patience_s=45, clock=lambda: now[0])
        assert session.lost() is None
        now[0] = 44
        assert session.lost() is None
        with socket.create_server(("127.0.0.1", control)):  # it takes connections, stopped or not
            assert session.lost() is None
        now[0] = 100
        assert session.lost() is None, "it was there in between"
        now[0] = 145
        assert session.lost() == f"127.0.0.1:{control} has not answered for 45 s"


def test_a_node_without_its_raylet_is_lost_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as control:
        port = free_port()
        session = JoinedSession(("127.0.0.1", control.getsockname()[1]), ("127.0.0.1", port))
        assert session.lost() == f"the raylet of this node (127.0.0.1:{port}) ended"


def test_limits_of_the_shell_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    import ray

    from tokenbound.engine.cluster.session import ray_session
    from tokenbound.errors import IncompleteError

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    limits = {resource.RLIMIT_FSIZE: 20_480_000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2)
    says = r"this shell limits file size \(ulimit -f\) to 20,480,000 bytes"
    with pytest.raises(IncompleteError, match=says), ray_session():
        pass
