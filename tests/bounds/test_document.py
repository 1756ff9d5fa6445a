"""The document-level baseline over shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tokenbound.bounds import (
    Claim,
    Evidence,
    certify_document,
    choose_document,
    document_bound,
    document_sums,
    merge_document_sums,
)
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
