"""The certificate as a table that is read in ten seconds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tokenbound.bounds.rounding import format_bound
from tokenbound.report.words import assumptions, headline, line_name, verdict

if TYPE_CHECKING:
    from tokenbound.certificate import Certificate


def certificate_text(certificate: Certificate, width: int = 100) -> str:
    """The table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=False).print(certificate_view(certificate))
    return buffer.getvalue()


def certificate_view(certificate: Certificate) -> RenderableType:
    """The certificate as a rich renderable."""
    colour = "red" if certificate.vacuous else "green"
    return Group(
        Panel(Text(headline(certificate), style="bold"), title="risk certificate", border_style=colour),
        Text(verdict(certificate), style=colour),
        _facts(certificate),
        _lines(certificate),
        Text("What this rests on", style="bold"),
        *(Text(f"- {sentence}") for sentence in assumptions(certificate)),
    )


def _facts(certificate: Certificate) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts(certificate):
        table.add_row(name, value)
    return table


def facts(certificate: Certificate) -> list[tuple[str, str]]:
    """The few numbers that matter, with units."""
    corpus = certificate.corpus
    rows = [
        ("corpus", f"{corpus['source']}: {corpus['documents']:,} documents, {certificate.num_tokens:,} tokens"),
        ("scored", f"{certificate.num_scored_tokens:,} tokens"),
        ("model", f"{certificate.artifact_bytes:,} bytes as an artifact ({certificate.model.get('architecture')})"),
        ("unsmoothed loss", f"{certificate.mean_nll_bits:.4f} bits/token ({certificate.mean_nll_nats:.5f} nats, perplexity {certificate.perplexity:.3f})"),
    ]
    if certificate.bound_bits is not None and certificate.gap_bits is not None:
        rows += [
            ("empirical risk", f"{certificate.empirical_risk_bits:.4f} bits/token, smoothed with alpha = {certificate.alpha:.3g}"),
            ("bound", f"{format_bound(certificate.bound_bits, 4)} bits/token ({certificate.method})"),
            ("gap", f"{format_bound(certificate.gap_bits, 4)} bits/token"),
        ]
    return [*rows, ("random guessing", f"{certificate.random_guess_bits:.4f} bits/token")]


def _lines(certificate: Certificate) -> Table:
    table = Table(title=f"all lines hold together with probability {1 - certificate.delta:g}", title_justify="left")
    for name in ("line", "bound", "measured", "variance", "complexity", "slack", "guessing", ""):
        table.add_column(name, justify="left" if name in ("line", "") else "right")
    for line in certificate.bounds:
        table.add_row(*_cells(line))
    return table


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    if line["value"] is None:
        return line_name(line), "-", "-", "-", "-", "-", "-", line["note"]
    terms = line["terms"]
    unit = " bits" if line["top_k"] is None else ""
    return (
        line_name(line),
        format_bound(line["value"], 4) + unit,
        f"{line['empirical']:.4f}",
        f"{terms.get('variance', 0.0):.4f}",
        f"{terms.get('complexity', 0.0):.4f}",
        f"{terms.get('sampling_slack', 0.0):.4f}",
        f"{line['random_guess']:.4f}",
        "vacuous" if line["vacuous"] else "",
    )
