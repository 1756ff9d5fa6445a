"""The table of granularities agrees with the certificate, and grows with the code."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenbound.api import Certificate
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import InputError

granularity = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("granularity.py"))))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.mark.usefixtures("scored_here")
def test_rows_are_the_certificate_and_its_what_ifs(run_tree: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, run_tree(), origin="test")
    evaluate(config)
    certificate = Certificate.load(f"{config.how.output}/certificate.json")
    own, *others = granularity.measure(config.how.output)
    values = {line["method"]: line["value"] for line in certificate.bounds if line["top_k"] is None}
    assert {name: line.value for name, line in own.lines.items()} == values
    assert all(each.what_if for each in others)
    for name in ("freedman", "bits"):
        found = [each.lines[name].value for each in others]
        assert found == sorted(found)
    assert len(granularity.markdown([own, *others]).splitlines()) == 2 + 1 + len(granularity.KAPPA_PER_TOKEN)


@pytest.mark.usefixtures("scored_here")
def test_a_run_without_both_bounds_is_refused(run_tree: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, run_tree(bound={"methods": ["freedman"]}), origin="test")
    evaluate(config)
    with pytest.raises(InputError, match="freedman and bits"):
        granularity.measure(config.how.output)
