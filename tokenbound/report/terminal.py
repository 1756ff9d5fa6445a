"""The certificate in a terminal: the claim, a bar against guessing, the parts of every line, what it rests on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tokenbound.bounds.rounding import format_bound
from tokenbound.report.words import assumptions, headline, is_vacuous, line_name, source_of_corpus, token_word, verdict
from tokenbound.visible import console

if TYPE_CHECKING:
    from tokenbound.certificate.record import CertificateRecord

COLUMNS = ("line", "bound", "measured", "variance", "complexity", "slack", "guessing")

BAR_WIDTH = 76
"""Letters of the bar at most, so that it fits a terminal of 80."""


def certificate_text(certificate: CertificateRecord, width: int = 100) -> str:
    """The table as plain text.

    Args:
        certificate: what to show.
        width: letters per line; 80 is enough.

    >>> from tokenbound.demo import demo_certificate
    >>> max(len(line) for line in certificate_text(demo_certificate(), width=80).splitlines())
    80
    """
    buffer = io.StringIO()
    console(file=buffer, width=width, force_terminal=False).print(certificate_view(certificate))
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def certificate_view(certificate: CertificateRecord) -> RenderableType:
    """The certificate as a rich renderable. Without colours, in a pipe and in ASCII it says the same."""
    colour = "red" if is_vacuous(certificate) else "green"
    parts: list[RenderableType] = [
        Panel(
            Text(headline(certificate), style="bold"), title="risk certificate", border_style=colour, box=box.ROUNDED
        ),
        Text(verdict(certificate), style=colour),
    ]
    if certificate.bound_bits is not None and certificate.empirical_risk_bits is not None:
        guess = certificate.random_guess_bits
        parts.append(ScaleBar(certificate.empirical_risk_bits, certificate.bound_bits, guess, colour))
    return Group(
        *parts,
        Text(),
        _facts(certificate),
        Text(),
        LinesTable(certificate.bounds, certificate.delta),
        *notes(certificate.bounds),
        Text("What this rests on", style="bold"),
        _sentences(certificate),
    )


class ScaleBar:
    """One line: what was measured, what the bound adds, and how far guessing is; and its legend.

    Args:
        measured: empirical risk, bits.
        bound: bits.
        guess: what guessing costs, bits.
        colour: of what the bound adds.
    """

    def __init__(self, measured: float, bound: float, guess: float, colour: str) -> None:
        self.measured, self.bound, self.guess, self.colour = measured, bound, guess, colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Two lines of at most `BAR_WIDTH` letters; plain ones where the output knows no others."""
        letters = ("#", "+", ".", "|") if options.ascii_only else ("█", "▒", "·", "│")
        yield self.bar(min(options.max_width, BAR_WIDTH), letters)
        filled, added, _, mark = letters
        yield Text(
            f"{filled} measured {self.measured:.3f}  {added} up to the bound {format_bound(self.bound, 3)}  "
            f"{mark} guessing {self.guess:.3f} bits/token",
            style="dim",
        )

    def bar(self, width: int, letters: tuple[str, str, str, str]) -> Text:
        """The bar; a bound beyond guessing runs over the mark and is cut at the double."""
        filled, added, left, mark = letters
        top = max(self.guess, min(self.bound, 2 * self.guess))
        places = [round((width - 1) * min(value, top) / top) for value in (self.measured, self.bound, self.guess)]
        measured, bound, guess = places
        bound = width if self.bound >= top else max(bound, measured + 1)
        row = [filled] * measured + [added] * (bound - measured) + [left] * (width - bound)
        row[guess] = mark
        text = Text("".join(row))
        text.stylize(self.colour, measured, bound)
        return text


def _facts(certificate: CertificateRecord) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(certificate):
        table.add_row(name, Text(value))
    return table


