"""How replicas hold their weights: the same certificate from every form, and the form that fits the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from here_support import Cluster, scoring_here

from tokenbound.compression.artifact import encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.config.run import HowConfig, RunConfig, validate
from tokenbound.demo import demo_artifact
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.cluster.session import Resources
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.evaluate.stages import ReplicaSpec, layer_source
from tokenbound.engine.evaluate.weights_form import form_here, place_replicas_in_form
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.sources import MapSource, PackedFileSource, PackedSource
from tokenbound.store.local_folder import release_files
from tokenbound.store.run import ARTIFACT, RunDirectory

Tree = Callable[..., dict[str, Any]]
TIMES = {"created_at"}


def configured(tree: dict[str, Any], **how: Any) -> RunConfig:
    return validate(RunConfig, {**tree, "how": {**tree["how"], **how}}, origin="test")


@pytest.fixture
def packable(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as an artifact of 4 bits or so."""
    found = read_checkpoint(str(tiny_checkpoint))
    path = tmp_path / "packable.tokenbound"
    path.write_bytes(encode_artifact(found.architecture, dict(found.tensors), RoundToNearestSettings(step=0.25)))
    return path


@pytest.mark.usefixtures("ray_session")
def test_every_form_gives_the_same_certificate_and_verifies(run_tree: Tree, packable: Path) -> None:
    found = {}
    with scoring_here():
        for form in ("dense", "packed", "streamed"):
            tree = run_tree(form, model={"artifact": str(packable)})
            config = configured(tree, weights=form)
            certificate = evaluate(config)
            found[form] = json.dumps(certificate.model_dump(mode="json", exclude=TIMES), sort_keys=True)
            run = RunDirectory(config.how.output)
            checked = rescore(certificate, config, losses=run.uri, artifact=run.place(ARTIFACT), windows=2)
            assert checked.largest_difference_nats == 0
    assert found["dense"] == found["packed"] == found["streamed"]


def test_model_without_layers_is_refused_before_anything_is_prepared(run_tree: Tree, tmp_path: Path) -> None:
    artifact = tmp_path / "ngrams.tokenbound"
    found = ArtifactFile(demo_artifact())
    architecture = {**found.architecture, "tokenbound_family": {"kind": "lora", "rank": 2}}
    artifact.write_bytes(encode_artifact(architecture, dict(found.tensors), RoundToNearestSettings(step=0.25)))
    config = configured(run_tree(model={"artifact": str(artifact)}), weights="streamed")
    with pytest.raises(InputError, match=r"how.weights: streamed is not possible, .* set how.weights: dense"):
        evaluate(config)
    assert not Path(config.how.output).exists()
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("gpus", [2, 8])
def test_layers_that_come_and_go_do_so_on_one_gpu(run_tree: Tree, gpus: int) -> None:
    with pytest.raises(InputError, match="set gpus_per_replica to 1, or weights to dense"):
        configured(run_tree(), weights="packed", gpus_per_replica=gpus)


def chosen(tree: dict[str, Any], packable: Path, memory: int, cpus: int = 2, **how: Any) -> tuple[str, int, int]:
    """The form, its replicas and their threads on a machine with so much memory."""
    config = configured(tree, **how)
    artifact = ArtifactFile(packable)
    with use_executor(Cluster(Resources(cpus, 0, cpus, 0, memory))):
        form, placement = place_replicas_in_form(config.how, config.what, artifact, 4, shards=9, shard_tokens=2048)
    return form, placement.replicas, placement.threads


def test_auto_takes_the_first_form_that_fits(run_tree: Tree, packable: Path) -> None:
    tree = run_tree(model={"artifact": str(packable)})
    assert chosen(tree, packable, 1 << 40) == ("dense", 2, 1)
    assert chosen(tree, packable, 0) == ("dense", 2, 1)  # not known
    assert chosen(tree, packable, 1 << 16) == ("streamed", 1, 2)
    assert chosen(tree, packable, 1 << 16, replicas=2) == ("streamed", 2, 1)
    assert chosen(tree, packable, 1 << 16, weights="dense") == ("dense", 2, 1)
    assert chosen(tree, packable, 1 << 40, weights="packed") == ("packed", 1, 2)


def test_verification_streams_what_dense_weights_would_not_fit() -> None:
    class Large(ArtifactFile):
        decoded_bytes = 1 << 50

    how = HowConfig(output="x")
    assert form_here(how, ArtifactFile(demo_artifact())) == "dense"
    assert form_here(how, Large(demo_artifact())) == "streamed"
    assert form_here(HowConfig(output="x", weights="packed"), Large(demo_artifact())) == "packed"


@pytest.mark.slow
@pytest.mark.parametrize(("form", "alone"), [("packed", PackedSource), ("streamed", MapSource)])
def test_layers_come_from_a_shared_file_in_a_run_and_from_the_artifact_in_a_verification(
    form: Any, alone: type, packable: Path, tmp_path: Path
) -> None:
    class Large(ArtifactFile):
        decoded_bytes = 1 << 50

    folder, artifact = tmp_path / "node", Large(packable)
    # A verification's spec shares nothing, so a file that a run left behind is never scored in place of the artifact.
    verifying = ReplicaSpec(str(packable), "float32", 2, 16, "cpu", 1, local_folder=str(folder), weights=form)
    running = replace(verifying, share=True)
    kinds = [type(layer_source(spec, artifact, torch.device("cpu"))) for spec in (verifying, running, verifying)]
    assert kinds == [alone, PackedFileSource, alone]
    assert [path.suffix for path in folder.iterdir() if path.name != "lock"] == [".packed"]
    release_files()
