"""Add finished runs to the table of real models.

    python tests/benchmarks/real_models.py runs/smollm2-linux/certificate.json runs/other

A row of `results/real_models.md` says what one certificate says. A run of the same model, bytes and corpus takes the
place of its older row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenbound import Certificate
from tokenbound.bounds import format_bound
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.report.rows import corpus_name, model_name

RESULTS = Path(__file__).parent / "results/real_models.md"
COLUMNS = (
    "model, compression",
    "artifact (bytes)",
    "corpus",
    "tokens m",
    "kappa/m",
    "tokens scored",
    "measured",
    "token bound",
    "bits",
    "uniform",
    "top-1 error",
    "date",
)
HEAD = f"""# Real models

Each row is the certificate of one model on one corpus, in bits per token. *Uniform* is log2 V, what a uniform guess
scores. *bits* bounds another risk than the token bound (docs/concepts/decisions.md). The top-1 error is bounded too.
`python tests/benchmarks/real_models.py RUN` adds a row.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""


def row(place: Path) -> str:
    """A certificate, or that of a run, in a line of the table."""
    file = place if place.is_file() else place / "certificate.json"
    certificate = Certificate.load(file)
    settings = ArtifactFile(file.parent / "artifact.tokenbound").settings
    lines = certificate.bounds
    bits = next((line["value"] for line in lines if line["method"] == "bits"), None)
    top_1 = next((line["value"] for line in lines if line["method"] == "kl" and line["top_k"] == 1), None)
    quoted = next(line for line in lines if line["method"] == certificate.method)
    cells = [
        f"{model_name(certificate)}, {' '.join(str(value) for value in settings.values())}",
        f"{certificate.artifact_bytes:,}",
        corpus_name(certificate),
        f"{certificate.num_tokens:,}",
        f"{quoted['kappa_nats'] / certificate.num_tokens:.3f}",
        f"{certificate.num_scored_tokens:,}",
        f"{certificate.mean_nll_bits:.3f}",
        format_bound(quoted["value"]),
        "" if bits is None else format_bound(bits),
        f"{certificate.random_guess_bits:.2f}",
        "" if top_1 is None else f"{format_bound(100 * top_1)} %",
        certificate.created_at[:10],
    ]
    return f"| {' | '.join(cells)} |\n"


def add(places: list[Path], results: Path) -> None:
    """Write the rows of some certificates or runs behind those that are there."""
    kept = (results.read_text() if results.exists() else HEAD).splitlines(keepends=True)
    for place in places:
        line = row(place)
        key = line.split(" | ")[:4]
        kept = [*(each for each in kept if each.split(" | ")[:4] != key), line]
    results.write_text("".join(kept))


def main() -> None:
    """Add the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    add(arguments.places, arguments.results)


if __name__ == "__main__":
    main()
