"""A model as one file whose bytes are its code length, and back.

    encode_artifact -> bytes -> decode_artifact (the model) or inspect_artifact (where the bits went)

Tensors are coded one by one and independently, so `tensor.encode_tensor` can run anywhere (one task per layer) and
`assemble_artifact` joins the results; peak memory is the model and what one tensor's coding needs. Same input,
same bytes. Everything that was chosen after seeing data is inside: architecture, settings, steps, weights and,
where it is to be counted, the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenbound.compression.bytestreams import decode_text, encode_text
from tokenbound.compression.codecs import CODECS
from tokenbound.compression.container import (
    ArtifactError,
    Buffer,
    Reader,
    Section,
    block,
    container_size,
    read_container,
    varint,
    write_container,
)
from tokenbound.compression.decode_pool import decode_tensors
from tokenbound.compression.methods import CompressionMethod, settings_record
from tokenbound.compression.tensor import CodedTensor, decoded_bytes, encode_tensor, may_repeat
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration

MAX_EXPANSION = 4096
"""Decoded bytes that one byte of an artifact may stand for. Trained weights are far below (bf16 at 1 bit: 16); the
limit is what keeps a few hostile bytes from asking for all memory."""
FREE_BYTES = 1 << 24
"""Decoded bytes that any artifact may have, however short."""
MAX_RANK = 8
MAX_TENSORS = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """A decoded artifact.

    Attributes:
        architecture: The Hugging Face config as JSON data.
        tensors: By name, on the CPU. Tied tensors stand once.
        settings: The quantizer's settings.
        tokenizer: The tokenizer's canonical bytes, where it is counted.
        sha256: Hex digest of all bytes: the artifact's identity.
        num_bytes: What the code length is made of.
        base: Of a delta artifact (see `delta`): its kind and the digest of the base that it changes.
    """

    architecture: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    tokenizer: bytes | None
    sha256: str
    num_bytes: int
    base: dict[str, Any] | None = None


def encode_artifact(
    architecture: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    settings: CompressionMethod,
    *,
    tokenizer: bytes | None = None,
    calibration: Calibration | None = None,
) -> bytes:
    """Encode a model.

    Args:
        architecture: Its config, as JSON data.
        tensors: Its weights and buffers; of tied tensors one.
        settings: A method of compression with its settings.
        tokenizer: Bytes to be counted with the model, or None if the tokenizer is declared given.
        calibration: For the methods that need one.

    Raises:
        InputError: a non-finite weight, an unknown dtype, a method without its calibration; by name.

    >>> import torch
    >>> from tokenbound.config.compress import RoundToNearestSettings
    >>> model = {"w": torch.linspace(-1, 1, 65536).reshape(256, 256)}
    >>> len(encode_artifact({"model_type": "x"}, model, RoundToNearestSettings(step=0.5))) < 65536 // 4
    True
    """
    coded = (encode_tensor(name, tensors[name], settings, calibration) for name in sorted(tensors))
    return assemble_artifact(architecture, coded, settings, tokenizer=tokenizer)


def assemble_artifact(
    architecture: Mapping[str, Any],
    coded: Iterable[CodedTensor],
    settings: CompressionMethod,
    *,
    tokenizer: bytes | None = None,
    base: Mapping[str, Any] | None = None,
) -> bytes:
    """`join_artifact` with the settings of a method, and of a plugin with its distribution and version."""
    return join_artifact(architecture, coded, settings_record(settings), tokenizer=tokenizer, base=base)


def join_artifact(
    architecture: Mapping[str, Any],
    coded: Iterable[CodedTensor],
    settings: Mapping[str, Any],
    *,
    tokenizer: bytes | None = None,
    base: Mapping[str, Any] | None = None,
) -> bytes:
    """Join coded tensors into an artifact, sorted by name.

    Args:
        architecture: The model's config, as JSON data.
        coded: From `encode_tensor`, in any order.
        settings: The quantizer's settings, as JSON data.
        tokenizer: Bytes to be counted with the model, or None.
        base: Of a delta: its kind and the digest of its base.

    Raises:
        InputError: a name stands twice or holds control characters, or the tensors are so repetitive that the decoder
            would refuse their expansion.
    """
    payloads, entries = {}, []
    for item in coded:
        entries.append(IndexEntry.of(item))
        payloads[item.name] = item.payload
    out = BytesIO()
    for part in artifact_parts(
        architecture, entries, lambda entry: payloads.pop(entry.name), settings, tokenizer=tokenizer, base=base
    ):
        out.write(part)
    return out.getvalue()


@dataclass(frozen=True)
class IndexEntry:
    """A coded tensor without its code: what the index says of it, and by what a repeat of it is found."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    codec: int
    num_bytes: int
    """Of its code."""
    sha256: bytes
    """Of its code."""

    @staticmethod
    def of(item: CodedTensor) -> IndexEntry:
        """The entry of a tensor."""
        digest = hashlib.sha256(item.payload).digest()
        return IndexEntry(item.name, item.shape, item.dtype, item.codec, len(item.payload), digest)


