"""What the package offers to Python: a certificate that can be loaded, verified and shown."""

from __future__ import annotations

from pathlib import Path

from tokenbound.certificate.record import CertificateRecord
from tokenbound.certificate.verify import verify_record
from tokenbound.report.terminal import certificate_text


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
