"""Progress that reads well on a terminal and in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tokenbound.report.words import duration
from tokenbound.visible import console as visible_console

logger = logging.getLogger(__name__)

B = TypeVar("B")


def describe_speed(done: int, total: int, speed: float) -> str:
    """Tokens done, tokens/s and time left in words.

    >>> describe_speed(500_000, 2_000_000, 25_000.0)
    '500.0k / 2.00M tokens, 25.0k tokens/s, 1 min left'
    """
    left = duration((total - done) / speed) if speed > 0 else "?"
    return f"{describe_done(done, total)}, {_human(speed)} tokens/s, {left} left"


def describe_done(done: int, total: int) -> str:
    """Tokens done, in words.

    >>> describe_done(500_000, 2_000_000)
    '500.0k / 2.00M tokens'
    """
    return f"{_human(done)} / {_human(total)} tokens"


def _human(number: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.2f}{suffix}" if scale > 1e3 else f"{number / scale:.1f}{suffix}"
    return f"{number:.0f}"


INTERVAL_S = 30.0
"""How often a long step before the scoring says how far it is."""


def told(results: Iterable[B], what: str, total: int, *, interval_s: float = INTERVAL_S) -> Iterator[B]:
    """Pass results on, and log now and then how many of them are there: a long step is not silent.

    Args:
        results: as they come.
        what: the step, in a word or two.
        total: results to expect.
        interval_s: seconds between two lines.
    """
    last = time.monotonic()
    for done, result in enumerate(results, 1):
        if done < total and time.monotonic() - last >= interval_s:
            last = time.monotonic()
            logger.info("%s: %d of %d parts", what, done, total)
        yield result


class TokenProgress:
    """A bar in a terminal; elsewhere one log line every `interval_s` seconds; neither below the log level INFO.

    Tokens that an earlier run had finished count as done but not towards the speed, nor does the time that the
    replicas take to start once it is known: the speed is taken from the first finished shard on, as soon as that is
    `interval_s` ago.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        done_tokens: int = 0,
        interval_s: float = 30.0,
        what: str = "scoring",
        console: Console | None = None,
        on_event: Callable[..., None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.total, self.done, self.resumed = total_tokens, done_tokens, done_tokens
        self.interval_s, self.what, self.on_event = interval_s, what, on_event
        self.started = self.last_line = self._clock()
        self.first: tuple[float, int] | None = None
        """When the first new tokens were done, and how many tokens were done then."""
        console = console or visible_console(file=sys.stderr)
        self.bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal and logger.isEnabledFor(logging.INFO)
            else None
        )
        self.task = TaskID(0)

    @property
    def speed(self) -> float:
        """Tokens per second, without the start where that is over."""
        now, (since, before) = self._clock(), (self.started, self.resumed)
        if self._is_steady(now) and self.first is not None:
            since, before = self.first
        return (self.done - before) / max(now - since, 1e-9)

    def _is_steady(self, now: float) -> bool:
        return self.first is not None and now - self.first[0] >= self.interval_s

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, text="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, tokens: int) -> None:
        """Count newly finished tokens."""
        self.done += tokens
        now = self._clock()
        self.first = self.first or (now, self.done)
        known = self.done >= self.total or self._is_steady(now)
        text = describe_speed(self.done, self.total, self.speed) if known else describe_done(self.done, self.total)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, text=text)
        if now - self.last_line >= self.interval_s or self.done >= self.total:
            self.last_line = now
            if self.bar is None:
                logger.info("%s: %s", self.what, text)
            if self.on_event is not None:
                self.on_event(
                    event="progress", done_tokens=self.done, total_tokens=self.total, tokens_per_s=round(self.speed, 1)
                )
