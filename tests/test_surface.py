"""What is public in Python: each function says what it takes and shows how it is called; the suite runs that."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tokenbound
from tokenbound import bounds
from tokenbound.certificate.record import CertificateRecord

FUNCTIONS = {
    "tokenbound": ("evaluate", "plan"),
    "tokenbound.bounds": tuple(name for name in bounds.__all__ if inspect.isfunction(getattr(bounds, name))),
    "tokenbound.certificate.verify": ("verify_beside",),
    "tokenbound.compression.artifact": ("decode_artifact", "encode_artifact", "parse_artifact"),
    "tokenbound.compression.inspection": ("inspect_artifact",),
    "tokenbound.config.run": ("dump_config", "load_config", "validate"),
    "tokenbound.demo": ("demo_artifact", "demo_certificate", "demo_config"),
    "tokenbound.certificate.external": ("bound_losses",),
    "tokenbound.report.html": ("html_report",),
    "tokenbound.report.rows": ("bibtex", "latex_row", "markdown_row", "model_card_yaml", "model_index"),
    "tokenbound.report.terminal": ("certificate_text",),
    "tokenbound.report.tracking": ("labels", "metrics"),
}
METHODS = ("claim", "extends", "ledger", "load", "sampling_plan", "save", "table", "verify")
"""Of `tokenbound.Certificate`."""
SURFACE = [
    *(
        pytest.param(getattr(importlib.import_module(module), name), id=f"{module}.{name}")
        for module, names in FUNCTIONS.items()
        for name in names
    ),
    *(pytest.param(getattr(tokenbound.Certificate, name), id=f"Certificate.{name}") for name in METHODS),
]


@pytest.mark.parametrize("function", SURFACE)
def test_it_shows_how_it_is_called(function: Callable[..., Any]) -> None:
    assert ">>>" in (inspect.getdoc(function) or "")


@pytest.mark.parametrize("function", SURFACE)
def test_it_says_what_it_takes(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    if len(names) > 1:
        assert "Args:" in text
        assert [name for name in names if name not in text.partition("Args:")[2]] == []


def test_no_method_of_a_certificate_is_forgotten() -> None:
    fields = tokenbound.Certificate.model_fields
    members = {**vars(CertificateRecord), **vars(tokenbound.Certificate)}
    own = {name for name, value in members.items() if callable(value) or name == "load"}
    public = {name for name in own if not name.startswith(("_", "model_")) and name not in fields}
    assert public == set(METHODS)


def test_the_page_about_the_layout_names_them() -> None:
    page = (Path(tokenbound.__file__).parent / "README.md").read_text()
    assert [module for module in FUNCTIONS if f"`{module}`" not in page] == []
