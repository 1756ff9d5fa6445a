"""A certificate as an HTML report: the claim in words, plots, every number, and how to check and quote it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tokenbound.bounds.rounding import format_bound
from tokenbound.report.details import ReportDetails
from tokenbound.report.page import Page, Tile, render
from tokenbound.report.rows import bibtex, latex_rows, markdown_table, model_card_yaml
from tokenbound.report.words import assumptions, headline, is_vacuous, line_name, token_word, verdict
from tokenbound.store.run import CERTIFICATE, RunDirectory

if TYPE_CHECKING:
    from tokenbound.certificate.record import CertificateRecord

UNITS = {
    "bound_bits": "bits/token",
    "empirical_risk_bits": "bits/token",
    "gap_bits": "bits/token",
    "random_guess_bits": "bits/token",
    "delta": "probability",
    "head_alpha_min": "weight",
    "num_tokens": "tokens",
    "num_scored_tokens": "tokens",
    "num_worst_case_tokens": "tokens",
    "declared_tokens": "tokens",
    "num_windows": "windows",
    "num_shards": "shards",
    "vocab_size": "ids",
    "tokenizer_vocab_size": "ids",
    "code_length_bits": "bits",
    "artifact_bytes": "bytes",
    "tune_bits": "bits",
    "alpha": "weight",
    "mean_nll_nats": "nats/token",
    "mean_nll_bits": "bits/token",
    "perplexity": "",
    "bound_bits_per_byte": "bits/byte",
    "mean_nll_bits_per_byte": "bits/byte",
    "trial": "ordinal",
    "schema_version": "",
}
"""Unit of every numeric field of a certificate."""

MEANINGS = {
    "artifact_bytes": "C(h): size of the file that decodes to the model.",
    "mean_nll_bits": "The same in bits per token.",
    "mean_nll_bits_per_byte": "The same per byte of the source text.",
    "trial": "Ordinal of this configuration among all tried on these tokens; paid for.",
    "num_shards": "Pieces in which the losses are stored.",
    "schema_version": "Version of the certificate's form.",
}
"""Meanings of fields whose names say enough to programmers only."""

DIGESTS = (
    "artifact_sha256",
    "corpus_sha256",
    "tokens_sha256",
    "losses_sha256",
    "scoring_fingerprint",
    "claim_fingerprint",
)


def write_report(run: RunDirectory, certificate: CertificateRecord, details: ReportDetails | None) -> str:
    """Write the report beside its certificate; returns its path.

    A claim that is not the run's first has its own certificate and so its own report.

    Args:
        run: where the certificate lies.
        certificate: what to report.
        details: what the plots need; None leaves most of them out.
    """
    name = run.certificate_name(certificate.claim_fingerprint)
    path = report_name(name)
    run.write(path, html_report(certificate, details=details, certificate_name=name).encode())
    return run.place(path)


def report_name(certificate: str) -> str:
    """File of the report beside the file of a certificate.

    >>> report_name("certificate-0123abcd.json")
    'report-0123abcd.html'
    """
    return f"report{certificate.removeprefix('certificate').removesuffix('.json')}.html"


def html_report(
    certificate: CertificateRecord, *, details: ReportDetails | None = None, certificate_name: str = CERTIFICATE
) -> str:
    """The report as one HTML document.

    Args:
        certificate: what to report.
        details: what the plots need; None leaves out all that the certificate alone cannot draw.
        certificate_name: file name in the command that verifies it.

    >>> from tokenbound.demo import demo_certificate
    >>> html_report(demo_certificate()).startswith("<!doctype html>")
    True
    """
    from tokenbound.report.figures import plots, term_words

    page = Page(
        kicker="Risk certificate",
        title=f"Risk certificate {certificate.claim_fingerprint[:8]}",
        headline=headline(certificate),
        verdict=verdict(certificate),
        vacuous=is_vacuous(certificate),
        tiles=_tiles(certificate),
        assumptions=assumptions(certificate),
        plots=plots(certificate, details),
        footer=footer(certificate),
    )
    return render(
        "certificate.html",
        page,
        lines_sentence=_lines_sentence(certificate),
        line_columns=LINE_COLUMNS,
        line_rows=[_line_row(line) for line in certificate.bounds],
        term_rows=[(name, term_words(name), values) for name, values in term_rows(certificate)],
        numbers=number_rows(certificate),
        records=_records(certificate),
        verify_command=f"tokenbound verify {shlex.quote(certificate_name)}",
        digests=[(name, getattr(certificate, name)) for name in DIGESTS],
        quotes=_quotes(certificate),
    )


def footer(certificate: CertificateRecord) -> str:
    """What made a certificate, and when."""
    return (
        f"tokenbound {certificate.tokenbound_version}, {certificate.created_at}, "
        f"certificate schema {certificate.schema_version}."
    )


def _tiles(certificate: CertificateRecord) -> list[Tile]:
    found = []
    if certificate.bound_bits is not None and certificate.gap_bits is not None:
        measured = f"{certificate.empirical_risk_bits:.3f}"
        found += [
            Tile("Bound", f"{format_bound(certificate.bound_bits, 3)} bits", f"per token, line {certificate.method}"),
            Tile("Measured", f"{measured} bits", "mean smoothed loss of the scored tokens"),
            Tile("Gap", f"{format_bound(certificate.gap_bits, 3)} bits", "bound minus measured"),
        ]
    else:
        found.append(Tile("Measured", f"{certificate.mean_nll_bits:.3f} bits", "mean loss per token, unsmoothed"))
    scored = certificate.num_scored_tokens
    share = "every one scored" if scored == certificate.num_tokens else f"{scored:,} scored"
    paid = (
        "not paid for (holdout)" if certificate.prior == "holdout" else f"{certificate.code_length_bits:,.0f} bits paid"
    )
    return [
        *found,
        Tile(
            "Guessing", f"{certificate.random_guess_bits:.3f} bits", f"{certificate.tokenizer_vocab_size:,} token ids"
        ),
        Tile(f"{token_word(certificate.corpus)}s".capitalize(), f"{certificate.num_tokens:,}", share),
        Tile("Artifact", f"{certificate.artifact_bytes:,} B", paid),
    ]


LINE_COLUMNS = ("bound", "measured", "variance", "complexity", "slack", "guessing", "kappa (nats)", "L_tune (bits)")


def _lines_sentence(certificate: CertificateRecord) -> str:
    count = len(certificate.bounds)
    together = "The line holds" if count == 1 else f"All {count} lines hold together"
    return (
        f"{together} with probability at least {1 - certificate.delta:g}. Losses are in bits per token, errors in "
        "shares of the tokens; bounds are rounded up. Variance and complexity of a relative line include the base's."
    )


def _line_row(line: Mapping[str, Any]) -> dict[str, Any]:
    known = line["value"] is not None
    return {
        "name": line_name(dict(line)),
        "known": known,
        "cells": _line_cells(line) if known else ["-"] * len(LINE_COLUMNS),
        "note": line["note"] or "",
        "parameters": _flat(line["parameters"]),
    }


def _line_cells(line: Mapping[str, Any]) -> list[str]:
    terms = line["terms"]
    both = {name: terms.get(name, 0.0) + terms.get(f"base_{name}", 0.0) for name in ("variance", "complexity")}
    return [
        format_bound(line["value"], 4),
        f"{line['empirical']:.4f}",
        f"{both['variance']:.4f}",
        f"{both['complexity']:.4f}",
        f"{terms.get('sampling_slack', 0.0):.4f}",
        f"{line['random_guess']:.4f}",
        f"{line['kappa_nats']:,.1f}",
        f"{line['tune_bits']:.1f}",
    ]


def number_rows(certificate: CertificateRecord) -> list[dict[str, str]]:
    """Every number of the certificate with its unit and meaning; its lines and records have tables of their own."""
    fields = type(certificate).model_fields
    rows = [
        _number(
            name, getattr(certificate, name), unit, MEANINGS.get(name) or str(fields[name].description).replace("`", "")
        )
        for name, unit in UNITS.items()
        if getattr(certificate, name) is not None
    ]
    split = [
        _number(f"code_split.{name}", bits, "bits", f"L(h): {name}") for name, bits in certificate.code_split.items()
    ]
    return [*rows, *split]


def term_rows(certificate: CertificateRecord) -> list[tuple[str, list[str]]]:
    """Every term of every computed line: its name, and its value in each line, in bits per token or shares."""
    lines = [line for line in certificate.bounds if line["value"] is not None]
    names = dict.fromkeys(name for line in lines for name in line["terms"])
    return [
        (name, [_digits(line["terms"][name]) if name in line["terms"] else "-" for line in lines]) for name in names
    ]


def _number(name: str, value: float, unit: str, meaning: str) -> dict[str, str]:
    return {"name": name, "value": _digits(value), "unit": unit, "meaning": meaning}


def _digits(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.9g}"


def _records(certificate: CertificateRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    found = {
        "Declared by whoever made it": certificate.declarations,
        "Corpus": certificate.corpus,
        "Model": certificate.model,
        "Scoring protocol": certificate.protocol,
        "Claim": {
            name: getattr(certificate, name) for name in ("prior", "methods", "top_k", "trial", "delta", "unscorable")
        },
        "Sample": certificate.sampling.model_dump() if certificate.sampling else {},
        "Selection": certificate.selection.model_dump() if certificate.selection else {},
        "Environment": certificate.environment,
    }
    return [(title, _flat(tree)) for title, tree in found.items() if tree]


def _flat(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(value)) for name, value in tree.items()]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _digits(value)
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value)


def _quotes(certificate: CertificateRecord) -> list[tuple[str, str]]:
    return [
        ("Markdown table", markdown_table(certificate)),
        ("LaTeX rows", latex_rows(certificate)),
        ("BibTeX", bibtex(certificate)),
        ("Model card (Hugging Face model-index)", model_card_yaml(certificate)),
    ]
