"""One training run on Ray Train: any model that can be built in a worker, any prepared corpus.

Ray Train keeps the checkpoints and restarts workers; started again with the same folder, a run goes on from its last
checkpoint.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ray.train
from ray.train.torch import TorchTrainer

from tokenbound.config.run import PretrainHow, TrainingConfig
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.progress import describe_speed
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.corpus import CorpusStream
from tokenbound.errors import TokenboundError
from tokenbound.store.run import RunDirectory

if TYPE_CHECKING:
    from tokenbound.training.loop import StepReport
    from tokenbound.training.trackers import Tracker

logger = logging.getLogger(__name__)

STATE = "state.pt"


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, without its own answer to SIGINT, which ends the program as if it were done."""

    def _register_sigint_handler(self, controller: object) -> None:
        """Leave the program's answer in place."""


def fit(
    build: Callable[[], Any],
    training: TrainingConfig,
    corpus: PreparedCorpus,
    how: PretrainHow,
    *,
    folder: str = "checkpoints",
) -> tuple[dict[str, Any], float]:
    """Train a model, or finish its training.

    Args:
        build: Makes the model in each worker, after its seed was set; must pickle.
        training: Budget and optimizer.
        corpus: What to train on.
        how: Where; checkpoints go to `folder` below its output.
        folder: Names the run; the same folder resumes it.

    Returns:
        The trained state dict on the CPU, and the smoothed training loss at the end in bits per token.

    Raises:
        InputError: training diverged, or the corpus is too short.
        TokenboundError: the run ended without a checkpoint.
    """
    import torch

    output = Path(how.output).absolute()
    resources = executor().resources()
    use_gpu = how.device == "cuda" or (how.device == "auto" and resources.gpus > 0)
    share = max(1, (resources.cpus - 1 if resources.cpus > 2 else resources.cpus) // how.workers)
    cpus = share if how.threads == "auto" else how.threads
    settings = {
        "build": build,
        "training": training,
        "corpus_root": corpus.root,
        "output": str(output),
        "threads": cpus,
        "cuda": use_gpu,
        "checkpoint_interval_s": how.checkpoint_interval_s,
        "progress_interval_s": how.progress_interval_s,
        "trackers": how.log,
        "folder": str(output / folder),
    }
    scaling = ray.train.ScalingConfig(
        num_workers=how.workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": max(0.5, cpus - 0.5), **({"GPU": 1} if use_gpu else {})},
    )
    run = ray.train.RunConfig(
        name=folder,
        storage_path=str(output),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        failure_config=ray.train.FailureConfig(max_failures=2),
    )
    with _progress_lines(output), plain_errors():
        result = executor().train(Trainer, _worker, settings, scaling_config=scaling, run_config=run)
    if result.checkpoint is None:
        raise TokenboundError(f"training ended without a checkpoint ({result.error}); see {output / folder}")
    with result.checkpoint.as_directory() as path:
        state = torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)["model"]
    return state, float((result.metrics or {})["loss_bits"])


def _worker(settings: dict[str, Any]) -> None:
    """One training worker; runs in its own process."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from tokenbound.training.loop import train

    if not settings["cuda"]:
        torch.set_num_threads(settings["threads"])
    training = settings["training"]
    set_seed(training.seed)
    model = settings["build"]()
    accelerator = Accelerator(cpu=not settings["cuda"], mixed_precision="bf16" if settings["cuda"] else "no")
    stream = CorpusStream(PreparedCorpus(settings["corpus_root"]))
    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as stack:
        reporter = stack.enter_context(_Reporter(settings, accelerator.is_main_process))
        folder = None if checkpoint is None else stack.enter_context(checkpoint.as_directory())
        train(
            model,
            stream,
            training,
            on_step=reporter.step,
            save=reporter.save,
            resume_from=None if folder is None else Path(folder) / STATE,
            checkpoint_interval_s=settings["checkpoint_interval_s"],
            accelerator=accelerator,
        )


class _Reporter:
    """What a worker tells: progress lines and trackers, and checkpoints to Ray Train; only the main one has much to."""

    def __init__(self, settings: Mapping[str, Any], is_main: bool) -> None:
        self.settings, self.is_main = settings, is_main
        self.run, self.last_line = RunDirectory(settings["output"]), time.monotonic()
        self.metrics: dict[str, float] = {}
        self.trackers: list[Tracker] | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def step(self, report: StepReport) -> None:
        """After every step; speaks when the interval is over, and at the end."""
        self.metrics = report.to_dict()
        due = time.monotonic() - self.last_line >= self.settings["progress_interval_s"]
        if self.is_main and (due or report.step == report.total_steps):
            self.last_line = time.monotonic()
            self.run.log_progress(event="step", **self.metrics)
            self._track(report.step)

    def _track(self, step: int) -> None:
        """Trackers are opened at the first line, when it is known where this start goes on."""
        from tokenbound.training.trackers import open_trackers

        if self.trackers is None:
            names, noted = self.settings["trackers"], self.settings["training"].model_dump(mode="json")
            opened = open_trackers(names, Path(self.settings["folder"]), noted, step)
            self.trackers = self.stack.enter_context(opened)
        shown = {name: value for name, value in self.metrics.items() if name not in ("step", "total_steps")}
        for tracker in self.trackers:
            tracker.log(shown, step)

    def save(self, write: Callable[[Path], None]) -> None:
        """A checkpoint; every worker reports one, the main one has the file."""
        if not self.is_main:
            ray.train.report(dict(self.metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / STATE)
            ray.train.report(dict(self.metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))


@contextmanager
def _progress_lines(output: Path) -> Iterator[None]:
    """Log what the worker appends to `progress.jsonl`."""
    path, done = output / "progress.jsonl", threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        position, ended = start, False
        while not ended:
            ended = done.wait(1.0)
            if path.exists() and path.stat().st_size > position:
                with path.open(encoding="utf-8") as stream:
                    stream.seek(position)
                    for line in stream:
                        _log_step(json.loads(line))
                    position = stream.tell()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _log_step(event: dict[str, Any]) -> None:
    total = event["tokens"] // event["step"] * event["total_steps"]
    logger.info(
        "training: %.4f bits/token, %s",
        event["loss_bits"],
        describe_speed(event["tokens"], total, event["tokens_per_s"]),
    )
