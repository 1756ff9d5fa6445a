"""The document-level baseline: documents as independent draws (Lotfi et al. 2023, arXiv 2312.17173).

Theorem. Let n documents be independent draws of one distribution, n fixed beforehand, with no context across them, and
let L_d in [A, B] be the mean of a document's smoothed token losses, D = B - A. With probability at least 1 - delta, for
all hypotheses at once,

    E[L_d] <= mean(L_d) + D sqrt(kappa / (2n)).

Proof. Hoeffding's inequality with one document as one sample, and the union bound over hypotheses in kappa.

Each document weighs the same, so this bounds another risk than the other lines do: the expected loss of a fresh
document. It is a baseline and never the bound that a certificate quotes.

A document may lie in several shards, so shards give the sum and the count of every document they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.blocks import required
from tokenbound.bounds.claim import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.coded import require_grid_alpha, require_paid
from tokenbound.bounds.codes import azuma_tune_bits, kappa_nats
from tokenbound.bounds.columns import Floats, Ints, Piece, check_length
from tokenbound.bounds.constants import ALPHA_GRID
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines.base import SeparateBound, Setting
from tokenbound.bounds.printing import LineValue, Measured
from tokenbound.bounds.rounding import round_up
from tokenbound.bounds.search import Cells
from tokenbound.bounds.smoothing import loss_interval_bits, smoothed_loss_bits
from tokenbound.errors import InputError, MismatchError

CODE_BITS = azuma_tune_bits(m0_index=None, choose_alpha=True)
"""Length of a tuning's code word: alpha from its grid. The number of documents is fixed, so no m0 is coded."""


class DocumentBound(SeparateBound[Tuning, "DocumentSums"]):
    """The document-level baseline, with sums by document."""

    name = "document"
    bounds_risk = False
    stands_alone = False
    columns = ("document",)
    counts_documents = True

    def objection(self, setting: Setting) -> str | None:
        """Documents must be whole, all there, and of a number fixed beforehand."""
        if setting.context != "document" or setting.sampled:
            return "needs `windows.context: document` and every window scored"
        if setting.times_grown:
            return f"takes the number of documents for fixed; the corpus grew {setting.times_grown} times; leave it out"
        return None

    def check_claim(self, claim: Claim) -> None:
        """The number of documents is part of the claim."""
        if self.name in claim.methods and (claim.num_documents is None or claim.num_documents < 1):
            raise InputError(f"`document` needs the number of documents with a scored token: {claim.num_documents!r}")

    def choose(self, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None) -> Tuning:
        """The alpha that suits the tokens' mean loss."""
        if sampling is not None:
            raise InputError("method `document` needs every window scored; leave it out of a sampled run")
        return choose_document(evidence, claim)

    def sums(self, tuning: Tuning, piece: Piece) -> DocumentSums:
        """Losses and counts of the documents in a piece."""
        return document_sums(tuning, piece["nll"], piece["document"], failed=piece.failed)

    def merge(self, parts: Sequence[DocumentSums]) -> DocumentSums:
        """Documents of several parts, added up."""
        return merge_document_sums(parts)

    def certify(self, tuning: Tuning, sums: DocumentSums, claim: Claim, sampling: SamplingPlan | None) -> Line:
        """The printed line."""
        return certify_document(tuning, sums, claim)

    def sentences(self, line: Line) -> tuple[str, ...]:
        """What the baseline assumes."""
        return (
            "The line document bounds another risk, the expected mean loss of a fresh document: it takes the "
            f"{line.parameters['documents']:,} documents for independent draws whose number was fixed beforehand, each "
            "weighing the same. It is a baseline, never the bound quoted; with few documents it says nothing.",
        )


@dataclass(frozen=True)
class DocumentSums:
    """What some shards hold of each document."""

    document: Ints
    """[D] ids, ascending."""
    tokens: Ints
    """[D] scored tokens."""
    loss_bits: Floats
    """[D] sums of their smoothed losses."""

    @property
    def num_documents(self) -> int:
        """Documents with a scored token."""
        return int(self.document.size)

    @property
    def mean_loss_bits(self) -> float:
        """Mean over documents of the mean loss of each."""
        return math.fsum((self.loss_bits / self.tokens).tolist()) / max(self.num_documents, 1)


def choose_document(evidence: Evidence, claim: Claim) -> Tuning:
    """The alpha of the document line, chosen as if every document had the mean loss of the tokens.

    Args:
        evidence: of all shards.
        claim: with `document` among its methods.

    Raises:
        InputError: the claim does not say how many documents there are, or there is no token.

    >>> from tokenbound.bounds import Evidence
    >>> claim = Claim(4, 4, 0.0, 0.05, num_tokens=600, methods=("azuma", "document"), num_documents=200)
    >>> nll, document = [0.1, 0.2, 0.3] * 200, [i // 3 for i in range(600)]
    >>> tuning = choose_document(Evidence.from_losses(nll, vocab_size=4), claim)
    >>> tuning.method, tuning.alpha
    ('document', 0.1875)
    """
    if claim.num_documents is None:
        raise InputError("a document line needs `num_documents` in its claim")
    bits = CODE_BITS + claim.shared_bits
    cells = Cells.of(evidence, claim)
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=bits, delta=claim.delta)
    deviations = math.sqrt(kappa / (2 * claim.num_documents))

    def value(alpha: float) -> float:
        low, high = loss_interval_bits(alpha=alpha, vocab_size=claim.vocab_size)
        return cells.mean_loss_bits(alpha, high) + (high - low) * deviations

    alpha = min(ALPHA_GRID, key=value)
    return Tuning(method=DocumentBound.name, vocab_size=claim.vocab_size, alpha=alpha, tune_bits=bits)


