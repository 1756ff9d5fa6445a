"""Where an artifact's bits went: by section, by tensor, by layer, and what general codecs would have needed."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tokenbound.bounds.codes import artifact_code_length_bits
from tokenbound.compression.artifact_file import ArtifactFile, as_artifact
from tokenbound.compression.bytestreams import xz_filters, zstd_level
from tokenbound.compression.codecs import CODECS
from tokenbound.compression.dtypes import dtype_label, dtype_of
from tokenbound.compression.tensor import CodedTensor

COMPARE_LIMIT_BYTES = 1 << 26
"""General codecs are run on tensors of up to this many plain bytes; beyond it they take too long to be looked at."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor's share.

    Attributes:
        bits_per_weight: 8 * num_bytes / elements.
        gzip_bytes, zstd_bytes, xz_bytes: What these codecs need for the same information (of a quantized tensor its
            integers, of an exact one its bytes); None unless a comparison was asked for.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    elements: int
    num_bytes: int
    bits_per_weight: float
    gzip_bytes: int | None = None
    zstd_bytes: int | None = None
    xz_bytes: int | None = None


@dataclass(frozen=True)
class Share:
    """What some of the tensors need together: those of a layer, or of a codec.

    Attributes:
        tensors: How many they are.
        gzip_bytes, zstd_bytes, xz_bytes: Sums of theirs; None unless every tensor that is not empty has them.
    """

    tensors: int
    elements: int
    num_bytes: int
    bits_per_weight: float
    gzip_bytes: int | None = None
    zstd_bytes: int | None = None
    xz_bytes: int | None = None

    @staticmethod
    def of(rows: Iterable[TensorReport]) -> Share:
        """Sum over tensors."""
        chosen = list(rows)
        elements, size = sum(row.elements for row in chosen), sum(row.num_bytes for row in chosen)
        filled = [row for row in chosen if row.elements]
        general = (_sum(getattr(row, name) for row in filled) for name in ("gzip_bytes", "zstd_bytes", "xz_bytes"))
        return Share(len(chosen), elements, size, 8 * size / elements if elements else 0.0, *general)


def _sum(sizes: Iterable[int | None]) -> int | None:
    found = list(sizes)
    known = [size for size in found if size is not None]
    return sum(known) if known and len(known) == len(found) else None


@dataclass(frozen=True)
class ArtifactReport:
    """What `tokenbound inspect` prints.

    Attributes:
        code_length_bits: 8 * num_bytes plus the Elias-delta length of that number: what the artifact alone costs.
        sections: Payload bytes by section, and `frame` for magic, lengths and digest; their sum is `num_bytes`.
        layers: Tensors by layer: numbered blocks, and modules outside of them.
        codecs: Tensors by wire form.
        total: All tensors.
        base: Of a delta artifact: its kind and its base's digest.
    """

    sha256: str
    num_bytes: int
    code_length_bits: int
    elements: int
    bits_per_weight: float
    architecture: dict[str, Any]
    settings: dict[str, Any]
    sections: dict[str, int]
    layers: dict[str, Share]
    codecs: dict[str, Share]
    total: Share
    tensors: tuple[TensorReport, ...]
    base: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def inspect_artifact(artifact: ArtifactFile | bytes, *, compare: bool = False) -> ArtifactReport:
    """Account for every byte of an artifact.

    Args:
        artifact: Open, or its bytes.
        compare: Also run gzip, zstd -19 and xz on what each tensor says (slow for large models).

    Raises:
        ArtifactError: not an artifact, damaged, or of another version.

    >>> from tokenbound.demo import demo_artifact
    >>> report = inspect_artifact(demo_artifact())
    >>> sum(report.sections.values()) == report.num_bytes == len(demo_artifact())
    True
    """
    opened = as_artifact(artifact)
    parsed, size = opened.parsed, opened.num_bytes
    rows = tuple(_tensor_report(opened, item, compare=compare) for item in parsed.coded)
    elements = sum(row.elements for row in rows)
    sections = {**parsed.section_bytes, "frame": size - sum(parsed.section_bytes.values())}
    return ArtifactReport(
        opened.sha256,
        size,
        artifact_code_length_bits(size),
        elements,
        8 * size / elements if elements else 0.0,
        parsed.architecture,
        parsed.settings,
        sections,
        _shares(rows, lambda row: row.layer),
        _shares(rows, lambda row: row.codec),
        Share.of(rows),
        rows,
        parsed.base,
    )


def layer_of(name: str) -> str:
    """The repeated block that a tensor belongs to: its name up to the first number, or its module.

    >>> layer_of("model.layers.11.mlp.up_proj.weight")
    'model.layers.11'
    >>> layer_of("model.embed_tokens.weight")
    'model.embed_tokens'
    """
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def _shares(rows: Iterable[TensorReport], key: Callable[[TensorReport], str]) -> dict[str, Share]:
    groups: dict[str, list[TensorReport]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: Share.of(group) for name, group in groups.items()}


def _tensor_report(artifact: ArtifactFile, item: CodedTensor, *, compare: bool) -> TensorReport:
    size = item.stored_bytes
    others = _general_sizes(item) if compare else (None, None, None)
    artifact.release(item)
    return TensorReport(
        item.name,
        layer_of(item.name),
        item.shape,
        dtype_label(item.dtype),
        CODECS[item.codec].name,
        item.elements,
        size,
        8 * size / item.elements if item.elements else 0.0,
        *others,
    )


def _general_sizes(item: CodedTensor) -> tuple[int | None, int | None, int | None]:
    plain = CODECS[item.codec].plain(memoryview(item.payload), item.shape, dtype_of(item.dtype))
    if not plain or len(plain) > COMPARE_LIMIT_BYTES:
        return None, None, None
    zstd = len(zstd_level(19).compress(plain, asbytes=True))
    return len(gzip.compress(plain, 9, mtime=0)), zstd, xz_bytes(plain)


def xz_bytes(plain: bytes) -> int:
    """Length under `xz -9e`; the window is no wider than the data, for full tables take longer than a small tensor."""
    return len(lzma.compress(plain, filters=xz_filters(len(plain))))
