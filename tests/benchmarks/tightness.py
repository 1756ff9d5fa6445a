"""How tight a run's bounds are, at its own number of tokens and at larger ones.

    python tests/benchmarks/tightness.py RUN_DIRECTORY

Reads the losses of a run in which every token was scored. The row of the run's own m holds the certificate's lines.
Rows at a smaller kappa/m are what-ifs, the same losses and code for a larger m, and no certificates.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from tokenbound.api import Certificate
from tokenbound.bounds import format_bound
from tokenbound.bounds.certify import certify
from tokenbound.bounds.choice import choose_tunings
from tokenbound.bounds.claim import Claim, Line, Tuning
from tokenbound.bounds.exact import LineSums
from tokenbound.certificate.reduce import exact_sums, full_evidence
from tokenbound.errors import InputError
from tokenbound.store.run import CERTIFICATE

KAPPA_PER_TOKEN = (0.025, 0.003)
"""What-if rows, unless the run's own m is larger: the smallest m at which freedman's kappa/m is at most this."""

METHODS = ("freedman", "azuma")


@dataclass(frozen=True)
class Row:
    """Both loss lines for one number of tokens."""

    num_tokens: int
    what_if: bool
    freedman: Line
    azuma: Line

    @property
    def kappa_per_token(self) -> float:
        """kappa/m of the freedman line, nats per token."""
        return self.freedman.kappa_nats / self.num_tokens

    @property
    def gap_over_azuma(self) -> float:
        """The freedman gap over azuma's, from the same artifact and losses."""
        return gap_bits(self.freedman) / gap_bits(self.azuma)


def gap_bits(line: Line) -> float:
    """Bound minus empirical risk, bits per token."""
    if line.value is None or line.empirical is None:
        raise InputError(f"the {line.method} line has no value: {line.note}; evaluate with both loss methods")
    return line.value - line.empirical


def measure(run: str) -> list[Row]:
    """The rows of a run: its own m first, then the what-ifs, all from one exact pass over its losses.

    Raises:
        InputError: the run is a sample, or lacks a loss line.
    """
    certificate = Certificate.load(f"{run}/{CERTIFICATE}")
    if certificate.sampling is not None:
        raise InputError(f"{run} scored a sample; leave out what.sample to score every token")
    claim, ledger = certificate.claim(), certificate.ledger(run)
    ledger = replace(ledger, columns=("nll", "entropy", "rank"))
    evidence = full_evidence(ledger, claim.top_k)
    larger = [m for ratio in KAPPA_PER_TOKEN if (m := needed_tokens(certificate, ratio)) > certificate.num_tokens]
    claims = [claim, *map(claim.with_larger_corpus, larger)]
    tunings = [choose_tunings(evidence, each) for each in claims]
    sums = exact_sums(ledger, [tuning for chosen in tunings for tuning in chosen])
    width = len(tunings[0])
    return [
        row(each, chosen, sums.select(slice(i * width, (i + 1) * width)))
        for i, (each, chosen) in enumerate(zip(claims, tunings, strict=True))
    ]


def needed_tokens(certificate: Certificate, kappa_per_token: float) -> int:
    """The smallest m with kappa/m at most this; kappa does not depend on m but for a few bits of tuning."""
    kappa = max(line["kappa_nats"] for line in certificate.bounds if line["method"] in METHODS)
    return round(1.001 * kappa / kappa_per_token)


def row(claim: Claim, tunings: tuple[Tuning, ...], sums: LineSums) -> Row:
    """The loss lines of one claim."""
    lines = {line.method: line for line in certify(tunings, sums, claim, None) if line.top_k is None}
    if missing := set(METHODS) - lines.keys():
        raise InputError(f"the run has no {', '.join(missing)} line; evaluate with both loss methods")
    return Row(claim.num_tokens, claim.what_if, lines["freedman"], lines["azuma"])


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = "| m | kappa/m | measured | freedman | azuma | gap, freedman over azuma | freedman gap over oracle |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *map(_cells, rows)])


def _cells(each: Row) -> str:
    label = f"{each.num_tokens:,}" + (" (what-if: the same losses, a larger m)" if each.what_if else "")
    cells = (
        f"{each.kappa_per_token:.4f}",
        f"{each.freedman.empirical:.4f}",
        format_bound(each.freedman.value, 4),
        format_bound(each.azuma.value, 4),
        f"{each.gap_over_azuma:.3f}",
        f"{each.freedman.terms['gap_over_oracle']:.3f}",
    )
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory in which every token was scored")
    print(markdown(measure(parser.parse_args().run)))


if __name__ == "__main__":
    main()
