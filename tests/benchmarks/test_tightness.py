"""The tightness table agrees with the certificate and tightens with m."""

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

tightness = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tightness.py"))))

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.usefixtures("scored_here")
def test_rows_are_the_certificate_and_its_what_ifs(run_tree: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, run_tree(), origin="test")
    evaluate(config)
    certificate = Certificate.load(f"{config.how.output}/certificate.json")
    own, *larger = tightness.measure(config.how.output)
    assert own.num_tokens == certificate.num_tokens
    assert own.freedman.value == next(line["value"] for line in certificate.bounds if line["method"] == "freedman")
    assert not own.what_if
    assert all(each.what_if for each in larger)
    assert all(each.kappa_per_token <= ratio for each, ratio in zip(larger, tightness.KAPPA_PER_TOKEN, strict=True))
    values = [each.freedman.value for each in (own, *larger)]
    assert values == sorted(values, reverse=True)
    assert len(tightness.markdown([own, *larger]).splitlines()) == 5


@pytest.mark.usefixtures("scored_here")
def test_a_sample_is_refused(run_tree: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, run_tree(sample={"windows": 12, "pilot_windows": 4}), origin="test")
    evaluate(config)
    with pytest.raises(InputError, match="scored a sample"):
        tightness.measure(config.how.output)
