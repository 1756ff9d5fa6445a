"""The run directory: resolved config, plan, losses, commit records, quarantine, progress, certificates.

A shard is done when its commit record is there, and only then: the losses are written first, the record with
their digest second, both under names that come from the plan, so that a retry overwrites itself. Readers trust
records and never list Parquet files.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.limits import MAX_SHARD_TOKENS
from tokenbound.store import filesystem as files
from tokenbound.store.losses import PIECE_TOKENS, Losses, claimed_counts, from_parquet, iter_parquet, to_parquet
from tokenbound.store.sections import STRICT, Count, Digest, PlanRecord, Positive, first_problem
from tokenbound.store.strict_json import INTEGER_BITS, MAX_BYTES, SUM_BITS, StrictJsonError, parse_json
from tokenbound.store.uri import is_uri, join

ARTIFACT = "artifact.tokenbound"
CERTIFICATE = "certificate.json"
PLAN = "plan.json"
PROGRESS = "progress.jsonl"


def sha256_hex(data: bytes) -> str:
    """SHA-256 as lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(tree: object) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8. What is hashed or paid for goes through here.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")  # names of files need not be UTF-8: JSON spells a lone surrogate so


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard, as `shards/NNNNN.json` holds it (`shards/HH/NNNNN.json` on object stores)."""

    __pydantic_config__: ClassVar = STRICT

    shard: Count
    """Number in the plan."""
    file: str
    """Losses file, relative to the run directory."""
    bytes: Count
    """Its size."""
    sha256: Digest
    """Its digest."""
    windows: Count
    """Rows."""
    tokens: Count
    """Scored tokens, unscored windows included."""
    unscored_windows: Count
    """Windows without finite losses."""
    evidence: dict[str, Any]
    """Mergeable sufficient statistics of the shard."""
    scoring_fingerprint: str
    """The run this shard belongs to."""
    batch: Positive | None = None
    """Windows of its forward passes, where memory had run out and halved them; null: as the protocol says."""
    environment: dict[str, Any] | None = None
    """Versions, device and settings that scored it; null: committed before they were recorded."""


class RunDirectory:
    """A run on any pyarrow filesystem."""

    def __init__(self, uri: str) -> None:
        self.filesystem, self.root = files.resolve(uri)
        self.uri = uri if is_uri(uri) else self.root
        self._lines: list[str] = []
        self._lines_file = ""

    def path(self, *parts: str) -> str:
        """Path inside the filesystem."""
        return posixpath.join(self.root, *parts)

    def place(self, name: str) -> str:
        """Path or URI of a file of the run, for people and for other processes."""
        return join(self.uri, *name.split("/"))

    def relative(self, place: str) -> str:
        """Name in the run of a file that lies below it: the inverse of `place`."""
        return files.resolve(place)[1].removeprefix(self.root.rstrip("/") + "/")

    @property
    def _is_fanned(self) -> bool:
        return self.filesystem.type_name in files.OBJECT_STORES

    def shard_file(self, folder: str, shard: int, suffix: str = ".json") -> str:
        """Name of a shard's file: `losses/00017.parquet`, on object stores `losses/45/00017.parquet`.

        Object stores divide load by the beginning of the key, so numbers in a row would all meet in one place.
        """
        return _shard_file(folder, shard, suffix, fanned=self._is_fanned)

    def numbered(self, folder: str) -> list[int]:
        """Sorted numbers of the shards that have a JSON file in a folder of the run."""
        listed = files.list_paths(self.filesystem, self.path(folder), recursive=True)
        names = {posixpath.basename(path) for path in listed}
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def exists(self, name: str) -> bool:
        """Whether a file or folder of the run is there."""
        return files.exists(self.filesystem, self.path(name))

    def read(self, name: str) -> bytes:
        """Bytes of a file of the run.

        Raises:
            IncompleteError: it is not there.
        """
        try:
            return files.read_bytes(self.filesystem, self.path(name))
        except FileNotFoundError:
            raise IncompleteError(f"{self.place(name)} does not exist; is {self.uri} a finished run?") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run atomically."""
        files.write_bytes(self.filesystem, self.path(name), data)

    def read_json(self, name: str, *, integer_bits: int = INTEGER_BITS, max_bytes: int = MAX_BYTES) -> Any:
        """Parsed JSON of a file of the run.

        Raises:
            IncompleteError: it is not there.
            MismatchError: it is not JSON, or can be read in more than one way (see `strict_json`).
        """
        try:
            self._refuse_large(name, max_bytes)
            return parse_json(self.read(name), integer_bits=integer_bits, max_bytes=max_bytes)
        except StrictJsonError as error:
            raise MismatchError(f"{self.place(name)} is damaged ({error}); restore it or delete the run") from None

    def plan(self) -> dict[str, Any]:
        """The plan of the run, `plan.json`.

        Raises:
            IncompleteError: there is none.
            MismatchError: it is damaged, or holds what no plan does.
        """
        tree = self.read_json(PLAN)
        try:
            _plan_reader().validate_python(tree)
        except ValidationError as error:
            raise MismatchError(f"{self.place(PLAN)} is not a plan: {first_problem(error)}") from None
        return dict(tree)

    def _refuse_large(self, name: str, max_bytes: int = MAX_BYTES) -> None:
        """A local file is not even read where it is larger than any record."""
        place = Path(self.path(name))
        if files.is_local(self.filesystem) and place.is_file() and place.stat().st_size > max_bytes:
            raise StrictJsonError(f"{place.stat().st_size:,} bytes, more than the {max_bytes:,} of the largest record")

    def write_json(self, name: str, tree: object) -> None:
        """Write readable JSON atomically."""
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
        self.write(name, text.encode(errors="backslashreplace") + b"\n")  # as in `canonical_json`

    def commit(
        self,
        shard: int,
        losses: Losses,
        evidence: Mapping[str, Any],
        scoring_fingerprint: str,
        batch: int | None = None,
        environment: dict[str, Any] | None = None,
    ) -> CommitRecord:
        """Write the losses, then the record that makes them count."""
        data, name = to_parquet(losses), self.shard_file("losses", shard, ".parquet")
        self.write(name, data)
        record = CommitRecord(
            shard,
            name,
            len(data),
            sha256_hex(data),
            len(losses.window_id),
            losses.num_tokens,
            int(losses.unscored.sum()),
            dict(evidence),
            scoring_fingerprint,
            batch,
            environment,
        )
        self.write(self.shard_file("shards", shard), canonical_json(asdict(record)))
        return record

    def committed(self, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """Records of the given shards that are there; default every record of the run.

        Raises:
            MismatchError: a record is damaged.
        """
        wanted = self.numbered("shards")
        if shards is not None:
            chosen = set(shards)
            wanted = [shard for shard in wanted if shard in chosen]
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(wanted, pool.map(self.record, wanted), strict=True))

    def record(self, shard: int) -> CommitRecord:
        """One commit record.

        Raises:
            IncompleteError: the shard is not committed.
            MismatchError: the record is damaged.
        """
        data, place = self._read_record(shard), self.place(self.shard_file("shards", shard))
        try:
            parse_json(data, integer_bits=SUM_BITS)
            record: CommitRecord = _record_reader().validate_json(data)
        except StrictJsonError as error:
            raise MismatchError(f"{place} is damaged ({error}); delete it to score again") from None
        except ValidationError as error:
            raise MismatchError(
                f"{place} is not a commit record: {first_problem(error)}; delete it to score again"
            ) from None
        if record.shard != shard:
            raise MismatchError(f"{place} speaks of shard {record.shard}; delete it to score again")
        if record.file not in {_shard_file("losses", shard, ".parquet", fanned=fanned) for fanned in (False, True)}:
            raise MismatchError(
                f"{place}: file {record.file!r} is not the losses file of shard {shard}; delete it to score again"
            )
        return record

    def _read_record(self, shard: int) -> bytes:
        """A record's bytes where this kind of store keeps it, or where the run was copied from."""
        try:
            return self.read(self.shard_file("shards", shard))
        except IncompleteError:
            copied = _shard_file("shards", shard, ".json", fanned=not self._is_fanned)
            if not self.exists(copied):
                raise
            return self.read(copied)

    def committed_bytes(self, record: CommitRecord) -> bytes:
        """The losses file that a record vouches for, as it was committed.

        Raises:
            MismatchError: it is missing or has other bytes.
        """
        cure = self.shard_file("shards", record.shard)
        try:
            data = b""
            if files.size(self.filesystem, self.path(record.file)) == record.bytes:  # else it is not even read
                data = files.read_bytes(self.filesystem, self.path(record.file))
        except FileNotFoundError:
            raise MismatchError(
                f"{self.place(record.file)} is committed but missing; delete {cure} to score it again"
            ) from None
        if len(data) != record.bytes or sha256_hex(data) != record.sha256:
            raise MismatchError(
                f"{self.place(record.file)} changed after it was committed; delete {cure} to score it again"
            )
        return data

    def check_committed(self, records: Iterable[CommitRecord]) -> None:
        """Read every losses file once and compare its digest.

        Raises:
            MismatchError: one is missing or has other bytes.
        """
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda record: len(self.committed_bytes(record)), records):
                pass

    def losses(self, record: CommitRecord, columns: Sequence[str] | None = None) -> Losses:
        """The losses a record vouches for, with digest and counts checked.

        Raises:
            MismatchError: the file is missing or not the one that was committed.
        """
        data = self.committed_bytes(record)
        self._check_claims(record, data)
        losses = from_parquet(data, columns, origin=self.place(record.file))
        self._check_counts(record, len(losses.window_id), losses.num_tokens)
        return losses

    def pieces(
        self, record: CommitRecord, columns: Sequence[str] | None = None, *, piece_tokens: int = PIECE_TOKENS
    ) -> Iterator[Losses]:
        """The same losses in pieces of whole windows of about `piece_tokens` tokens; counts are checked after the last.

        Raises:
            MismatchError: as for :meth:`losses`.
        """
        windows = tokens = 0
        data, origin = self.committed_bytes(record), self.place(record.file)
        self._check_claims(record, data)
        for piece in iter_parquet(data, columns, origin=origin, piece_tokens=piece_tokens):
            windows, tokens = windows + len(piece.window_id), tokens + piece.num_tokens
            yield piece
        self._check_counts(record, windows, tokens)

    def _check_claims(self, record: CommitRecord, data: bytes) -> None:
        """Compare what a losses file claims to hold with its record, before any of it is decoded."""
        windows, values = claimed_counts(data, origin=self.place(record.file))
        # A window without a token, or without losses, still has one place in each of its columns.
        if windows != record.windows or not record.tokens <= values <= record.tokens + windows:
            raise MismatchError(f"{self.place(record.file)}: windows or tokens differ from the commit record")
        if values > MAX_SHARD_TOKENS:
            raise MismatchError(
                f"{self.place(record.file)}: {values:,} tokens, more than the {MAX_SHARD_TOKENS:,} of the largest "
                "shard; score it again in smaller ones (what.windows.shard_tokens)"
            )

    def _check_counts(self, record: CommitRecord, windows: int, tokens: int) -> None:
        if (windows, tokens) != (record.windows, record.tokens):
            raise MismatchError(f"{self.place(record.file)}: windows or tokens differ from the commit record")

    def quarantine(self, shard: int, reasons: Sequence[Mapping[str, Any]]) -> None:
        """Keep why windows of a shard could not be scored."""
        self.write_json(self.shard_file("quarantine", shard), list(reasons))

    def certificate_name(self, claim_fingerprint: str) -> str:
        """File name of a claim's certificate: `certificate.json` for the run's first claim and what extends it."""
        if not self.exists(CERTIFICATE) or self.read_json(CERTIFICATE).get("claim_fingerprint") == claim_fingerprint:
            return CERTIFICATE
        return claim_file(claim_fingerprint)

    def log_progress(self, **event: object) -> None:
        """Append one line to `progress.jsonl`.

        Object stores cannot append: there every writer has a file of its own below `progress/`, which it writes anew
        with each line.
        """
        line = json.dumps({"time": round(time.time(), 3), **event}) + "\n"
        if files.is_local(self.filesystem):
            with open(self.path(PROGRESS), "a", encoding="utf-8") as stream:  # noqa: PTH123
                stream.write(line)
            return
        if not self._lines:
            self._lines_file = f"progress/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
        self._lines.append(line)
        self.write(self._lines_file, "".join(self._lines).encode())

    def progress(self) -> list[dict[str, Any]]:
        """Every event of :meth:`log_progress`, each writer's in order; a line that a crash cut off is left out."""
        names = [PROGRESS] if self.exists(PROGRESS) else []
        listed = files.list_paths(self.filesystem, self.path("progress"))
        names += [f"progress/{posixpath.basename(path)}" for path in listed]
        lines = [line for name in names for line in self.read(name).decode(errors="replace").splitlines()]
        return [event for event in map(_parsed, lines) if event is not None]


