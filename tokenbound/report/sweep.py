"""The certificates of a sweep side by side: tables, bound against bytes, and an HTML report of both."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from tokenbound.bounds.rounding import format_bound
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.report import page
from tokenbound.report.rows import markdown_cell
from tokenbound.report.words import grouped_sentences, line_name, remarks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    from tokenbound.certificate import Certificate
    from tokenbound.store.run import RunDirectory

ROWS = "sweep.json"
"""The rows of a sweep, in its directory."""
PAGE = "sweep.html"
"""Its report, beside them."""


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
    empirical_bits: float | None
    """Its smoothed mean loss."""
    guess_bits: float
    """What random guessing costs."""
    delta: float
    prior: str
    sampled: bool
    """Whether a sample of the windows was scored."""
    lines: Mapping[str, float | None]
    """Every bound by the name of its line: bits per token, or an error rate."""
    measured_errors: Mapping[str, float | None]
    """What was measured of each error line."""
    vacuous: bool
    certificate: str
    """Its claim fingerprint."""
    file: str
    """Where it lies, relative to the sweep."""
    version: str
    """Of the package that made the certificate."""
    created_at: str
    """When it was made."""
    ordinal: int
    """Its place among all configurations tried on the corpus; paid for."""
    selection: str
    """How it was selected, in the words of the certificate."""
    protocol: Mapping[str, Any]
    """How the model is applied to the corpus."""
    base: str | None
    """Digest of the base that a delta changes; null for a whole model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def sweep_row(
    name: str, family: str, trained: Mapping[str, Any] | None, certificate: Certificate, file: str
) -> SweepRow:
    """The row of one trial, whose certificate lies at `file`, relative to the sweep."""
    return SweepRow(
        trial=name,
        family=family,
        trained_parameters=None if trained is None else int(trained["trained_parameters"]),
        artifact_bytes=certificate.artifact_bytes,
        measured_bits=certificate.mean_nll_bits,
        bound_bits=certificate.bound_bits,
        empirical_bits=certificate.empirical_risk_bits,
        guess_bits=certificate.random_guess_bits,
        delta=certificate.delta,
        prior=certificate.prior,
        sampled=certificate.sampling is not None,
        lines={line_name(line): line["value"] for line in certificate.bounds},
        measured_errors={
            line_name(line): line["empirical"] for line in certificate.bounds if line["top_k"] is not None
        },
        vacuous=certificate.vacuous,
        certificate=certificate.claim_fingerprint,
        file=file,
        version=certificate.tokenbound_version,
        created_at=certificate.created_at,
        ordinal=certificate.trial,
        selection=" ".join(remarks(certificate)),
        protocol=dict(certificate.protocol),
        base=(certificate.scoring_identity.get("base") or {}).get("sha256"),
    )


def read_rows(home: RunDirectory) -> list[SweepRow]:
    """The rows that a sweep left in its directory.

    Raises:
        IncompleteError: no trial has a certificate yet.
        MismatchError: they are damaged, or an older version wrote them.
    """
    names = {field.name for field in fields(SweepRow)}
    rows = home.read_json(ROWS)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == names for row in rows):
        raise MismatchError(f"{home.place(ROWS)} is damaged or of another version; run the sweep again to renew it")
    if not rows:
        raise IncompleteError(f"{home.uri}: no trial has a certificate yet; run the sweep again to resume")
    return [SweepRow(**row) for row in rows]


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
    """The comparison as a Markdown table, and below it how its rows were selected."""
    head, *body = [[markdown_cell(cell) for cell in cells] for cells in _cells(rows)]
    rule = [":--" if place < 2 else "--:" for place in range(len(head))]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *body))
    return table + "".join(f"\n{markdown_cell(line)}\n" for line in selection_lines(rows))


def selection_lines(rows: Sequence[SweepRow]) -> list[str]:
    """How the rows were selected, in the words of their certificates."""
    return grouped_sentences({row.trial: row.selection for row in rows})


