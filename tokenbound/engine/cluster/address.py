"""Which Ray cluster a command joins, who said so, and whether anything answers there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import ray
from ray._common.utils import get_default_system_temp_dir, get_ray_address_file
from ray._private.utils import read_ray_address

from tokenbound.errors import IncompleteError, InputError
from tokenbound.store.uri import refuse_credentials

RAY_TIMEOUT_S = 60.0
"""How long a cluster may take to answer, unless a config says otherwise."""

SESSION_BYTES = len("/ray/session_2026-12-01_17-34-41_420090_4194304/sockets/plasma_store")
"""What Ray puts behind its temporary folder to name its longest socket; 4194304 is Linux's largest process id."""
SOCKET_BYTES = (104 if sys.platform == "darwin" else 108) - 1
"""Longest name of a socket that the system takes."""


@dataclass(frozen=True)
class Address:
    """A cluster and who named it."""

    text: str
    """`HOST:PORT`."""
    origin: str
    """What a message calls the place where the address was found."""
    found: bool = False
    """Whether Ray itself finds it: then a token that is there is used without being asked for."""

    def __str__(self) -> str:
        return f"{self.origin} {self.text!r}"


def find_address(configured: str | None = None) -> Address | None:
    """The cluster to join, as Ray would choose it; None where a local session is to be started.

    Args:
        configured: `how.ray_address`.

    Raises:
        InputError: the address is not one that a driver can join, or `auto` finds no session.
    """
    asked = _asked(configured)
    if asked is not None and asked.text == "local":
        return None
    if asked is None or asked.text == "auto":
        running = read_ray_address()
        if running:
            return _checked(Address(running, f"the session in {get_ray_address_file(None)}", found=True))
        if asked is not None:
            raise InputError(f"{asked}: no Ray session runs on this machine; start one with `ray start --head`")
        return None
    return _checked(asked)


def _asked(configured: str | None) -> Address | None:
    if configured and configured != "auto":
        return Address(configured, "how.ray_address")
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return Address(named, "RAY_ADDRESS")
    return Address(configured, "how.ray_address") if configured else None


def _checked(address: Address) -> Address:
    refuse_credentials(address.text, where=address.origin)
    scheme, separator, _ = address.text.rpartition("://")
    if scheme in ("http", "https"):
        raise InputError(
            f"{address} is the address of a dashboard; give HOST:PORT of the cluster itself (6379 unless it was "
            "started with another port), or submit the command with `ray job submit`"
        )
    if separator:
        raise InputError(
            f"{address}: {scheme}:// addresses are not supported; run on a node of the cluster and give HOST:PORT "
            "(6379 unless it was started with another port)"
        )
    host, _, port = address.text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"{address} is not a Ray address; give HOST:PORT, such as 10.0.0.7:6379")
    return address


def check_folder() -> None:
    """Refuse a temporary folder below which Ray's sockets cannot be named.

    Raises:
        InputError: it is too long.
    """
    folder, most = get_default_system_temp_dir(), SOCKET_BYTES - SESSION_BYTES
    if len(os.fsencode(folder)) > most:
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise InputError(
            f"{name} {folder!r} has {len(os.fsencode(folder))} bytes, and the names of Ray's sockets leave room for "
            f"{most}; set RAY_TMPDIR to a shorter folder"
        )


ASK = """
import sys, time
import ray
from ray._raylet import GcsClient
while True:
    try:
        GcsClient(address=sys.argv[1])
        break
    except ray.exceptions.AuthenticationError as error:
        sys.exit(str(error))
    except Exception:
        time.sleep(0.5)
"""
"""Asks a cluster until it answers. One question may take 40 seconds, writes to stderr and cannot be interrupted, so a
process of its own asks, which can be ended."""


def wait_for(address: Address, timeout_s: float = RAY_TIMEOUT_S, *, ask: str = ASK) -> None:
    """Wait until a cluster answers; Ray itself would try for a quarter of an hour.

    Args:
        address: of the cluster.
        timeout_s: seconds after which it counts as dead.
        ask: program that ends when the cluster answers, with a word on stderr if our token was refused.

    Raises:
        AuthenticationError: Ray's; it refuses our token.
        IncompleteError: it did not answer in time.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ask, address.text], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise IncompleteError(
            f"{address}: no Ray cluster answered within {timeout_s:g} s (how.ray_timeout_s); start it, correct the "
            "address, or set RAY_ADDRESS=local to run on this machine alone"
        ) from None
    if asked.returncode:
        raise ray.exceptions.AuthenticationError(asked.stderr.strip())
