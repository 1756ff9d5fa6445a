"""Documents to flat id files: the pure functions that run as one task per part.

Preparing a corpus is: find files, digest each, ask `pending_files` what is new, tokenise the new files part by
part, append one segment to the manifest. `prepare_corpus` does it; give it a parallel ``run`` to spread the parts.

The ids of a document are ``[BOS] text [EOS]`` as the config says. In `tokens` sources the ids are taken as they
are, and a document ends after `eos_id`, which belongs to the document it ends.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pyarrow.fs import FileSystem

from tokenbound.corpus.answers import Answered, Conversation, Document, answer_runs, plain_text
from tokenbound.corpus.chat import ChatTemplate, load_chat_template
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.contents import is_void
from tokenbound.corpus.documents import digest_file, find_corpus, find_files, read_rows
from tokenbound.corpus.files import Listing, SourceFile
from tokenbound.corpus.listing import BROKEN, EXCLUDED, HIDDEN, LINKED, OTHER_FORM
from tokenbound.corpus.parts import DocumentPart
from tokenbound.corpus.prepared import (
    OPTIONAL_FIELDS,
    SCHEMA_VERSION,
    CorpusRule,
    Manifest,
    PartRecord,
    PreparedCorpus,
    Segment,
    append_segment,
    ids_path,
    load_manifest,
    offsets_path,
    pending_files,
    save_manifest,
    segment_name,
    targets_path,
)
from tokenbound.corpus.sources import SOURCES, IdSource
from tokenbound.corpus.sources.base import Source
from tokenbound.corpus.sources.fields import (
    Fields,
    LimitFields,
    PartFields,
    SpecialTokenFields,
)
from tokenbound.corpus.sources.tokens import check_ids
from tokenbound.corpus.streams import BLOCK_BYTES
from tokenbound.corpus.tokenizers import Ids, Tokenizer, load_tokenizer
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.filesystem import anchored, open_atomic, require_writable, resolve, write_bytes
from tokenbound.store.uri import is_uri, join

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class Sizes(NamedTuple):
    """How the work is cut; no id depends on it."""

    part_bytes: int = 1 << 26
    """Text of one part, the unit of work: small enough to be redone cheaply, large enough to be read at full speed."""
    batch_bytes: int = 1 << 22
    """Text tokenised at a time; bounds the memory of a task."""
    batch_documents: int = 8192
    """Documents tokenised at a time; bounds the memory of very short ones."""
    block_bytes: int = BLOCK_BYTES
    """Stored ids read at a time."""


DEFAULT_SIZES = Sizes()

FILES_PER_TASK = 1024
"""Small files that one task digests."""


class Run(Protocol):
    """Something that maps a function over items, in order: ``map`` here, tasks on a cluster."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """The results, in the order of the items."""


NO_RUNS = np.zeros((0, 2), np.int64)
"""No id is scored, or all are and nobody asks."""


class _Batch(NamedTuple):
    """Consecutive ids of a part; a document may go on in the next batch."""

    ids: Ids
    ends: npt.NDArray[np.int64]
    """Where documents end, counted from the start of the batch."""
    text_bytes: int
    first_bytes: Sequence[int] = ()
    """Of each document that begins in it, the bytes of text that its first token spells."""
    replaced: int = 0
    """Documents with a U+FFFD, where bytes may have been replaced."""
    missing: int = 0
    """Rows without a text, which are left out."""
    targets: npt.NDArray[np.int64] = NO_RUNS
    """int64 [runs, 2]: first and end of each run of scored ids, counted from the start of the batch."""


class _Placed(NamedTuple):
    """A document as text, and where it is from."""

    written: str | bytes | Answered
    file: SourceFile
    number: int
    """From 1, in the file or the part of it that is read."""


class _Written(NamedTuple):
    """What a part came to."""

    offsets: npt.NDArray[np.int64]
    text_bytes: int
    ids_sha256: str
    first_tokens_bytes: int
    first_token_bytes: int
    replaced_documents: int
    rows_without_text: int
    targets: npt.NDArray[np.int64]


class _Job(NamedTuple):
    files: list[SourceFile]
    prefix: str
    sizes: Sizes


def prepare_corpus(
    config: CorpusConfig,
    root: str,
    *,
    run: Run = map,
    segments: Sequence[Sequence[str]] | None = None,
    sizes: Sizes = DEFAULT_SIZES,
) -> PreparedCorpus:
    """Tokenise what is new in a corpus into ``root`` and open the result; nothing is done twice.

    Args:
        config: the corpus.
        root: directory or URI of the prepared form; see `cache_name`.
        run: how tasks are mapped over files and parts; results must come in order. The functions mapped are
            picklable and pure, so a task may be repeated: it writes the same bytes under the same name.
        segments: names of the files of each segment, to prepare a corpus as it once grew; files in none of them are
            left out. Null: all that is new becomes one segment.
        sizes: how the work is cut.

    Raises:
        InputError: a source, its content or the tokenizer cannot be used, the corpus holds no id, or there is something
            to prepare and ``root`` cannot be written.
        MismatchError: a file changed under its name or disappeared, ``root`` was made by another rule, or by an earlier
            version that read these files differently.
    """
    if config.tokenizer is not None:
        config = config.model_copy(update={"tokenizer": anchored(config.tokenizer)})
    listing = find_corpus(config)
    _log_skipped(listing)
    files = _digested(config, listing.files, run)
    _log_void(files)
    manifest = load_manifest(root) or Manifest(rule=corpus_rule(config))
    manifest.require_rule(corpus_rule(config))
    pending = pending_files(manifest, files)
    names = [set(names) for names in segments] if segments is not None else [{file.name for file in pending}]
    earlier = manifest.segments if manifest.version < SCHEMA_VERSION else ()
    if earlier:
        logger.info("the prepared corpus is of an earlier version; preparing it anew")
        names = [{file.name for file in segment.files} for segment in earlier] + names
        manifest, pending = Manifest(rule=manifest.rule), files
    if pending:  # a prepared corpus may be shared where this user only reads
        require_writable(root, field="how.cache (by default beside how.output)")
    for chosen in names:
        new = [file for file in pending if file.name in chosen]
        if new:
            logger.info("tokenising %s files, %s bytes", f"{len(new):,}", f"{sum(file.bytes for file in new):,}")
            pending = [file for file in pending if file.name not in chosen]
            name = segment_name(len(manifest.segments), new)
            jobs = _jobs(new, root, name, sizes)
            manifest = append_segment(manifest, name, new, list(run(partial(_tokenise_job, config), jobs)))
            _require_same_ids(earlier, manifest)
            if len(manifest.segments) >= len(earlier):
                save_manifest(manifest, root)
    return PreparedCorpus(root, listing.skipped)


EXPECTED = (HIDDEN, EXCLUDED, LINKED, BROKEN, OTHER_FORM)
"""Rules by which nothing is missed."""


def _log_skipped(listing: Listing) -> None:
    for rule, count in listing.skipped.items():
        names = ", ".join(map(repr, listing.examples.get(rule, [])))
        level = logging.INFO if rule in EXPECTED else logging.WARNING
        logger.log(level, "left out of the corpus by the rule `%s`: %s, such as %s", rule, f"{count:,}", names)


def _log_void(files: Sequence[SourceFile]) -> None:
    """Name files that are empty although they should hold compressed content."""
    void = [file.path for file in files if is_void(file)]
    if void:
        logger.warning("%d compressed files are empty and hold no document, such as %r", len(void), void[0])


def _require_same_ids(earlier: Sequence[Segment], manifest: Manifest) -> None:
    """What an earlier version prepared is taken over only where it is read the same way today."""
    for old, new in zip(earlier, manifest.segments, strict=False):
        if (old.sha256, old.files) != (new.sha256, new.files):
            raise MismatchError(
                "the corpus was prepared by an earlier version that read some of its files differently; use another "
                "how.cache and another how.output"
            )


def unprepared_files(config: CorpusConfig, root: str, *, run: Run = map) -> list[SourceFile]:
    """The files that the prepared form under ``root`` does not hold yet; reads every file once, writes nothing.

    Raises:
        InputError: a source or the tokenizer cannot be used.
        MismatchError: a file changed under its name or disappeared, or ``root`` was made by another rule.
    """
    files = _digested(config, find_files(config), run)
    manifest = load_manifest(root)
    if manifest is not None:
        manifest.require_rule(corpus_rule(config))
    return pending_files(manifest, files)


def _digested(config: CorpusConfig, files: Sequence[SourceFile], run: Run) -> list[SourceFile]:
    """The files with their digests; small ones share a task, which costs more than a thousand of them."""
    return [file for part in run(partial(_digest_files, config), list(_shared(files))) for file in part]


def _digest_files(config: CorpusConfig, files: Sequence[SourceFile]) -> list[SourceFile]:
    return [digest_file(config, file) for file in files]


def _shared(
    files: Sequence[SourceFile], most_files: int = FILES_PER_TASK, most_bytes: int = DEFAULT_SIZES.part_bytes
) -> Iterator[Sequence[SourceFile]]:
    """Consecutive files in groups of so many files and bytes at most; a larger file stands alone.

    >>> files = [SourceFile(name, name, size) for name, size in (("a", 3), ("b", 4), ("c", 9), ("d", 1))]
    >>> [[file.name for file in group] for group in _shared(files, most_bytes=8)]
    [['a', 'b'], ['c'], ['d']]
    """
    group, size = list[SourceFile](), 0
    for file in files:
        if group and (len(group) >= most_files or size + file.bytes > most_bytes):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.bytes
    if group:
        yield group


def cache_name(config: CorpusConfig) -> str:
    """Folder name of a corpus in a cache: the same for the same config and tokenizer, different otherwise.

    Growth keeps the name when the new files appear in a listed directory or match a listed glob.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    # The rule holds the keys of the text, where they are not the default.
    named = config.model_dump(
        mode="json",
        exclude={
            "tokenizer",
            "tokenizer_is",
            "encoding",
            "errors",
            "special_tokens",
            "part",
            *LimitFields.model_fields,
        },
    )
    named["paths"] = [path if is_uri(path) else os.path.abspath(path) for path in config.paths]  # noqa: PTH100
    named["rule"] = corpus_rule(config).to_dict()
    named |= config.reader().surroundings()
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]


