"""The metrics of a training run in TensorBoard or MLflow, where somebody asks for them (`how.log`).

TensorBoard's event files are written by `tensorboardX`, which comes with Ray Train; `mlflow` is an extra. Where MLflow
keeps its runs, and as whom, is said by the environment of the workers (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`,
...); none of that passes through this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tokenbound.errors import InputError

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
"""Every tracker, and the package that it needs."""


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep some metrics of a step."""

    def close(self) -> None:
        """Write what is left."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        InputError: with what to install.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise InputError(f"how.log: {name} needs the package {PACKAGES[name]}; pip install it")


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int
) -> Iterator[list[Tracker]]:
    """The trackers of one training run, closed at the end; the same folder goes on with the same run.

    Args:
        names: some of `PACKAGES`.
        folder: of the training run; its last part names it.
        settings: what is noted once, the seed among it.
        step: the first that will be logged; what a killed run logged from there on is replaced.
    """
    kinds: dict[str, type[_TensorBoard] | type[_Mlflow]] = {"tensorboard": _TensorBoard, "mlflow": _Mlflow}
    with ExitStack() as stack:
        yield [stack.enter_context(closing(kinds[name](folder, settings, step))) for name in names]


class _TensorBoard:
    """Event files in `FOLDER/tensorboard`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step, filename_suffix=f".{step}")
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars of their own names."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class _Mlflow:
    """A run of the active experiment; its id lies in `FOLDER/mlflow-run`, so that a resumed training goes on in it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        known = folder / "mlflow-run"
        if known.exists():
            self.mlflow.start_run(run_id=known.read_text())
            return
        run = self.mlflow.start_run(run_name=folder.name)
        self.mlflow.log_params(dict(settings))
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(run.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of their own names."""
        self.mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """End this part of the run."""
        self.mlflow.end_run()
