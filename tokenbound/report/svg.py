"""Matplotlib figures as inline SVG whose colours the page decides.

A figure is drawn with one placeholder colour per role; afterwards each placeholder becomes a CSS variable, so that one
drawing serves light and dark. Text stays text. The tree is rebuilt rather than patched: metadata, style sheets and
namespaces go, ids get the figure's name in front, and every text is escaped again on the way out.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from contextlib import AbstractContextManager
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tokenbound.report.page import Legend, page_source

STANDALONE = 1.7
"""Pixels of a unit where a figure is a file of its own."""
LINE_INCHES = 0.22
"""Height of a line of text in a figure."""
WIDTH = 400
"""Units of a figure's width; a unit is about 0.9 pixels on a phone and 1.3 on a desk."""

ROLES = (
    "ink",
    "muted",
    "grid",
    "measured",
    "variance",
    "artifact",
    "protocol",
    "tokenizer",
    "tune",
    "delta",
    "slack",
    "accent",
    "guess",
    "surface",
)
"""What colours are for; each is a CSS variable `--role` of the template."""

_PLACEHOLDERS = {role: f"#0102{index:02x}" for index, role in enumerate(ROLES)}
_VARIABLES = {colour: f"var(--{role})" for role, colour in _PLACEHOLDERS.items()}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenbound",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.edgecolor": _PLACEHOLDERS["grid"],
    "axes.labelcolor": _PLACEHOLDERS["muted"],
    "axes.labelsize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": _PLACEHOLDERS["grid"],
    "grid.linewidth": 0.7,
    "text.color": _PLACEHOLDERS["ink"],
    "xtick.color": _PLACEHOLDERS["grid"],
    "ytick.color": _PLACEHOLDERS["grid"],
    "xtick.labelcolor": _PLACEHOLDERS["muted"],
    "ytick.labelcolor": _PLACEHOLDERS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
}
_XLINK = "{http://www.w3.org/1999/xlink}href"
_DROPPED = {"metadata", "style"}


def colour(role: str) -> str:
    """The placeholder of a role, for matplotlib."""
    return _PLACEHOLDERS[role]


def new_figure(height: float) -> Figure:
    """An empty figure of the common width.

    Args:
        height: in the same units as `WIDTH`.
    """
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def settings() -> AbstractContextManager[None]:
    """The context that figures are made and drawn in."""
    return rc_context(_SETTINGS)


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn with the colours of this module.
        name: unique on the page; ids begin with it.
    """
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _rebuild(root, name)
    box = root.get("viewBox", f"0 0 {WIDTH} 300")
    root.attrib = {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title"}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True))


def standalone_svg(figure: Figure, legend: Legend, name: str, title: str = "") -> str:
    """The figure as an SVG file of its own, on the ground and in the light colours of the report.

    Args:
        figure: drawn with the colours of this module.
        legend: drawn below the plot.
        name: ids begin with it.
        title: a sentence above the plot.
    """
    _label(figure, legend, title)
    text = str(inline_svg(figure, name))
    for role, value in _light_colours().items():
        text = text.replace(f"var(--{role})", value)
    head, _, rest = text.replace(f' aria-labelledby="{name}-title"', "", 1).partition(">")
    pixels = [round(72 * STANDALONE * inches) for inches in figure.get_size_inches()]
    size = f'width="{pixels[0]}" height="{pixels[1]}"'
    head = head.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" ', 1)
    return f'{head}><rect width="100%" height="100%" rx="8" fill="{_light_colours()["surface"]}"/>{rest}\n'


def _label(figure: Figure, legend: Legend, title: str) -> None:
    """Put title and legend into a figure, and make room for them."""
    lines = textwrap.wrap(title, 54)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + (len(lines) + math.ceil(len(legend) / 2)) * LINE_INCHES)
    if lines:
        figure.suptitle("\n".join(lines), x=0.02, ha="left", fontsize=11.5, weight="bold")
    if legend:
        handles = [_handle(role, kind, words) for role, kind, words in legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)


def _handle(role: str, kind: str, words: str) -> Patch | Line2D:
    """One entry of a legend inside a figure."""
    if kind == "area":
        return Patch(color=colour(role), label=words)
    style: Any = {"dash": (0, (4, 3)), "line": "-"}.get(kind, "")
    marker = "o" if kind == "dot" else ""
    return Line2D([], [], color=colour(role), linestyle=style, marker=marker, linewidth=2, label=words)


def _light_colours() -> dict[str, str]:
    """The colours of the report's page, which stand in its template alone."""
    page = page_source()
    light = page[: page.index("@media")]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))


def _rebuild(element: ElementTree.Element, name: str) -> None:
    element.tag = _local(element.tag)
    for child in [child for child in element if _local(child.tag) in _DROPPED]:
        element.remove(child)
    element.attrib = {_attribute(key): _value(key, value, name) for key, value in element.attrib.items()}
    for child in element:
        _rebuild(child, name)


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _attribute(key: str) -> str:
    return "href" if key == _XLINK else _local(key)


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == _XLINK:
        return f"#{name}-{value.removeprefix('#')}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    return re.sub(r"#0102[0-9a-f]{2}", lambda found: _VARIABLES.get(found[0], found[0]), value)


def plain(text: object, limit: int = 26) -> str:
    """A foreign text as a label: printable, and short enough to leave room for the plot.

    >>> plain("model.layers.0")
    'model.layers.0'
    >>> plain("a" * 40)
    'aaaaaaaaaaaa..aaaaaaaaaaaa'
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    half = limit // 2 - 1
    return shown if len(shown) <= limit else f"{shown[:half]}..{shown[-half:]}"
