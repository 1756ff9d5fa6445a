"""The certificates of a sweep side by side: a table for terminal, Markdown and CSV, and bound against bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from tokenbound.bounds.rounding import format_bound
from tokenbound.report.rows import markdown_cell
from tokenbound.report.words import line_name

if TYPE_CHECKING:
    from tokenbound.certificate import Certificate


@dataclass(frozen=True)
class SweepRow:
    """One trial and what its certificate says."""

    trial: str
    family: str
    """Kind of family, or `given` where nothing was trained."""
    trained_parameters: int | None
    """Numbers that training chose; null where nothing was trained."""
    artifact_bytes: int
    measured_bits: float
    """Unsmoothed mean loss of the scored tokens, bits per token."""
    bound_bits: float | None
    """The smallest loss line."""
    lines: Mapping[str, float | None]
    """Every bound by the name of its line: bits per token, or an error rate."""
    measured_errors: Mapping[str, float | None]
    """What was measured of each error line."""
    vacuous: bool
    certificate: str
    """Its claim fingerprint."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def sweep_row(name: str, family: str, trained: Mapping[str, Any] | None, certificate: Certificate) -> SweepRow:
    """The row of one trial."""
    return SweepRow(
        trial=name,
        family=family,
        trained_parameters=None if trained is None else int(trained["trained_parameters"]),
        artifact_bytes=certificate.artifact_bytes,
        measured_bits=certificate.mean_nll_bits,
        bound_bits=certificate.bound_bits,
        lines={line_name(line): line["value"] for line in certificate.bounds},
        measured_errors={
            line_name(line): line["empirical"] for line in certificate.bounds if line["top_k"] is not None
        },
        vacuous=certificate.vacuous,
        certificate=certificate.claim_fingerprint,
    )


def comparison_table(rows: Sequence[SweepRow]) -> Table:
    """The comparison for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="bits per token, % of tokens", title_justify="left")
    head, *body = _cells(rows)
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=True)
    for cells in body:
        table.add_row(*cells)
    return table


def comparison_markdown(rows: Sequence[SweepRow]) -> str:
    """The comparison as a Markdown table."""
    head, *body = [[markdown_cell(cell) for cell in cells] for cells in _cells(rows)]
    rule = [":--" if place < 2 else "--:" for place in range(len(head))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *body))


def comparison_csv(rows: Sequence[SweepRow]) -> str:
    """The comparison with all digits, for programs."""
    lines = _line_names(rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "family", "trained_parameters", "artifact_bytes", "measured_bits", *lines])
    for row in rows:
        known = [row.trial, row.family, row.trained_parameters, row.artifact_bytes, row.measured_bits]
        writer.writerow(["" if value is None else value for value in (*known, *map(row.lines.get, lines))])
    return stream.getvalue()


def _line_names(rows: Sequence[SweepRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.lines))


def _cells(rows: Sequence[SweepRow]) -> list[list[str]]:
    """Head and body as text: bounds rounded up, errors as `bound (measured)`."""
    lines = _line_names(rows)
    found = [["trial", "family", "trained parameters", "artifact bytes", "measured", *lines]]
    for row in rows:
        parameters = "-" if row.trained_parameters is None else f"{row.trained_parameters:,}"
        first = [row.trial, row.family, parameters, f"{row.artifact_bytes:,}", f"{row.measured_bits:.3f}"]
        found.append([*first, *(_bound(row, name) for name in lines)])
    return found


def _bound(row: SweepRow, name: str) -> str:
    value = row.lines.get(name)
    if value is None:
        return "-"
    measured = row.measured_errors.get(name)
    if measured is None:
        return format_bound(value, 3)
    return f"{format_bound(100 * value, 1)} % ({100 * measured:.1f})"


def frontier(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Trials that no other beats in both bytes and bound, by rising bytes.

    >>> frontier([])
    []
    """
    best, found = float("inf"), []
    for row in sorted(rows, key=lambda row: (row.artifact_bytes, row.bound_bits or 0.0)):
        if row.bound_bits is not None and row.bound_bits < best:
            best = row.bound_bits
            found.append(row)
    return found


def comparison_svg(rows: Sequence[SweepRow]) -> str:
    """Bound against bytes, one point for each trial, the frontier joined; a file of its own."""
    from matplotlib.ticker import FuncFormatter

    from tokenbound.report.svg import colour, new_figure, plain, settings, standalone_svg

    points = [(row.artifact_bytes, row.bound_bits, row.trial) for row in rows if row.bound_bits is not None]
    edge = [(row.artifact_bytes, row.bound_bits) for row in frontier(rows) if row.bound_bits is not None]
    with settings():
        figure = new_figure(300)
        axes = figure.add_subplot()
        axes.step([x for x, _ in edge], [y for _, y in edge], where="post", color=colour("muted"))
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colour("accent"))
        for x, y, trial in points:
            axes.annotate(plain(trial), (x, y), (4, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("artifact, bytes")
        axes.set_ylabel("bound, bits per token")
        axes.grid(True)
        return standalone_svg(figure, "sweep")
