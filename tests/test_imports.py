"""The house: imports point one way, and a light import stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokenbound

PACKAGE = Path(tokenbound.__file__).parent
ALLOWED = {
    "bounds": set(),
    "store": {"bounds"},
    "compression": {"bounds", "store"},
    "corpus": {"store"},
    "config": {"compression", "bounds", "store", "corpus"},
    "models": {"config", "compression", "bounds", "store"},
    "training": {"config", "models", "compression", "bounds"},
    "certificate": {"config", "bounds", "store", "corpus", "compression", "models"},
    "report": {"certificate", "bounds", "store", "compression"},
    "engine": {"config", "certificate", "bounds", "store", "corpus", "compression", "models", "training", "report"},
}
"""Which folders a folder may import; modules at the root of the package are checked below."""


def imported_folders(path: Path) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text())
    only_typing = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        found |= {
            name.split(".")[1]
            for name in names
            if name and name.startswith("tokenbound.") and id(node) not in only_typing
        }
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        folders = imported_folders(path) & set(ALLOWED)
        assert folders <= ALLOWED[folder] | {folder}, path


def test_the_page_about_the_layout_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (.*?) \|$", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    assert {folder: set(re.findall(r"`(\w+)`", imports)) for folder, imports in rows} == ALLOWED


def test_only_the_engine_imports_ray() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        if any(name.split(".")[0] == "ray" for name in names):
            assert path.relative_to(PACKAGE).parts[0] == "engine", path


def test_every_folder_is_in_the_table() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()} == set(
        ALLOWED
    )


@pytest.mark.parametrize("module", ["tokenbound", "tokenbound.bounds", "tokenbound.config.run", "tokenbound.cli"])
def test_light_imports_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_driver_starts_without_torch() -> None:
    code = "import sys, tokenbound.engine.evaluate.run, tokenbound.engine.plan.run; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"


def imports_of(name: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, inside functions too; what only the type checker reads is none."""
    tree, found = ast.parse(modules[name].read_text()), set()
    for_typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in for_typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules.keys() - {name}


def test_no_import_goes_in_a_circle_not_even_a_deferred_one() -> None:
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    left = {name: imports_of(name, modules) for name in modules}
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not left, f"these modules import each other in a circle, or need some that do: {sorted(left)}"
