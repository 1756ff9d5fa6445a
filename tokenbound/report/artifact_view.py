"""Where the bits of an artifact went, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tokenbound.compression.inspection import ArtifactReport, Share, TensorReport

COMPARED = ("gzip", "zstd-19", "xz")
"""General compressors beside ours, where they were asked for."""
NAME_WIDTH = 6
"""Least width of a column of names: where space is short, names fold before numbers are cut."""


def artifact_view(report: ArtifactReport) -> RenderableType:
    """Totals, sections, layers, codecs and tensors of an artifact."""
    compared = any(row.gzip_bytes is not None for row in report.tensors)
    return Group(
        Text(
            f"{report.num_bytes:,} bytes, {report.elements:,} weights, {report.bits_per_weight:.3f} bits per weight, "
            f"C(h) = {report.code_length_bits:,} bits"
        ),
        Text(f"sha256 {report.sha256}"),
        *_base(report),
        _sections(report),
        _shares("layer", report.layers, report.num_bytes, compared),
        _shares("codec", {**report.codecs, "all": report.total}, report.num_bytes, compared),
        _tensors(report, compared),
    )


def _base(report: ArtifactReport) -> list[Text]:
    """Of a delta: what it is, and on which base."""
    base = report.base
    return [] if base is None else [Text(f"a delta ({base['kind']}) on the base with digest {base['sha256']}")]


def _table(*names: str, numbers: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(names):
        table.add_column(name, overflow="fold", no_wrap=place > 0, min_width=0 if place else NAME_WIDTH)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _sections(report: ArtifactReport) -> Table:
    table = _table("section", numbers=("bytes", "share"))
    for name, size in report.sections.items():
        table.add_row(name, f"{size:,}", f"{size / report.num_bytes:.1%}")
    return table


def _shares(name: str, shares: Mapping[str, Share], total: int, compared: bool) -> Table:
    table = _table(name, numbers=("weights", "bytes", *(COMPARED if compared else ("share",)), "bits/weight"))
    for key, share in shares.items():
        table.add_row(
            Text(key),  # not a string, which would be read for markup
            f"{share.elements:,}",
            f"{share.num_bytes:,}",
            *(_others(share) if compared else (f"{share.num_bytes / total:.1%}",)),
            f"{share.bits_per_weight:.3f}",
        )
    return table


def _tensors(report: ArtifactReport, compared: bool) -> Table:
    table = _table("tensor", "shape", "codec", numbers=("bytes", *(COMPARED if compared else ()), "bits/weight"))
    for row in report.tensors:
        table.add_row(
            Text(row.name.removesuffix(".weight")),
            "x".join(map(str, row.shape)),
            row.codec,
            f"{row.num_bytes:,}",
            *(_others(row) if compared else ()),
            f"{row.bits_per_weight:.3f}",
        )
    return table


def _others(row: Share | TensorReport) -> list[str]:
    """What general codecs need."""
    sizes = (row.gzip_bytes, row.zstd_bytes, row.xz_bytes)
    return ["-" if size is None else f"{size:,}" for size in sizes]
