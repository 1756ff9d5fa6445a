"""What Ray's processes do, done in the test's own: for tests that ask what is computed and not where.

Each process of Ray imports torch and transformers anew, which takes far longer than a tiny model does. What goes to one
there is pickled here, and rows pass through blocks as Ray Data's do, so that what cannot travel is found. That the
processes themselves work is promised by `test_evaluate`, `test_delta`, `test_halving`, `test_object_stores` and
`test_train`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from tokenbound.engine.evaluate.stages import ScoreShard


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


@contextmanager
def _patched() -> Iterator[pytest.MonkeyPatch]:
    """Patches and torch's threads, both as they were afterwards."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    torch.set_num_threads(threads)


@contextmanager
def scoring_here(scorer: Callable[[Any], Any] = ScoreShard) -> Iterator[None]:
    """`evaluate` reads, scores and commits shards one after the other."""
    from tokenbound.engine.evaluate import run as evaluation

    def score_shards(shards: Any, *, read: Any, replica: Any, commit: Any, placement: Any) -> Iterator[Any]:
        stages = [sent(read), scorer(sent(replica)), sent(commit)]
        for shard in shards:
            row = {"shard": shard.number, "windows": shard.windows.tobytes()}
            for stage in stages:
                row = stage(through_a_block(row))
            yield through_a_block(row)

    with _patched() as patch:
        patch.setattr(evaluation, "score_shards", score_shards)
        yield


@contextmanager
def reading_here() -> Iterator[None]:
    """Files of a corpus are digested and tokenised one after the other."""
    from tokenbound.engine import corpus

    with _patched() as patch:
        patch.setattr(corpus, "ray_map", lambda function, items: map(sent(function), map(sent, items)))
        yield


@contextmanager
def compressing_here() -> Iterator[None]:
    """Calibrations, tensors and candidates of a compression one after the other."""
    from tokenbound.engine.compress import run as compression

    with _patched() as patch:
        patch.setattr(compression, "ray_map", lambda function, items: map(sent(function), map(sent, items)))
        patch.setattr(compression, "ray_pool", lambda make, items, *, actors, **_: map(sent(make)(), map(sent, items)))
        yield


class TrainerHere:
    """Of Ray Train what `fit` uses: one worker, which finds the last checkpoint of its folder and leaves another."""

    def __init__(self, worker: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any) -> None:
        assert scaling_config.num_workers == 1
        self.worker, self.settings = sent(worker), sent(train_loop_config)
        self.kept = Path(run_config.storage_path) / run_config.name / "kept"

    def fit(self) -> Any:
        import ray.train

        with _patched() as patch:
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


@contextmanager
def training_here() -> Iterator[None]:
    """`fit` trains with one worker."""
    from tokenbound.engine.train import ray_train as fit

    with _patched() as patch:
        patch.setattr(fit, "Trainer", TrainerHere)
        yield
