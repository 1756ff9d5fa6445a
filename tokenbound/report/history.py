"""A history of certificates: a table for the terminal, the bound over time, and an HTML report of both."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from tokenbound.bounds.rounding import format_bound
from tokenbound.report import page
from tokenbound.report.words import assumptions, grouped_sentences, headline, is_vacuous, source_name, verdict
from tokenbound.store.history import HistoryEntry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokenbound.certificate import Certificate
    from tokenbound.store.run import RunDirectory

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = ("when", "model", "tokens", "scored", "trial", "bytes", "measured", "bound", "change")
WORDS = ("when", "model")
"""Columns that are no numbers."""
PAGE = "history.html"
"""The report of a history, beside its folder of entries."""


def sparkline(values: Sequence[float | None]) -> str:
    """Values as a line of blocks, lowest to highest; a gap where there is none.

    >>> sparkline([1.0, 2.0, None, 3.0])
    '▁▅ █'
    """
    known = [value for value in values if value is not None]
    if not known:
        return " " * len(values)
    low, step = min(known), (max(known) - min(known)) / (len(BLOCKS) - 1) or 1.0
    return "".join(" " if value is None else BLOCKS[round((value - low) / step)] for value in values)


def history_table(entries: Sequence[HistoryEntry]) -> Table:
    """Every entry, oldest first, with what changed since the one before; 80 columns where names are short."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    sampled = any(entry.num_scored_tokens != entry.num_tokens for entry in entries)
    counted = sampled or any(entry.trial > 1 for entry in entries)
    hidden = {*(() if sampled else ("scored",)), *(() if counted else ("trial",))}
    shown = [place for place, name in enumerate(COLUMNS) if name not in hidden]
    for place in shown:
        table.add_column(COLUMNS[place], justify="left" if COLUMNS[place] in WORDS else "right", no_wrap=True)
    for cells in _cells(entries):
        table.add_row(*(cells[place] for place in shown))
    return table


def _cells(entries: Sequence[HistoryEntry]) -> list[tuple[str, ...]]:
    return [
        (
            entry.created_at[:16].replace("T", " "),
            source_name(entry.model),
            f"{entry.num_tokens:,}",
            f"{entry.num_scored_tokens / entry.num_tokens:.1%}",
            f"{entry.trial:,}",
            f"{entry.artifact_bytes:,}",
            f"{entry.mean_nll_bits:.4f}",
            "none" if entry.bound_bits is None else format_bound(entry.bound_bits, 4),
            _change(entry, previous),
        )
        for previous, entry in itertools.pairwise([None, *entries])
        if entry is not None
    ]


def selection_lines(entries: Sequence[HistoryEntry]) -> list[str]:
    """How each model's latest certificate was selected, in its words; older entries say nothing."""
    return grouped_sentences({source_name(entry.model): entry.selection for entry in entries if entry.selection})


def _change(entry: HistoryEntry, previous: HistoryEntry | None) -> str:
    if previous is None or previous.bound_bits is None or entry.bound_bits is None:
        return ""
    return f"{entry.bound_bits - previous.bound_bits:+.4f}"


def history_svg(entries: Sequence[HistoryEntry]) -> str:
    """Bound and measured loss over time, a file of its own."""
    from tokenbound.report.svg import settings, standalone_svg

    with settings():
        return standalone_svg(*_time_figure(entries, None), "history")


def write_history(home: RunDirectory, entries: Sequence[HistoryEntry]) -> str:
    """Write the report of a history beside it; returns its path.

    Args:
        home: where the history lies.
        entries: all of it, at least one.

    Raises:
        TokenboundError: the latest certificate is missing or damaged.
    """
    from tokenbound.certificate import Certificate

    latest = Certificate.load(home.place(entries[-1].certificate))
    home.write(PAGE, history_html(entries, latest).encode())
    return home.place(PAGE)


def history_html(entries: Sequence[HistoryEntry], latest: Certificate) -> str:
    """The report of a history as one HTML document: what the latest certificate says, and how it came to that.

    Args:
        entries: oldest first, at least one.
        latest: the certificate of the last entry.
    """
    from tokenbound.report.html import footer

    frame = page.Page(
        kicker=f"History of {len(entries):,} certificates" if len(entries) > 1 else "History of one certificate",
        title=f"History up to {latest.claim_fingerprint[:8]}",
        headline=headline(latest),
        verdict=verdict(latest),
        vacuous=is_vacuous(latest),
        tiles=_tiles(entries),
        assumptions=[*assumptions(latest), *selection_lines(entries)],
        plots=_plots(entries, latest),
        footer=footer(latest),
    )
    table = page.Table(
        "Every certificate",
        "Oldest first. Losses and bounds are in bits per token; bounds are rounded up. The change is that of the bound "
        "since the row above.",
        (*COLUMNS, "claim", "certificate"),
        tuple(
            (*cells, entry.claim_fingerprint[:8], entry.certificate)
            for cells, entry in zip(_cells(entries), entries, strict=True)
        ),
        text=(*WORDS, "claim", "certificate"),
    )
    return page.render(
        "comparison.html",
        frame,
        tables=[table],
        check_sentence="The headline is the latest certificate's. In the directory of this page:",
        check_command=f"tokenbound verify {shlex.quote(entries[-1].certificate)}",
    )


