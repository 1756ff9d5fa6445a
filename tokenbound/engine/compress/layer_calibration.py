"""Calibration of large checkpoints: one layer in memory, and the sums of the others in files beside the artifact.

The sums of a 1.1B model take 10 GB, those of a 7B model 57 GB, half as much in files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.progress import told
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.compress.checkpointed_parts import Parts
from tokenbound.engine.corpus import Text
from tokenbound.engine.evaluate.stages import open_plan, settle_on_cpu

if TYPE_CHECKING:
    from tokenbound.compression.calibration import Calibration, MatrixSums

LARGE_WEIGHTS = 1 << 29
"""Checkpoints of more weights are calibrated layer by layer: they take 2 GB in float32, and their sums far more."""

BATCH_TOKENS = 1024
"""Tokens of one pass: its logits and their gradients are in memory at once."""

HELD_BYTES = 1 << 30
"""Hidden states of the passes that wait between two layers."""


@dataclass(frozen=True)
class StoredCalibration:
    """What was collected; the sums of matrices are read one by one."""

    parts: Parts
    part: int
    """The last one, whose sums are those of all."""
    tokens: int
    squares: Mapping[str, float]

    def of(self, name: str) -> Calibration:
        """What was collected for one tensor."""
        from tokenbound.compression.calibration import Calibration

        sums = _stored(self.parts, self.part, name)
        return Calibration(self.tokens, {} if sums is None else {name: sums}, dict(self.squares))


def calibrate_stored(path: str, text: Text, parts: Parts, jobs: Iterable[tuple[int, list[int]]]) -> StoredCalibration:
    """Calibrate a large checkpoint, part after part on one machine; finished ones are not made again.

    Args:
        path: the checkpoint.
        text: its windows.
        parts: where sums are kept.
        jobs: numbers of the parts, from 0, and their windows.

    Raises:
        InputError: the checkpoint has no list of layers, or its loss is not finite.
    """
    from tokenbound.compression.calibration import read_calibration

    jobs = list(jobs)
    missing = [(part, windows) for part, windows in jobs if parts.get(_done(part)) is None]
    threads = executor().resources().cpus_of_a_node
    make = partial(_LayerCalibrator, path, text, parts, threads)
    pool = executor().pool(make, missing, actors=1, num_cpus=threads)
    with plain_errors():
        for _ in told(pool, "calibrating", len(missing)):
            pass
    found = [read_calibration(bytes(data)) for part, _ in jobs if (data := parts.get(_done(part))) is not None]
    squares: dict[str, float] = {}
    for each in found:
        for name, value in each.squares.items():
            squares[name] = squares.get(name, 0.0) + value
    return StoredCalibration(parts, len(jobs) - 1, sum(each.tokens for each in found), squares)


def _done(part: int) -> str:
    return f"calibration by layers {part}"


def _sums(part: int, name: str) -> str:
    return f"calibration sums {part} {name}"


def _stored(parts: Parts, part: int, name: str) -> MatrixSums | None:
    """A matrix's sums over all parts up to this one; None where it was not seen in use."""
    from tokenbound.compression.calibration import read_calibration

    data = parts.get(_sums(part, name))
    if data is None:
        return None
    sums = read_calibration(bytes(data)).matrices[name]
    return replace(sums, moment=sums.moment.double())


class _LayerCalibrator:
    """A checkpoint's model without its layers' weights."""

    def __init__(self, path: str, text: Text, parts: Parts, threads: int) -> None:
        import torch

        from tokenbound.models.blocks import build_chain
        from tokenbound.models.checkpoint import read_checkpoint
        from tokenbound.models.sources import MapSource

        settle_on_cpu(threads, releases=True)
        checkpoint = read_checkpoint(path)
        self.names, self.text, self.parts = set(checkpoint.tensors), text, parts
        source = MapSource(checkpoint.tensors)
        self.chain = build_chain(checkpoint.architecture, source, dtype=torch.float32, device="cpu")
        self.chain.held_bytes = HELD_BYTES

    def __call__(self, job: tuple[int, list[int]]) -> int:
        """Add the sums of one part to those of the parts before it."""
        from tokenbound.compression.calibration import CALIBRATION_SEED, write_calibration
        from tokenbound.models.layer_calibration import calibrate_by_layers

        part, windows = job
        seen: set[str] = set()

        def keep(found: dict[str, MatrixSums]) -> None:
            while found:
                name, sums = found.popitem()
                self._add(part, part if name in seen else part - 1, name, sums)
                seen.add(name)

        with tempfile.TemporaryDirectory(prefix="tokenbound-states-") as folder:
            collected = calibrate_by_layers(
                self.chain,
                self._batches(windows),
                keep,
                folder=Path(folder),
                names=self.names,
                seed=CALIBRATION_SEED + part,
            )
        for name in self.names - seen:  # experts that no token of this part went to
            data = self.parts.get(_sums(part - 1, name))
            if data is not None:
                self.parts.put(_sums(part, name), data)
        self.parts.put(_done(part), write_calibration(collected))
        for name in self.names:
            self.parts.drop(_sums(part - 1, name))
        return part

    def _add(self, part: int, before: int, name: str, sums: MatrixSums) -> None:
        from tokenbound.compression.calibration import Calibration, write_calibration

        stored = _stored(self.parts, before, name)
        if stored is not None:
            sums.add(stored)
            del stored
        small = replace(sums, moment=sums.moment.float())
        self.parts.put(_sums(part, name), write_calibration(Calibration(0, {name: small})))

    def _batches(self, windows: list[int]) -> list[Any]:
        import torch

        corpus, plan = open_plan(self.text.corpus_root, self.text.spec)
        batch = gather(corpus, plan.windows(windows), self.text.spec.length)
        rows = max(1, BATCH_TOKENS // self.text.spec.length)
        return [
            (torch.from_numpy(batch.inputs[i : i + rows]), torch.from_numpy(batch.mask[i : i + rows]))
            for i in range(0, len(batch.inputs), rows)
        ]