@cache
def _plan_reader() -> TypeAdapter[Any]:
    return TypeAdapter(PlanRecord)


@cache
def _record_reader() -> TypeAdapter[CommitRecord]:
    return TypeAdapter(CommitRecord)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = parse_json(line.encode())
    except (StrictJsonError, UnicodeEncodeError):
        return None
    return event if isinstance(event, dict) else None


def claim_file(claim_fingerprint: str) -> str:
    """File of a certificate that is not the run's first or newest."""
    return f"certificate-{claim_fingerprint[:8]}.json"


def _shard_file(folder: str, shard: int, suffix: str, *, fanned: bool) -> str:
    fan = f"{sha256_hex(str(shard).encode())[:2]}/" if fanned else ""
    return f"{folder}/{fan}{shard:05d}{suffix}"


def losses_sha256(records: Iterable[CommitRecord]) -> str:
    """Digest of a ledger: SHA-256 over the shards' digests in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(bytes.fromhex(record.sha256))
    return digest.hexdigest()


def missing_shards(planned: int, records: Mapping[int, CommitRecord]) -> Iterator[int]:
    """Planned shards without a commit record."""
    return (shard for shard in range(planned) if shard not in records)


def scoring_environments(records: Iterable[CommitRecord]) -> list[dict[str, Any]]:
    """The distinct environments of some shards, in the order of their first shard, and how many each scored.

    The number of threads is in the records alone: it says how many replicas shared a machine, which changes with every
    start, and a certificate does not depend on that.

    Args:
        records: of all shards, in order; those that older versions committed say nothing.

    >>> scoring_environments([])
    []
    """
    found: dict[bytes, dict[str, Any]] = {}
    for record in records:
        known = {name: value for name, value in (record.environment or {}).items() if name != "threads"}
        found.setdefault(canonical_json(known), {"shards": 0, **known})["shards"] += 1
    return list(found.values())
