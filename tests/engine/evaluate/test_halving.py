"""Out of memory: the batch is halved for what is not committed, and the protocol that is paid for says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here_support import here, scoring_here

from tokenbound.api import Certificate
from tokenbound.certificate.identity import protocol_bits, smallest_batch
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.evaluate.stages import ScoreShard
from tokenbound.errors import MismatchError, ReplicaOutOfMemory
from tokenbound.store.run import RunDirectory, canonical_json

pytestmark = pytest.mark.usefixtures("ray_session")
Tree = Callable[..., dict[str, Any]]


def starved(largest: int, first_shard: int = 0) -> type[ScoreShard]:
    """A scorer without memory for more than so many windows at once, from some shard on."""

    class Starved(ScoreShard):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if self.spec.batch > largest and row["shard"] >= first_shard:
                raise ReplicaOutOfMemory(f"out of memory for {self.spec.batch} windows; use a smaller windows.batch")
            return super().__call__(row)

    return Starved


def run(tree: dict[str, Any]) -> tuple[Certificate, Path]:
    certificate = evaluate(validate(RunConfig, tree, origin="test"))
    return certificate, Path(tree["how"]["output"]) / "certificate.json"


def losses_of(folder: Path, shards: int) -> list[Any]:
    directory = RunDirectory(str(folder))
    return [directory.losses(directory.record(shard)) for shard in range(shards)]


@pytest.fixture
def in_this_process() -> Iterator[Callable[[int, int], None]]:
    """Run the stages here, with a scorer that has no memory for large batches from some shard on."""

    with ExitStack() as stack:
        yield lambda largest, first_shard=0: stack.enter_context(scoring_here(starved(largest, first_shard)))


def test_out_of_memory_comes_out_of_the_actors_and_halves_the_batch(run_tree: Tree) -> None:
    tree = run_tree()
    tree["how"]["replicas"] = 1
    with here(scorer=starved(2)):
        certificate, path = run(tree)
    assert certificate.protocol["batch"] == 2
    assert certificate.scoring_identity["protocol"]["batch"] == 4
    verify_beside(path)
    events = [json.loads(line) for line in (path.parent / "progress.jsonl").read_text().splitlines()]
    assert [event["batch"] for event in events if event["event"] == "out_of_memory"] == [2]


def test_a_run_goes_on_with_half_the_batch(run_tree: Tree, in_this_process: Callable[..., None]) -> None:
    in_this_process(2, 3)
    certificate, path = run(run_tree())
    directory = RunDirectory(str(path.parent))
    shapes = [directory.record(shard).batch or 4 for shard in range(certificate.num_shards)]
    assert shapes == [4] * 3 + [2] * (certificate.num_shards - 3)
    before = sum(directory.record(shard).windows for shard in range(3))
    assert certificate.protocol["batch"] == [[4, before], [2, certificate.num_windows - before]]
    assert smallest_batch(certificate.protocol) == 2
    assert certificate.code_split["protocol"] == protocol_bits(certificate.protocol)
    assert protocol_bits(certificate.protocol) > protocol_bits(certificate.scoring_identity["protocol"])
    verify_beside(path)

    # As if every shard had been scored at the shape that its record names.
    in_this_process(4)
    windows = run_tree()["what"]["windows"]
    whole = {
        shape: losses_of(run(run_tree(f"at{shape}", windows={**windows, "batch": shape}))[1].parent, len(shapes))
        for shape in (4, 2)
    }
    for shard, losses in enumerate(losses_of(path.parent, len(shapes))):
        assert np.array_equal(losses.nll, whole[shapes[shard]][shard].nll)

    # Resumed, it does not try again what did not fit; and a record that names another shape is found out.
    (path.parent / "shards/00000.json").unlink()
    again, _ = run(run_tree())
    assert again.protocol["batch"][0][0] == 2
    verify_beside(path)
    record = path.parent / "shards/00001.json"
    record.write_bytes(canonical_json({**json.loads(record.read_text()), "batch": 8}))
    with pytest.raises(MismatchError, match="protocol"):
        verify_beside(path)


def test_a_sample_halves_only_before_its_first_commit(run_tree: Tree, in_this_process: Callable[..., None]) -> None:
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 640}
    sample = {"windows": 60, "pilot_windows": 20}
    in_this_process(2)
    certificate, path = run(run_tree("early", windows=windows, sample=sample))
    assert certificate.protocol["batch"] == 2
    verify_beside(path)
    in_this_process(2, 1)
    with pytest.raises(ReplicaOutOfMemory, match=r"windows\.batch: 2 and another how\.output"):
        run(run_tree("late", windows=windows, sample=sample))


def test_one_window_that_does_not_fit_ends_the_run(run_tree: Tree, in_this_process: Callable[..., None]) -> None:
    in_this_process(0)
    with pytest.raises(ReplicaOutOfMemory, match="not even one window fits"):
        run(run_tree())
