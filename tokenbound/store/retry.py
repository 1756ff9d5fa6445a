"""Patience with object stores: what fails for the moment is tried again, ever later, at random times.

The waits are exponential with full jitter, so that a thousand writers that were told to slow down do not come back
together. The clients' own retries are off (Google's: as short as it allows): they would multiply ours.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from tokenbound.errors import IncompleteError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ATTEMPTS = 10
"""How often an operation is tried in all; TOKENBOUND_STORE_ATTEMPTS in the environment of a process changes it."""
FIRST_WAIT_S = 0.2
"""Longest wait after the first failure; it doubles with each."""
LONGEST_WAIT_S = 20.0
"""No wait is longer. Ten attempts last half a minute on average."""

TRANSIENT = re.compile(
    r"HTTP status (429|5\d\d)|INTERNAL_FAILURE|SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTL|REQUEST_TIMEOUT"
    r"|NETWORK_CONNECTION|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|DATA_LOSS"
    r"|time[d -]*out|connection (was )?(reset|closed|aborted)|broken pipe",
    re.IGNORECASE,
)
"""How Arrow's clients of S3 and GCS name what may pass: overload, the server's own errors, the network, and (DATA_LOSS)
bytes that came otherwise than their checksum says."""

OFFLINE = "OfflineModeIsEnabled"
"""The hub's client says so with an error of the network where HF_HUB_OFFLINE is set; it will say so again."""

observers: list[Callable[[str], None]] = []
"""Told the name of the operation at each retry; the engine counts them as a metric."""


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a moment later.

    >>> is_transient(OSError("AWS Error SLOW_DOWN during PutObject operation")), is_transient(FileNotFoundError("key"))
    (True, False)
    """
    if type(error).__name__ == OFFLINE:
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if any(kind.__name__ == "TransportError" and kind.__module__.startswith("httpx") for kind in type(error).__mro__):
        return True  # how the hub's client tells of the network, once it has tried a few times itself
    return type(error) is OSError and TRANSIENT.search(str(error)) is not None


def patiently(operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call an operation that may be repeated without harm until it succeeds.

    Raises:
        IncompleteError: the store failed every time; what was committed stands.
    """
    attempts = int(os.environ.get("TOKENBOUND_STORE_ATTEMPTS", ATTEMPTS))
    patience = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=stop_after_attempt(attempts),
        before_sleep=_note,
    )
    try:
        return patience(operation, *args, **kwargs)
    except RetryError as error:
        reason = " ".join(str(error.last_attempt.exception()).split())
        raise IncompleteError(
            f"the store failed {attempts} times: {reason}; run the same command again when it answers"
        ) from None


def patient(operation: Callable[P, R]) -> Callable[P, R]:
    """Decorate an operation that may be repeated without harm."""

    @wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return patiently(operation, *args, **kwargs)

    return call


def _note(state: RetryCallState) -> None:
    name = getattr(state.fn, "__name__", "operation")
    reason = " ".join(str(state.outcome.exception()).split()) if state.outcome is not None else ""
    logger.info("%s is tried again in %.1f s: %s", name, state.next_action.sleep if state.next_action else 0.0, reason)
    for observer in observers:
        observer(name)