def _tiles(entries: Sequence[HistoryEntry]) -> list[page.Tile]:
    first, last = entries[0], entries[-1]
    began = first.created_at[:10]
    bound = "none" if last.bound_bits is None else f"{format_bound(last.bound_bits, 3)} bits"
    found = [
        page.Tile("Bound", bound, f"per token, on {last.created_at[:10]}"),
        page.Tile("Measured", f"{last.mean_nll_bits:.3f} bits", "mean loss per token, unsmoothed"),
        page.Tile("Tokens", f"{last.num_tokens:,}", "" if first is last else f"{first.num_tokens:,} on {began}"),
        page.Tile("Artifact", f"{last.artifact_bytes:,} B", source_name(last.model)),
    ]
    if last.bound_bits is not None and first.bound_bits is not None and first is not last:
        change = f"{last.bound_bits - first.bound_bits:+.4f} bits"
        found.insert(1, page.Tile("Change", change, f"of the bound since {began}"))
    return found


def _plots(entries: Sequence[HistoryEntry], latest: Certificate) -> list[page.Plot]:
    from tokenbound.report.figures import composition, errors
    from tokenbound.report.svg import inline_svg, settings

    with settings():
        bounds, bounds_legend = _time_figure(entries, latest.random_guess_bits)
        sizes, sizes_legend = _size_figure(entries)
        found = [
            page.Plot(
                "time",
                "Bound over time",
                "Each dot is one certificate. The bound falls when the corpus grows, the model gets better or its "
                "artifact shorter; what was measured can rise while it does.",
                inline_svg(bounds, "time"),
                bounds_legend,
            ),
            page.Plot(
                "tokens",
                "Tokens over time",
                "How large the corpus was, and how many of its tokens were scored, at each certificate.",
                inline_svg(sizes, "tokens"),
                sizes_legend,
            ),
        ]
    return [*found, *(plot for plot in (composition(latest), errors(latest)) if plot is not None)]


def _series(entries: Sequence[HistoryEntry]) -> dict[str, list[HistoryEntry]]:
    """Entries by model where each was certified again and again; else all in one, as a model's steps are."""
    from tokenbound.report.figures import CURVE_ROLES

    by_model: dict[str, list[HistoryEntry]] = {}
    for entry in entries:
        by_model.setdefault(source_name(entry.model), []).append(entry)
    apart = 1 < len(by_model) <= len(CURVE_ROLES) and min(map(len, by_model.values())) > 1
    return by_model if apart else {"bound": list(entries)}


def _time_figure(entries: Sequence[HistoryEntry], guess: float | None) -> tuple[Figure, page.Legend]:
    """Bounds and measured losses over time; guessing where it is within reach of them."""
    from tokenbound.report.figures import CURVE_ROLES
    from tokenbound.report.svg import colour, new_figure, plain

    figure = new_figure(270)
    axes = figure.add_subplot()
    legend: list[tuple[str, str, str]] = []
    for role, (name, group) in zip(CURVE_ROLES, _series(entries).items(), strict=False):
        known = [entry for entry in group if entry.bound_bits is not None]
        _line(axes, group, [entry.mean_nll_bits for entry in group], "measured")
        _line(axes, known, [entry.bound_bits for entry in known], role)
        legend.append((role, "line", name if name == "bound" else f"bound of {plain(name)}"))
    legend.append(("measured", "line", "measured, unsmoothed"))
    highest = max([entry.bound_bits or entry.mean_nll_bits for entry in entries])
    if guess is not None and guess < 1.5 * highest:
        axes.axhline(guess, color=colour("guess"), linewidth=1.5, linestyle=(0, (4, 3)))
        legend.append(("guess", "dash", "random guessing"))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("bits per token")
    _time_axis(axes)
    return figure, tuple(legend)


def _size_figure(entries: Sequence[HistoryEntry]) -> tuple[Figure, page.Legend]:
    """Tokens of the corpus over time, and those scored where they are fewer."""
    from matplotlib.ticker import FuncFormatter

    from tokenbound.report.figures import counted
    from tokenbound.report.svg import new_figure

    figure = new_figure(270)
    axes = figure.add_subplot()
    legend: list[tuple[str, str, str]] = [("accent", "line", "tokens of the corpus")]
    _line(axes, entries, [entry.num_tokens for entry in entries], "accent")
    if any(entry.num_scored_tokens != entry.num_tokens for entry in entries):
        _line(axes, entries, [entry.num_scored_tokens for entry in entries], "slack")
        legend.append(("slack", "line", "scored"))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: counted(value)))
    axes.set_ylabel("tokens")
    _time_axis(axes)
    return figure, tuple(legend)


def _line(axes: Any, entries: Sequence[HistoryEntry], values: Sequence[float | None], role: str) -> None:
    from tokenbound.report.svg import colour

    times: Any = [datetime.fromisoformat(entry.created_at) for entry in entries]
    axes.plot(times, values, color=colour(role), linewidth=2, marker="o", markersize=5)


def _time_axis(axes: Any) -> None:
    """Dates in few letters; of a single moment half a day around it."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    low, high = axes.dataLim.intervalx
    if high - low < 0.5:
        axes.set_xlim(low - 0.5, high + 0.5)
    places = AutoDateLocator(minticks=2, maxticks=6)
    axes.xaxis.set_major_locator(places)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(places))
    axes.set_xlabel("UTC")
    axes.grid(axis="y")
