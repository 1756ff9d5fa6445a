"""Mutation testing of the bounds: a sample of the mutants is killed, and the list of equivalent ones is up to date."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
from mutants import MODULE_LEVEL, Mutant, mutants_of  # noqa: E402

SOURCE = '''
LIMIT = 3

def clipped(values, low, high=8.0):
    """Docstring: 1 + 1 stays."""
    if low > high:
        raise ValueError(f"{low + 1}")
    require_paid(values)
    pairs = list(zip(values, values, strict=True))
    total = -max(values[1:], low) * 2 + high
    return total, low if low is not None and high < 1 else 0

class Line:
    @property
    def size(self):
        return self.a / self.b
'''


def changed(mutant: Mutant, source: str = SOURCE) -> str:
    return ast.unparse(mutant.tree(source))


def test_what_is_changed_and_what_is_not() -> None:
    names = {mutant.name for mutant in mutants_of("m", SOURCE)}
    for expected in (
        "<module>: LIMIT = 3 -> LIMIT = 4",
        "clipped: low > high -> low >= high",
        "clipped: if low > high: -> if False:",
        "clipped: require_paid(values) -> pass",
        "clipped: max(values[1:], low) -> min(values[1:], low)",
        "clipped: max(values[1:], low) -> low",
        "clipped: values[1:] -> values[:]",
        "clipped: values[1:] -> values[2:]",
        "clipped: -max(values[1:], low) * 2 + high -> high",
        "clipped: -max(values[1:], low) * 2 + high -> -max(values[1:], low) * 2 - high",
        "clipped: low is not None and high < 1 -> high < 1",
        "clipped: low is not None -> low is None",
        "clipped: low if low is not None and high < 1 else 0 -> low",
        "Line.size: self.a / self.b -> self.a * self.b",
    ):
        assert expected in names, expected
    assert not any("Docstring" in name or "ValueError" in name or "strict" in name for name in names)
    assert len(names) == len(mutants_of("m", SOURCE))


def test_each_mutant_is_one_change_that_compiles() -> None:
    original = ast.unparse(ast.parse(SOURCE))
    texts = [changed(mutant) for mutant in mutants_of("m", SOURCE)]
    assert original not in texts
    assert len(set(texts)) >= len(texts) - 2, "two operators may meet in the same change"
    for text in texts:
        compile(text, "m", "exec")
        assert sum(a != b for a, b in zip(text.splitlines(), original.splitlines(), strict=True)) == 1


def test_names_survive_a_move_to_another_file() -> None:
    """No line numbers, no file names: what stands above a function makes no difference."""
    names = [mutant.name for mutant in mutants_of("m", SOURCE) if mutant.function != MODULE_LEVEL]
    moved = mutants_of(
        "another", '"""Another module."""\nimport math\n\n\ndef first(x):\n    return x + 1\n\n' + SOURCE
    )
    assert [m.name for m in moved if m.function not in (MODULE_LEVEL, "first")] == names


def test_every_listed_mutant_exists_and_has_a_reason() -> None:
    """A function that changed takes its entries off the list: whether they still hold is asked again."""
    existing = "{mutant.name for mutant in run.select_mutants(list(run.TESTS))}"
    command = f"import run; print(*(set(run.equivalents()) - {existing}), sep=chr(10))"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert not found.stdout.strip(), "not in the source any more; look at them again:\n" + found.stdout


def test_every_function_that_is_not_mutated_exists_with_its_reason_and_its_tests() -> None:
    """A search that is renamed, or that takes over a part of the evaluation under another name, is mutated again."""
    existing = "{f'{m.module}: {m.function}' for n in run.TESTS for m in run.mutants_of(n, run.text_of(n))}"
    modules = "{f'{name}: *' for name in run.TESTS}"
    command = f"import run; print(*(set(run.searches()) - {existing} - {modules}), sep=chr(10))"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert not found.stdout.strip(), "not in the source any more:\n" + found.stdout
    for group in yaml.safe_load((FOLDER / "searches.yaml").read_text(encoding="utf-8")):
        assert group["why"]
        assert group["tests"]
        assert all((FOLDER.parents[1] / path).is_file() for path in group["tests"])


@pytest.mark.slow
def test_a_sample_of_the_mutants_is_killed(tmp_path: Path) -> None:
    """Sixty at random; MUTATION_SEED draws others. A survivor is a missing test, or belongs on the list."""
    seed = os.environ.get("MUTATION_SEED", "0")
    command = [sys.executable, str(FOLDER / "run.py"), "--sample", "60", "--seed", seed]
    command += ["--progress", str(tmp_path / "progress.jsonl"), "--skip-listed"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert found.returncode == 0, found.stdout + found.stderr