def document_sums(
    tuning: Tuning, nll: ArrayLike, document: ArrayLike, *, failed: NDArray[np.bool_] | None = None
) -> DocumentSums:
    """Losses of the documents of one shard.

    Args:
        tuning: the document line.
        nll: [T] unsmoothed losses in nats; of failed tokens anything.
        document: [T] document of each token.
        failed: [T] tokens without a finite loss, which count at the worst case.

    Raises:
        InputError: arrays of different lengths, or losses that are not finite.

    >>> sums = document_sums(Tuning("document", vocab_size=4, alpha=0.5), [0.0, 0.0, 9.0], [7, 7, 9])
    >>> sums.document.tolist(), sums.tokens.tolist(), sums.loss_bits.round(3).tolist()
    ([7, 9], [2, 1], [1.356, 2.999])
    """
    values = np.asarray(nll)
    ids = check_length(np.asarray(document), values.size, "document")
    alpha = required(tuning.alpha, "alpha")
    high = loss_interval_bits(alpha=alpha, vocab_size=tuning.vocab_size)[1]
    loss = smoothed_loss_bits(
        values if failed is None else np.where(failed, 0.0, values), alpha=alpha, vocab_size=tuning.vocab_size
    )
    loss = loss if failed is None else np.where(failed, high, loss)
    found, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.bincount(place, weights=loss, minlength=found.size)
    return DocumentSums(found.astype(np.int64), counts.astype(np.int64), sums.astype(np.float64))


def merge_document_sums(parts: Sequence[DocumentSums]) -> DocumentSums:
    """The documents of all shards; those that lie in several are added up.

    Raises:
        InputError: nothing to merge.

    >>> tuning = Tuning("document", vocab_size=4, alpha=0.5)
    >>> whole = document_sums(tuning, [0.5, 1.0, 1.5], [0, 1, 1])
    >>> parts = [document_sums(tuning, [0.5, 1.0], [0, 1]), document_sums(tuning, [1.5], [1])]
    >>> merge_document_sums(parts).mean_loss_bits == whole.mean_loss_bits
    True
    """
    if not parts:
        raise InputError("there are no sums to merge")
    found, place = np.unique(np.concatenate([part.document for part in parts]), return_inverse=True)
    tokens, sums = np.zeros(found.size, np.int64), np.zeros(found.size)
    np.add.at(tokens, place, np.concatenate([part.tokens for part in parts]))
    np.add.at(sums, place, np.concatenate([part.loss_bits for part in parts]))
    return DocumentSums(found, tokens, sums)


def certify_document(
    tuning: Tuning, sums: DocumentSums, claim: Claim, *, rounding: Callable[[float], float] = round_up
) -> Line:
    """The printed document line: mean document loss + D sqrt(kappa / (2 documents)).

    Args:
        tuning: what :func:`choose_document` chose.
        sums: of every shard, merged.
        claim: what is claimed, with ``num_documents``.
        rounding: makes the value the printed one; must not make it smaller.

    Raises:
        MismatchError: a tuning that is not paid for or of another vocabulary, or tokens or documents are missing or
            counted twice.

    >>> from tokenbound.bounds import Evidence
    >>> claim = Claim(4, 4, 0.0, 0.05, num_tokens=600, methods=("azuma", "document"), num_documents=200)
    >>> nll, document = [0.1, 0.2, 0.3] * 200, [i // 3 for i in range(600)]
    >>> tuning = choose_document(Evidence.from_losses(nll, vocab_size=4), claim)
    >>> round(certify_document(tuning, document_sums(tuning, nll, document), claim).value, 3)
    1.086
    """
    if tuning.vocab_size != claim.vocab_size:
        raise MismatchError(
            f"the document line was tuned for V = {tuning.vocab_size}, the claim says {claim.vocab_size}; choose it "
            "for this claim"
        )
    require_grid_alpha("alpha", tuning.alpha)
    require_paid(DocumentBound.name, tuning.tune_bits, CODE_BITS + claim.shared_bits)
    tokens, documents = int(sums.tokens.sum()), sums.num_documents
    if (tokens, documents) != (claim.num_tokens, claim.num_documents):
        raise MismatchError(
            f"the sums hold {documents} documents of {tokens} tokens, the claim speaks of {claim.num_documents} of "
            f"{claim.num_tokens}"
        )
    low, high = loss_interval_bits(alpha=required(tuning.alpha, "alpha"), vocab_size=claim.vocab_size)
    kappa = kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=tuning.tune_bits, delta=claim.delta)
    gap, mean = (high - low) * math.sqrt(kappa / (2 * documents)), sums.mean_loss_bits
    form = {"alpha": tuning.alpha, "loss_range_bits": high - low, "documents": documents, "form": "documents, m fixed"}
    found = LineValue(mean + gap, gap / 2, gap / 2, tuning.tune_bits, form)
    return DocumentBound().printed_line(None, found, Measured(mean, mean), claim, rounding=rounding)
