"""A history of certificates for a terminal, and as a plot of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.table import Table

from tokenbound.bounds.rounding import format_bound
from tokenbound.store.history import HistoryEntry
from tokenbound.store.uri import base_name

BLOCKS = "▁▂▃▄▅▆▇█"


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
    """Every entry, oldest first, with what changed since the one before."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("when", "model", "tokens", "scored", "artifact", "measured", "bound", "change"):
        table.add_column(name, justify="left" if name in ("when", "model") else "right", overflow="fold")
    for entry, previous in zip(entries, [None, *entries], strict=False):
        table.add_row(
            entry.created_at[:16].replace("T", " "),
            base_name(entry.model),
            f"{entry.num_tokens:,}",
            f"{entry.num_scored_tokens / entry.num_tokens:.1%}",
            f"{entry.artifact_bytes:,} B",
            f"{entry.mean_nll_bits:.4f}",
            "none" if entry.bound_bits is None else format_bound(entry.bound_bits, 4),
            _change(entry, previous),
        )
    return table


def _change(entry: HistoryEntry, previous: HistoryEntry | None) -> str:
    if previous is None or previous.bound_bits is None or entry.bound_bits is None:
        return ""
    return f"{entry.bound_bits - previous.bound_bits:+.4f}"


def history_svg(entries: Sequence[HistoryEntry]) -> str:
    """Bound and measured loss over time, a file of its own."""
    from tokenbound.report.svg import colour, new_figure, settings, standalone_svg

    known = [(entry, entry.bound_bits) for entry in entries if entry.bound_bits is not None]
    times: Any = [datetime.fromisoformat(entry.created_at) for entry, _ in known]
    with settings():
        figure = new_figure(260)
        axes = figure.add_subplot()
        for values, role, label in (
            ([bound for _, bound in known], "accent", "bound"),
            ([entry.mean_nll_bits for entry, _ in known], "measured", "measured"),
        ):
            axes.plot(times, values, color=colour(role), marker="o", markersize=4, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("bits per token")
        axes.legend(frameon=False)
        axes.grid(axis="y")
        figure.autofmt_xdate()
        return standalone_svg(figure, "history")