def corpus_rule(config: CorpusConfig) -> CorpusRule:
    """Everything besides the files that decides the ids.

    Raises:
        InputError: the tokenizer cannot be loaded, or lacks the BOS or EOS that the config asks for.
    """
    source = config.reader()
    read_as = _read_as(config, source)
    if isinstance(source, IdSource):
        ids = {"vocab_size": source.vocab_size, "max_id": source.vocab_size - 1, "eos_id": source.eos_id}
        return CorpusRule(**{**read_as, **ids})
    tokenizer = _tokenizer(config)
    return CorpusRule(
        **read_as,
        vocab_size=tokenizer.vocab_size,
        max_id=tokenizer.max_id,
        tokenizer_sha256=tokenizer.digest,
        bos_id=_required_id("bos", tokenizer.bos_id, config) if config.add_bos else None,
        eos_id=_required_id("eos", tokenizer.eos_id, config) if config.add_eos else None,
        chat_template_sha256=None if config.messages_field is None else _chat_template(config).digest,
    )


RULE_NAMES = {"dtype": "stored_dtype"}
"""Keys of `what.corpus` that have another name in the rule."""


def _read_as(config: CorpusConfig, source: Source[Fields]) -> dict[str, Any]:
    """What a source's own fields put into the rule: every one that decides what is read, under its name.

    A field of the package's rules is null at its default where it came later than the first digests.
    """
    shared, options = dict[str, object](), dict[str, object]()
    of_texts = (*SpecialTokenFields.model_fields, *PartFields.model_fields)
    deciding = source.deciding() | {key: getattr(config, key) for key in of_texts}
    for key, value in deciding.items():
        name = RULE_NAMES.get(key, key)
        if name not in IN_RULE:
            options[key] = value
        elif name not in OPTIONAL_FIELDS or value != CorpusConfig.model_fields[key].default:
            shared[name] = value
    return {
        **shared,
        "source": config.source,
        "options": options or None,
        "plugin": SOURCES.origin(config.source),
    }


