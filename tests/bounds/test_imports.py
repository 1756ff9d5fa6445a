"""The folder stays pure: its imports, and what importing it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tokenbound.bounds

FOLDER = Path(tokenbound.bounds.__file__).parent
ALLOWED = {"numpy", "scipy", "tokenbound.bounds", "tokenbound.errors", "tokenbound.plugins"}


def test_only_numpy_scipy_and_the_errors_are_imported():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                fits = top in sys.stdlib_module_names or any(name == a or name.startswith(f"{a}.") for a in ALLOWED)
                assert fits, f"{path.name} imports {name}"


def test_importing_the_bounds_loads_nothing_heavy():
    heavy = ("torch", "ray", "pyarrow", "transformers")
    code = f"import sys, tokenbound.bounds; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_surface_is_there():
    for name in tokenbound.bounds.__all__:
        assert getattr(tokenbound.bounds, name).__doc__, name
