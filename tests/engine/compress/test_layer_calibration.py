"""A large checkpoint is calibrated with one layer in memory, and resumed part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from here_support import Here

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.calibration import collect_calibration
from tokenbound.config.compress import KfacSettings
from tokenbound.config.run import RunConfig, validate
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.cluster.session import Resources
from tokenbound.engine.compress.checkpointed_parts import Parts
from tokenbound.engine.compress.layer_calibration import BATCH_TOKENS, calibrate_stored
from tokenbound.engine.compress.run import encode_checkpoint, parts_of
from tokenbound.engine.corpus import Text, text_of
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.models.build import trained_form
from tokenbound.models.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Alone(Here):
    """Everything in this process, on a machine of one processor."""

    compressing: bool = True

    def resources(self) -> Resources:
        return Resources(1, 0, 1, 0)


@pytest.fixture
def text(run_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> Text:
    what = validate(RunConfig, run_tree(), origin="test").what
    return text_of(prepare_corpus(what.corpus, str(tmp_path / "corpus")), what.windows)


def jobs(text: Text) -> list[tuple[int, list[int]]]:
    windows = text.windows(4096)
    return [(part, windows[part::3]) for part in range(3)]


def test_parts_add_up_to_the_calibration_of_the_whole_model(text: Text, tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "parts"), ["x"])
    with use_executor(Alone()):
        first = calibrate_stored(str(tiny_checkpoint), text, parts, jobs(text)[:2])  # as if it had been killed here
        found = calibrate_stored(str(tiny_checkpoint), text, parts, jobs(text))
    assert first.tokens < found.tokens
    checkpoint = read_checkpoint(tiny_checkpoint)
    model = trained_form(checkpoint.architecture, checkpoint.tensors)
    corpus, plan = open_plan(text.corpus_root, text.spec)
    rows = BATCH_TOKENS // text.spec.length
    expected = None
    for part, windows in jobs(text):
        batch = gather(corpus, plan.windows(windows), text.spec.length)
        batches = [
            (torch.from_numpy(batch.inputs[i : i + rows]), torch.from_numpy(batch.mask[i : i + rows]))
            for i in range(0, len(batch.inputs), rows)
        ]
        collected = collect_calibration(model, batches, names=set(checkpoint.tensors), seed=part)
        if expected is None:
            expected = collected
        else:
            expected.add(collected)
    assert expected is not None
    assert found.tokens == expected.tokens
    assert found.squares == pytest.approx(expected.squares, rel=1e-5)
    for name in expected.matrices:
        ours, theirs = found.of(name).curvature(name), expected.curvature(name)
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.moment, theirs.moment, rtol=1e-4, atol=1e-7)
    assert found.of("none").curvature("none") is None


def test_a_large_checkpoint_is_encoded_as_well_as_a_small_one(
    text: Text, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    sizes = {}
    with use_executor(Alone()):
        for name, limit in (("small", 1 << 40), ("large", 0)):
            out = str(tmp_path / f"{name}.tokenbound")
            settings = KfacSettings(rate=0.05)
            encode_checkpoint(str(tiny_checkpoint), settings, out=out, text=text, large_weights=limit)
            sizes[name] = ArtifactFile(out).num_bytes
            assert not Path(parts_of(out)).exists()
    assert sizes["large"] == pytest.approx(sizes["small"], rel=0.02)
