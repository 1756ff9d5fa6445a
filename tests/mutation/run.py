"""Mutation testing of ``tokenbound.bounds``: does a test notice, whatever is changed in the mathematics?

    python tests/mutation/run.py                        # all mutants; run it again to go on after an interruption
    python tests/mutation/run.py --modules codes coded  # of some modules
    python tests/mutation/run.py --sample 50 --seed 7   # a random sample
    python tests/mutation/run.py --report               # write tests/mutation/results.md from what was run so far

Run it from the root of the repository. Progress is kept in ``.mutation/progress.jsonl``, and with a report in
``outcomes.jsonl.gz``: a killed mutant is not run again unless its function changes, a surviving one also where a test
changes. A mutant that survives is a missing test,
unless it is on the list of ``equivalent.yaml`` with the reason why no test can tell it from the original, or why it
makes no difference to what is claimed. The exit code is 1 if any other survives.

Whether a bound is valid and how tight it is are two questions, and this is about the first. Functions that only choose
a grid point, or draw a plot, cannot make a bound wrong: what they return is charged, checked and evaluated elsewhere.
They are listed in ``searches.yaml``, each with the reason and with the tests that compare the search with another one,
and are not mutated.

Public mutation testers start a process for each mutant, or copy the package. Here the tests are collected once; each
mutant is a fork of that process in which the code of one function is exchanged, and the tests that killed a mutant of
the same function before run first. A killed mutant costs half a second, a surviving one all the tests of its module.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import gzip
import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import platform
import random
import resource
import select
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import mpmath  # noqa: F401  (what the tests import is imported once, before the forks)
import numpy as np  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
from mutants import MODULE_LEVEL, Mutant, mutants_of  # noqa: E402

PACKAGE = "tokenbound.bounds"
PROGRESS = ROOT / ".mutation" / "progress.jsonl"
OUTCOMES = Path(__file__).with_name("outcomes.jsonl.gz")
"""What `--report` was made of, so that another checkout need not run it again."""
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
SEARCHES = Path(__file__).with_name("searches.yaml")
RESULTS = Path(__file__).with_name("results.md")

TESTS: dict[str, str] = {
    "theorems": "refusals numbers theorems guards smoothing",
    "codes": "refusals codes guards coded numbers",
    "rounding": "guards certify numbers",
    "smoothing": "refusals smoothing guards theorems",
    "coded": "coded guards budgets",
    "budgets": "budgets",
    "certify": "certify guards coded document sampling budgets",
    "printing": "certify line_terms guards coded sampling budgets",
    "exact": "exact guards sampling",
    "blocks": "exact guards sampling",
    "claim": "claim certify guards coded budgets controls sampling document relative",
    "sampling": "sampling controls numbers",
    "sampled_lines": "sampling budgets",
    "controls": "controls",
    "lines.base": "line_terms claim certify coded guards budgets",
    "lines.azuma": "line_terms guards coded exact budgets",
    "lines.freedman": "line_terms guards coded exact claim",
    "lines.topk": "line_terms claim certify guards exact",
    "decisions": "bits",
    "decision_bets": "bits",
    "lines.bits": "bits",
    "lines.document": "document line_terms coded",
    "lines.relative": "relative line_terms coded numbers",
    "reduction": "reduction",
    "relative_evidence": "relative guards",
    "relative_search": "relative coded numbers",
    "columns": "columns exact",
    "constants": "constants codes",
    "evidence": "evidence guards choice",
    "curves": "searches",
    "choice": "choice guards certify relative",
    "search": "choice guards certify relative",
    "forecast_search": "choice guards certify relative",
}
"""The tests of each module, as `tests/bounds/test_*.py`; where a function moves, its tests move with it here."""
TIME_LIMIT = 30
"""Seconds of processor time for one mutant; longer is an endless loop, which a test run would notice."""
MEMORY_LIMIT = 8 << 30
NOTICED = ("killed", "timeout")


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    module: str
    name: str
    line: int
    outcome: str
    """`killed`, `timeout` or `survived`."""
    killer: str
    seconds: float
    source: str
    """Digest of its function, or of what is outside functions."""
    tests: str
    """Digest of its tests."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that were asked for; 1 if one survives that is not listed."""
    options = _options(arguments)
    if options.report:
        RESULTS.write_text(report(), encoding="utf-8")
        _write_outcomes()
        return 0
    mutants = select_mutants(options.modules, options.sample, options.seed, options.match)
    if options.skip_listed:
        mutants = [mutant for mutant in mutants if mutant.name not in equivalents()]
    known = {} if options.fresh else load_progress(options.progress)
    if options.survivors:
        mutants = [m for m in mutants if m.name in known and known[m.name].outcome == "survived"]
    todo = [mutant for mutant in mutants if not _is_done(known.get(mutant.name), mutant)]
    print(f"{len(mutants)} mutants, {len(todo)} to run", flush=True)
    for outcome in run_mutants(todo, known, options.jobs):
        append_progress(options.progress, outcome)
        known[outcome.name] = outcome
        if outcome.outcome == "survived":
            print(f"  survived: {outcome.module}: {outcome.name} (line {outcome.line})", flush=True)
    survivors = [known[m.name] for m in mutants if known[m.name].outcome == "survived"]
    listed = equivalents()
    unlisted = [s for s in survivors if s.name not in listed]
    print(f"{len(mutants)} mutants, {len(survivors)} survived, {len(unlisted)} of them not in {EQUIVALENT.name}")
    for outcome in unlisted:
        print(f"{outcome.module}.py:{outcome.line}: {outcome.name}")
    return 1 if unlisted else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--sample", type=int, help="run this many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--match", default="", help="only mutants whose name contains this text")
    parser.add_argument("--skip-listed", action="store_true", help=f"leave out what {EQUIVALENT.name} lists")
    parser.add_argument("--survivors", action="store_true", help="only what survived when it was run last")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--fresh", action="store_true", help="run again what was run before")
    parser.add_argument("--report", action="store_true", help="write results.md and outcomes.jsonl.gz, and stop")
    parser.add_argument("--progress", type=Path, default=PROGRESS)
    return parser.parse_args(arguments)


