"""What was certified, and when: one small object for each certificate, under a name that its content decides.

Nothing is appended in place, so a crash leaves whole entries only, object stores serve as well as disks, and writing
an entry again changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from tokenbound.errors import MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.run import RunDirectory, canonical_json

FOLDER = "history"


@dataclass(frozen=True)
class HistoryEntry:
    """One certificate in a few numbers, bits per token."""

    created_at: str
    """When the certificate was made, ISO 8601."""
    model: str
    """Where the model came from."""
    certificate: str
    """Its file, relative to the place of the history."""
    claim_fingerprint: str
    artifact_sha256: str
    artifact_bytes: int
    num_tokens: int
    """m."""
    num_scored_tokens: int
    segments: int
    """Times that the corpus was appended to, its beginning included."""
    bound_bits: float | None
    """The smallest loss line."""
    method: str | None
    empirical_risk_bits: float | None
    mean_nll_bits: float
    vacuous: bool
    trial: int
    evaluation: int | None
    """Ordinal of the draw where a growing corpus is sampled."""
    selection: str = ""
    """How it was selected, in the words of the certificate; empty in entries of older versions."""

    @classmethod
    def of(cls, certificate: Mapping[str, Any], place: str, selection: str = "") -> Self:
        """The entry of a certificate, given as its JSON data, its file, and what it says of its selection."""
        names = {field.name for field in fields(cls)} & certificate.keys()
        kept = {name: certificate[name] for name in names if name not in ("model", "certificate", "selection")}
        return cls(
            **kept,
            model=str(certificate["model"]["source"]),
            certificate=place,
            selection=selection,
            segments=int(certificate["corpus"]["segments"]),
            evaluation=(certificate["sampling"] or {}).get("evaluation"),
        )

    @property
    def name(self) -> str:
        """File of the entry: of two launches that certified the same at once, the last one's entry stays."""
        return f"{FOLDER}/{self.claim_fingerprint[:16]}.json"


def append_history(home: RunDirectory, entry: HistoryEntry) -> None:
    """Write an entry; the same entry twice is one."""
    home.write(entry.name, canonical_json(asdict(entry)) + b"\n")


def read_history(home: RunDirectory) -> list[HistoryEntry]:
    """Every entry, oldest first.

    Raises:
        MismatchError: one is damaged.
    """
    found = []
    for path in files.list_paths(home.filesystem, home.path(FOLDER)):
        try:
            found.append(HistoryEntry(**json.loads(files.read_bytes(home.filesystem, path))))
        except (ValueError, TypeError) as error:
            raise MismatchError(f"{path} is no entry of a history ({error}); remove it") from None
    return sorted(found, key=lambda entry: (entry.created_at, entry.name))