IN_RULE = {field.name for field in fields(CorpusRule)} & {RULE_NAMES.get(key, key) for key in CorpusConfig.model_fields}
"""Fields of the rule that are keys of `what.corpus`; keys that only one source has are under `options` there."""


def partition_files(
    files: Sequence[SourceFile], target_bytes: int = DEFAULT_SIZES.part_bytes
) -> list[list[SourceFile]]:
    """Consecutive files in parts of about ``target_bytes``; large splittable files are cut into spans.

    A part exceeds the target only where one file that cannot be split does. A pure function of the files.

    >>> files = [SourceFile("a", "a", 3), SourceFile("b", "b", 4), SourceFile("c", "c", 9)]
    >>> [[file.name for file in part] for part in partition_files(files, 8)]
    [['a', 'b'], ['c']]
    """
    parts: list[list[SourceFile]] = []
    room = 0
    for piece in (piece for file in files for piece in _spans(file, target_bytes)):
        size = piece_bytes(piece)
        if not parts or size > room:
            parts.append([])
            room = target_bytes
        parts[-1].append(piece)
        room -= size
    return parts


def tokenise_part(
    config: CorpusConfig,
    files: Sequence[SourceFile],
    out_prefix: str,
    filesystem: FileSystem,
    sizes: Sizes = DEFAULT_SIZES,
) -> PartRecord:
    """Write the ids and document offsets of one part and return what they are.

    Memory is one batch of ids and 8 bytes per document, whatever the size of the part. The id file is flat and
    little-endian, uint16 where every id fits and uint32 otherwise; the offsets are ``int64 [documents + 1]``.

    Args:
        config: the corpus.
        files: the files, or spans of files, of the part.
        out_prefix: path in ``filesystem``; ``.ids.bin``, ``.offsets.npy`` and ``.targets.npy`` are put behind it.
        filesystem: where to write.
        sizes: how much is read and tokenised at a time.

    Raises:
        InputError: a document or id cannot be used; the message names file and line, row or id.
    """
    rule = corpus_rule(config)
    with open_atomic(filesystem, ids_path(out_prefix)) as stream:
        written = _write_ids(_batches(config, rule, files, sizes), rule.dtype, stream)
    offsets_sha256 = _write_array(filesystem, offsets_path(out_prefix), written.offsets)
    targets_sha256 = None
    if rule.targets is not None:
        targets_sha256 = _write_array(filesystem, targets_path(out_prefix), written.targets)
    return PartRecord(
        name=out_prefix.rpartition("/")[2],
        tokens=int(written.offsets[-1]),
        documents=len(written.offsets) - 1,
        text_bytes=written.text_bytes,
        ids_sha256=written.ids_sha256,
        offsets_sha256=offsets_sha256,
        rule_sha256=rule.digest,
        first_tokens_bytes=written.first_tokens_bytes,
        first_token_bytes=written.first_token_bytes,
        replaced_documents=written.replaced_documents,
        rows_without_text=written.rows_without_text,
        targets_sha256=targets_sha256,
    )


