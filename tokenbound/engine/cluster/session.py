"""Joining or starting Ray, and reading what it has to give."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants

from tokenbound.errors import IncompleteError, InputError, TokenboundError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_LATE = ("timed out during startup", "Failed to connect to GCS")
"""What Ray says of a local session whose processes it waited for in vain."""


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Join the given or the surrounding cluster, else start a local one that listens on loopback alone.

    A session that is already there is used and left running.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends a task's process after one idle second. The next task then imports everything anew, beside the scorers.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    chosen = address or os.environ.get("RAY_ADDRESS")
    # Ray's backend says on stderr, at its error level, how Ray Data's own actors are built.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local: dict[str, Any] = {} if chosen else {"include_dashboard": False, "_node_ip_address": LOOPBACK}
    kept = nullcontext() if chosen else _loopback_kept()
    with warnings.catch_warnings(), _quiet_stderr(), _sigterm_kept(), kept:
        warnings.simplefilter("ignore")
        try:
            ray.init(address=chosen, logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"how.ray_address {chosen!r}: no Ray cluster answers there that accepts this token ({reason})"
            ) from None
        except Exception as error:  # Ray raises no narrower kind where its own processes are late
            if not any(reason in str(error) for reason in _LATE):
                raise
            raise IncompleteError("Ray did not start in time; is the machine overloaded? Run again") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _loopback_kept() -> Iterator[None]:
    """Keep Ray from putting the machine's own address in the place of loopback, where others could reach it.

    Ray does so except on desktop systems, by a constant that it reads from the environment when it is imported.
    """
    kept, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the program's own answer to SIGTERM, where it has one: Ray's prints the stacks of its threads."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:  # what Ray makes of the signal while it starts
        handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep native libraries from writing to stderr; exceptions are not affected."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


@dataclass(frozen=True)
class Resources:
    """What the cluster can run at once."""

    cpus: int
    gpus: int
    cpus_of_a_node: int
    """Of the largest: what needs more at once never runs."""
    gpus_of_a_node: int
    """Of the node that has most."""
    memory_of_a_node: int = 0
    """Bytes that workers may use on the smallest node with processors; 0 where that is not known."""


def cluster_resources() -> Resources:
    """Processors and GPUs of all living nodes."""
    found = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    memory = [int(node["Resources"].get("memory", 0)) for node in nodes if node["Resources"].get("CPU")]
    return Resources(
        cpus=max(1, int(found.get("CPU", 1))),
        gpus=int(found.get("GPU", 0)),
        cpus_of_a_node=max(1, *(int(node["Resources"].get("CPU", 0)) for node in nodes)),
        gpus_of_a_node=max(0, *(int(node["Resources"].get("GPU", 0)) for node in nodes)),
        memory_of_a_node=min(memory, default=0),
    )


def replica_name() -> str:
    """What people call this process: address of its node and number of the process, `10.0.0.7/4711`."""
    return f"{ray.util.get_node_ip_address()}/{os.getpid()}"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let a user's error that was raised inside a Ray task come out as itself."""
    try:
        yield
    except Exception as error:
        cause = _user_error(error)
        if cause is None:
            raise
        # Ray Data appends advice of its own; our messages are one line.
        raise type(cause)(str(cause).partition("\n")[0]) from None


def _user_error(error: BaseException) -> TokenboundError | None:
    """The first of our errors among the causes of one; Ray wraps them in one layer per task, Ray Train by worker."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        error = waiting.pop(0)
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, TokenboundError):
            # Ray raises a class derived from ours whose text is a traceback; the plain error is its cause.
            inner = getattr(error, "cause", None)
            return inner if isinstance(inner, TokenboundError) else error
        waiting += [getattr(error, name, None) for name in ("cause", "_base_exc", "__cause__", "__context__")]
        waiting += list(getattr(error, "worker_failures", {}).values())
    return None
