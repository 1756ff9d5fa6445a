"""Control variates of a run: on its certificate, checked against its directory and against the corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here_support import compressing_here

from tokenbound.api import Certificate
from tokenbound.certificate.control_variates import FEATURES
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, load_config, validate
from tokenbound.corpus.ngram_features import Features
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.report.words import unchecked, verified_sentence

pytestmark = pytest.mark.usefixtures("ray_session", "scored_here")

Tree = Callable[..., dict[str, Any]]
WINDOWS = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 640}


def run(tree: dict[str, Any]) -> tuple[Certificate, Path]:
    paths: list[str] = []
    with compressing_here():
        certificate = evaluate(
            validate(RunConfig, tree, origin="test"), on_certificate=lambda _, path: paths.append(path)
        )
    return certificate, Path(paths[0])


def sampled(run_tree: Tree, windows: int = 200, **changes: Any) -> dict[str, Any]:
    return run_tree(windows=WINDOWS, sample={"windows": windows, "pilot_windows": 40, **changes})


def test_a_sample_names_its_control_variates_and_is_continued(run_tree: Tree) -> None:
    certificate, path = run(sampled(run_tree))
    assert certificate.sampling is not None
    record = certificate.sampling.control_variates
    assert record is not None
    assert record.features == ["tokens", "bits_2", "bits_3", "bits_4"]
    assert certificate.claim_identity["control_variates"] == "ngrams-1"
    features = Features.parse((path.parent / FEATURES).read_bytes(), "test")
    assert features.sha256 == record.sha256
    assert len(features.table) == certificate.num_windows
    assert features.lengths.sum() == certificate.num_tokens
    betas = [line["parameters"]["control_variates"] for line in certificate.bounds]
    assert all(len(beta) == 4 for beta in betas)
    verify_beside(path)
    more, path = run(sampled(run_tree, 260))
    assert more.claim_fingerprint == certificate.claim_fingerprint, "going on is the same claim"
    assert [line["parameters"]["control_variates"] for line in more.bounds] == betas, "which the pilot has fixed"
    verify_beside(path)


def test_a_run_begun_without_them_keeps_its_form(run_tree: Tree) -> None:
    without, path = run(sampled(run_tree, control_variates="none"))
    assert without.sampling is not None
    assert without.sampling.control_variates is None
    assert "control_variates" not in without.claim_identity
    assert not (path.parent / FEATURES).exists()
    again, _ = run(sampled(run_tree, 220))
    assert again.claim_fingerprint == without.claim_fingerprint
    assert again.trial == without.trial


def test_using_them_is_another_configuration(run_tree: Tree) -> None:
    """The better of a certificate with and one without must not be free."""
    trials = [run(sampled(run_tree))[0].trial, run(sampled(run_tree, control_variates="none"))[0].trial]
    assert trials == [1, 2]


def test_verify_reads_the_features_and_rescore_computes_them_again(run_tree: Tree) -> None:
    _, path = run(sampled(run_tree))
    checked, folder, artifact = verify_beside(path)
    assert any(point.startswith("control_variates: ") for point in unchecked(checked, None))
    config = load_config(RunConfig, f"{folder}/config.yaml")
    found = rescore(checked, config, losses=folder, artifact=artifact, windows=2)
    assert found.control_variates
    assert "computed again from the corpus" in verified_sentence(checked, found)
    assert not any(point.startswith("control_variates: ") for point in unchecked(checked, found))

    stored = path.parent / FEATURES
    table = Features.parse(stored.read_bytes(), "test").table.copy()
    table[:, 1] = np.roll(table[:, 1], 1)
    stored.write_bytes(Features.of(table).data)
    with pytest.raises(MismatchError, match=r"features\.npy has digest"):
        verify_beside(path)
    forged = json.loads(path.read_text())
    forged["sampling"]["control_variates"]["sha256"] = Features.of(table).sha256
    path.write_text(json.dumps(forged))
    with pytest.raises(MismatchError):
        verify_beside(path)  # other features give other values
    claimed = checked.model_copy(update={"sampling": Certificate.load(path).sampling})
    with pytest.raises(MismatchError, match="was not computed from this corpus"):
        rescore(claimed, config, losses=folder, artifact=artifact, windows=2)
    stored.unlink()
    with pytest.raises(IncompleteError, match=r"features\.npy does not exist"):
        verify_beside(path)
