"""SIGINT and SIGTERM: a run ends in order, whatever it waits for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def first_signal() -> Iterator[list[int]]:
    """Answer the first signal by KeyboardInterrupt, the one exception that all libraries on the way let through.

    A second one ends the process at once. One that was ignored before, as `nohup` and shells ask, stays ignored.

    Yields:
        What will hold the number of that signal.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
