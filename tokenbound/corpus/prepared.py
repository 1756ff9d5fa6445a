"""The prepared form of a corpus: flat id files, document offsets, and a manifest of append-only segments.

    manifest.json
    00000-1f3a.../part-00000.ids.bin      flat uint16 or uint32, little-endian
    00000-1f3a.../part-00000.offsets.npy  int64 [documents + 1], starts with 0
    00000-1f3a.../part-00000.targets.npy  int64 [runs, 2], under `targets: answers`: first id and end of each run

The manifest is written last and holds every digest, so a folder without one is not a prepared corpus, and a part
that it does not name does not exist. A corpus grows by a further segment; what was there keeps its bytes, its
positions and its numbers. The *stream* of a segment is the ids of all its documents, one after another.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from io import BytesIO
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.tokenizers import Ids
from tokenbound.corpus.windows import CorpusPlan, plan_corpus
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store.filesystem import is_local, open_input, read_bytes, read_range, resolve, write_bytes
from tokenbound.store.uri import join

T = TypeVar("T")
Offsets = npt.NDArray[np.int64]

SCHEMA_VERSION = 2
"""Version 1 did not say which text bytes belong to tokens that are never predicted, and read some files as text that
were none. It can be opened; `prepare_corpus` makes it anew."""

OPEN_PARTS = 64
"""Memory maps and offset tables kept open per reader; each map holds a file descriptor."""


@dataclass(frozen=True)
class CorpusRule:
    """Everything besides the files that decides the ids."""

    source: str
    vocab_size: int
    """V_tok: how many ids the tokenizer can emit."""
    max_id: int
    """Largest id that can occur."""
    tokenizer_sha256: str | None = None
    """Digest of the tokenizer; null where the files hold ids already."""
    bos_id: int | None = None
    """Id put before every document; null where none is."""
    eos_id: int | None = None
    """Id that ends every document: put there, or, in `tokens` sources, found there; null where none is."""
    text_field: str | None = None
    """Column the text comes from, where there are columns."""
    missing: str | None = None
    """What became of rows without a text; null where they are refused."""
    stored_dtype: str | None = None
    """Id type of flat token files."""
    encoding: str | None = None
    """Encoding of the text; null for UTF-8."""
    errors: str | None = None
    """What became of bytes that are not in the encoding; null where they are refused."""
    special_tokens: str | None = None
    """What became of text that spells a special token; null where it is text like any other."""
    part: dict[str, float | str] | None = None
    """Which documents, by the hash of their text; null for all."""
    prompt_field: str | None = None
    """Column of the prompt that a document begins with; null where documents have one text."""
    completion_field: str | None = None
    """Column of the answer behind the prompt."""
    messages_field: str | None = None
    """Column of the conversation that a chat template turns into text; null where documents are no conversations."""
    chat_template_sha256: str | None = None
    """Digest of that template; null without one."""
    targets: str | None = None
    """`answers` where they alone are scored; null where every id is."""
    options: dict[str, object] | None = None
    """Keys that only this source has; null where there are none."""
    plugin: str | None = None
    """Distribution and version of the plugin that read the files; null for a source of this package."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the prepared ids: uint16 where every id fits."""
        return np.dtype("<u2") if self.max_id <= np.iinfo(np.uint16).max else np.dtype("<u4")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all fields."""
        return _sha256(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the fields of `OPTIONAL_FIELDS` that are null: a digest stays when there is a new one."""
        return {key: value for key, value in asdict(self).items() if value is not None or key not in OPTIONAL_FIELDS}


OPTIONAL_FIELDS = (
    "missing",
    "encoding",
    "errors",
    "special_tokens",
    "part",
    "prompt_field",
    "completion_field",
    "messages_field",
    "chat_template_sha256",
    "targets",
    "options",
    "plugin",
)


