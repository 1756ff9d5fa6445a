"""Every public function of the mathematics shows how it is called; the suite runs what it shows."""

from __future__ import annotations

import inspect

import pytest

from tokenbound import bounds

FUNCTIONS = [name for name in bounds.__all__ if inspect.isfunction(getattr(bounds, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(bounds, name)) or "")