def select_mutants(modules: Sequence[str], sample: int | None = None, seed: int = 0, match: str = "") -> list[Mutant]:
    """The mutants of these modules, or a sample of them that only the seed decides; names are unique.

    Those of functions that only search are left out.
    """
    found: list[Mutant] = []
    for module in modules:
        found += [m for m in mutants_of(module, text_of(module)) if match in m.name and not only_searches(m)]
    if sample is not None and sample < len(found):
        chosen = set(random.Random(seed).sample(range(len(found)), sample))
        found = [mutant for index, mutant in enumerate(found) if index in chosen]
    return found


@cache
def text_of(module: str) -> str:
    """The source of a module as it was when this process began to look at it."""
    return source_of(module).read_text(encoding="utf-8")


def source_of(module: str) -> Path:
    """The file of a module."""
    return ROOT / "tokenbound" / "bounds" / f"{module.replace('.', '/')}.py"


def tests_of(module: str) -> list[Path]:
    """The test files of a module."""
    paths = [ROOT / "tests" / "bounds" / f"test_{name}.py" for name in TESTS[module].split()]
    return [path for path in paths if path.exists()]


def searches() -> dict[str, str]:
    """`module: function` of what is not mutated, with the reason; `module: *` is a whole module."""
    groups = yaml.safe_load(SEARCHES.read_text(encoding="utf-8"))
    return {name: group["why"] for group in groups for name in group["functions"]}


_searches = cache(searches)


def only_searches(mutant: Mutant) -> bool:
    """Whether the function that is changed can make no bound wrong."""
    return f"{mutant.module}: *" in _searches() or f"{mutant.module}: {mutant.function}" in _searches()


def equivalents() -> dict[str, str]:
    """Names of the mutants that no test can kill, or that are harmless, with the reason."""
    groups = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8"))
    return {name: group["why"] for group in groups for name in group["mutants"]}


# ------------------------------------------------------------------------------------------------------- progress


def load_progress(path: Path) -> dict[str, Outcome]:
    """The last outcome of each mutant: of the last report, and since."""
    lines = gzip.decompress(OUTCOMES.read_bytes()).decode().splitlines() if OUTCOMES.exists() else []
    lines += path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {o.name: o for o in (Outcome(**json.loads(line)) for line in lines)}


