"""One pass for a claim, the claims beside it and bounds with their own sums: who gets which sums, and who prints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    Line,
    SamplingPlan,
    certify,
    certify_document,
    certify_relative,
    choose_document,
    choose_tunings,
    document_sums,
    line_sums,
    sampling_path,
)
from tokenbound.bounds.columns import Piece
from tokenbound.bounds.lines.relative import Relative, relative_path
from tokenbound.bounds.reduction import Sums, Tunings, certified_lines, loss_paths, separate_bounds
from tokenbound.errors import MismatchError

V, SIZE, LEAST = 300, 1200, 2.0**-6
RNG = np.random.default_rng(8)
ENTROPY = np.minimum(RNG.gamma(1.0, 1.0, SIZE), 5.5).astype(np.float32)
NLL = RNG.gamma(0.7, ENTROPY / 0.7 + 0.02).astype(np.float32)
COLUMNS = {
    "nll": NLL,
    "entropy": ENTROPY,
    "rank": np.floor(NLL * 3).astype(np.int32),
    "alpha": RNG.uniform(LEAST, 0.4, SIZE).astype(np.float32),
    "base_nll": NLL + np.float32(0.1),
    "base_entropy": ENTROPY,
    "document": np.arange(SIZE) // 10,
}
LENGTHS = np.full(SIZE // 10, 10)
METHODS = ("freedman", "azuma", "kl", "document")
CLAIM = Claim(V, V, 50.0, 0.05, SIZE, methods=METHODS, top_k=(1, 3), num_documents=SIZE // 10)
HEAD = replace(CLAIM, methods=("freedman", "azuma", "kl"), head_alpha_min=LEAST)
DELTA = replace(CLAIM, methods=("azuma", "freedman"), num_bases=1)


def evidence_of(claim: Claim, tokens: int = SIZE) -> Evidence:
    cut = {name: column[:tokens] for name, column in COLUMNS.items()}
    shared = {"vocab_size": V, "top_k": claim.top_k, "window_lengths": LENGTHS[: tokens // 10]}
    plain = (cut["nll"], cut["entropy"], cut["rank"])
    base = {name: cut[name] for name in ("base_nll", "base_entropy")} if claim.num_bases else {}
    found = Evidence.from_losses(*plain, **shared, **base)
    head = Evidence.from_losses(*plain, cut["alpha"], **shared) if claim.head_lines else None
    return replace(found, head=head)


def piece(part: slice = slice(0, SIZE)) -> Piece:
    lengths = LENGTHS[part.start // 10 : part.stop // 10]
    return Piece({name: column[part] for name, column in COLUMNS.items()}, None, lengths, np.zeros(lengths.size, bool))


def whole(tunings: Tunings) -> Sums:
    return Sums.merged([Sums.of(tunings, piece(slice(0, 400))), Sums.of(tunings, piece(slice(400, SIZE)))])


def test_every_claim_of_a_head_prints_its_own_lines() -> None:
    """In one pass, as if each claim had been evaluated alone."""
    evidence = evidence_of(HEAD)
    tunings = Tunings.chosen(evidence, HEAD)
    lines = list(certified_lines(tunings, whole(tunings), HEAD, None))
    assert [(line.method, line.parameters.get("alpha_from")) for line in lines] == [
        ("freedman", "grid"),
        ("azuma", None),
        ("kl", None),
        ("kl", None),
        ("freedman", "constant"),
        ("freedman", "entropy"),
        ("freedman", "column"),
        ("azuma", "column"),
    ]
    assert len(lines) == HEAD.num_lines
    expected: list[Line] = []
    for claim in (HEAD, *HEAD.companions):
        assert evidence.head is not None
        own = choose_tunings(evidence.head if claim.has_alpha else evidence, claim)
        columns = (NLL, ENTROPY, COLUMNS["rank"], COLUMNS["alpha"])
        expected += certify(own, line_sums(own, *columns, window_lengths=LENGTHS), claim)
    for line, alone in zip(lines, expected, strict=True):
        assert line.value == pytest.approx(alone.value, abs=2e-9)
        assert (line.method, line.top_k, line.tune_bits) == (alone.method, alone.top_k, alone.tune_bits)
    places = [(place.start, place.stop) for _, _, place in tunings.sections(HEAD)]
    assert places == [(0, 4), (4, 5), (5, 6), (6, 8)]
    assert tunings.of_losses == (*tunings.lines, *(each for own in tunings.companions for each in own))


def test_a_head_without_its_column_is_missed() -> None:
    without = replace(evidence_of(HEAD), head=None)
    with pytest.raises(MismatchError, match="its column `alpha` is missing"):
        Tunings.chosen(without, HEAD)
    plain = replace(HEAD, head_alpha_min=None)
    assert Tunings.chosen(without, plain).companions == ()
    assert Tunings.chosen(evidence_of(HEAD), plain).companions == ()


def test_bounds_with_a_pass_of_their_own_stand_behind_the_others() -> None:
    for claim, name in ((CLAIM, "document"), (DELTA, "relative")):
        evidence = evidence_of(claim)
        tunings = Tunings.chosen(evidence, claim)
        assert list(tunings.separate) == [name]
        assert [bound.name for bound in separate_bounds(claim)] == [name]
        sums = whole(tunings)
        *shared, own = certified_lines(tunings, sums, claim, None)
        assert [line.method for line in shared] == [method for method, _ in claim.lines]
        assert own.method == name
        assert own.value is not None
        if name == "document":
            tuning = choose_document(evidence, claim)
            alone = certify_document(tuning, document_sums(tuning, NLL, COLUMNS["document"]), claim)
        else:
            relative = Relative()
            alone = certify_relative(tunings.separate[name], relative.sums(tunings.separate[name], piece()), claim)  # type: ignore[arg-type]
        assert own.value == pytest.approx(alone.value, abs=2e-9)
        one = Sums.merged([Sums.of(tunings, piece())])
        assert [line.value for line in certified_lines(tunings, one, claim, None)][-1] == alone.value
        collapsed = list(certified_lines(tunings, sums.collapsed(), claim, None))
        assert collapsed == [*shared, own]
    assert separate_bounds(replace(CLAIM, methods=("azuma",))) == ()


def test_paths_are_those_of_the_lines_that_bound_the_risk() -> None:
    plan = SamplingPlan(SIZE // 10, 10, 20)
    for claim, count in ((HEAD, 6), (DELTA, 3)):
        tunings = Tunings.chosen(evidence_of(claim, 200), claim, plan)
        sums = Sums.of(tunings, piece(slice(0, 800)))
        paths = list(loss_paths(tunings, sums, claim, plan))
        expected = []
        for each, own, place in tunings.sections(claim):
            for row, tuning in enumerate(own):
                if tuning.method != "kl":
                    expected.append(sampling_path(tuning, place.start + row, sums.lines, each, plan))
        if claim is DELTA:
            expected.append(relative_path(tunings.separate["relative"], sums.separate["relative"], claim, plan))  # type: ignore[arg-type]
        assert [path.upper.tolist() for path in paths] == [path.upper.tolist() for path in expected]
        assert len(paths) == count


def test_a_bound_of_another_risk_has_no_path() -> None:
    claim, plan = replace(CLAIM, methods=("azuma", "document")), SamplingPlan(SIZE // 10, 10, 20)
    tunings = Tunings.chosen(evidence_of(claim), claim)
    sums = Sums.of(tunings, piece(slice(0, 800)))
    assert len(list(loss_paths(tunings, sums, claim, plan))) == 1
