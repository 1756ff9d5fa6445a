"""Where the bits of an artifact went, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tokenbound.compression.inspection import ArtifactReport

COMPARED = ("gzip", "zstd -19", "xz")
"""General compressors beside ours, where they were asked for."""


def artifact_view(report: ArtifactReport) -> RenderableType:
    """Totals, sections and tensors of an artifact."""
    return Group(
        Text(
            f"{report.num_bytes:,} bytes, {report.elements:,} weights, {report.bits_per_weight:.3f} bits per weight, "
            f"C(h) = {report.code_length_bits:,} bits"
        ),
        Text(f"sha256 {report.sha256}"),
        *_base(report),
        _shares("section", report.sections, report.num_bytes),
        _tensors(report),
    )


def _base(report: ArtifactReport) -> list[Text]:
    """Of a delta: what it is, and on which base."""
    base = report.base
    return [] if base is None else [Text(f"a delta ({base['kind']}) on the base with digest {base['sha256']}")]


def _shares(name: str, sizes: dict[str, int], total: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(name)
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for key, size in sizes.items():
        table.add_row(key, f"{size:,}", f"{size / total:.1%}")
    return table


def _tensors(report: ArtifactReport) -> Table:
    compared = any(row.gzip_bytes is not None for row in report.tensors)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for name in ("shape", "codec"):
        table.add_column(name, no_wrap=True)
    for name in ("bytes", "bits/weight", *(COMPARED if compared else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.tensors:
        others = (row.gzip_bytes, row.zstd_bytes, row.xz_bytes) if compared else ()
        table.add_row(
            Text(row.name.removesuffix(".weight")),  # not a string, which would be read for markup
            "x".join(map(str, row.shape)),
            row.codec,
            f"{row.num_bytes:,}",
            f"{row.bits_per_weight:.3f}",
            *("-" if size is None else f"{size:,}" for size in others),
        )
    return table
