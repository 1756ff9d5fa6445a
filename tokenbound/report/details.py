"""What the plots of a report need beyond the certificate: small arrays, computed once from merged evidence.

Nothing here is a bound. Curves come from the evidence's histogram and are shifted so that they pass through the printed
value; elsewhere they say what the choice of the grid point looked like, or what another number of tokens would give.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tokenbound.bounds.claim import Claim, Line
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import LN2
from tokenbound.bounds.curves import EvidenceView, LineCurves, Sweep
from tokenbound.bounds.evidence import ENTROPY_OCTAVES, NLL_OCTAVES, Evidence, bin_centres, merge_evidence
from tokenbound.bounds.lines import bound_named
from tokenbound.errors import IncompleteError
from tokenbound.report.words import line_name
from tokenbound.store.losses import Losses
from tokenbound.store.run import ARTIFACT, RunDirectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokenbound.certificate.record import CertificateRecord
    from tokenbound.compression.inspection import ArtifactReport

WHAT_IF_RATE = 0.003
"""kappa/m at which the size plot quotes a what-if: from here on the code length costs little."""

MAX_PARTS = 14
"""Rows of the artifact's plot; further layers are shown in ranges."""

POSITION_SHARDS = 8
"""Shards read for the plot by position, spread over the run: their means differ from those of all by little."""

