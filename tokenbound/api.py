"""What the package offers to Python: runs, plans and artifacts, and a certificate that can be verified and shown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbound.certificate.record import CertificateRecord
from tokenbound.certificate.verify import verify_record
from tokenbound.report.terminal import certificate_text

if TYPE_CHECKING:
    from tokenbound.compression.inspection import ArtifactReport
    from tokenbound.compression.methods import CompressionMethod
    from tokenbound.config.run import RunConfig
    from tokenbound.engine.plan.run import Forecast

NOTEBOOK_HEIGHT = 720
"""Pixels of a report inside a notebook's output; the rest is scrolled."""


def evaluate(config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Certificate:
    """Score a corpus with a model, write the certificate and its report, and return the certificate.

    What `tokenbound evaluate` does: a run that was interrupted is resumed, and one that is complete is not scored
    again. Joins the surrounding Ray cluster, or starts a local one for the time of the call.

    Args:
        config: a config, its data, or the path of its YAML file.
        overrides: each `dotted.key=value`, the value in YAML; not beside a validated config.

    Raises:
        InputError: the config, the corpus or the model cannot be used.
        IncompleteError: planned shards are missing afterwards.
        MismatchError: the run directory belongs to other inputs, or windows could not be scored.

    Example:
        >>> certificate = evaluate("my-run.yaml", ["what.sample.windows=512"])  # doctest: +SKIP
        >>> certificate.bound_bits  # doctest: +SKIP
        3.127
    """
    from tokenbound.engine.evaluate.run import evaluate as run_evaluation

    record = run_evaluation(_run_config(config, overrides))
    return Certificate.model_validate(record.model_dump())


def plan(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    probe_seconds: float = 60.0,
    bits_per_weight: float | None = None,
) -> Forecast:
    """Say what a run will cost and may show, before paying for it; what `tokenbound plan` prints.

    Args:
        config: as for :func:`evaluate`.
        overrides: as for :func:`evaluate`.
        probe_seconds: how long replicas score to measure their speed; 0 measures nothing.
        bits_per_weight: code length to assume of a checkpoint that is not worth encoding now.

    Raises:
        InputError: the config, the corpus or the model cannot be used, or the model is a delta.

    Example:
        >>> plan("my-run.yaml", probe_seconds=0).work.num_tokens  # doctest: +SKIP
        31527013
    """
    from tokenbound.engine.plan.run import plan_run

    return plan_run(_run_config(config, overrides), probe_seconds=probe_seconds, bits_per_weight=bits_per_weight)


def compress(
    checkpoint: str | Path,
    out: str | Path,
    settings: CompressionMethod | Mapping[str, Any] | None = None,
    *,
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    base: str | None = None,
) -> ArtifactReport:
    """Encode a checkpoint into an artifact, and account for its bytes; what `tokenbound compress` does.

    An encoding that was interrupted is resumed.

    Args:
        checkpoint: directory or hub id with safetensors weights, or a GGUF file.
        out: the artifact to write, a path or an s3:// or gs:// URI.
        settings: the method and its options, as below `compress:` in a config; None means `lossless`.
        config: a run, whose corpus calibrates the methods that need it.
        base: encode only what the checkpoint, or LoRA adapter, changes of this base.

    Raises:
        InputError: the checkpoint, the settings or the corpus cannot be used, or `out` cannot be written.

    Example:
        >>> compress("my-model", "my-model.tokenbound", {"method": "rtn", "step": 0.5}).num_bytes  # doctest: +SKIP
        67684358
    """
    from tokenbound.compression.inspection import inspect_artifact
    from tokenbound.config.compress import LosslessSettings
    from tokenbound.config.run import CompressChoice, validate
    from tokenbound.engine.compress.run import compress_checkpoint
    from tokenbound.store import filesystem as files
    from tokenbound.store.uri import join, split

    if isinstance(settings, Mapping):
        settings = validate(CompressChoice, {"compress": dict(settings)}, origin="of compress").compress
    folder, name = split(str(out))
    files.require_writable(folder, field="out")
    files.remove_abandoned(folder, recursive=False)
    files.remove_abandoned(join(folder, f"{name}.parts"))
    run = None if config is None else _run_config(config, ())
    method = LosslessSettings() if settings is None else settings
    return inspect_artifact(compress_checkpoint(str(checkpoint), method, run, base, out=str(out)))


def _run_config(config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str]) -> RunConfig:
    from tokenbound.config.run import RunConfig, load_config, validate
    from tokenbound.errors import InputError

    if isinstance(config, str | Path):
        return load_config(RunConfig, config, overrides)
    if overrides:
        raise InputError("overrides: they change a YAML file; change the given config itself")
    return config if isinstance(config, RunConfig) else validate(RunConfig, dict(config), origin="given as data")


class Certificate(CertificateRecord):
    """An upper bound on a model's risk and all it depends on. Rates are bits per token unless named otherwise."""

    def verify(self, *, losses: str | Path, artifact: str | Path | bytes) -> None:
        """Recompute everything that losses and artifact determine and compare.

        The corpus is not read: that its tokens have these losses is what re-scoring checks.

        Args:
            losses: the run directory, or its `losses` folder.
            artifact: the artifact's file, or its bytes.

        Raises:
            IncompleteError: losses or artifact are not there.
            MismatchError: a byte of either changed, or a printed number does not follow from them.

        >>> from tokenbound.demo import demo_artifact, demo_certificate
        >>> forged = demo_artifact() + b"x"
        >>> demo_certificate().verify(losses="runs/demo", artifact=forged)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tokenbound.errors.MismatchError: artifact_sha256: the certificate says 69f8.., but losses and artifact give ..
        """
        verify_record(self, losses=losses, artifact=artifact)

    def table(self) -> str:
        """The certificate as text for a terminal of 100 columns.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().table().splitlines()[0].strip("╭─╮ ")
        'risk certificate'
        """
        return certificate_text(self)

    def _repr_html_(self) -> str:
        """The report, for notebooks: in a frame of its own, so that its style and the notebook's do not mix.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate()._repr_html_()[:15]
        '<iframe srcdoc='
        """
        from tokenbound.report.html import html_report

        page = html.escape(html_report(self), quote=True)
        style = f"width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"
        return f'<iframe srcdoc="{page}" style="{style}" sandbox="allow-scripts"></iframe>'