def comparison_csv(rows: Sequence[SweepRow]) -> str:
    """The comparison with all digits, for programs."""
    lines = _line_names(rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "family", "ordinal", "trained_parameters", "artifact_bytes", "measured_bits", *lines])
    for row in rows:
        known = [row.trial, row.family, row.ordinal, row.trained_parameters, row.artifact_bytes, row.measured_bits]
        writer.writerow(["" if value is None else value for value in (*known, *map(row.lines.get, lines))])
    return stream.getvalue()


def _line_names(rows: Sequence[SweepRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.lines))


def _cells(rows: Sequence[SweepRow]) -> list[list[str]]:
    """Head and body as text: bounds rounded up, errors as `bound (measured)`."""
    lines = _line_names(rows)
    found = [["trial", "family", "ordinal", "trained parameters", "artifact bytes", "measured", *lines]]
    for row in rows:
        parameters = "-" if row.trained_parameters is None else f"{row.trained_parameters:,}"
        measured = f"{row.measured_bits:.3f}"
        first = [row.trial, row.family, f"{row.ordinal:,}", parameters, f"{row.artifact_bytes:,}", measured]
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
    from tokenbound.report.svg import settings, standalone_svg

    with settings():
        return standalone_svg(*_bytes_figure(rows), "sweep")


def write_sweep(home: RunDirectory, rows: Sequence[SweepRow]) -> str:
    """Write the report of a sweep into its directory; returns its path.

    Args:
        home: where the sweep lies.
        rows: one for each trial that has a certificate, at least one.
    """
    home.write(PAGE, sweep_html(rows).encode())
    return home.place(PAGE)


def sweep_html(rows: Sequence[SweepRow]) -> str:
    """The report of a sweep as one HTML document.

    Args:
        rows: at least one.
    """
    best = min(rows, key=_bound_or_infinity)
    frame = page.Page(
        kicker=f"Sweep of {len(rows):,} configurations" if len(rows) > 1 else "Sweep of one configuration",
        title=f"Sweep of {len(rows):,}",
        headline=_headline(rows, best),
        verdict=_verdict(rows),
        vacuous=all(row.vacuous for row in rows),
        tiles=_tiles(rows, best),
        assumptions=_assumptions(rows),
        plots=_plots(rows),
        footer=f"tokenbound {best.version}, {max(row.created_at for row in rows)}.",
    )
    head, *body = _cells(rows)
    table = page.Table(
        "Every trial",
        "Each trial with its certificate. Losses and bounds are in bits per token, errors as bound (measured); bounds "
        "are rounded up. Measured is the mean loss of the unsmoothed model.",
        tuple(head),
        tuple(map(tuple, body)),
        text=("trial", "family"),
        small=tuple(row.file for row in rows),
    )
    return page.render(
        "comparison.html",
        frame,
        tables=[table],
        check_sentence="Each trial has its own certificate and report. In the directory of this page:",
        check_command=f"tokenbound verify {shlex.quote(best.file)}",
    )


def hold_together(rows: Sequence[SweepRow]) -> bool:
    """Whether all certificates make the same claim of their models, and so hold at once with the confidence of one."""
    return len({_claim(row) for row in rows}) == 1


def _claim(row: SweepRow) -> tuple[object, ...]:
    protocol = tuple(sorted((name, str(value)) for name, value in row.protocol.items()))
    return row.delta, row.prior, row.sampled, frozenset(row.lines), protocol, row.base


def _claims_sentence(rows: Sequence[SweepRow]) -> str:
    """Which trials do hold at once: those of the commonest claim, and who makes another."""
    claims = [_claim(row) for row in rows]
    common = max(dict.fromkeys(claims), key=claims.count)
    others = [row.trial for row, claim in zip(rows, claims, strict=True) if claim != common]
    if len(rows) - len(others) < 2:
        return "No two of them are known to hold at once."
    named = ", ".join(others)
    return (
        f"{len(rows) - len(others):,} of them also hold at once, all but {named}: other lines, or another confidence, "
        "prior, base or protocol, or a sample beside every token."
    )


def _bound_or_infinity(row: SweepRow) -> float:
    return float("inf") if row.bound_bits is None else row.bound_bits


