"""The house: types say what they are, and tests use what the package offers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenbound

PACKAGE = Path(tokenbound.__file__).parent
TESTS = Path(__file__).parent
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def has_bare_any(function: FUNCTION) -> bool:
    """Whether a parameter or the result is nothing but Any."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [each.annotation for each in every if each is not None] + [function.returns]
    return any(isinstance(found, ast.Name) and found.id == "Any" for found in annotations)


def test_few_functions_take_or_return_a_bare_any() -> None:
    places = [
        (f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", has_bare_any(node))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTION)
    ]
    bare = [place for place, is_bare in places if is_bare]
    assert len(bare) < 0.02 * len(places), bare


def names_of_the_package(tree: ast.Module) -> set[str]:
    """Names that a test file binds to modules, classes or functions of the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenbound":
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "tokenbound"]
            found |= {alias.asname or alias.name.split(".")[0] for alias in names}
    return found


def patched_names(tree: ast.Module) -> Iterator[str]:
    """What a test file sets inside the package, by `monkeypatch.setattr` or by an assignment to an attribute."""
    ours = names_of_the_package(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            target = node.args[0]
            text = target.value if isinstance(target, ast.Constant) else ast.unparse(target)
            inside = {name.id for name in ast.walk(target) if isinstance(name, ast.Name)} & ours
            if inside or '"tokenbound' in f'"{text}' or "'tokenbound." in str(text):
                yield f"{node.lineno}: {text}"
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in ours:
                    yield f"{node.lineno}: {ast.unparse(target)}"


@pytest.mark.parametrize(
    ("source", "patches"),
    [
        ("from tokenbound import cli\npatch.setattr(cli, 'x', 1)", 1),
        ("import tokenbound.cli as c\npatch.setattr(c.app, 'x', 1)", 1),
        ("patch.setattr('tokenbound.cli.x', 1)", 1),
        ("import sys\npatch.setattr(sys.modules['tokenbound.cli'], 'x', 1)", 1),
        ("from tokenbound import cli\ncli.x = 1", 1),
        ("import sys\npatch.setattr(sys, 'argv', [])\npatch.setattr('sys.argv', [])", 0),
    ],
)
def test_patches_are_found(source: str, patches: int) -> None:
    assert len(list(patched_names(ast.parse(source)))) == patches


def test_no_test_patches_names_inside_the_package() -> None:
    found = {
        str(path.relative_to(TESTS)): list(patched_names(ast.parse(path.read_text()))) for path in TESTS.rglob("*.py")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}
