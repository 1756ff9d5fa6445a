"""Text from files, made safe for a terminal.

A certificate comes from someone else. Printed as it is, a name in it could clear the screen, recolour a verdict, write
`verified` over a refusal or turn the order of the letters around. Everything that this package prints passes through
here: `console()` for tables and lines, `visible()` for errors and logs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of writing direction
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # interlinear annotations and tags, which are invisible
    "\ud800-\udfff"  # halves of surrogate pairs: bytes of file names that are not UTF-8
    "]"
)


def visible(text: str, *, lines: bool = True) -> str:
    r"""The text with every character that controls a terminal spelled out.

    Args:
        text: from anywhere.
        lines: whether newlines may stay; an error is one line.

    >>> print(visible("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    >>> print(visible("bad\nverified", lines=False))
    bad\nverified
    """
    text = _UNSAFE.sub(_spelled, text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def visible_json(text: str) -> str:
    r"""The same JSON, with what JSON leaves unescaped of such characters escaped.

    >>> print(visible_json('"a\x9bb"'))
    "a\u009bb"
    """
    return _UNSAFE.sub(lambda match: _json_spelled(ord(match.group())), text)


def _json_spelled(code: int) -> str:
    if code < 65536:
        return f"\\u{code:04x}"
    return "".join(f"\\u{unit:04x}" for unit in (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF)))


class _VisibleConsole(Console):
    """A console on which only rich itself, and never a text that is shown, controls the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's segments, with their texts made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console(**options: Any) -> Console:
    """A console for text from files: no control characters, and `[red]` or `:smile:` in a name are letters.

    >>> console().print("[red]name[/red]")
    [red]name[/red]
    """
    return _VisibleConsole(**{"markup": False, "emoji": False, **options})


class VisibleFormatter(logging.Formatter):
    """A log line of visible characters; only a traceback has several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line."""
        return visible(super().formatMessage(record), lines=False)
