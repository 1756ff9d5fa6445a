"""Ends a command whose Ray session was lost.

Ray's own answer is late and bare: a driver whose control server (GCS) died ends after a minute with code 1 and without
a word, one whose raylet died may wait for ever, and the agents of a local session outlive both.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import psutil  # Ray brings it
import ray
from ray._private import ray_constants

from tokenbound.errors import IncompleteError

INTERVAL_S = 1.0
"""Between two looks. A driver whose raylet died is ended by Ray within seven seconds."""
CONFIRM_S = 1.0
"""How long a loss must last: a session that is being shut down loses its processes too."""
PATIENCE_S = 45.0
"""How long the control server of a joined cluster may be away; Ray, which lets it restart, ends a driver after 60."""
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""What sets Ray's own patience, in seconds."""
SHARE = 0.75
"""Ours as a share of it."""
CONNECT_S = 2.0


class Session(Protocol):
    """What a command runs on."""

    def lost(self) -> str | None:
        """What of it has gone; None while it is whole."""

    def end(self) -> None:
        """End what is left of it, as far as it is ours."""


@dataclass
class LocalSession:
    """Ray's processes on this machine, which this process started."""

    processes: dict[str, Any]
    """Those without which nothing runs, as `subprocess.Popen` knows them."""
    started: dict[int, psutil.Process] = field(default_factory=dict)
    """All that they and this process started: when their parents are gone, nothing else tells them apart."""

    def lost(self) -> str | None:
        """Name of a process that ended."""
        with suppress(psutil.Error):
            self.started.update((each.pid, each) for each in psutil.Process().children(recursive=True))
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        return f"its {ended[0]} ended" if ended else None

    def end(self) -> None:
        """Kill what is left: agents and workers outlive their raylet."""
        for each in self.started.values():
            with suppress(psutil.Error):  # a process that has ended meanwhile; psutil never kills one that took its id
                each.kill()


@dataclass
class JoinedSession:
    """A cluster that others started."""

    control: tuple[str, int]
    """Host and port of its control server."""
    raylet: tuple[str, int]
    """Host and port of the raylet of this node."""
    patience_s: float = PATIENCE_S
    clock: Callable[[], float] = time.monotonic
    away_since: float | None = None

    def lost(self) -> str | None:
        """What cannot be reached any more."""
        if not _answers(self.raylet):
            return f"the raylet of this node ({_shown(self.raylet)}) ended"
        if _answers(self.control):
            self.away_since = None
            return None
        self.away_since = self.clock() if self.away_since is None else self.away_since
        away = self.clock() - self.away_since
        return f"{_shown(self.control)} has not answered for {away:.0f} s" if away >= self.patience_s else None

    def end(self) -> None:
        """Nothing of it is ours."""


def _shown(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def current_session() -> Session:
    """The session that this process has just joined or started."""
    node: Any = ray._private.worker._global_node
    names = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    if all(name in node.all_processes for name in names):
        return LocalSession({name: node.all_processes[name][0].process for name in names})
    host, _, port = node.gcs_address.rpartition(":")
    patience = min(PATIENCE_S, SHARE * float(os.environ.get(RECONNECT, "60")))
    return JoinedSession((host, int(port)), (node.node_ip_address, int(node.node_manager_port)), patience)


@contextmanager
def watched(
    session: Session,
    what: str,
    *,
    leave: Callable[[str], object] | None = None,
    interval_s: float = INTERVAL_S,
    confirm_s: float = CONFIRM_S,
) -> Iterator[None]:
    """End the process as soon as a session is lost, whatever it waits for then.

    Ray's native code ends the process of its own accord, and cannot be interrupted where it waits for ever, so no
    exception can be relied on to reach the caller.

    Args:
        session: on which the command runs.
        what: the session in the message.
        leave: is told the loss; default writes it to stderr and ends the process with the code of `IncompleteError`.
        interval_s: seconds between two looks.
        confirm_s: seconds that a loss must last.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(interval_s):
            reason = session.lost()
            if reason is None or over.wait(confirm_s):
                continue
            session.end()
            (leave or _leave)(f"{what} was lost: {reason}; what is done is kept: run the same command again to resume")
            return

    thread = threading.Thread(target=watch, name="tokenbound-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(interval_s + confirm_s + 2 * CONNECT_S)


def _leave(line: str) -> NoReturn:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"tokenbound: {line}\n")
        sys.stderr.flush()
    os._exit(IncompleteError.exit_code)