# --- jobs ------------------------------------------------------------------------------------------------------


def _jobs(files: Sequence[SourceFile], root: str, segment: str, sizes: Sizes) -> list[_Job]:
    parts = enumerate(partition_files(files, sizes.part_bytes))
    return [_Job(part, join(root, segment, f"part-{index:05d}"), sizes) for index, part in parts]


def _tokenise_job(config: CorpusConfig, job: _Job) -> PartRecord:
    filesystem, prefix = resolve(job.prefix)
    return tokenise_part(config, job.files, prefix, filesystem, job.sizes)


def _batches(config: CorpusConfig, rule: CorpusRule, files: Sequence[SourceFile], sizes: Sizes) -> Iterator[_Batch]:
    source = config.reader()
    if isinstance(source, IdSource):
        return (batch for file in files for batch in _stored_batches(source, file, rule, sizes))
    tokenizer = _tokenizer(config)
    documents = (document for file in files for document in _documents(config, file, tokenizer))
    return _text_batches(tokenizer, rule, documents, sizes)


def _documents(config: CorpusConfig, file: SourceFile, tokenizer: Tokenizer) -> Iterator[_Placed | None]:
    """The documents of a file that are in the part, and None for each row without one.

    Under `special_tokens: refuse`, none of them spells a special token.
    """
    part = None if config.part is None else DocumentPart.of(config.part)
    special = _special_pattern(config, tokenizer)
    for number, document in enumerate(read_rows(config, file), start=1):
        if document is None:
            yield None
            continue
        placed = _Placed("", file, number)
        with _named(placed):
            written = _as_text(config, document, tokenizer)
            if part is not None and not part.holds(plain_text(written)):
                continue
            if special is not None:
                _refuse_special(special, document, config)
        yield placed._replace(written=written)


