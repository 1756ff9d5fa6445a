"""Ray clusters of several nodes on one machine; namespaces for nodes with addresses of their own, or for machines."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from cluster_run import HOLD

TESTS = Path(__file__).parent
OBJECT_STORE_BYTES = 100_000_000
START = """
from ray._private import services
from ray.scripts.scripts import main
services.resolve_ip_for_localhost = str
main()
"""
"""`ray start`, which would put the address of this machine in the place of 127.0.0.1 and listen there."""
SETTINGS = {
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""Of every node and driver; whoever has not this token is refused."""

LONG_S = 420.0
"""Much longer than anything takes on a machine that is not very busy."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = LONG_S) -> Any:
    """Wait for a condition to be true, and return what it returns."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        mine = psutil.Process(process.pid)
        for each in (mine, *mine.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Node:
    """One node: `ray start --block` and everything that it started."""

    process: subprocess.Popen[bytes]

    def owns(self, replica: str) -> bool:
        """Whether a replica, by its name in the run's directory, runs on the node."""
        pid = int(replica.rpartition("/")[2])
        return any(child.pid == pid for child in psutil.Process(self.process.pid).children(recursive=True))

    def kill(self) -> None:
        """End every process of the node at once, as if its machine had gone."""
        kill_tree(self.process)


@dataclass
class LocalCluster:
    """A head without processors, and workers that come and go; all of them on one machine."""

    folder: Path
    """A short one: sockets lie below it."""
    head_address: str = "127.0.0.1"
    enter: Callable[[str], Sequence[str]] = lambda address: ()
    """Words before the command of a node with that address, such as those that enter its network namespace."""
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.settings = {**os.environ, **SETTINGS, HOLD: str(self.folder / "hold"), **self.settings}

    @property
    def address(self) -> str:
        """Where drivers join."""
        return f"{self.head_address}:{self.port}"

    def head(self, *options: str) -> Node:
        """Start the head; returns when it is there. It has no processors and no dashboard unless options say so."""
        chosen = options or ("--num-cpus=0", "--include-dashboard=false")
        return self._begin(self.head_address, "--head", f"--port={self.port}", f"--temp-dir={self.folder}", *chosen)

    def worker(self, address: str = "127.0.0.1") -> Node:
        """Start a worker node of one processor; returns when it is there."""
        return self._begin(address, f"--address={self.address}", "--num-cpus=1")

    def _begin(self, address: str, *options: str) -> Node:
        """Start a node and wait for it; Ray gives it half a minute, which a busy machine may need twice."""
        for _ in range(3):
            node = self._node(address, *options)
            started = partial(self._has_started, node)
            wait_until(lambda: started() or node.process.poll() is not None, "the node is there")  # noqa: B023
            if started():
                return node
        raise AssertionError(f"a node does not start: {self._log(node)[-2000:]}")

    def _has_started(self, node: Node) -> bool:
        return "Ray runtime started" in self._log(node)

    def _node(self, address: str, *options: str) -> Node:
        command = ["-c", START, "start", "--block", f"--node-ip-address={address}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", *options]
        return Node(self._start(address, command, self.settings))

    def _log(self, node: Node) -> str:
        return (self.folder / f"{self.started.index(node.process)}.log").read_text()

    def _start(self, address: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.enter(address), sys.executable, *command],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, config: Path) -> subprocess.Popen[bytes]:
        """Start an evaluation that joins the cluster, and holds its shards while `hold` says so."""
        joined = {"RAY_ADDRESS": self.address}
        if self.head_address == "127.0.0.1":
            joined["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # `ray.init` too would change the address
        return self._start(self.head_address, ["-m", "cluster_run", str(config)], {**self.settings, **joined})

    def hold(self) -> None:
        """From now on shards stay with their replica."""
        (self.folder / "hold").touch()

    def release(self) -> None:
        """Let them go."""
        (self.folder / "hold").unlink()

    def finish(self, run: subprocess.Popen[bytes]) -> None:
        """Wait for a run to end well."""
        log = self.folder / f"{self.started.index(run)}.log"
        wait_until(lambda: run.poll() is not None, f"the run has ended: {log.read_text()[-2000:]}")
        assert run.returncode == 0, log.read_text()[-4000:]


@contextmanager
def local_cluster(**options: Any) -> Iterator[LocalCluster]:
    """A cluster without nodes; what was started in it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder), **options)
        try:
            yield cluster
        finally:
            for process in reversed(cluster.started):
                kill_tree(process)


def free_port() -> int:
    """A port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- Network namespaces -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Namespaces on one bridge, which has no way out: their addresses are 10.231.0.1 and so on."""

    name: str
    size: int

    def address(self, node: int) -> str:
        """Address of a node."""
        return f"10.231.0.{node + 1}"

    def enter(self, address: str) -> list[str]:
        """Words before a command that put it into the namespace of an address."""
        return ["ip", "netns", "exec", self._space(int(address.rpartition(".")[2]) - 1)]

    def cut(self, node: int) -> None:
        """Take a node off the network."""
        _ip("link", "set", self._port(node), "down")

    def join(self, node: int) -> None:
        """Put it back."""
        _ip("link", "set", self._port(node), "up")

    def _space(self, node: int) -> str:
        return f"{self.name}n{node}"

    def _port(self, node: int) -> str:
        return f"{self.name}p{node}"

    def create(self) -> None:
        """Make bridge and namespaces. The bridge has no address, so the machine itself is not on this network."""
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")
        for node in range(self.size):
            space, port = self._space(node), self._port(node)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", self.name, "up")
            _ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Take away what was made."""
        for node in range(self.size):
            subprocess.run(["ip", "netns", "del", self._space(node)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True)


@contextmanager
def network(size: int) -> Iterator[Network]:
    """So many namespaces on a network of their own."""
    found = Network(f"tb{secrets.token_hex(2)}", size)
    try:
        found.create()
        yield found
    finally:
        found.remove()


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces here."""
    try:
        with network(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# --- Machines apart -----------------------------------------------------------------------------------------------

APART = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Words before a command that give it namespaces of its own; what it started ends with it."""


@dataclass(frozen=True)
class Machine:
    """A machine of its own but for the disk: no network beside loopback, no other processes, a home, names of hosts.

    Commands run there as they are written for a fresh machine, with the ports and folders that they take by default.
    """

    home: Path
    ray: Path
    """What lies at `/tmp/ray` there."""
    names: tuple[str, ...] = ()
    """Host names of the machine beside `localhost`."""

    def run(self, script: str, environment: dict[str, str] | None = None) -> str:
        """Run a shell script in the folder of the repository; it must succeed. Returns what it printed."""
        hosts, log = self.home / "hosts", self.home / "script.log"
        hosts.write_text(" ".join(["127.0.0.1", "localhost", socket.gethostname(), *self.names]) + "\n")
        Path("/tmp/ray").mkdir(exist_ok=True)
        made = f"ip link set lo up\nmount --bind {self.ray} /tmp/ray\nmount --bind {hosts} /etc/hosts\n"
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        with log.open("wb") as stream:
            ended = subprocess.run(
                [*APART, "/bin/sh", "-euc", made + script],
                cwd=TESTS.parent,
                env={"HOME": str(self.home), "PATH": path, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=3 * LONG_S,
                check=False,
            )
        assert ended.returncode == 0, log.read_text()[-6000:]
        return log.read_text()


@contextmanager
def machine(home: Path, *names: str) -> Iterator[Machine]:
    """A machine with that home, and so named; its folder of Ray goes with the block."""
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp", ignore_cleanup_errors=True) as ray:
        home.mkdir(exist_ok=True)
        yield Machine(home, Path(ray), names)


def can_be_apart() -> bool:
    """Whether this process may make such machines here."""
    with tempfile.TemporaryDirectory() as home, machine(Path(home)) as found, suppress(OSError, AssertionError):
        found.run("true")
        return True
    return False
