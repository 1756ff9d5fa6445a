"""What Ray's processes do, done in the test's own: for tests that ask what is computed and not where.

Each process of Ray imports torch and transformers anew, which takes far longer than a tiny model does. What goes to one
there is pickled here, and rows pass through blocks as Ray Data's do, so that what cannot travel is found. That the
processes themselves work is promised by `test_evaluate`, `test_delta`, `test_halving`, `test_object_stores` and
`test_train`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from tokenbound.engine.cluster.executor import Executor, executor, use_executor
from tokenbound.engine.cluster.session import Resources


def sent(thing: Any) -> Any:
    """What arrives in another process."""
    return cloudpickle.loads(cloudpickle.dumps(thing))


def through_a_block(row: dict[str, Any]) -> dict[str, Any]:
    """What the next stage of a Ray Data graph gets."""
    from ray.data._internal.delegating_block_builder import DelegatingBlockBuilder
    from ray.data.block import BlockAccessor

    builder = DelegatingBlockBuilder()
    builder.add(row)
    (got,) = BlockAccessor.for_block(builder.build()).iter_rows(public_row_format=True)
    return dict(got)


@dataclass(frozen=True)
class Here(Executor):
    """Runs the chosen steps one after the other in this process, and the others on Ray."""

    scoring: bool = False
    """`evaluate` reads, scores and commits shards here."""
    compressing: bool = False
    """Maps run here: calibrations, tensors and candidates of a compression, and whatever else is mapped."""
    training: bool = False
    """`fit` trains here, with one worker."""
    scorer: Callable[[Any], Any] | None = None
    """Takes the place of the scoring actor's class."""

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        return map(sent(function), map(sent, items)) if self.compressing else super().map(function, items)

    def pool(self, make: Any, items: Any, **options: Any) -> Iterator[Any]:
        return map(sent(make)(), map(sent, items)) if self.compressing else super().pool(make, items, **options)

    def stream(
        self, rows: Any, *, read: Any, scorer: Any, replica: Any, commit: Any, **options: Any
    ) -> Iterable[dict[str, Any]]:
        chosen = self.scorer or scorer
        if not self.scoring:
            return super().stream(rows, read=read, scorer=chosen, replica=replica, commit=commit, **options)
        return self._stages(rows, [sent(read), chosen(sent(replica)), sent(commit)])

    def _stages(self, rows: Any, stages: list[Any]) -> Iterator[dict[str, Any]]:
        for row in rows:
            for stage in stages:
                row = stage(through_a_block(row))
            yield through_a_block(row)

    def train(self, trainer: Any, worker: Any, settings: Any, **options: Any) -> Any:
        if not self.training:
            return super().train(trainer, worker, settings, **options)
        return TrainerHere(worker, train_loop_config=settings, **options).fit()


@dataclass(frozen=True)
class Cluster(Executor):
    """A cluster that exists on paper."""

    found: Resources
    gpu_bytes: int = 0

    def resources(self) -> Resources:
        return self.found

    def smallest_gpu_bytes(self) -> int:
        return self.gpu_bytes


@contextmanager
def here(**steps: Any) -> Iterator[None]:
    """Run some steps here, beside those that already do; torch's threads are afterwards as they were."""
    import torch

    threads, used = torch.get_num_threads(), executor()
    with use_executor(replace(used if isinstance(used, Here) else Here(), **steps)):
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Killed(Here):
    """Compresses here, and is interrupted after so many mapped items; what was given out is noted."""

    after: int = 1 << 30
    given: list[Any] = field(default_factory=list)

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.after:
                raise KeyboardInterrupt
            self.given.append(item)
            yield sent(function)(sent(item))

    def pool(self, make: Any, items: Any, **options: Any) -> Iterator[Any]:
        return map(sent(make)(), map(sent, items))


def scoring_here(scorer: Callable[[Any], Any] | None = None) -> AbstractContextManager[None]:
    """`evaluate` reads, scores and commits shards one after the other."""
    return here(scoring=True, scorer=scorer)


def compressing_here() -> AbstractContextManager[None]:
    """Calibrations, tensors and candidates of a compression one after the other."""
    return here(compressing=True)


class TrainerHere:
    """Of Ray Train what `fit` uses: one worker, which finds the last checkpoint of its folder and leaves another."""

    def __init__(self, worker: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any) -> None:
        assert scaling_config.num_workers == 1
        self.worker, self.settings = sent(worker), sent(train_loop_config)
        self.kept = Path(run_config.storage_path) / run_config.name / "kept"

    def fit(self) -> Any:
        import ray.train

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray.train, "report", self._report)
            patch.setattr(ray.train, "get_checkpoint", self._checkpoint)
            self.worker(self.settings)
        metrics = json.loads((self.kept / "metrics.json").read_text())
        return SimpleNamespace(checkpoint=self._checkpoint(), metrics=metrics, error=None)

    def _report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        shutil.copytree(checkpoint.path, self.kept, dirs_exist_ok=True)
        (self.kept / "metrics.json").write_text(json.dumps(metrics))

    def _checkpoint(self) -> Any:
        import ray.train

        return ray.train.Checkpoint.from_directory(self.kept) if self.kept.exists() else None


def training_here() -> AbstractContextManager[None]:
    """`fit` trains with one worker."""
    return here(training=True)
