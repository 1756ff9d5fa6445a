"""Golden certificates, made once: what is recomputed from their losses is what they say, in every later version."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tokenbound.certificate import Certificate, derived_fields
from tokenbound.ledger import reduce_ledger

GOLDEN = Path(__file__).parent / "golden"


def rounded(tree: Any) -> Any:
    """The same tree, its floats to ten digits: sums of logarithms may differ in the last ones between machines."""
    if isinstance(tree, float):
        return float(f"{tree:.10g}") if math.isfinite(tree) else str(tree)
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return [rounded(value) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("name", ["full", "sampled"])
def test_the_golden_certificate_is_found_again_from_its_losses(name: str) -> None:
    """Grid points are chosen anew, so a change of a grid, of the search or of the arithmetic shows here."""
    path = GOLDEN / name / "certificate.json"
    certificate = Certificate.load(path)
    reduction = reduce_ledger(certificate.ledger(str(path.parent)), certificate.claim(), certificate.sampling_plan())
    found = derived_fields(reduction, certificate.claim(), certificate.corpus["bytes_per_token"])
    printed = json.loads(path.read_text())
    assert rounded(found) == rounded({key: printed[key] for key in found})


@pytest.mark.parametrize("name", ["full", "sampled"])
def test_the_golden_certificate_verifies(name: str) -> None:
    folder = GOLDEN / name
    certificate = Certificate.load(folder / "certificate.json")
    certificate.verify(losses=folder, artifact=folder / "artifact.tokenbound")
    assert not certificate.vacuous