def _as_text(config: CorpusConfig, document: Document, tokenizer: Tokenizer) -> str | bytes | Answered:
    """A document as text: a conversation as its template writes it."""
    if not isinstance(document, Conversation):
        return document
    return _chat_template(config).answered(document, tokenizer.special_texts)


def _special_pattern(config: CorpusConfig, tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What must not occur in a document; None where anything may.

    The text of a conversation is tokenised with the special tokens that its template writes, so a message must not
    spell one unless the config says so.
    """
    allowed = config.special_tokens == "parse" if config.messages_field else config.special_tokens != "refuse"
    if allowed or not tokenizer.special_texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(tokenizer.special_texts, key=len, reverse=True))))


def _refuse_special(special: re.Pattern[str], document: Document, config: CorpusConfig) -> None:
    texts = document.texts if isinstance(document, Conversation) else [plain_text(document)]
    for text in texts:
        found = special.search(text if isinstance(text, str) else text.decode(errors="replace"))
        if found:
            others = "`parse`" if config.messages_field else "`text` or `parse`"
            raise InputError(
                f"its text holds the special token {found.group()!r} at character {found.start()}; remove it, or set "
                f"`corpus.special_tokens` to {others}"
            )


@contextmanager
def _named(document: _Placed) -> Iterator[None]:
    """Say of which document an error is."""
    try:
        yield
    except InputError as error:
        part = " of its part" if document.file.span else ""
        raise InputError(f"corpus file {document.file.path!r}, document {document.number}{part}: {error}") from None


def _spans(file: SourceFile, target_bytes: int) -> list[SourceFile]:
    if not file.splittable or file.bytes <= target_bytes:
        return [file]
    starts = range(0, file.bytes, target_bytes)
    return [replace(file, span=(start, min(start + target_bytes, file.bytes))) for start in starts]


def piece_bytes(file: SourceFile) -> int:
    """How much of a file is read: its span, or all of it."""
    return file.bytes if file.span is None else file.span[1] - file.span[0]


def _chat_template(config: CorpusConfig) -> ChatTemplate:
    assert config.tokenizer is not None, "checked when the config was validated"
    return load_chat_template(config.tokenizer)


def _tokenizer(config: CorpusConfig) -> Tokenizer:
    assert config.tokenizer is not None
    return load_tokenizer(config.tokenizer)


def _required_id(kind: str, token: int | None, config: CorpusConfig) -> int:
    if token is None:
        raise InputError(
            f"tokenizer {config.tokenizer!r} has no {kind.upper()} token; set `corpus.add_{kind}: false`, "
            f"or name its `{kind}_token` in tokenizer_config.json"
        )
    return token


# --- ids of texts ----------------------------------------------------------------------------------------------


def _text_batches(
    tokenizer: Tokenizer, rule: CorpusRule, documents: Iterable[_Placed | None], sizes: Sizes
) -> Iterator[_Batch]:
    before, after = _as_ids(rule.bos_id, rule), _as_ids(rule.eos_id, rule)
    parse, replace_errors = _parses_special(rule), rule.errors == "replace"
    for rows in _grouped(documents, sizes):
        group = [document for document in rows if document is not None]
        missing = len(rows) - len(group)
        if not group:
            yield _Batch(np.empty(0, rule.dtype), np.empty(0, np.int64), 0, missing=missing)
            continue
        texts = [plain_text(document.written) for document in group]
        encoded = tokenizer.encode_batch(texts, parse_special=parse)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64) + (len(before) + len(after))
        flat = np.concatenate([piece for ids in encoded for piece in (before, ids, after)])
        replaced = [text.count("\ufffd") if replace_errors and isinstance(text, str) else 0 for text in texts]
        # A replaced byte became three; counted as one, nothing divides by more bytes than there were.
        text_bytes = sum(_utf8_bytes(text) for text in texts) - 2 * sum(replaced)
        first = (
            [0] * len(texts)  # BOS spells nothing, and every token behind it is predicted
            if len(before)
            else [
                tokenizer.first_token_bytes(text, ids, parse_special=parse)
                for text, ids in zip(texts, encoded, strict=True)
            ]
        )
        ends = np.cumsum(lengths)
        targets = _answer_runs(tokenizer, rule, group, encoded, ends - lengths)
        yield _Batch(flat, ends, text_bytes, first, sum(count > 0 for count in replaced), missing, targets)


def _parses_special(rule: CorpusRule) -> bool:
    """Whether text that spells a special token becomes its id; a chat template writes them so."""
    return rule.special_tokens == "parse" or rule.messages_field is not None


def _answer_runs(
    tokenizer: Tokenizer,
    rule: CorpusRule,
    group: Sequence[_Placed],
    encoded: Sequence[Ids],
    starts: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """int64 [runs, 2] the scored ids of some documents, which begin at `starts`; none where all ids are scored."""
    if rule.targets is None:
        return NO_RUNS
    answered = [(each.written, each) for each in group if isinstance(each.written, Answered)]
    assert len(answered) == len(group), "a config that asks for answers says where they are"
    spans = tokenizer.token_spans([text.text for text, _ in answered], parse_special=_parses_special(rule))
    found = [NO_RUNS]
    for (text, document), ids, places, start in zip(answered, encoded, spans, starts, strict=True):
        with _named(document):
            found.append(_document_runs(rule, text, ids, places) + start)
    return np.concatenate(found)


def _document_runs(
    rule: CorpusRule, document: Answered, ids: Ids, spans: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """int64 [runs, 2] the scored ids of a document; the end-of-document id belongs to an answer that ends there."""
    if len(spans) != len(ids):
        raise InputError(
            f"the tokenizer cuts the text into {len(ids)} tokens or {len(spans)}, so which of them are answers is not "
            "certain; use another tokenizer, or `corpus.targets: all`"
        )
    runs = answer_runs(document, spans) + (rule.bos_id is not None)
    if rule.eos_id is not None and document.answers and document.answers[-1][1] == len(document):
        last = len(ids) + (rule.bos_id is not None)
        runs = np.concatenate([runs, [[last, last + 1]]])
    return runs


def _utf8_bytes(text: str | bytes) -> int:
    return len(text) if isinstance(text, bytes) else len(text.encode())


def _as_ids(token: int | None, rule: CorpusRule) -> Ids:
    return np.array([] if token is None else [token], dtype=rule.dtype)


def _grouped(documents: Iterable[_Placed | None], sizes: Sizes) -> Iterator[list[_Placed | None]]:
    """Documents in groups small enough to be tokenised at once."""
    group: list[_Placed | None] = []
    size = 0
    for document in documents:
        group.append(document)
        size += 0 if document is None else len(document.written)
        if size >= sizes.batch_bytes or len(group) >= sizes.batch_documents:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- stored ids ------------------------------------------------------------------------------------------------


def _stored_batches(source: IdSource[Fields], file: SourceFile, rule: CorpusRule, sizes: Sizes) -> Iterator[_Batch]:
    """Ids of one file, checked against the vocabulary and cut where its index says, or after each `eos_id`."""
    indexed = source.ends(file)
    if indexed is not None:
        yield from _indexed_batches(source, file, rule, sizes, indexed)
        return
    first = open_end = 0
    for ids in source.ids(file, sizes.block_bytes):
        check_ids(ids, first, file, rule.vocab_size)
        ends = np.flatnonzero(ids == rule.eos_id) + 1 if rule.eos_id is not None else np.empty(0, np.int64)
        first += len(ids)
        open_end = len(ids) - int(ends[-1]) if len(ends) else open_end + len(ids)
        yield _Batch(ids.astype(rule.dtype), ends, 0)
    if open_end or rule.eos_id is None:
        # The end of a file ends a document too.
        yield _Batch(np.empty(0, rule.dtype), np.zeros(1, np.int64), 0)


def _indexed_batches(
    source: IdSource[Fields], file: SourceFile, rule: CorpusRule, sizes: Sizes, ends: npt.NDArray[np.int64]
) -> Iterator[_Batch]:
    first = seen = 0
    for ids in source.ids(file, sizes.block_bytes):
        check_ids(ids, first, file, rule.vocab_size)
        until = int(np.searchsorted(ends, first + len(ids), side="right"))
        yield _Batch(ids.astype(rule.dtype), ends[seen:until] - first, 0)
        first, seen = first + len(ids), until
    if seen < len(ends):  # documents without an id in a file without one
        yield _Batch(np.empty(0, rule.dtype), ends[seen:] - first, 0)


# --- writing ---------------------------------------------------------------------------------------------------


def _write_ids(batches: Iterable[_Batch], dtype: np.dtype[Any], stream: IO[bytes]) -> _Written:
    """Stream ids out."""
    digest = hashlib.sha256()
    ends = [np.zeros(1, dtype=np.int64)]
    targets = [NO_RUNS]
    tokens = text_bytes = first_tokens = first_token = replaced = missing = 0
    for batch in batches:
        data = batch.ids.astype(dtype.newbyteorder("<"), copy=False).tobytes()
        stream.write(data)
        digest.update(data)
        ends.append(batch.ends + tokens)
        targets.append(batch.targets + tokens)
        if not tokens and len(batch.ids):
            # The part's first token is that of its first document with one.
            starts = np.concatenate([np.zeros(1, np.int64), batch.ends[:-1]])
            first = int(np.argmax(batch.ends > starts)) if len(batch.ends) else 0
            first_token = batch.first_bytes[first] if batch.first_bytes else 0
        tokens += len(batch.ids)
        text_bytes += batch.text_bytes
        first_tokens += sum(batch.first_bytes)
        replaced += batch.replaced
        missing += batch.missing
    return _Written(
        offsets=np.concatenate(ends),
        text_bytes=text_bytes,
        ids_sha256=digest.hexdigest(),
        first_tokens_bytes=first_tokens,
        first_token_bytes=first_token,
        replaced_documents=replaced,
        rows_without_text=missing,
        targets=np.concatenate(targets),
    )


def _write_array(filesystem: FileSystem, path: str, array: npt.NDArray[np.int64]) -> str:
    """Write an array as `.npy`; its SHA-256 (hex)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(filesystem, path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()