@dataclass(frozen=True)
class FileRecord:
    """A source file as it was when it was tokenised."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartRecord:
    """One id file with its document offsets."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the original text, the divisor of bits per byte; 0 where the source held ids."""
    ids_sha256: str
    offsets_sha256: str
    rule_sha256: str
    """Digest of the rule it was made by: the tokenizer must be the same on every machine."""
    first_tokens_bytes: int | None = None
    """At least how many bytes of text the first tokens of all documents spell: a document's first token is never
    predicted where contexts are documents. 0 where it is BOS. Null in manifests of version 1."""
    first_token_bytes: int | None = None
    """The same of the first token of the part alone, which is never predicted where a stream begins with it."""
    replaced_documents: int = 0
    """Under `errors: replace`, documents with a U+FFFD."""
    rows_without_text: int = 0
    """Under `missing: skip`, rows that were left out."""
    targets_sha256: str | None = None
    """Of the runs of ids that are scored; null where all are."""

    @property
    def digests(self) -> list[str]:
        """Of everything that is stored of it."""
        targets = [] if self.targets_sha256 is None else [self.targets_sha256]
        return [self.ids_sha256, self.offsets_sha256, *targets]


@dataclass(frozen=True)
class Segment:
    """Files that were prepared together."""

    name: str
    files: tuple[FileRecord, ...]
    parts: tuple[PartRecord, ...]

    @cached_property
    def tokens(self) -> int:
        """Length of the stream."""
        return sum(part.tokens for part in self.parts)

    @cached_property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return sum(part.documents for part in self.parts)

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of the original text."""
        return sum(part.text_bytes for part in self.parts)

    def unpredicted_bytes(self, context: str) -> int | None:
        """At least how many bytes of text belong to tokens that no window predicts; None where nobody counted them.

        Args:
            context: `document` or `packed`.
        """
        if context == "document":
            counts = [part.first_tokens_bytes for part in self.parts]
        else:
            counts = [part.first_token_bytes for part in self.parts if part.tokens][:1]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @cached_property
    def sha256(self) -> str:
        """Digest over the parts' ids and offsets, and which ids are scored where not all are, in order."""
        return _sha256([part.digests for part in self.parts])

    @cached_property
    def stream_sha256(self) -> str:
        """The same over ids and offsets alone, whichever are scored."""
        return _sha256([[part.ids_sha256, part.offsets_sha256] for part in self.parts])

    @cached_property
    def part_starts(self) -> Offsets:
        """int64 [parts + 1]: stream index at which each part begins."""
        return _starts([part.tokens for part in self.parts])

    @cached_property
    def part_documents(self) -> Offsets:
        """int64 [parts + 1]: index in the segment of each part's first document."""
        return _starts([part.documents for part in self.parts])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived totals for human readers."""
        totals = {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "sha256": self.sha256,
        }
        return asdict(self) | totals


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus consists of; segments are only ever appended."""

    rule: CorpusRule
    segments: tuple[Segment, ...] = field(default=())
    version: int = SCHEMA_VERSION
    """Of the form in which it was stored."""

    @property
    def tokens(self) -> int:
        """Ids in all, those without a context included."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def documents(self) -> int:
        """Documents in all."""
        return sum(segment.documents for segment in self.segments)

    @property
    def text_bytes(self) -> int:
        """Bytes of the original text; 0 where the source held ids."""
        return sum(segment.text_bytes for segment in self.segments)

    def predicted_bytes(self, context: str) -> int | None:
        """At most how many bytes of text the predicted tokens spell, the divisor of bits per byte.

        Null where the source held ids, where it is not known, where only answers are scored, or where there is nothing
        to divide by.

        Args:
            context: `document` or `packed`.
        """
        counts = [segment.unpredicted_bytes(context) for segment in self.segments]
        known = [count for count in counts if count is not None]
        if not self.text_bytes or len(known) < len(counts) or self.rule.targets is not None:
            return None
        return max(self.text_bytes - sum(known), 0) or None

    @property
    def replaced_documents(self) -> int:
        """Under `errors: replace`, documents with a U+FFFD."""
        return sum(part.replaced_documents for segment in self.segments for part in segment.parts)

    @property
    def rows_without_text(self) -> int:
        """Under `missing: skip`, rows that were left out."""
        return sum(part.rows_without_text for segment in self.segments for part in segment.parts)

    @property
    def empty_files(self) -> int:
        """Files without a byte; they are read like others."""
        return sum(file.bytes == 0 for segment in self.segments for file in segment.files)

    @property
    def vocab_size(self) -> int:
        """V_tok of the tokenizer."""
        return self.rule.vocab_size

    @property
    def corpus_sha256(self) -> str:
        """Digest over names, sizes and SHA-256 of the files, and the rule (tokenizer digest, BOS and EOS)."""
        files = [[file.name, file.bytes, file.sha256] for segment in self.segments for file in segment.files]
        return _sha256({"files": files, "rule": self.rule.to_dict()})

    @property
    def tokens_sha256(self) -> str:
        """Digest over the prepared ids, document offsets and targets, segment by segment."""
        return _sha256([segment.sha256 for segment in self.segments])

    @property
    def stream_sha256(self) -> str:
        """Digest over the prepared ids and document offsets alone: the same tokens, whichever are scored."""
        return _sha256([segment.stream_sha256 for segment in self.segments])

    def prefixes(self) -> Iterator[Manifest]:
        """What this corpus was before each segment was appended, shortest first, and what it is now."""
        for count in range(1, len(self.segments) + 1):
            yield replace(self, segments=self.segments[:count])

    def require_rule(self, rule: CorpusRule) -> None:
        """Refuse to mix two ways of making ids in one corpus.

        Raises:
            MismatchError: this corpus was prepared by another rule.
        """
        ours, theirs = self.rule.to_dict(), rule.to_dict()
        changed = [
            f"{key} {ours.get(key)!r} -> {theirs.get(key)!r}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]
        if changed:
            raise MismatchError(f"corpus was prepared by another rule ({', '.join(changed)}); use another cache folder")

    def to_json(self) -> bytes:
        """Serialise."""
        tree = {
            "schema_version": self.version,
            "corpus_sha256": self.corpus_sha256,
            "tokens_sha256": self.tokens_sha256,
            "rule": self.rule.to_dict(),
            "segments": [segment.to_dict() for segment in self.segments],
        }
        return json.dumps(tree, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            InputError: the bytes are no manifest, or one of another version.
            MismatchError: its own digests contradict its content.
        """
        try:
            tree = json.loads(data)
            version = tree["schema_version"]
            manifest = cls(CorpusRule(**tree["rule"]), tuple(_segment(item) for item in tree["segments"]), version)
            stated = (tree["corpus_sha256"], tree["tokens_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"manifest of the prepared corpus is damaged: {error!r}; remove its folder") from None
        if version not in (1, SCHEMA_VERSION):
            raise InputError(
                f"manifest of the prepared corpus has version {version}; remove its folder and prepare anew"
            )
        if stated != (manifest.corpus_sha256, manifest.tokens_sha256):
            raise MismatchError("manifest of the prepared corpus was altered; remove its folder and prepare anew")
        return manifest


def pending_files(manifest: Manifest | None, files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files that are not in the manifest yet, in their order.

    Raises:
        MismatchError: a file changed under its name, or one in the manifest is no longer listed.
    """
    known = {file.name: file for segment in manifest.segments for file in segment.files} if manifest else {}
    for file in files:
        old = known.get(file.name)
        if old and (old.bytes, old.sha256) != (file.bytes, file.sha256):
            raise MismatchError(
                f"corpus file {file.path!r} changed after it was prepared ({old.bytes} -> {file.bytes} bytes, "
                f"sha256 {old.sha256[:12]} -> {file.sha256[:12]}); restore it, or use another cache folder"
            )
    if missing := known.keys() - {file.name for file in files}:
        raise MismatchError(
            f"corpus file {min(missing)!r} was prepared but is no longer listed ({len(missing)} such); "
            "restore it, or use another cache folder"
        )
    return [file for file in files if file.name not in known]


def segment_name(index: int, files: Sequence[SourceFile]) -> str:
    """Folder of a segment: its number and a digest of its files, so that two writers never share one by accident."""
    return f"{index:05d}-{_sha256([[file.name, file.bytes, file.sha256] for file in files])[:16]}"


def append_segment(manifest: Manifest, name: str, files: Sequence[SourceFile], parts: Sequence[PartRecord]) -> Manifest:
    """The manifest with one more segment.

    Raises:
        InputError: the corpus would still hold no id.
        MismatchError: a part was made by another rule (tokenizers differ between machines).
    """
    if any(part.rule_sha256 != manifest.rule.digest for part in parts):
        raise MismatchError("parts were tokenised by different rules; install the same tokenizer on every machine")
    records = tuple(FileRecord(file.name, file.bytes, file.sha256) for file in files)
    grown = replace(manifest, segments=(*manifest.segments, Segment(name, records, tuple(parts))))
    if grown.tokens == 0:
        raise InputError("corpus is empty: its files hold no token; check `corpus.paths`")
    return grown


def load_manifest(root: str) -> Manifest | None:
    """The manifest under ``root``; null where nothing was prepared.

    Raises:
        InputError: it is damaged or of another version.
        MismatchError: it was altered.
    """
    filesystem, path = resolve(join(root, "manifest.json"))
    try:
        return Manifest.from_json(read_bytes(filesystem, path))
    except FileNotFoundError:
        return None


def save_manifest(manifest: Manifest, root: str) -> None:
    """Write the manifest, last of all files, atomically."""
    filesystem, path = resolve(join(root, "manifest.json"))
    write_bytes(filesystem, path, manifest.to_json())


def ids_path(prefix: str) -> str:
    """Where the ids of a part lie."""
    return f"{prefix}.ids.bin"


def offsets_path(prefix: str) -> str:
    """Where the document offsets of a part lie."""
    return f"{prefix}.offsets.npy"


def targets_path(prefix: str) -> str:
    """Where the runs of scored ids of a part lie."""
    return f"{prefix}.targets.npy"


class PreparedCorpus:
    """Random access to the ids of a prepared corpus; cheap to pickle, opened files stay behind."""

    def __init__(self, root: str, skipped: Mapping[str, int] | None = None, *, open_parts: int = OPEN_PARTS) -> None:
        """Open a prepared corpus.

        Args:
            root: where it is.
            skipped: how many files of the places named are not part of it, by the name of the rule.
            open_parts: how many parts are kept open.

        Raises:
            IncompleteError: nothing was prepared there.
            InputError: its manifest is damaged.
            MismatchError: its manifest was altered.
        """
        manifest = load_manifest(root)
        if manifest is None:
            raise IncompleteError(f"no prepared corpus at {root!r}; prepare it first")
        self.root = root
        self.skipped = dict(skipped or {})
        self.manifest = manifest
        self._open_parts = open_parts
        self._filesystem, self._path = resolve(root)
        self._ids: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._offsets: OrderedDict[tuple[int, int], Offsets] = OrderedDict()
        self._targets: OrderedDict[tuple[int, int], Offsets] = OrderedDict()

    def __reduce__(self) -> tuple[type[PreparedCorpus], tuple[str, dict[str, int]]]:
        """Pickle by place."""
        return PreparedCorpus, (self.root, self.skipped)

    def read_ids(self, segment: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of a segment's stream, across parts, as a copy in the stored type.

        Local files are memory-mapped; on object stores exactly the range is fetched.

        Raises:
            IndexError: the range is not inside the stream.
        """
        record = self.manifest.segments[segment]
        if not 0 <= start <= stop <= record.tokens:
            raise IndexError(f"ids {start}:{stop} outside segment {segment} of {record.tokens} ids")
        pieces = [
            self._part_ids(segment, part, max(start - begin, 0), min(stop, end) - begin)
            for part, begin, end in _overlapping(record.part_starts, start, stop)
            if begin < end
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, self.manifest.rule.dtype)

    def document_offsets(self, segment: int) -> Offsets:
        """int64 [documents + 1]: where each document of a segment begins in its stream. Memory O(documents)."""
        record = self.manifest.segments[segment]
        tables = [self._part_offsets(segment, part)[:-1] + begin for part, begin in enumerate(record.part_starts[:-1])]
        return np.concatenate([*tables, record.part_starts[-1:]])

    def targets(self, segment: int) -> Offsets | None:
        """int64 [runs, 2]: first id and end of each run of targets in a segment's stream; None where all ids are."""
        record = self.manifest.segments[segment]
        if self.manifest.rule.targets is None:
            return None
        starts = record.part_starts
        return np.concatenate([self._part_targets(segment, part) + starts[part] for part in range(len(record.parts))])

    def targets_between(self, segment: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which ids ``start`` to ``stop`` of a segment's stream are targets; None where all ids are."""
        if self.manifest.rule.targets is None:
            return None
        edges = np.zeros(stop - start + 1, np.int8)
        for part, begin, _ in _overlapping(self.manifest.segments[segment].part_starts, start, stop):
            runs = self._part_targets(segment, part) + (begin - start)
            low, high = np.searchsorted(runs[:, 1], 0, side="right"), np.searchsorted(runs[:, 0], stop - start)
            begins, ends = np.clip(runs[low:high], 0, stop - start).T
            np.add.at(edges, begins, 1)
            np.add.at(edges, ends, -1)
        return np.cumsum(edges, dtype=np.int8)[:-1].astype(np.bool_)

    def plan(self, *, length: int, context: Literal["packed", "document"], stride: int | None) -> CorpusPlan:
        """The windows of the corpus, as `plan_corpus` cuts them.

        Raises:
            InputError: length or stride is out of range.
        """
        segments = range(len(self.manifest.segments))
        return plan_corpus(
            [self.document_offsets(segment) for segment in segments],
            length=length,
            context=context,
            stride=stride,
            targets=[self.targets(segment) for segment in segments],
        )

    def documents_between(self, segment: int, start: int, stop: int) -> tuple[int, Offsets]:
        """The documents that overlap a nonempty range of a segment's stream.

        Returns:
            Index in the segment of the first of them, and their int64 [n + 1] offsets in the stream. The offset
            tables of the parts concerned stay in memory, not those of the corpus.
        """
        record = self.manifest.segments[segment]
        parts = _overlapping(record.part_starts, start, stop)
        if not parts:
            return 0, np.array([start], dtype=np.int64)
        (first_part, begin, _), (last_part, last_begin, _) = parts[0], parts[-1]
        # side="right": of several documents at one offset only the last has content.
        low = int(np.searchsorted(self._part_offsets(segment, first_part), start - begin, side="right")) - 1
        high = int(np.searchsorted(self._part_offsets(segment, last_part), stop - last_begin, side="left"))
        tables = [
            self._part_offsets(segment, part)[low if part == first_part else 0 : high if part == last_part else -1] + at
            for part, at, _ in parts
        ]
        end = self._part_offsets(segment, last_part)[high : high + 1] + last_begin
        return int(record.part_documents[first_part]) + low, np.concatenate([*tables, end])

    def first_document(self, segment: int) -> int:
        """Number in the whole corpus of a segment's first document."""
        return sum(record.documents for record in self.manifest.segments[:segment])

    def verify(self) -> None:
        """Recompute every digest of ids and offsets.

        Raises:
            MismatchError: a file was altered, truncated or removed; it is named.
        """
        for segment, record in enumerate(self.manifest.segments):
            for part in range(len(record.parts)):
                self.verify_part(segment, part)

    def verify_part(self, segment: int, part: int) -> None:
        """Recompute the digests of one part, the unit in which to spread `verify`.

        Raises:
            MismatchError: a file of the part was altered, truncated or removed; it is named.
        """
        record, prefix = self.manifest.segments[segment].parts[part], self._prefix(segment, part)
        self._verify_file(ids_path(prefix), record.ids_sha256)
        self._verify_file(offsets_path(prefix), record.offsets_sha256)
        if record.targets_sha256 is not None:
            self._verify_file(targets_path(prefix), record.targets_sha256)

    def _verify_file(self, path: str, sha256: str) -> None:
        digest = hashlib.sha256()
        try:
            with open_input(self._filesystem, path) as stream:
                for block in iter(lambda: stream.read(1 << 22), b""):
                    digest.update(block)
        except FileNotFoundError:
            raise MismatchError(f"prepared file {path!r} is missing; remove the folder and prepare anew") from None
        if digest.hexdigest() != sha256:
            raise MismatchError(f"prepared file {path!r} was altered; remove the folder and prepare anew")

    def _prefix(self, segment: int, part: int) -> str:
        record = self.manifest.segments[segment]
        return f"{self._path}/{record.name}/{record.parts[part].name}"

    def _part_ids(self, segment: int, part: int, start: int, stop: int) -> Ids:
        path, dtype = ids_path(self._prefix(segment, part)), self.manifest.rule.dtype
        if is_local(self._filesystem):
            table = self._cached(self._ids, (segment, part), lambda: np.memmap(path, dtype=dtype, mode="r"))
            ids: Ids = np.asarray(table[start:stop])
        else:
            data = read_range(self._filesystem, path, start * dtype.itemsize, (stop - start) * dtype.itemsize)
            ids = np.frombuffer(data, dtype=dtype)
        if len(ids) != stop - start:
            raise MismatchError(f"prepared file {path!r} is truncated; remove the folder and prepare anew")
        return ids

    def _part_offsets(self, segment: int, part: int) -> Offsets:
        sha256 = self.manifest.segments[segment].parts[part].offsets_sha256
        path = offsets_path(self._prefix(segment, part))
        return self._cached(self._offsets, (segment, part), lambda: self._load_array(path, sha256))

    def _part_targets(self, segment: int, part: int) -> Offsets:
        sha256 = self.manifest.segments[segment].parts[part].targets_sha256
        path = targets_path(self._prefix(segment, part))
        return self._cached(self._targets, (segment, part), lambda: self._load_array(path, sha256))

    def _load_array(self, path: str, sha256: str | None) -> Offsets:
        data = read_bytes(self._filesystem, path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise MismatchError(f"prepared file {path!r} was altered; remove the folder and prepare anew")
        array: Offsets = np.load(BytesIO(data), allow_pickle=False)
        return array

    def _cached(self, cache: OrderedDict[tuple[int, int], T], key: tuple[int, int], load: Callable[[], T]) -> T:
        """Least recently used values, at most as many as parts may be open."""
        if key not in cache:
            cache[key] = load()
            if len(cache) > self._open_parts:
                cache.popitem(last=False)
        cache.move_to_end(key)
        return cache[key]


def _overlapping(starts: Offsets, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(part, begin, end) of the parts that overlap a nonempty range, parts without ids between them included."""
    if start >= stop:
        return []
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, stop, side="left"))
    return [(part, int(starts[part]), int(starts[part + 1])) for part in range(first, last)]


def _segment(tree: dict[str, Any]) -> Segment:
    files = tuple(FileRecord(**item) for item in tree["files"])
    return Segment(tree["name"], files, tuple(PartRecord(**item) for item in tree["parts"]))


def _starts(sizes: Sequence[int]) -> Offsets:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(sizes, dtype=np.int64))])


def _sha256(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