def _write_outcomes() -> None:
    known = load_progress(PROGRESS)
    mutants = select_mutants(list(TESTS), None, 0, "")
    found = [known[m.name] for m in mutants if m.name in known and known[m.name].source == _source_digest(m)]
    text = "".join(json.dumps(asdict(outcome)) + "\n" for outcome in found)
    OUTCOMES.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def append_progress(path: Path, outcome: Outcome) -> None:
    """Add one outcome."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def _is_done(outcome: Outcome | None, mutant: Mutant) -> bool:
    if outcome is None or outcome.source != _source_digest(mutant):
        return False
    return outcome.outcome in NOTICED or outcome.tests == _digest(tests_of(mutant.module))


@cache
def _digest_of_code(module: str, function: str) -> str:
    """Of what the interpreter sees of a function, without comments, docstrings and what stands around it.

    Of the module level: all but the bodies of functions.
    """
    tree: Any = ast.parse(text_of(module))
    for name in () if function == MODULE_LEVEL else function.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", "") == name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and function == MODULE_LEVEL:
            node.body = [ast.Pass()]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _source_digest(mutant: Mutant) -> str:
    return _digest_of_code(mutant.module, mutant.function)


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------- running


def run_mutants(mutants: Sequence[Mutant], known: dict[str, Outcome], jobs: int) -> Iterator[Outcome]:
    """Outcomes of the mutants as they come; this process never imports the package."""
    tests = {m: _digest(tests_of(m)) for m in TESTS}

    def outcome_of(mutant: Mutant, outcome: str, killer: str, seconds: float) -> Outcome:
        stamps = {"source": _source_digest(mutant), "tests": tests[mutant.module]}
        return Outcome(mutant.module, mutant.name, mutant.line, outcome, killer, round(seconds, 2), **stamps)

    functions = {m.name: m for m in mutants if not _needs_import(m)}
    if functions:
        killers = [outcome.killer for outcome in known.values()]
        with _session(list(functions.values()), killers, jobs) as lines:
            for line in lines:
                name, *rest = json.loads(line)
                if not rest:
                    raise RuntimeError(f"{name} fails without any mutation")
                yield outcome_of(functions.pop(name), *rest)
        if functions:
            raise RuntimeError(f"the tests stopped with {len(functions)} mutants left")
    for mutant, *rest in _pool(((m, _import_changed(m)) for m in mutants if _needs_import(m)), jobs):
        yield outcome_of(mutant, *rest)


def _needs_import(mutant: Mutant) -> bool:
    """Whether the change works at import only: constants, defaults, and the functions that build the grids."""
    return mutant.function == MODULE_LEVEL or mutant.module == "constants"


def _import_changed(mutant: Mutant) -> Callable[[], str]:
    """Run the tests in a fresh import of the package with one module changed."""

    def work() -> str:
        code = compile(mutant.tree(text_of(mutant.module)), mutant.module, "exec")
        sys.meta_path.insert(0, _Finder(f"{PACKAGE}.{mutant.module}", code))
        importlib.import_module(f"{PACKAGE}.{mutant.module}")  # as above
        first = _First()
        status = pytest.main([*_pytest_arguments([mutant.module]), "-x"], plugins=[first])
        return first.failed or ("" if status == 0 else f"exit code {status}")

    return work


class _First:
    failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module: str, code: CodeType) -> None:
        self.module, self.code = module, code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.module else None

    def exec_module(self, module: Any) -> None:
        exec(self.code, module.__dict__)


def files_of(module: str) -> list[Path]:
    """What is run for a module: its own doctests, then its tests."""
    return [source_of(module), *tests_of(module)]


def _pytest_arguments(modules: Sequence[str]) -> list[str]:
    paths = list(dict.fromkeys(str(path) for module in modules for path in files_of(module)))
    plain = ["--doctest-modules", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--hypothesis-profile=mutation"]
    return [
        *paths,
        *plain,
        "-m",
        "not slow and not gpu and not cluster and not faults",
        "-o",
        "addopts=--import-mode=importlib",
    ]


@contextlib.contextmanager
def _session(mutants: Sequence[Mutant], killers: Sequence[str], jobs: int) -> Iterator[Any]:
    """Lines that a forked pytest session writes, one for each mutant."""
    modules = list(dict.fromkeys(mutant.module for mutant in mutants))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            _be_quiet()
            for module in modules:
                importlib.import_module(f"{PACKAGE}.{module}")  # before pytest finds the file itself
            pytest.main(_pytest_arguments(modules), plugins=[_Loop(mutants, killers, jobs, writer)])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as lines:
        yield lines
    os.waitpid(child, 0)


class _Loop:
    """A pytest plugin whose test loop runs once for every mutant, each in a fork."""

    def __init__(self, mutants: Sequence[Mutant], killers: Sequence[str], jobs: int, writer: int) -> None:
        self.mutants, self.jobs, self.writer = mutants, jobs, writer
        self.kills: Counter[str] = Counter(killers)
        self.recent: dict[str, list[str]] = defaultdict(list)
        self.seconds: dict[str, float] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = list(session.items)
        # In a fork, so that no item runs twice in one process.
        child, reader = _fork(lambda: _measure(items), cpu_seconds=len(items) * TIME_LIMIT)
        measured = json.loads(_read_all(reader))
        os.waitpid(child, 0)
        if isinstance(measured, str):
            os.write(self.writer, (json.dumps([measured]) + "\n").encode())
            return True
        self.seconds = measured

        def work(mutant: Mutant) -> Callable[[], str]:
            def run() -> str:
                exchange_code(mutant)
                files = files_of(mutant.module)
                mine = [item for item in items if item.path in files]
                return _run_until_failure(sorted(mine, key=lambda item: self.rank(item.nodeid, mutant)))

            return run

        for mutant, outcome, killer, seconds in _pool(((m, work(m)) for m in self.mutants), self.jobs):
            self.kills[killer] += 1
            self.recent[mutant.module + mutant.function].insert(0, killer)
            os.write(self.writer, (json.dumps([mutant.name, outcome, killer, seconds]) + "\n").encode())
        return True

    def rank(self, test: str, mutant: Mutant) -> tuple[int, float]:
        """Tests that killed a mutant of the same function, the last first; then by kills per second."""
        recent = self.recent[mutant.module + mutant.function]
        if test in recent:
            return recent.index(test), 0.0
        return len(recent), (self.seconds[test] + 0.01) / (1 + self.kills[test])


def _run_until_failure(items: Sequence[pytest.Item], after: Sequence[pytest.Item] = ()) -> str:
    from _pytest.runner import runtestprotocol

    for item, following in zip(items, [*items[1:], *(after or [None])], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return item.nodeid
    return ""


def _measure(items: Sequence[pytest.Item]) -> str:
    """JSON of the seconds of each test, or of the name of the first that fails without any mutation."""
    seconds = {}
    for index, item in enumerate(items):
        start = time.process_time()
        if _run_until_failure([item], items[index + 1 : index + 2]):
            return json.dumps(item.nodeid)
        seconds[item.nodeid] = round(time.process_time() - start, 3)
    return json.dumps(seconds)


def _read_all(reader: int) -> bytes:
    with os.fdopen(reader, "rb") as file:
        return file.read()


def exchange_code(mutant: Mutant) -> None:
    """Give a function of an imported module the code that it has in the mutant."""
    function = _live_function(sys.modules[f"{PACKAGE}.{mutant.module}"], mutant.function)
    tree = mutant.tree(text_of(mutant.module))
    function.__code__ = _code_of(compile(tree, function.__code__.co_filename, "exec"), mutant.function)


def _live_function(module: Any, qualified: str) -> FunctionType:
    owner, *names = module, *qualified.split(".")
    for name in names:
        owner = inspect.getattr_static(owner, name)
    if isinstance(owner, property):
        owner = owner.fget
    elif isinstance(owner, cached_property):
        owner = owner.func
    elif isinstance(owner, classmethod | staticmethod):
        owner = owner.__func__
    found = inspect.unwrap(owner)
    assert isinstance(found, FunctionType), qualified
    return found


def _code_of(code: CodeType, qualified: str) -> CodeType:
    found = [c for c in _codes(code) if c.co_qualname == qualified]
    return found[-1]


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _pool(
    work: Sequence[tuple[Mutant, Callable[[], str]]] | Iterator[tuple[Mutant, Callable[[], str]]], jobs: int
) -> Iterator[tuple[Mutant, str, str, float]]:
    """Run each in a fork of its own, some at a time: (mutant, outcome, test that killed it, seconds)."""
    waiting, running = iter(work), {}
    while True:
        while len(running) < jobs and (following := next(waiting, None)) is not None:
            child, reader = _fork(following[1])
            running[reader] = (child, following[0], time.perf_counter())
        if not running:
            return
        ready, _, _ = select.select(list(running), [], [])
        for reader in ready:
            child, mutant, start = running.pop(reader)
            killer = _read_all(reader).decode()
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                killer = "time limit" if os.WTERMSIG(status) == signal.SIGXCPU else f"signal {os.WTERMSIG(status)}"
            outcome = {"time limit": "timeout", "nothing": "survived"}.get(killer, "killed")
            yield mutant, outcome, "" if killer == "nothing" else killer, time.perf_counter() - start


def _fork(work: Callable[[], str], cpu_seconds: int = TIME_LIMIT) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        _be_quiet(errors_too=True)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        answer = work() or "nothing"
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"[:200]
    with os.fdopen(writer, "wb") as file:
        file.write(answer.encode())
    os._exit(0)


def _be_quiet(*, errors_too: bool = False) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, *((2,) if errors_too else ())):
        os.dup2(nowhere, stream)


# --------------------------------------------------------------------------------------------------------- report


def report() -> str:
    """Markdown with date, machine and numbers of what was run, per module, and the survivors."""
    known, listed = load_progress(PROGRESS), equivalents()
    rows, open_names, again = [], [], []
    totals: Counter[str] = Counter()
    for module in TESTS:
        every = mutants_of(module, text_of(module))
        mutants = [m for m in every if not only_searches(m)]
        outcomes = [known[m.name] for m in mutants if m.name in known and known[m.name].source == _source_digest(m)]
        survived = [o for o in outcomes if o.outcome == "survived"]
        stale = [o for o in survived if o.name not in listed and o.tests != _digest(tests_of(module))]
        unlisted = [o for o in survived if o.name not in listed and o not in stale]
        again.extend(stale)
        open_names.extend(unlisted)
        counts = {
            "searches": len(every) - len(mutants),
            "mutants": len(mutants),
            "run": len(outcomes),
            "killed": sum(o.outcome == "killed" for o in outcomes),
            "timeout": sum(o.outcome == "timeout" for o in outcomes),
            "listed": len(survived) - len(unlisted) - len(stale),
            "again": len(stale),
            "open": len(unlisted),
            "seconds": round(sum(o.seconds for o in outcomes)),
        }
        totals.update(counts)
        rows.append(f"| {module} | " + " | ".join(str(n) for n in counts.values()) + " |")
    rows.append("| **all** | " + " | ".join(str(totals[name]) for name in counts) + " |")
    return _REPORT.format(
        date=datetime.datetime.now(datetime.UTC).date(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        rows="\n".join(rows),
        open="\n".join(f"* `{o.module}`: `{o.name}`" for o in open_names) or "None.",
        again="\n".join(f"* `{o.module}`: `{o.name}`" for o in again) or "None.",
        searches="\n".join(_searched(group) for group in yaml.safe_load(SEARCHES.read_text(encoding="utf-8"))),
    )


def _searched(group: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in group["functions"])
    return f"* {names}. {group['why']} Tests: {', '.join(f'`{path}`' for path in group['tests'])}."


_REPORT = """# Mutation testing of tokenbound.bounds

Written by `python tests/mutation/run.py --report` on {date} ({machine}).

Each mutant is one change of the source: an arithmetic operator or a comparison exchanged, a term dropped, a constant
moved, min for max, a condition negated, a check removed. `listed` are the survivors of `equivalent.yaml`, each with its
reason; `to run again` those whose tests have changed since; `open` are the others. `searches` counts the mutants of
functions that can make a bound looser but not wrong, which are not run (below).

| module | searches | mutants | run | killed | timeout | survived, listed | to run again | survived, open | seconds |
|---|---|---|---|---|---|---|---|---|---|
{rows}

## Open survivors

{open}

## To run again

{again}

## Not mutated: searches and plots

From `searches.yaml`. What these functions return is charged, checked and evaluated elsewhere; no change of them can
print an invalid bound. Tests of their own compare them with an exhaustive search.

{searches}
"""


hypothesis.settings.register_profile(
    "mutation",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=15,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=list(hypothesis.HealthCheck),
)

if __name__ == "__main__":
    sys.exit(main())
