"""Documents, tokens and binary decisions as data points: three bounds from the same losses at many code lengths.

    python tests/benchmarks/granularity.py RUN_DIRECTORY [--output granularity.md]

Reads a run with the bounds `freedman` and `bits`, and `document` where it has that too. The row of the run's own code
length holds the certificate's bounds. Every other row is a what-if, the same losses for a code of another length, and
not a certificate: a model of that length would have other losses.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from bench import machine

from tokenbound.api import Certificate
from tokenbound.bounds import format_bound
from tokenbound.bounds.claim import Claim, Line
from tokenbound.bounds.constants import LN2
from tokenbound.certificate.reduce import reduce_ledger, reduced_columns
from tokenbound.certificate.verify import sampling_plan_beside
from tokenbound.errors import InputError
from tokenbound.store.run import CERTIFICATE

KAPPA_PER_TOKEN = (0.003, 0.01, 0.034, 0.1, 0.3, 0.7, 1.0)
"""Nats of code per token of the what-if rows."""


@dataclass(frozen=True)
class Row:
    """The bounds for one code length."""

    kappa_per_token: float
    """Nats of the model's code per token of the corpus."""
    what_if: bool
    unsmoothed: float
    """Measured loss without smoothing, bits per token."""
    lines: dict[str, Line]
    """By bound."""

    @property
    def gap_ratio(self) -> float:
        """Gap of `bits` over that of `freedman`, both above the unsmoothed loss."""
        bits, token = (float(self.lines[name].value or 0.0) - self.unsmoothed for name in ("bits", "freedman"))
        return bits / token


def measure(run: str) -> list[Row]:
    """The rows of a run: its own code length first.

    Raises:
        InputError: the run lacks one of the two bounds.
    """
    certificate = Certificate.load(f"{run}/{CERTIFICATE}")
    if not {"freedman", "bits"} <= set(certificate.methods):
        raise InputError(f"{run} needs the bounds freedman and bits; evaluate with both in what.bound.methods")
    claim, plan = certificate.claim(), sampling_plan_beside(certificate, run)
    ledger = replace(certificate.ledger(run), columns=reduced_columns(claim))
    unsmoothed = certificate.mean_nll_bits

    def row(each: Claim, *, what_if: bool) -> Row:
        found = reduce_ledger(ledger, each, plan)
        lines = {line.method: line for line in found.lines if line.top_k is None}
        return Row(each.code_length_bits * LN2 / each.num_tokens, what_if, unsmoothed, lines)

    lengths = [kappa * claim.num_tokens / LN2 for kappa in KAPPA_PER_TOKEN]
    others = [replace(claim, code_length_bits=bits, code_split={}) for bits in lengths]
    return [row(claim, what_if=False), *(row(each, what_if=True) for each in others)]


def markdown(rows: list[Row]) -> str:
    """A table of rows."""
    names = [name for name in ("document", "azuma", "freedman", "bits") if name in rows[0].lines]
    head = f"| code, nats per token | unsmoothed loss | {' | '.join(names)} | gap of bits over that of freedman |"
    lines = [head, "|---" * (len(names) + 3) + "|"]
    for row in rows:
        mark = " (what-if)" if row.what_if else ""
        shown = " | ".join(format_bound(float(row.lines[name].value or 0.0), 3) for name in names)
        lines.append(f"| {row.kappa_per_token:.4f}{mark} | {row.unsmoothed:.3f} | {shown} | {row.gap_ratio:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    text = markdown(measure(arguments.run))
    if arguments.output is None:
        print(text)
        return
    with arguments.output.open("a", encoding="utf-8") as stream:
        stream.write(f"## {arguments.title or arguments.run}\n\n{machine()}\n\n{text}\n\n")


if __name__ == "__main__":
    main()