_TENSOR_KINDS = (
    ("norm", re.compile(r"norm|(^|\.)ln(_|\d|\.)", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|wte|wpe|lm_head", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj", re.IGNORECASE)),
    ("feed-forward", re.compile(r"mlp|ffn|feed|expert|fc\d|(up|down|gate)_proj", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `chosen` is the point that the certificate prints."""

    label: str
    """Method and, for errors, k."""
    x: tuple[float, ...]
    y: tuple[float, ...]
    chosen: tuple[float, float] | None = None


@dataclass(frozen=True)
class WhatIf:
    """The best line's value for the same losses and a larger m. Not a bound."""

    num_tokens: float
    """m at which kappa/m is `WHAT_IF_RATE`."""
    value: float
    """Bits per token, or an error rate."""


@dataclass(frozen=True)
class LossDistribution:
    """Tokens and their share of the total loss by size of the loss."""

    edges_bits: tuple[float, ...]
    """[B + 1] limits of the bins."""
    token_share: tuple[float, ...]
    """[B] share of the tokens."""
    loss_share: tuple[float, ...]
    """[B] share of the summed loss."""


@dataclass(frozen=True)
class EntropyBins:
    """Mean loss by how unsure the model was."""

    entropy_bits: tuple[float, ...]
    """[B] mean predictive entropy of a bin."""
    loss_bits: tuple[float, ...]
    """[B] mean unsmoothed loss of its tokens."""
    token_share: tuple[float, ...]
    """[B] share of the tokens."""


@dataclass(frozen=True)
class PositionLosses:
    """Sums by place among a window's scored tokens; addition merges."""

    nats: tuple[float, ...]
    """[L] summed unsmoothed nll."""
    tokens: tuple[int, ...]
    """[L] tokens."""

    @classmethod
    def of(cls, parts: Iterable[Losses]) -> PositionLosses:
        """Sum over windows; those without finite losses are left out.

        Args:
            parts: losses with `nll` and a column that is never null, of any shards.
        """
        nats, tokens = np.zeros(0), np.zeros(0, np.int64)
        for part in parts:
            place = np.arange(part.num_tokens) - np.repeat(part.offsets[:-1], part.window_lengths)
            keep = ~np.repeat(part.unscored, part.window_lengths)
            size = max(len(nats), int(part.window_lengths.max(initial=0)))
            nats = _padded(nats, size) + np.bincount(place[keep], part.nll[keep], minlength=size)
            tokens = _padded(tokens, size) + np.bincount(place[keep], minlength=size)
        return cls(tuple(nats.tolist()), tuple(int(count) for count in tokens))


T = TypeVar("T", bound=np.generic)


def _padded(values: NDArray[T], size: int) -> NDArray[T]:
    return np.pad(values, (0, size - len(values)))


@dataclass(frozen=True)
class PositionBins:
    """Mean loss by place in the window, in bins that grow with the place."""

    place: tuple[float, ...]
    """[B] mean place of a bin, from 1."""
    loss_bits: tuple[float, ...]
    """[B] mean unsmoothed loss."""
    num_tokens: int
    """Tokens looked at."""


@dataclass(frozen=True)
class ArtifactPart:
    """One row of the artifact's plot."""

    name: str
    """Layer, range of layers, or section."""
    bytes_by_kind: Mapping[str, int]
    """Bytes of attention, feed-forward, norm, embedding and other tensors, or of what is no tensor."""
    elements: int
    """Weights in it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True)
class ReportDetails:
    """Everything that the plots of a report show and the certificate does not hold."""

    size_curves: tuple[Curve, ...] = ()
    """Bound against m for the same losses: a what-if away from the printed point."""
    alpha_curves: tuple[Curve, ...] = ()
    """Bound against the smoothing weight, everything else re-chosen."""
    stake_curves: tuple[Curve, ...] = ()
    """Bound against lambda (per bit) at the chosen smoothing weight."""
    what_if: WhatIf | None = None
    distribution: LossDistribution | None = None
    entropy: EntropyBins | None = None
    position: PositionBins | None = None
    artifact: tuple[ArtifactPart, ...] = ()
    smoothed: bool = False
    """The distribution is of smoothed losses, because the model smooths by itself."""


def report_details(
    evidence: Evidence,
    certificate: CertificateRecord,
    *,
    artifact: ArtifactReport | None = None,
    positions: PositionLosses | None = None,
) -> ReportDetails:
    """The arrays behind a report's plots.

    Args:
        evidence: merged, of the scored tokens.
        certificate: what was certified from them.
        artifact: where the artifact's bytes went; None leaves its plot out.
        positions: losses by place in the window; None leaves that plot out.
    """
    curves = _Curves(evidence, certificate) if evidence.num_tokens else None
    return ReportDetails(
        size_curves=curves.size() if curves else (),
        alpha_curves=curves.alpha() if curves else (),
        stake_curves=curves.stake() if curves else (),
        what_if=curves.what_if() if curves else None,
        distribution=_distribution(evidence),
        entropy=_entropy_bins(evidence),
        position=_position_bins(positions) if positions else None,
        artifact=_artifact_parts(artifact) if artifact else (),
        smoothed=evidence.alpha_min is not None,
    )


def run_details(run: RunDirectory, certificate: CertificateRecord) -> ReportDetails:
    """The details of a finished run, from its commit records, some of its losses and its artifact.

    Raises:
        IncompleteError: a shard is not committed.
        MismatchError: a record, the losses or the artifact are damaged.
    """
    from tokenbound.compression.inspection import inspect_artifact

    shards = range(certificate.num_shards)
    records = run.committed(shards)
    if len(records) < len(shards):
        raise IncompleteError(f"{run.uri}: {len(shards) - len(records)} of {len(shards)} shards are not committed")
    # One at a time: histograms of thousands of shards together would be most of the driver's memory.
    parts = (Evidence.from_json(json.dumps(records[shard].evidence)) for shard in shards)
    evidence = reduce(lambda merged, part: merge_evidence([merged, part]), parts)
    step = max(1, math.ceil(len(shards) / POSITION_SHARDS))
    columns = ("nll", "position")  # an unscored window has no losses: where it ends is in another column
    positions = PositionLosses.of(run.losses(records[shard], columns) for shard in shards[::step])
    artifact = inspect_artifact(run.read(ARTIFACT)) if run.exists(ARTIFACT) else None
    return report_details(evidence, certificate, artifact=artifact, positions=positions)


class _Curves:
    """The printed lines' values at other sizes, smoothing weights and stakes, by the evidence."""

    def __init__(self, evidence: Evidence, certificate: CertificateRecord) -> None:
        lines = [Line.from_dict(row) for row in certificate.bounds if row["value"] is not None]
        self.shown = [line for line in lines if line.bounds_risk] or lines
        view = EvidenceView(evidence, _claim(certificate, evidence), certificate.sampling_plan())
        self.num_tokens = certificate.num_tokens
        self.curves = [bound_named(line.method).curves(line, view) for line in self.shown]

    def alpha(self) -> tuple[Curve, ...]:
        """Value against alpha; none where the model smooths by itself."""
        pairs = zip(self.shown, self.curves, strict=True)
        return tuple(_through(line, curves.by_alpha) for line, curves in pairs if curves.by_alpha is not None)

    def stake(self) -> tuple[Curve, ...]:
        """Value against lambda at the chosen alpha."""
        pairs = zip(self.shown, self.curves, strict=True)
        return tuple(_through(line, curves.by_stake) for line, curves in pairs if curves.by_stake is not None)

    def size(self) -> tuple[Curve, ...]:
        """Value against m."""
        sizes = self._sizes()
        printed = float(self.num_tokens)
        return tuple(
            Curve(line_name(line), sizes, _at(line, curves, self.num_tokens, sizes), (printed, _value(line)))
            for line, curves in zip(self.shown, self.curves, strict=True)
        )

    def what_if(self) -> WhatIf | None:
        """The best line at kappa/m = WHAT_IF_RATE, where that takes more tokens."""
        pairs = zip(self.shown, self.curves, strict=True)
        best, curves = min(pairs, key=lambda pair: _value(pair[0]), default=(None, None))
        if best is None or curves is None or best.kappa_nats / self.num_tokens <= WHAT_IF_RATE:
            return None
        tokens = best.kappa_nats / WHAT_IF_RATE
        return WhatIf(tokens, _at(best, curves, self.num_tokens, (tokens,))[0])

    def _sizes(self) -> tuple[float, ...]:
        m = self.num_tokens
        last = max([m * 64.0, *(line.kappa_nats / WHAT_IF_RATE * 2 for line in self.shown)])
        grid = np.geomspace(max(m / 32, 16.0), last, 49)
        return tuple(sorted({*grid.tolist(), float(m)}))


def _claim(certificate: CertificateRecord, evidence: Evidence) -> Claim:
    return replace(
        certificate.claim(),
        has_entropy=evidence.has_entropy,
        has_alpha=evidence.alpha_min is not None,
        alpha_min=evidence.alpha_min,
    )


def _at(line: Line, curves: LineCurves, num_tokens: int, sizes: Sequence[float]) -> tuple[float, ...]:
    """Values of a line at other sizes, shifted to pass through the printed one."""
    shift = _value(line) - curves.at_size(float(num_tokens))
    return tuple(curves.at_size(size) + shift for size in sizes)


def _through(line: Line, sweep: Sweep) -> Curve:
    """A curve shifted to pass through the printed value at its chosen point."""
    shifted = sweep.values + (_value(line) - float(sweep.values[sweep.chosen]))
    return Curve(line_name(line), sweep.x, tuple(shifted.tolist()), (float(sweep.x[sweep.chosen]), _value(line)))


def _value(line: Line) -> float:
    return float(line.value or 0.0)


def _edges(octaves: tuple[int, int]) -> Floats:
    """Half-octave limits in bits of the histogram's bins: 0, 2^low, 2^(low + 1/2), .. 2^high, 2^(high + 1)."""
    low, high = octaves
    mantissas = np.array([1.0, 1.5])
    inner = (2.0 ** np.arange(low, high)[:, None] * mantissas).reshape(-1)
    return np.concatenate([[0.0], inner, [2.0**high, 2.0 ** (high + 1)]]) / LN2


def _distribution(evidence: Evidence) -> LossDistribution | None:
    counts = evidence.histogram.sum(axis=1)
    total = int(counts.sum())
    if not total:
        return None
    loss = counts * bin_centres(NLL_OCTAVES)
    edges, tokens = _edges(NLL_OCTAVES), _half_octaves(counts) / total
    losses = _half_octaves(loss) / max(float(loss.sum()), 1e-300)
    filled = np.flatnonzero(tokens)
    first, last = int(filled[0]), int(filled[-1]) + 1
    return LossDistribution(
        tuple(edges[first : last + 1].tolist()),
        tuple(tokens[first:last].tolist()),
        tuple(losses[first:last].tolist()),
    )


def _half_octaves(values: NDArray[np.number]) -> Floats:
    """Eight bins per octave added up to two."""
    inner = np.asarray(values[1:-1], np.float64).reshape(-1, 4).sum(axis=1)
    return np.concatenate([values[:1], inner, values[-1:]])


def _entropy_bins(evidence: Evidence) -> EntropyBins | None:
    counts = evidence.histogram.sum(axis=0).astype(np.float64)
    if not evidence.has_entropy or not counts.sum():
        return None
    losses = bin_centres(NLL_OCTAVES) @ evidence.histogram
    kept = counts >= max(20.0, 1e-5 * counts.sum())
    centres = bin_centres(ENTROPY_OCTAVES)
    return EntropyBins(
        tuple((centres[kept] / LN2).tolist()),
        tuple((losses[kept] / counts[kept] / LN2).tolist()),
        tuple((counts[kept] / counts.sum()).tolist()),
    )


def _position_bins(positions: PositionLosses) -> PositionBins | None:
    nats, tokens = np.array(positions.nats), np.array(positions.tokens)
    if not tokens.sum():
        return None
    edges = np.unique(np.concatenate([[0], np.round(np.geomspace(1, len(tokens), 41)).astype(int)]))
    starts = edges[:-1]
    counts = np.add.reduceat(tokens, starts)
    places = np.add.reduceat(tokens * np.arange(1, len(tokens) + 1), starts)
    kept = counts > 0
    losses = np.add.reduceat(nats, starts)[kept] / counts[kept] / LN2
    return PositionBins(tuple((places[kept] / counts[kept]).tolist()), tuple(losses.tolist()), int(tokens.sum()))


def _artifact_parts(report: ArtifactReport) -> tuple[ArtifactPart, ...]:
    layers: dict[str, ArtifactPart] = {}
    for tensor in report.tensors:
        part = layers.get(tensor.layer, ArtifactPart(tensor.layer, {}, 0))
        kind = _kind(tensor.name, tensor.layer)
        sizes = {**part.bytes_by_kind, kind: part.bytes_by_kind.get(kind, 0) + tensor.num_bytes}
        layers[tensor.layer] = ArtifactPart(part.name, sizes, part.elements + tensor.elements)
    tensors = sum(part.num_bytes for part in layers.values())
    rows = _in_ranges(list(layers.values()), MAX_PARTS - 1)
    rest = ArtifactPart("everything else", {"no tensor": report.num_bytes - tensors}, 0)
    return (*rows, rest) if rest.num_bytes else tuple(rows)


def _kind(name: str, layer: str) -> str:
    """Kind of a tensor, by its name inside its layer, else by the layer's."""
    inner = name.removeprefix(layer)
    for text in (inner, layer):
        for kind, pattern in _TENSOR_KINDS:
            if pattern.search(text):
                return kind
    return "other tensors"


def _in_ranges(parts: list[ArtifactPart], limit: int) -> list[ArtifactPart]:
    """At most so many rows: numbered layers in ranges of equal length, else the smallest neighbours together."""
    length = 1
    rows = parts
    while len(rows) > limit and length < len(parts):
        length += 1
        rows = _ranges_of(parts, length)
    while len(rows) > limit:
        sums = [left.num_bytes + right.num_bytes for left, right in itertools.pairwise(rows)]
        at = sums.index(min(sums))
        rows = [*rows[:at], _joined(rows[at : at + 2]), *rows[at + 2 :]]
    return rows


def _ranges_of(parts: list[ArtifactPart], length: int) -> list[ArtifactPart]:
    rows: list[ArtifactPart] = []
    for prefix, group in itertools.groupby(parts, key=lambda part: _numbered(part.name)[0]):
        run = list(group)
        step = length if prefix else 1
        rows += [_joined(run[start : start + step]) for start in range(0, len(run), step)]
    return rows


def _numbered(name: str) -> tuple[str, str]:
    """Name of a numbered layer without its number, and the number; the first is empty where there is none."""
    prefix, _, number = name.rpartition(".")
    return (prefix, number) if number.isdigit() else ("", name)


def _joined(parts: Sequence[ArtifactPart]) -> ArtifactPart:
    kinds: dict[str, int] = {}
    for part in parts:
        for kind, size in part.bytes_by_kind.items():
            kinds[kind] = kinds.get(kind, 0) + size
    return ArtifactPart(_range_name(parts[0].name, parts[-1].name), kinds, sum(part.elements for part in parts))


def _range_name(first: str, last: str) -> str:
    """One name for several rows.

    >>> _range_name("model.layers.2", "model.layers.3")
    'model.layers.2-3'
    """
    if first == last:
        return first
    (prefix, start), (other, stop) = _numbered(first), _numbered(last)
    return f"{prefix}.{start}-{stop}" if prefix and prefix == other else f"{first} .. {last}"
