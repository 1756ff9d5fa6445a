"""A certificate in an experiment tracker: MLflow or Weights & Biases, where they are installed.

Server, project and credentials are those of the trackers' own environment (`MLFLOW_TRACKING_URI`, `WANDB_PROJECT`,
`WANDB_MODE`, ...); none of them passes through this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from tokenbound.errors import InputError
from tokenbound.report.words import line_name, remarks

if TYPE_CHECKING:
    from tokenbound.certificate import Certificate

METRICS = (
    "bound_bits",
    "empirical_risk_bits",
    "gap_bits",
    "random_guess_bits",
    "mean_nll_bits",
    "perplexity",
    "bound_bits_per_byte",
    "num_tokens",
    "num_scored_tokens",
    "code_length_bits",
    "artifact_bytes",
)
"""Fields of a certificate that are measurements."""
LABELS = (
    "method",
    "vacuous",
    "alpha",
    "delta",
    "prior",
    "trial",
    "claim_fingerprint",
    "scoring_fingerprint",
    "artifact_sha256",
    "corpus_sha256",
    "losses_sha256",
    "tokenbound_version",
)
"""Fields that say which certificate it is."""

PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What installs a tracker."""


def metrics(certificate: Certificate) -> dict[str, float]:
    """What a tracker plots: the measured fields and the bound of every line, where there is one.

    >>> from tokenbound.demo import demo_certificate
    >>> metrics(demo_certificate())["artifact_bytes"]
    192545.0
    """
    found = {name: getattr(certificate, name) for name in METRICS}
    lines = {f"bound {line_name(line)}": line["value"] for line in certificate.bounds}
    return {
        name: float(value)
        for name, value in {**found, **lines}.items()
        if value is not None and math.isfinite(float(value))
    }


def labels(certificate: Certificate) -> dict[str, str]:
    """What a tracker filters by, as text.

    >>> from tokenbound.demo import demo_certificate
    >>> labels(demo_certificate())["prior"]
    'code'
    """
    return {**{name: str(getattr(certificate, name)) for name in LABELS}, "selection": " ".join(remarks(certificate))}


def log_certificate(certificate: Certificate, *, to: str, files: Mapping[str, bytes]) -> None:
    """Log a certificate as one finished run of a tracker.

    Args:
        certificate: what to log.
        to: `mlflow` or `wandb`.
        files: content of the files to keep with it, by name.

    Raises:
        InputError: an unknown tracker, or one that is not installed.
    """
    if to not in TRACKERS:
        raise InputError(f"--log {to!r} is unknown; choose one of {', '.join(TRACKERS)}")
    TRACKERS[to](certificate, files)


def _installed(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"--log {name} needs a package that is not installed: pip install {PACKAGES[name]}") from None


def _log_mlflow(certificate: Certificate, files: Mapping[str, bytes]) -> None:
    import tempfile
    from pathlib import Path

    mlflow: Any = _installed("mlflow")
    with mlflow.start_run(run_name=_run_name(certificate)), tempfile.TemporaryDirectory() as folder:
        mlflow.log_params(labels(certificate))
        mlflow.log_metrics(metrics(certificate))
        for name, content in files.items():
            path = Path(folder, name)
            path.write_bytes(content)
            mlflow.log_artifact(str(path))


def _log_wandb(certificate: Certificate, files: Mapping[str, bytes]) -> None:
    wandb: Any = _installed("wandb")
    with wandb.init(name=_run_name(certificate), job_type="certificate", config=labels(certificate)) as run:
        run.log(metrics(certificate))
        kept = wandb.Artifact(f"certificate-{certificate.claim_fingerprint[:16]}", type="certificate")
        for name, content in files.items():
            with kept.new_file(name, mode="wb") as stream:
                stream.write(content)
        run.log_artifact(kept)


def _run_name(certificate: Certificate) -> str:
    return f"certificate {certificate.claim_fingerprint[:8]}"


TRACKERS: Mapping[str, Callable[[Certificate, Mapping[str, bytes]], None]] = MappingProxyType(
    {"mlflow": _log_mlflow, "wandb": _log_wandb}
)
"""Every tracker by the name of its package."""
