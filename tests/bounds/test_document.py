"""The document-level baseline over shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    SamplingPlan,
    certify_document,
    choose_document,
    document_bound,
    document_sums,
    merge_document_sums,
)
from tokenbound.bounds.codes import kappa_nats
from tokenbound.bounds.columns import Piece
from tokenbound.bounds.lines.base import Setting
from tokenbound.bounds.lines.document import DocumentBound
from tokenbound.bounds.smoothing import loss_interval_bits, smoothed_loss_bits
from tokenbound.errors import InputError, MismatchError

V, DOCUMENTS = 256, 400
GENERATOR = np.random.default_rng(5)
LENGTHS = GENERATOR.integers(1, 60, DOCUMENTS)
DOCUMENT = np.repeat(np.arange(DOCUMENTS) * 3, LENGTHS)
NLL = GENERATOR.gamma(1.0, 1.2, DOCUMENT.size).astype(np.float32)
CLAIM = Claim(V, V, 40.0, 0.05, DOCUMENT.size, methods=("freedman", "document"), num_documents=DOCUMENTS)
TUNING = choose_document(Evidence.from_losses(NLL, vocab_size=V), CLAIM)


def parts(cuts: list[int]) -> list[object]:
    return [
        document_sums(TUNING, nll, document)
        for nll, document in zip(np.split(NLL, cuts), np.split(DOCUMENT, cuts), strict=True)
    ]


@pytest.mark.parametrize("cuts", [[], [1], [1000, 1001, 5000]])
def test_the_line_is_the_theorem_wherever_shards_are_cut(cuts: list[int]) -> None:
    line = certify_document(TUNING, merge_document_sums(parts(cuts)), CLAIM)
    paid = {"code_length_bits": 40.0, "tune_bits": TUNING.tune_bits, "delta": 0.05}
    assert line.value == pytest.approx(
        document_bound(NLL, DOCUMENT, vocab_size=V, alpha=TUNING.alpha, **paid), abs=2e-9
    )
    assert line.value == pytest.approx(
        sum(line.terms[name] for name in ("empirical", "variance", "complexity")), abs=2e-9
    )
    assert not line.bounds_risk
    assert not line.vacuous


def test_every_alpha_pays_for_the_grid_and_for_the_other_line() -> None:
    alone = Claim(V, V, 40.0, 0.05, DOCUMENT.size, methods=("freedman",))
    assert CLAIM.shared_bits - alone.shared_bits == pytest.approx(1.0)
    assert TUNING.tune_bits == pytest.approx(np.log2(40) + CLAIM.shared_bits)


def test_failed_tokens_count_at_the_worst_case() -> None:
    failed = np.zeros(NLL.size, bool)
    failed[:7] = True
    sums = document_sums(TUNING, np.where(failed, np.nan, NLL), DOCUMENT, failed=failed)
    loss = smoothed_loss_bits(NLL, alpha=TUNING.alpha, vocab_size=V)
    loss[:7] = loss_interval_bits(alpha=TUNING.alpha, vocab_size=V)[1]
    expected = np.mean([loss[document == DOCUMENT].mean() for document in np.unique(DOCUMENT)])
    assert sums.mean_loss_bits == pytest.approx(expected, rel=1e-12)


def test_few_documents_are_vacuous() -> None:
    few = DOCUMENT < 30
    claim = replace(CLAIM, num_tokens=int(few.sum()), num_documents=10)
    tuning = choose_document(Evidence.from_losses(NLL[few], vocab_size=V), claim)
    line = certify_document(tuning, document_sums(tuning, NLL[few], DOCUMENT[few]), claim)
    assert line.vacuous
    assert "vacuous" in line.note


def test_missing_or_doubled_documents_are_found() -> None:
    whole = parts([1000])
    for wrong in ([whole[0]], [*whole, whole[1]]):
        with pytest.raises(MismatchError, match="documents"):
            certify_document(TUNING, merge_document_sums(wrong), CLAIM)


def test_a_claim_names_the_number_of_documents_and_another_method() -> None:
    with pytest.raises(InputError, match="number of documents"):
        replace(CLAIM, num_documents=None)
    with pytest.raises(InputError, match="beside it"):
        replace(CLAIM, methods=("document",))
    with pytest.raises(InputError, match="one value per token"):
        document_sums(TUNING, NLL, DOCUMENT[1:])
    with pytest.raises(InputError, match="no sums"):
        merge_document_sums([])


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        (Setting("document", sampled=False), None),
        (Setting("packed", sampled=False), "every window scored"),
        (Setting("document", sampled=True), "every window scored"),
        (Setting("document", sampled=False, times_grown=2), "the corpus grew 2 times"),
    ],
)
def test_documents_are_whole_all_there_and_of_a_fixed_number(setting: Setting, word: str | None) -> None:
    objection = DocumentBound().objection(setting)
    assert (objection is None) if word is None else (word in (objection or ""))


def test_a_claim_without_the_line_needs_no_documents() -> None:
    DocumentBound().check_claim(replace(CLAIM, methods=("azuma",), num_documents=None))
    assert replace(CLAIM, num_documents=1)
    for number in (None, 0, -1):
        with pytest.raises(InputError, match="number of documents"):
            replace(CLAIM, num_documents=number)


def test_a_sample_has_no_document_line() -> None:
    evidence = Evidence.from_losses(NLL, vocab_size=V)
    assert DocumentBound().choose(evidence, CLAIM, None) == TUNING
    with pytest.raises(InputError, match="every window scored"):
        DocumentBound().choose(evidence, CLAIM, SamplingPlan(100, 100, 10))


def test_a_bound_of_documents_reads_its_pieces() -> None:
    failed = np.zeros(NLL.size, bool)
    failed[3:9] = True
    piece = Piece({"nll": NLL, "document": DOCUMENT}, failed, None, 6)
    sums = DocumentBound().sums(TUNING, piece)
    expected = document_sums(TUNING, NLL, DOCUMENT, failed=failed)
    for name in ("document", "tokens", "loss_bits"):
        assert getattr(sums, name).tolist() == getattr(expected, name).tolist()
    assert sums.loss_bits.sum() > document_sums(TUNING, NLL, DOCUMENT).loss_bits.sum()
    merged = DocumentBound().merge([sums])
    assert DocumentBound().certify(TUNING, merged, CLAIM, None) == certify_document(TUNING, sums, CLAIM)


@pytest.mark.parametrize(
    "changes", [{"num_tokens": NLL.size + 1}, {"num_documents": DOCUMENTS + 1}, {"num_documents": DOCUMENTS - 1}]
)
def test_tokens_and_documents_are_both_counted(changes: dict[str, int]) -> None:
    with pytest.raises(MismatchError, match="the sums hold 400 documents"):
        certify_document(TUNING, parts([])[0], replace(CLAIM, **changes))


def test_a_line_of_another_vocabulary_is_refused() -> None:
    """Its losses were smoothed over other ids than the range is of."""
    other = replace(TUNING, vocab_size=V // 2)
    with pytest.raises(MismatchError, match="tuned for V = 128"):
        certify_document(other, document_sums(other, NLL, DOCUMENT), CLAIM)


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_an_alpha_outside_the_grid_is_refused(alpha: float | None) -> None:
    sums = parts([])[0]
    with pytest.raises(MismatchError, match="alpha"):
        certify_document(replace(TUNING, alpha=alpha), sums, CLAIM)
    with pytest.raises(MismatchError, match="pays"):
        certify_document(replace(TUNING, tune_bits=TUNING.tune_bits - 1e-6), sums, CLAIM)


def test_the_gap_of_documents_is_halved_between_range_and_code() -> None:
    line = certify_document(TUNING, parts([])[0], CLAIM)
    low, high = loss_interval_bits(alpha=TUNING.alpha, vocab_size=V)
    kappa = kappa_nats(code_length_bits=40.0, tune_bits=TUNING.tune_bits, delta=0.05)
    half = (high - low) * np.sqrt(kappa / (2 * DOCUMENTS)) / 2
    assert (line.terms["variance"], line.terms["complexity"]) == pytest.approx((half, half), rel=1e-13)
    assert line.kappa_nats == pytest.approx(kappa, rel=1e-14)
    assert dict(line.parameters) == {
        "alpha": TUNING.alpha,
        "loss_range_bits": high - low,
        "documents": DOCUMENTS,
        "form": "documents, m fixed",
    }
    (sentence,) = DocumentBound().sentences(line)
    assert "the 400 documents" in sentence
    assert line.terms["sampling_slack"] == 0.0


def test_no_documents_have_no_loss() -> None:
    empty = document_sums(TUNING, NLL[:0], DOCUMENT[:0])
    assert (empty.num_documents, empty.mean_loss_bits) == (0, 0.0)
    one = document_sums(TUNING, NLL[:1], DOCUMENT[:1])
    assert one.mean_loss_bits == one.loss_bits[0]
    merged = merge_document_sums([empty, one, one])
    assert merged.tokens.tolist() == [2]
    assert merged.mean_loss_bits == one.mean_loss_bits