def artifact_parts(
    architecture: Mapping[str, Any],
    entries: Iterable[IndexEntry],
    payload: Callable[[IndexEntry], bytes | memoryview],
    settings: Mapping[str, Any],
    *,
    tokenizer: bytes | None = None,
    base: Mapping[str, Any] | None = None,
) -> Iterator[bytes | memoryview]:
    """The bytes of an artifact, part after part: of the codes of its tensors one is held at a time.

    Args:
        architecture: The model's config, as JSON data.
        entries: Of every tensor, in any order.
        payload: Gives the code of an entry; asked once, in the order of the names, and not for repeats.
        settings: The quantizer's settings, as JSON data.
        tokenizer: Bytes to be counted with the model, or None.
        base: Of a delta: its kind and the digest of its base.

    Raises:
        InputError: a name stands twice or holds control characters, or the tensors are so repetitive that the decoder
            would refuse their expansion; before the first part.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name for entry in ordered]
    if len(set(names)) != len(names) or not all(name and name.isprintable() for name in names):
        raise InputError("tensor names must be unique, not empty, and without newlines or other control characters")
    distances = _repeats(ordered)
    stored = [entry for entry, back in zip(ordered, distances, strict=True) if not back]
    sections = {
        "architecture": Section.of(encode_text(_canonical_json(architecture))),
        "settings": Section.of(encode_text(_canonical_json(settings))),
        "index": Section.of(encode_text(_write_index(ordered, distances))),
        "tensors": Section(sum(entry.num_bytes for entry in stored), map(payload, stored)),
    }
    if tokenizer is not None:
        sections["tokenizer"] = Section.of(encode_text(tokenizer))
    if base is not None:
        sections["base"] = Section.of(encode_text(_canonical_json(base)))
    expanded = sum(decoded_bytes(entry.shape, entry.dtype) for entry in ordered)
    _check_expansion(expanded, container_size(sections), error=InputError)
    yield from write_container(sections)


def _canonical_json(value: object) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()  # fails on halves of surrogate pairs
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the architecture is not plain JSON data: {error}") from None


def _check_expansion(decoded: int, num_bytes: int, error: type[InputError]) -> None:
    if decoded > FREE_BYTES + MAX_EXPANSION * num_bytes:
        raise error(
            f"artifact: {num_bytes} bytes declare tensors of {decoded} bytes, more than {MAX_EXPANSION} for each byte"
        )


# The index: names, dtypes, codecs, ranks, sizes, payload lengths, each as one column. A length of zero says that the
# tensor is the same as an earlier one; how many tensors back that one stands is a last column, there if it is needed.


def _repeats(entries: Sequence[IndexEntry]) -> list[int]:
    """Of each tensor: how many tensors back the same one stood last, or 0."""
    last: dict[tuple[Any, ...], int] = {}
    distances = []
    for place, entry in enumerate(entries):
        key = (entry.shape, entry.dtype, entry.codec, entry.sha256)
        is_worth_it = entry.num_bytes > 1 and may_repeat(entry.num_bytes, entry.shape, entry.dtype)
        distances.append(place - last[key] if is_worth_it and key in last else 0)
        last[key] = place
    return distances


def _write_index(entries: Sequence[IndexEntry], distances: Sequence[int]) -> bytes:
    columns = [
        block("\n".join(entry.name for entry in entries).encode()),
        varint(len(entries)),
        bytes(entry.dtype for entry in entries),
        bytes(entry.codec for entry in entries),
        bytes(len(entry.shape) for entry in entries),
        b"".join(varint(size) for entry in entries for size in entry.shape),
        b"".join(varint(0 if back else entry.num_bytes) for entry, back in zip(entries, distances, strict=True)),
        b"".join(varint(back) for back in distances if back),
    ]
    return b"".join(columns)


def _read_index(text: bytes, payloads: memoryview) -> list[CodedTensor]:
    reader = Reader(text, "the index of tensors")
    names = _decode_names(bytes(reader.block()))
    count = reader.varint(MAX_TENSORS)
    if len(names) != count:
        raise ArtifactError(f"artifact: the index has {len(names)} names for {count} tensors")
    dtypes, codecs, ranks = (bytes(reader.take(count)) for _ in range(3))
    if max(ranks, default=0) > MAX_RANK:
        raise ArtifactError(f"artifact: a tensor has {max(ranks)} axes; at most {MAX_RANK} are allowed")
    shapes = [tuple(reader.varint(1 << 40) for _ in range(rank)) for rank in ranks]
    lengths = [reader.varint() for _ in range(count)]
    stream = Reader(payloads, "the tensors")
    coded: list[CodedTensor] = []
    for name, shape, dtype, codec, length in zip(names, shapes, dtypes, codecs, lengths, strict=True):
        item = CodedTensor(name, shape, dtype, codec, stream.take(length))
        coded.append(item if length else _repeated(item, coded, reader.varint()))
    reader.finish()
    stream.finish()
    return coded


def _repeated(item: CodedTensor, before: list[CodedTensor], back: int) -> CodedTensor:
    """A tensor that has no code of its own, with that of the tensor so many places before it."""
    if not 1 <= back <= len(before):
        raise ArtifactError(f"artifact: tensor {item.name!r} repeats one that does not stand before it")
    source = before[-back]
    if (item.shape, item.dtype, item.codec) != (source.shape, source.dtype, source.codec):
        raise ArtifactError(
            f"artifact: tensor {item.name!r} repeats {source.name!r}, which is of another kind or shape"
        )
    if not source.may_repeat:
        raise ArtifactError(f"artifact: tensor {item.name!r} repeats a code longer than the tensor that it stands for")
    return replace(item, payload=source.payload, repeats=source.repeats or source.name)


def _decode_names(text: bytes) -> list[str]:
    try:
        names = text.decode().split("\n") if text else []
    except UnicodeDecodeError as error:
        raise ArtifactError("artifact: tensor names are not UTF-8") from error
    if not all(name and name.isprintable() for name in names):
        raise ArtifactError("artifact: a tensor name is empty or holds control characters")
    if any(a >= b for a, b in pairwise(names)):
        raise ArtifactError("artifact: tensor names are not in strictly rising order")
    return names


def _read_json(payload: memoryview, what: str) -> dict[str, Any]:
    text = decode_text(payload, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact: {what} is not JSON") from error
    if not isinstance(value, dict) or not _is_canonical(value, text):
        raise ArtifactError(f"artifact: {what} is not a canonical JSON object")
    return value


def _is_canonical(value: object, text: bytes) -> bool:
    try:
        return _canonical_json(value) == text
    except InputError:
        return False


def _read_base(payload: memoryview) -> dict[str, Any]:
    base = _read_json(payload, "the base")
    if not isinstance(base.get("kind"), str) or not re.fullmatch("[0-9a-f]{64}", str(base.get("sha256"))):
        raise ArtifactError("artifact: the base section does not name a base")
    return base


@dataclass(frozen=True)
class ParsedArtifact:
    """An artifact taken apart but not decoded: what `decode_tensor` and the inspector work on."""

    architecture: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: bytes | None
    coded: tuple[CodedTensor, ...]
    section_bytes: dict[str, int]
    base: dict[str, Any] | None


def parse_artifact(data: Buffer, body_sha256: bytes | None = None) -> ParsedArtifact:
    """Check an artifact's form and split it; cheap, and tensors can then be decoded one by one or in parallel.

    Args:
        data: Its bytes, in memory or mapped; of tensors nothing is copied.
        body_sha256: See `read_container`.

    Raises:
        ArtifactError: not an artifact, damaged, forged, or of another version.

    >>> from tokenbound.demo import demo_artifact
    >>> sum(item.decoded_bytes for item in parse_artifact(demo_artifact()).coded) // 886_016  # bytes per weight
    4
    """
    sections = read_container(data, body_sha256)
    missing = {"architecture", "settings", "index", "tensors"} - set(sections)
    if missing:
        raise ArtifactError(f"artifact: section {', '.join(sorted(missing))} is missing")
    coded = _read_index(decode_text(sections["index"], "the index of tensors"), sections["tensors"])
    for item in coded:
        if item.codec not in CODECS:
            raise ArtifactError(f"artifact: tensor {item.name!r} has codec {item.codec}, unknown to this version")
    _check_expansion(sum(item.decoded_bytes for item in coded), len(data), error=ArtifactError)
    tokenizer = decode_text(sections["tokenizer"], "the tokenizer") if "tokenizer" in sections else None
    return ParsedArtifact(
        _read_json(sections["architecture"], "the architecture"),
        _read_json(sections["settings"], "the settings"),
        tokenizer,
        tuple(coded),
        {name: len(payload) for name, payload in sections.items()},
        _read_base(sections["base"]) if "base" in sections else None,
    )


def decode_artifact(data: bytes, *, workers: int = 1) -> Artifact:
    """Decode an artifact, bit for bit the same on every machine.

    Args:
        data: Its bytes.
        workers: Processes that share the tensors, where there is enough to decode.

    Raises:
        ArtifactError: not an artifact, damaged, forged, or of another version.

    >>> import torch
    >>> from tokenbound.config.compress import LosslessSettings
    >>> data = encode_artifact({"model_type": "x"}, {"w": torch.ones(2, 3)}, LosslessSettings())
    >>> decode_artifact(data).tensors["w"].sum().item()
    6.0
    """
    parsed = parse_artifact(data)
    tensors = decode_tensors(parsed.coded, workers)
    digest = hashlib.sha256(data).hexdigest()
    return Artifact(parsed.architecture, tensors, parsed.settings, parsed.tokenizer, digest, len(data), parsed.base)
