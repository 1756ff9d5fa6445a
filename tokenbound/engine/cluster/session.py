"""Joining or starting Ray, and reading what it has to give."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from tokenbound.engine.cluster.address import RAY_TIMEOUT_S, Address, check_folder, find_address, wait_for
from tokenbound.engine.cluster.auth import secure_token
from tokenbound.engine.cluster.watch import current_session, watched
from tokenbound.errors import IncompleteError, InputError, TokenboundError, disk_problem

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_LATE = ("timed out during startup", "Failed to connect to GCS")
"""What Ray says of a local session whose processes it waited for in vain."""


@contextmanager
def ray_session(address: str | None = None, timeout_s: float = RAY_TIMEOUT_S) -> Iterator[None]:
    """Join the given or the surrounding cluster, else start a local one that listens on loopback alone.

    A session that is already there is used and left running.

    Args:
        address: `how.ray_address`.
        timeout_s: seconds that a cluster to join may take to answer.

    Raises:
        InputError: no driver can join that address, or our token is refused.
        IncompleteError: nothing answers there, or no local session came up.
    """
    if ray.is_initialized():
        with plain_errors():
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends a task's process after one idle second. The next task then imports everything anew, beside the scorers.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Ray's backend says on stderr, at its error level, how Ray Data's own actors are built.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    chosen = find_address(address)
    secure_token(starts_session=chosen is None)
    if chosen is None:
        check_folder()
    else:
        logger.info("joining the Ray cluster at %s", chosen)
    with warnings.catch_warnings(), _quiet_stderr(), _sigterm_kept():
        warnings.simplefilter("ignore")
        if chosen is None:
            _start()
        else:
            _join(chosen, timeout_s)
    ray._private.worker._worker_logs_enabled = False  # Ray prints the last words of its processes on our stdout
    try:
        where = "the local Ray session" if chosen is None else f"the Ray cluster at {chosen}"
        with watched(current_session(), where), plain_errors():
            yield
    finally:
        ray.shutdown()


def _start() -> None:
    """Start a session of our own.

    Raises:
        IncompleteError: its processes did not come up.
    """
    with _loopback_kept():
        try:
            _init("local", include_dashboard=False, _node_ip_address=LOOPBACK)
        except Exception as error:  # Ray raises no narrower kind where its own processes are late
            if not any(reason in str(error) for reason in _LATE):
                raise
            raise IncompleteError(
                f"Ray did not start in time; {_limits() or 'is the machine overloaded? Run again'}"
            ) from None


def _join(address: Address, timeout_s: float) -> None:
    """Join a cluster that others started.

    Raises:
        InputError: it refuses our token, or has no node on this machine.
        IncompleteError: it does not answer.
    """
    try:
        if address.found:
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        wait_for(address, timeout_s)
        _init("auto" if address.found else address.text)
    except ray.exceptions.AuthenticationError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{address}: the Ray cluster there does not accept this token ({reason})") from None
    except ConnectionError:
        raise InputError(
            f"{address}: no node of that Ray cluster runs on this machine; run the command on one, or start one with "
            f"`ray start --address={address.text}`"
        ) from None


def _init(address: str, **options: Any) -> None:
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)


def _limits() -> str | None:
    """Limits of this process on what Ray's processes need much of, and how they are lifted; None where there are none.

    Windows has none.
    """
    try:
        import resource
    except ImportError:
        return None
    kinds = {"file size (ulimit -f)": resource.RLIMIT_FSIZE, "memory (ulimit -v)": resource.RLIMIT_AS}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    limits = [f"{name} to {limit:,} bytes" for name, limit in found.items() if limit != resource.RLIM_INFINITY]
    if not limits:
        return None
    return f"this shell limits {' and '.join(limits)}, which Ray's processes obey too; lift that and run again"


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
    """Let a user's error that was raised inside a Ray task come out as itself, and name what failed beneath one.

    Raises:
        TokenboundError: that error; `InputError` for a full or read-only disk; `IncompleteError` for a worker that the
            machine ended.
    """
    try:
        yield
    except Exception as error:
        found = _user_error(error)
        if found is None:
            raise
        # Ray Data appends advice of its own; our messages are one line.
        raise type(found)(str(found).partition("\n")[0]) from None


def _user_error(error: BaseException) -> TokenboundError | None:
    """What a user can do something about among the causes of an error: the first of ours, else the first of a machine.

    A machine is to blame only where an error was raised from its own: what is raised while one is handled may be ours.
    """
    ours = next((each for each in _causes(error, *_LINKS, "__context__") if isinstance(each, TokenboundError)), None)
    return ours or next(filter(None, map(_machine_error, _causes(error, *_LINKS))), None)


def _machine_error(error: BaseException) -> TokenboundError | None:
    """A disk, a limit or a memory that gave out, as an error of ours."""
    if isinstance(error, OSError) and (problem := disk_problem(error)) is not None:
        return InputError(problem)
    for kind, text in _ENDED.items():
        if isinstance(error, kind):
            return IncompleteError(text)
    return None


_ENDED: dict[type[Exception], str] = {
    ray.exceptions.OutOfMemoryError: "the memory of a machine ran out and Ray ended a worker there; set fewer "
    "how.replicas or a smaller batch, and run the same command again to resume",
    ray.exceptions.OutOfDiskError: "the disk of Ray's temporary folder is full; make room or set RAY_TMPDIR to another "
    "one, and run the same command again to resume",
    ray.exceptions.WorkerCrashedError: "a worker process was ended from outside, most often for want of memory; run "
    "the same command again to resume",
    ray.exceptions.ActorDiedError: "a worker process was ended from outside, most often for want of memory; run the "
    "same command again to resume",
}
"""What Ray raises for a process that the machine ended."""


_LINKS = ("cause", "_base_exc", "__cause__")
"""Attributes under which Ray's errors and Python's keep what they were raised from."""


def _causes(error: BaseException, *links: str) -> Iterator[BaseException]:
    """An error and all that led to it; Ray wraps them in one layer per task, Ray Train by worker.

    Ray raises classes derived from that of the cause, whose text is a traceback: these are left out.
    """
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        error = waiting.pop(0)
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        if not isinstance(error, ray.exceptions.RayTaskError):
            yield error
        waiting += [getattr(error, name, None) for name in links]
        waiting += list(getattr(error, "worker_failures", {}).values())
