"""Golden certificates, made once: what is recomputed from their losses is what they say, in every later version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenbound.api import Certificate
from tokenbound.certificate.derived import derived_fields
from tokenbound.certificate.reduce import reduce_ledger
from tokenbound.certificate.verify import _agree

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["full", "sampled"])
def test_the_golden_certificate_is_found_again_from_its_losses(name: str) -> None:
    """Grid points are chosen anew, so a change of a grid, of the search or of the arithmetic shows here."""
    path = GOLDEN / name / "certificate.json"
    certificate = Certificate.load(path)
    reduction = reduce_ledger(certificate.ledger(str(path.parent)), certificate.claim(), certificate.sampling_plan())
    found = derived_fields(reduction, certificate.claim(), certificate.corpus["bytes_per_token"])
    printed = json.loads(path.read_text())
    assert [key for key in found if not _agree(printed[key], found[key])] == []


@pytest.mark.parametrize("name", ["full", "sampled"])
def test_the_golden_certificate_verifies(name: str) -> None:
    folder = GOLDEN / name
    certificate = Certificate.load(folder / "certificate.json")
    certificate.verify(losses=folder, artifact=folder / "artifact.tokenbound")
    assert not certificate.vacuous