def facts(certificate: CertificateRecord) -> list[tuple[str, str]]:
    """The few numbers that matter, with units."""
    corpus, scored, tokens = certificate.corpus, certificate.num_scored_tokens, certificate.num_tokens
    word = token_word(corpus)
    share = f"every {word}" if scored == tokens else f"{scored:,} {word}s, {100 * scored / tokens:.2g} %"
    rows = [
        ("corpus", f"{source_of_corpus(corpus)}: {corpus['documents']:,} documents, {tokens:,} {word}s"),
        ("scored", share),
        ("model", f"{certificate.artifact_bytes:,} bytes as an artifact ({certificate.model.get('architecture')})"),
        (
            "unsmoothed loss",
            f"{certificate.mean_nll_bits:.4f} bits/token ({certificate.mean_nll_nats:.5f} nats, "
            f"perplexity {certificate.perplexity:.3f})",
        ),
    ]
    if certificate.bound_bits is not None and certificate.gap_bits is not None:
        smoothing = "" if certificate.alpha is None else f", smoothed with alpha = {certificate.alpha:.3g}"
        rows += [
            ("empirical risk", f"{certificate.empirical_risk_bits:.4f} bits/token{smoothing}"),
            ("bound", f"{format_bound(certificate.bound_bits, 4)} bits/token ({certificate.method})"),
            ("gap", f"{format_bound(certificate.gap_bits, 4)} bits/token"),
        ]
    return [*rows, ("random guessing", f"{certificate.random_guess_bits:.4f} bits/token")]


class LinesTable:
    """The lines that could be computed, one row each; set closer where the terminal is narrow, and never cut off.

    Args:
        lines: of a certificate.
        delta: probability that any of them fails.
    """

    def __init__(self, lines: list[dict[str, Any]], delta: float) -> None:
        self.lines, self.delta = [line for line in lines if line["value"] is not None], delta

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """One table."""
        table, unlimited = self._table(), options.update(max_width=10_000)
        fits = Measurement.get(console, unlimited, table).maximum <= options.max_width
        yield table if fits else self._table(close=True)

    def _table(self, *, close: bool = False) -> Table:
        slack = any(line["terms"].get("sampling_slack") for line in self.lines)
        table = Table(
            title=f"all hold together with probability {1 - self.delta:g}; bits per token, % of tokens",
            title_justify="left",
            title_style="bold",
            box=None if close else box.SIMPLE_HEAD,
            pad_edge=False,
        )
        shown = [name for name in COLUMNS if name != "slack" or slack]
        for name in shown:
            first = name == "line"
            table.add_column(name, justify="left" if first else "right", no_wrap=not first)
        for line in self.lines:
            cells = dict(zip(COLUMNS, _cells(line), strict=True))
            table.add_row(*(cells[name] for name in shown))
        return table


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    terms = line["terms"]
    return (
        line_name(line),
        _shown(line, line["value"], up=True),
        _shown(line, line["empirical"]),
        _shown(line, terms.get("variance", 0.0) + terms.get("base_variance", 0.0)),
        _shown(line, terms.get("complexity", 0.0) + terms.get("base_complexity", 0.0)),
        _shown(line, terms.get("sampling_slack", 0.0)),
        _shown(line, line["random_guess"]),
    )


def _shown(line: dict[str, Any], value: float, *, up: bool = False) -> str:
    """Bits for losses, per cent for errors; bounds rounded up."""
    scale, decimals, unit = (1, 4, "") if line["top_k"] is None else (100, 2, " %")
    return (format_bound(scale * value, decimals) if up else f"{scale * value:.{decimals}f}") + unit


def notes(lines: list[dict[str, Any]]) -> list[Text]:
    """What lines lack, why a line is missing, and which say nothing."""
    vacuous = [line_name(line) for line in lines if line["vacuous"] and line["value"] is not None]
    lines_with: dict[str, list[str]] = {}
    for line in lines:
        for part in line["note"].split("; "):
            if part and not part.startswith("vacuous"):
                lines_with.setdefault(part, []).append(line_name(line))
    found = [Text(f"{', '.join(names)}: {part}") for part, names in lines_with.items()]
    return [*found, Text(f"vacuous, not below guessing: {', '.join(vacuous)}", style="red")] if vacuous else found


def _sentences(certificate: CertificateRecord) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for sentence in assumptions(certificate):
        table.add_row("-", Text(sentence, overflow="fold"))
    return table
