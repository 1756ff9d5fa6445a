"""Certificates in experiment trackers: the real ones where they are installed."""

from __future__ import annotations

import math
import os
import sys

import pytest

from tokenbound.errors import InputError
from tokenbound.report.tracking import METRICS, labels, log_certificate, metrics


def test_every_bound_is_a_metric(cases) -> None:
    certificate = cases["full"].certificate
    found = metrics(certificate)
    assert found["bound_bits"] == certificate.bound_bits
    assert found["bound freedman"] in [line["value"] for line in certificate.bounds]
    assert all(math.isfinite(value) for value in found.values())
    assert set(METRICS) <= set(found) | {name for name in METRICS if getattr(certificate, name) is None}


def test_a_bound_that_does_not_exist_is_no_metric(cases) -> None:
    certificate = cases["full"].certificate
    without = certificate.model_copy(update={"bound_bits": None, "bounds": []})
    assert "bound_bits" not in metrics(without)
    assert labels(without)["claim_fingerprint"] == certificate.claim_fingerprint


@pytest.mark.parametrize(("tracker", "words"), [("excel", "mlflow, wandb"), ("mlflow", "pip install mlflow-skinny")])
def test_what_is_not_there_is_named(cases, monkeypatch: pytest.MonkeyPatch, tracker: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=words):
        log_certificate(cases["full"].certificate, to=tracker, files={})


def test_mlflow_keeps_it(cases, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    certificate = cases["full"].certificate
    log_certificate(certificate, to="mlflow", files={"certificate.json": b"{}"})
    (run,) = mlflow.tracking.MlflowClient().search_runs(["0"])
    assert run.data.metrics["bound_bits"] == certificate.bound_bits
    assert run.data.params["claim_fingerprint"] == certificate.claim_fingerprint
    assert [item.path for item in mlflow.tracking.MlflowClient().list_artifacts(run.info.run_id)] == [
        "certificate.json"
    ]


def test_wandb_keeps_it(cases, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_certificate(cases["full"].certificate, to="wandb", files={"certificate.json": b"{}"})
    assert [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".wandb")]