def _headline(rows: Sequence[SweepRow], best: SweepRow) -> str:
    if best.bound_bits is None:
        return "Only errors were bounded; the table below has every line."
    confidence, smallest = f"With {100 * (1 - best.delta):g} % confidence", format_bound(best.bound_bits, 2)
    of_it = f"{best.trial} with {best.artifact_bytes:,} bytes"
    if len(rows) > 1 and hold_together(rows):
        return f"{confidence} all bounds below hold; the smallest is {smallest} bits per token, of {of_it}."
    return f"{confidence} the expected loss of {of_it} is at most {smallest} bits per token."


def _verdict(rows: Sequence[SweepRow]) -> str:
    say_something = sum(not row.vacuous for row in rows)
    if not say_something:
        return "VACUOUS: no bound is below random guessing. Use more tokens or shorter artifacts."
    return f"{say_something:,} of {len(rows):,} bounds are below random guessing."


def _tiles(rows: Sequence[SweepRow], best: SweepRow) -> list[page.Tile]:
    found = []
    if best.bound_bits is not None:
        found.append(
            page.Tile("Smallest bound", f"{format_bound(best.bound_bits, 3)} bits", f"per token, {best.trial}")
        )
    least = min(rows, key=lambda row: row.measured_bits)
    shortest = min(rows, key=lambda row: row.artifact_bytes)
    return [
        *found,
        page.Tile("Smallest loss", f"{least.measured_bits:.3f} bits", f"measured, {least.trial}"),
        page.Tile("Smallest artifact", f"{shortest.artifact_bytes:,} B", shortest.trial),
        page.Tile("Guessing", f"{best.guess_bits:.3f} bits", "per token"),
        page.Tile("On the frontier", f"{len(frontier(rows)):,}", "trials that no other beats in bytes and bound"),
    ]


def _assumptions(rows: Sequence[SweepRow]) -> list[str]:
    """How far the comparison may be trusted; what a single bound rests on stands in its own report."""
    if not hold_together(rows):
        together = (
            "The trials do not all make the same claim: each certificate holds by itself, with its confidence. "
            + _claims_sentence(rows)
        )
    elif any(row.sampled or row.prior == "holdout" for row in rows):
        together = (
            "All certificates hold at once: each artifact pays for its place among the trials that share the sample or "
            "the holdout."
        )
    else:
        together = "All certificates hold at once, because every artifact pays its own code: the best may be picked."
    return [
        together,
        "Each bound is on the risk on this corpus's own positions, of the smoothed model. It is not the risk on fresh "
        "documents.",
        "What a bound rests on, its declarations and every number stand in the trial's own report.",
        *selection_lines(rows),
    ]


def _plots(rows: Sequence[SweepRow]) -> list[page.Plot]:
    from tokenbound.report.svg import inline_svg, settings

    if all(row.bound_bits is None for row in rows):
        return []
    with settings():
        by_bytes, bytes_legend = _bytes_figure(rows)
        parts, parts_legend = _parts_figure(rows)
        return [
            page.Plot(
                "bytes",
                "Bound against bytes",
                "Each dot is one trial. No other trial beats those on the frontier in both bytes and bound.",
                inline_svg(by_bytes, "bytes"),
                bytes_legend,
            ),
            page.Plot(
                "parts",
                "What was measured, and what the bound adds",
                "The smallest loss line of each trial. A short code leaves little to add; a good model little to "
                "measure.",
                inline_svg(parts, "parts"),
                parts_legend,
            ),
        ]


def _bytes_figure(rows: Sequence[SweepRow]) -> tuple[Figure, page.Legend]:
    from tokenbound.report.figures import counted, log_x
    from tokenbound.report.svg import colour, new_figure, plain

    points = [(row.artifact_bytes, row.bound_bits, row.trial) for row in rows if row.bound_bits is not None]
    edge = [(row.artifact_bytes, row.bound_bits) for row in frontier(rows) if row.bound_bits is not None]
    figure = new_figure(320)
    axes = figure.add_subplot()
    axes.step([x for x, _ in edge], [y for _, y in edge], where="post", color=colour("muted"), zorder=1)
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colour("accent"), zorder=2)
    axes.margins(0.22, 0.15)
    log_x(axes, counted)
    axes.set_xlabel("artifact, bytes")
    axes.set_ylabel("bound, bits per token")
    axes.grid(True)
    labels = [(x, y, plain(trial)) for x, y, trial in sorted(points, key=lambda point: -point[1])]
    _label_points(axes, labels, _steps(edge))
    return figure, (("accent", "dot", "trials"), ("muted", "line", "frontier"))


