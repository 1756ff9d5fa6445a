"""A driver whose replicas wait with a scored shard while the test says so: `python -m cluster_run CONFIG`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tokenbound import cli
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.engine.evaluate import stages as scoring

HOLD = "TOKENBOUND_TEST_HOLD"
"""Variable of the nodes' environment: a file; while it is there, no shard leaves its replica."""


class HeldScore(scoring.ScoreShard):
    """Scores as ever, then waits."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one shard."""
        scored = super().__call__(row)
        while Path(os.environ[HOLD]).exists():
            time.sleep(0.1)
        return scored


class Held(Executor):
    """Ray, with replicas that wait."""

    def stream(self, rows: Any, *, scorer: Any, **stages: Any) -> Any:
        """As usual, with another scorer."""
        from cluster_run import HeldScore as importable

        return super().stream(rows, scorer=importable, **stages)


if __name__ == "__main__":
    with use_executor(Held()):
        cli.run_command("evaluate")
