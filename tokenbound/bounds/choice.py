"""Choosing the grid point of every line from merged evidence.

Each bound searches its own grid; what they share is in :mod:`~tokenbound.bounds.search`.
"""

from __future__ import annotations

from tokenbound.bounds.claim import Claim, SamplingPlan, Tuning
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines.base import token_bound
from tokenbound.bounds.search import SlackModel
from tokenbound.errors import InputError, MismatchError


def choose_tunings(evidence: Evidence, claim: Claim, sampling: SamplingPlan | None = None) -> tuple[Tuning, ...]:
    """The grid point of every line of the claim, in the claim's order.

    Args:
        evidence: of all shards; for a sampled run, of the pilot windows only.
        claim: what is to be printed.
        sampling: the plan of a sampled run; the choice then minimises bound and sampling slack together.

    Returns:
        One tuning per line of ``claim.lines``. A line that cannot be computed says why in ``unavailable``.

    Raises:
        InputError: evidence without tokens, or a sampled run's evidence without windows.
        MismatchError: evidence that contradicts the claim.

    >>> from tokenbound.bounds import Claim, Evidence
    >>> evidence = Evidence.from_losses([0.2, 3.0] * 500, [0.3, 2.5] * 500, vocab_size=256)
    >>> claim = Claim(256, 256, code_length_bits=0, delta=0.05, num_tokens=1_000, methods=("freedman",))
    >>> (tuning,) = choose_tunings(evidence, claim)
    >>> tuning.method, tuning.degree, tuning.coefficients  # two entropies, two losses: a line forecasts them
    ('freedman', 1, (-0.1875, 1.2568359375))
    """
    _check(evidence, claim)
    slack = SlackModel.of(evidence, claim, sampling)
    return tuple(token_bound(method).tuned(evidence, claim, slack, top_k) for method, top_k in claim.lines)


def _check(evidence: Evidence, claim: Claim) -> None:
    if evidence.num_tokens == 0:
        raise InputError("there is no token with a finite loss to choose from")
    if evidence.vocab_size != claim.vocab_size:
        raise MismatchError(f"evidence was taken for V = {evidence.vocab_size}, the claim says {claim.vocab_size}")
    if claim.has_entropy and not evidence.has_entropy:
        raise MismatchError("the claim says that entropies were stored, but the evidence has none")
    if claim.has_alpha != (evidence.alpha_min is not None):
        raise MismatchError("claim and evidence disagree about the `alpha` column")
    if claim.alpha_min is not None and evidence.alpha_min is not None and evidence.alpha_min < claim.alpha_min:
        raise MismatchError(f"an alpha of {evidence.alpha_min} lies below the claimed alpha_min {claim.alpha_min}")