PLACES = tuple(
    (side, right, up)
    for up in (4, -10, 14, -20, 24, -30)
    for side, right in (("left", 6), ("right", -6), ("center", 0))
)
"""Where a point's label may stand: alignment, and the shift from the point in typographic points."""


def _steps(edge: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the line that joins a frontier, in order.

    >>> _steps([(1.0, 5.0), (2.0, 4.0)])
    [(1.0, 5.0), (2.0, 5.0), (2.0, 4.0)]
    """
    return [*edge[:1], *(corner for (_, y), (x, below) in pairwise(edge) for corner in ((x, y), (x, below)))]


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]) -> None:
    """Write a label beside each point, where it covers least and no other point is nearer.

    Args:
        axes: with its limits set; they are kept.
        points: x and y as data, and the label.
        line: corners, as data, of a line that labels should not cross.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where the axes lie
    frame = axes.get_window_extent()
    dots = [(float(x), float(y)) for x, y in axes.transData.transform([point[:2] for point in points])]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    corners = axes.transData.transform(list(line)) if line else ()
    taken += [Bbox([(x, min(y, to)), (along, max(y, to))]).padded(1) for (x, y), (along, to) in pairwise(corners)]
    for (x, y, label), dot in zip(points, dots, strict=True):
        tried = []
        for side, right, up in PLACES:
            text = axes.annotate(label, (x, y), (right, up), textcoords="offset points", ha=side, fontsize=9.5)
            area = text.get_window_extent()
            covered = _area(area) - _shared(area, frame) + sum(_shared(area, box) for box in taken)
            tried.append((covered + _area(area) * (_nearest(area, dots) != dot), text, area))
        _, kept, area = min(tried, key=lambda one: one[0])
        for _, text, _ in tried:
            if text is not kept:
                text.remove()
        taken.append(area)


def _nearest(box: Bbox, dots: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The point that lies nearest to a box."""

    def distance(dot: tuple[float, float]) -> float:
        across = max(box.x0 - dot[0], dot[0] - box.x1, 0.0)
        return math.hypot(across, max(box.y0 - dot[1], dot[1] - box.y1, 0.0))

    return min(dots, key=distance)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _shared(first: Bbox, second: Bbox) -> float:
    """Area that two boxes share."""
    both = first.intersection(first, second)
    return 0.0 if both is None else _area(both)


def _parts_figure(rows: Sequence[SweepRow]) -> tuple[Figure, page.Legend]:
    """One bar for each trial, by rising bound; those without a bound are left out, the longest cut."""
    from tokenbound.report.figures import CUT
    from tokenbound.report.svg import colour, new_figure, plain

    shown = sorted((row for row in rows if row.bound_bits is not None), key=_bound_or_infinity)
    guess = shown[0].guess_bits
    limit = min(CUT * guess, 1.02 * max(guess, _bound_or_infinity(shown[-1])))
    figure = new_figure(70 + 24 * len(shown))
    axes = figure.add_subplot()
    for place, row in enumerate(shown):
        measured, bound = row.empirical_bits or 0.0, _bound_or_infinity(row)
        axes.barh(place, measured, height=0.66, color=colour("measured"), linewidth=0)
        axes.barh(place, min(bound, limit) - measured, left=measured, height=0.66, color=colour("accent"), linewidth=0)
        axes.text(min(bound, limit) + 0.01 * limit, place, format_bound(bound, 3), va="center", fontsize=10)
    axes.axvline(guess, color=colour("guess"), linewidth=1.5, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(shown)), [plain(row.trial) for row in shown])
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, limit * 1.15)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("bits per token")
    legend = (
        ("measured", "area", "measured, smoothed"),
        ("accent", "area", "added by the bound"),
        ("guess", "dash", "random guessing"),
    )
    return figure, legend
