"""An S3 server as a process of its own, and a proxy before it that fails on purpose."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "a-secret-that-no-file-may-hold"
"""Value of AWS_SECRET_ACCESS_KEY during the tests; `conftest.py` sets it before Ray starts."""
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We made a mistake</Message></Error>"

Fault = str | None
"""What happens to a request: `500`, `503`, `slow`, `cut` (half of the answer, then the end), `drop`, or None."""
Rule = Callable[[int, str, str], Fault]
"""Number of the request from 1, its method and its path, to what happens to it."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Address of an empty S3 server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await(port, server)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def _await(port: int, server: subprocess.Popen[Any]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the S3 server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the S3 server did not answer within a minute")


def request(address: str, method: str, path: str) -> bytes:
    """One request without a signature, which the server does not ask for."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, headers={"Content-Length": "0"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status < 300, (answer.status, body)
    return body


def place(address: str, path: str) -> str:
    """URI of a path on that server."""
    return f"s3://{path}?endpoint_override=http://{address}&scheme=http&region=us-east-1"


class Faults:
    """Decides what happens to each request and counts what it did."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.lock, self.requests, self.made = rule, threading.Lock(), 0, Counter[str]()

    def __call__(self, method: str, path: str) -> Fault:
        with self.lock:
            self.requests += 1
            fault = self.rule(self.requests, method, path)
            if fault is not None:
                self.made[fault] += 1
        return fault


@contextmanager
def faulty(
    address: str, rule: Callable[[int, str, str], Fault], *, slow_s: float = 0.2
) -> Iterator[tuple[str, Faults]]:
    """A proxy before the server at an address; yields its own address and the count of its faults.

    Args:
        address: the server behind it.
        rule: what happens to each request.
        slow_s: how long a slow answer waits.
    """
    faults = Faults(rule)

    class Handler(_Proxy):
        backend, decide, wait_s = address, faults, slow_s

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        if fault in ("500", "503"):
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
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut
