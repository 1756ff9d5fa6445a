"""Whatever happens ends in one line, and the same command goes on."""

from __future__ import annotations

import pytest
from faults import FAULTS, Bench, Fault, check, try_fault

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A model, a corpus and a run without a fault."""
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_ends_as_the_table_says(fault: Fault, bench: Bench) -> None:
    check(fault, try_fault(bench, fault))
