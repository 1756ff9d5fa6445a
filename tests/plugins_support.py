"""A package that somebody else wrote, installed for one test."""

from __future__ import annotations

from pathlib import Path

import pytest


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    group: str,
    name: str,
    module: str,
    source: str,
    version: str = "1.0",
) -> None:
    """Write a distribution `toy-MODULE` with one module and one entry point, and put it on the path.

    Args:
        folder: where; on the path of this process and of those that it starts.
        group: of the entry point.
        name: of the entry point; its value is the class `Toy` of the module.
        module: the module's name.
        source: the module's text.
    """
    about = folder / f"toy_{module}-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-{module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:Toy\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
