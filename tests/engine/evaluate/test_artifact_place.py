"""Where a run's artifact is made and kept, and what its replicas are told of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from here_support import Killed, compressing_here

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.evaluate.graph import Placement
from tokenbound.engine.evaluate.preparation import prepare
from tokenbound.engine.evaluate.run import _replica_spec
from tokenbound.engine.evaluate.stages import ReplicaSpec, build_replicas
from tokenbound.errors import InputError, MismatchError

Tree = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    with compressing_here():
        yield


def config_of(tree: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, tree, origin="test")


def test_an_artifact_that_is_made_for_a_run_ends_in_it(run_tree: Tree, tmp_path: Path) -> None:
    tree = run_tree()
    tree["how"]["local_folder"] = str(tmp_path / "node")
    config = config_of(tree)
    run = Path(config.how.output)
    prepared = prepare(config)
    kept = run / "artifact.tokenbound"
    assert prepared.artifact.path == kept
    assert prepared.identity["artifact_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert not (run / "encoding").exists()
    spec = _replica_spec(prepared, Placement(1, "cpu", 1, 1, 2), 4, "dense")
    assert (spec.artifact, spec.artifact_sha256, spec.run) == (str(kept), prepared.artifact.sha256, str(run))
    assert spec.local_folder == str(tmp_path / "node")
    again = prepare(config)
    assert again.fingerprint == prepared.fingerprint
    assert not (run / "encoding").exists()


def test_a_run_of_another_model_keeps_its_artifact(run_tree: Tree) -> None:
    config = config_of(run_tree())
    prepare(config)
    kept = Path(config.how.output, "artifact.tokenbound").read_bytes()
    model = {**run_tree()["what"]["model"], "compress": {"method": "rtn", "step": 0.7}}
    with pytest.raises(MismatchError, match="holds another run"):
        prepare(config_of(run_tree(model=model)))
    assert Path(config.how.output, "artifact.tokenbound").read_bytes() == kept
    assert not Path(config.how.output, "encoding").exists()


def test_encoding_for_a_run_goes_on_after_a_kill(run_tree: Tree) -> None:
    config = config_of(run_tree())
    killed, whole = Killed(after=5), Killed()
    with use_executor(killed), pytest.raises(KeyboardInterrupt):
        prepare(config)
    with use_executor(whole):
        prepare(config)
    assert not {str(item) for item in killed.given if isinstance(item, str)} & {
        str(item) for item in whole.given if isinstance(item, str)
    }


def test_a_named_artifact_is_copied_as_it_was_opened(run_tree: Tree, tmp_path: Path) -> None:
    made = prepare(config_of(run_tree())).artifact
    named = tmp_path / "named.tokenbound"
    named.write_bytes(made.read())
    prepared = prepare(config_of(run_tree("named", model={"artifact": str(named)})))
    assert prepared.artifact.path == named
    assert (Path(prepared.config.how.output) / "artifact.tokenbound").read_bytes() == named.read_bytes()
    opened = ArtifactFile(named)
    stream = opened.stream()
    stream.__enter__().read()
    named.write_bytes(made.read()[:-1] + b"x")
    with pytest.raises(MismatchError, match=r"named\.tokenbound changed while it was copied; run the command again"):
        stream.__exit__(None, None, None)


def test_a_replica_refuses_another_artifact_than_the_run_s(run_tree: Tree, tmp_path: Path) -> None:
    prepared = prepare(config_of(run_tree()))
    assert prepared.artifact.path is not None
    spec = ReplicaSpec(str(prepared.artifact.path), "float32", 4, 32, "cpu", 1, artifact_sha256="0" * 64)
    with pytest.raises(MismatchError, match="has the digest"):
        build_replicas(spec, None)  # type: ignore[arg-type]
    remote = prepared.artifact.path.as_uri()
    spec = ReplicaSpec(remote, "float32", 4, 32, "cpu", 1, local_folder=str(tmp_path / "disk" / "node"))
    with pytest.raises(InputError, match=r"^how\.local_folder \S+ on \S+: cannot be made: .* does not exist; name"):
        build_replicas(spec, None)  # type: ignore[arg-type]
