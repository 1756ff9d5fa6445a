"""The frame of every HTML report: one self-contained file, no script, no address on the network, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from jinja2 import Environment

Legend = tuple[tuple[str, str, str], ...]
"""(role of the colour, `area`, `line`, `dash` or `dot`, words)."""


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    name: str
    """Unique id on the page."""
    title: str
    caption: str
    svg: Markup
    legend: Legend = ()


@dataclass(frozen=True)
class Tile:
    """One number in large letters."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a heading; columns named in `text` are words, all others numbers."""

    title: str
    sentence: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    """Of each row, what stands in small print below its first cell; empty for none."""


@dataclass(frozen=True)
class Page:
    """What every report begins and ends with."""

    kicker: str
    """Kind of report, in small letters above the headline."""
    title: str
    """Of the browser's tab."""
    headline: str
    """The claim in a sentence."""
    verdict: str
    vacuous: bool
    tiles: Sequence[Tile]
    assumptions: Sequence[str]
    plots: Sequence[Plot]
    footer: str


def render(template: str, page: Page, **more: object) -> str:
    """A page as HTML text; the same values give the same text.

    Every text that came from outside is escaped, and the page forbids scripts and the network to itself.

    Args:
        template: file of this folder that extends `page.html`.
        page: head, plots and foot.
        more: what the template shows besides.
    """
    return _environment().get_template(template).render(**vars(page), **more)


def page_source() -> str:
    """The frame's own text: styles, and the colours of light and dark."""
    return _template("page.html")


def _template(name: str) -> str:
    return resources.files("tokenbound.report").joinpath(name).read_text("utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_template))
    environment.filters["unbroken"] = _unbroken
    return environment


def _unbroken(sentence: str) -> Markup:
    """No line break, where there is room, between a number and its `%` or `bits`, or inside a name with hyphens.

    >>> _unbroken("With 95 % confidence")
    Markup('With <span class="whole">95 %</span> confidence')
    >>> _unbroken("<b> of markov-4")
    Markup('&lt;b&gt; of <span class="whole">markov-4</span>')
    >>> _unbroken("at most 10.5 bits (3.8 bits per byte)")
    Markup('at most <span class="whole">10.5 bits</span> <span class="whole">(3.8 bits</span> per byte)')
    """
    # With the brackets and stops beside them: at the edge of a span that is a block of its own a line may break.
    whole = r"\S*\d (?:%|bits\b)\S*|\S*\w-\w\S*"
    return Markup(re.sub(whole, r'<span class="whole">\g<0></span>', str(escape(sentence))))
