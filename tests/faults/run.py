"""Tries every fault of the table and writes what came out, with date and machine, to `results.md`.

PYTHONPATH=. python tests/faults/run.py
"""

from __future__ import annotations

import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import psutil
from faults import FAULTS, Bench, Fault, Outcome, check, try_fault

RESULTS = Path(__file__).with_name("results.md")


def row(fault: Fault, outcome: Outcome | None, problem: str) -> str:
    """A line of the table."""
    if outcome is None:
        return f"| {fault.name} | {fault.when} | {fault.code} | | | | | failed: {problem} |"
    resumed = {None: "nothing to resume", True: "same certificate", False: "OTHER CERTIFICATE"}[outcome.resumed]
    line = outcome.line.replace("|", "\\|")[:160]
    left = ", ".join(outcome.left) or "nothing"
    cells = [
        fault.name,
        fault.when,
        outcome.code,
        f"{outcome.seconds:.0f} s",
        line,
        left,
        resumed,
        problem or "as promised",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Number of rows that broke a promise."""
    machine = (
        f"{platform.system()} {platform.release()}, {psutil.cpu_count()} processors, Python {platform.python_version()}"
    )
    head = [
        f"Made by `python tests/faults/run.py` on {datetime.now(UTC):%Y-%m-%d}, {machine}.",
        "",
        "| fault | when | exit code | seconds to the end | last line | left behind | resumed | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows, broken = list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for fault in FAULTS:
            outcome, problem = None, ""
            try:
                outcome = try_fault(bench, fault)
                check(fault, outcome)
            except Exception as error:  # the next row is tried all the same
                problem = f"{type(error).__name__}: " + " ".join(str(error).split())[:120].replace("|", "\\|")
                broken += 1
            rows.append(row(fault, outcome, problem))
            sys.stdout.write(rows[-1].replace(folder, "...") + "\n")
            sys.stdout.flush()
            RESULTS.write_text("\n".join([*head, *rows]).replace(folder, "...") + "\n")
    return broken


if __name__ == "__main__":
    sys.exit(min(main(), 1))
