"""Everything that one reduction tunes, sums and prints: the lines of a claim, of its companions, and those apart.

Bounds that share a pass over the losses are evaluated together (:mod:`~tokenbound.bounds.exact`), for the claim and for
the claims beside it of a model with a smoothing head. Every other bound has a tuning and sums of its own, kept here
under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from tokenbound.bounds.certify import certify
from tokenbound.bounds.choice import choose_tunings
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.columns import Piece
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.exact import LineSums, line_sums, merge_sums
from tokenbound.bounds.lines.base import AnySeparateBound, separate_bound, token_bound
from tokenbound.bounds.sampled_lines import sampling_path
from tokenbound.bounds.sampling import SamplingPath
from tokenbound.errors import MismatchError


@dataclass(frozen=True)
class Tunings:
    """The grid points of everything that one exact pass evaluates."""

    lines: tuple[Tuning, ...]
    """Those of the claim's lines in the shared pass."""
    companions: tuple[tuple[Tuning, ...], ...] = ()
    """Those of the claim's companions: of a model with a smoothing head."""
    separate: Mapping[str, object] = field(default_factory=dict)
    """Those of the bounds with a pass of their own, by name."""

    @classmethod
    def chosen(cls, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None = None) -> Tunings:
        """The grid points that the evidence favours.

        Raises:
            InputError: a bound that cannot be had of a sample.
            MismatchError: a column that the claim speaks of was not recorded.
        """
        if claim.head_lines and evidence.head is None:
            raise MismatchError("the model has a smoothing head, but its column `alpha` is missing")
        separate = {bound.name: bound.choose(evidence, claim, sampling) for bound in separate_bounds(claim)}
        sources = {False: evidence, True: evidence.head}
        beside = [(each, sources[each.has_alpha]) for each in claim.companions]
        return cls(
            choose_tunings(evidence, claim, sampling),
            companions=tuple(choose_tunings(own, each, sampling) for each, own in beside if own is not None),
            separate=separate,
        )

    @property
    def of_losses(self) -> tuple[Tuning, ...]:
        """Those of the claim and of its companions, in the order of their sums."""
        return (*self.lines, *chain.from_iterable(self.companions))

    def sections(self, claim: Claim) -> Iterator[tuple[Claim, tuple[Tuning, ...], slice]]:
        """The claim and its companions, each with its tunings and the place of their sums."""
        start = 0
        for each, own in zip((claim, *claim.companions), (self.lines, *self.companions), strict=True):
            yield each, own, slice(start, start + len(own))
            start += len(own)


@dataclass(frozen=True)
class Sums:
    """Exact sums of everything that was tuned, over some shards."""

    lines: LineSums
    separate: Mapping[str, object] = field(default_factory=dict)
    """Of the bounds with a pass of their own, by name."""

    @classmethod
    def of(cls, tunings: Tunings, piece: Piece) -> Sums:
        """The sums over one piece.

        Raises:
            InputError: a column that a line needs is absent or does not fit.
            MismatchError: a column that a claim speaks of was not recorded.
        """
        shared = line_sums(
            tunings.of_losses,
            piece.finite("nll"),
            *(piece.find(name) for name in ("entropy", "rank", "alpha")),
            window_lengths=piece.window_lengths,
            worst_case=piece.worst_case,
        )
        return cls(shared, {name: separate_bound(name).sums(each, piece) for name, each in tunings.separate.items()})

    @classmethod
    def merged(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of all parts together, in order."""
        lines = merge_sums([part.lines for part in parts])
        names = parts[0].separate
        return cls(lines, {name: separate_bound(name).merge([part.separate[name] for part in parts]) for name in names})

    def collapsed(self) -> Sums:
        """The same sums as of one shard, each total rounded once."""
        separate = {name: separate_bound(name).collapse(own) for name, own in self.separate.items()}
        return Sums(self.lines.collapsed(), separate)


def separate_bounds(claim: Claim) -> tuple[AnySeparateBound, ...]:
    """The bounds with a pass of their own that have lines in a claim."""
    return tuple(separate_bound(bound.name) for bound in claim.bounds if not bound.shares_pass and bound.rows(claim))


def certified_lines(tunings: Tunings, sums: Sums, claim: Claim, sampling: SamplingPlan | None) -> Iterator[Line]:
    """Every line of a claim and of what is claimed beside it."""
    for each, own, place in tunings.sections(claim):
        yield from certify(own, sums.lines.select(place), each, sampling)
    for name, tuning in tunings.separate.items():
        yield separate_bound(name).certify(tuning, sums.separate[name], claim, sampling)


def loss_paths(tunings: Tunings, sums: Sums, claim: Claim, sampling: SamplingPlan) -> Iterator[SamplingPath]:
    """What each line that bounds the risk could say after every window of a sample."""
    for each, own, place in tunings.sections(claim):
        for line, tuning in enumerate(own, place.start):
            if token_bound(tuning.method).bounds_risk:
                yield sampling_path(tuning, line, sums.lines, each, sampling)
    for name, own_tuning in tunings.separate.items():
        path = separate_bound(name).path(own_tuning, sums.separate[name], claim, sampling)
        if path is not None:
            yield path
