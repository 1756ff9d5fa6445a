"""The top-k error: how often the right token is not among the model's k most probable ones.

Theorem. Let e_i = 1[rank_i >= k]. With probability at least 1 - delta, for all hypotheses and all m at once and any one
lambda > 0 that is paid for,

    e <= (1 - exp(-lambda e^ - kappa / m)) / (1 - exp(-lambda)).

Proof. The mean of exp(-lambda e_i) given the past is 1 - p_i (1 - exp(-lambda)) for the chance p_i of an error, and its
logarithm is concave in p_i. So exp(-lambda sum e_i) over the product of those means is a nonnegative supermartingale
started at 1, and Ville's inequality with Jensen's gives the bound on the mean of the p_i (Catoni 2007).

The infimum over all lambda would be the inverse of the kl divergence, hence the name `kl`; for martingales it is no
bound at this price. A grid of 20 powers of two is, and is at most 1.07 times as wide.
"""

from __future__ import annotations

import math

import numpy as np

from tokenbound.bounds.blocks import Block, Evaluator, TokenSums
from tokenbound.bounds.claim import Claim, Line, Tuning, corpus_delta
from tokenbound.bounds.codes import kl_tune_bits
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.curves import EvidenceView, LineCurves
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines.base import TokenBound
from tokenbound.bounds.printing import LineValue, Measured
from tokenbound.bounds.rounding import arithmetic_guard, round_up
from tokenbound.bounds.search import SlackModel
from tokenbound.bounds.theorems import kl_error_bound, kl_grid_bound
from tokenbound.errors import InputError


class TopKError(TokenBound):
    """One line for each k: z_i = e_i."""

    name = "kl"
    bounds_risk = False
    columns = ("rank",)

    def rows(self, claim: Claim) -> tuple[int | None, ...]:
        """One per k."""
        return claim.top_k if self.name in claim.methods else ()

    def check_claim(self, claim: Claim) -> None:
        """Every k is a rank, named once."""
        ranks = claim.top_k
        if self.name in claim.methods and not (ranks and len(set(ranks)) == len(ranks) and min(ranks) >= 1):
            raise InputError(f"top_k must name positive ranks, each once, got {ranks!r}")

    def choose(self, evidence: Evidence, claim: Claim, slack: SlackModel, top_k: int | None) -> Tuning:
        """Nothing before the error is known: lambda follows from it and is paid for all the same."""
        return Tuning(self.name, claim.vocab_size, top_k=top_k)

    def code_bits(self, tuning: Tuning) -> float:
        """Lambda from its grid."""
        return kl_tune_bits()

    def evaluator(self, tuning: Tuning) -> Evaluator:
        """Counts errors."""
        if tuning.top_k is None:
            raise InputError("the tuning lacks `top_k`")
        return CountErrors(tuning.top_k)

    def value(self, tuning: Tuning, measured: Measured, claim: Claim) -> LineValue:
        """The smallest bound of the grid, at most 1."""
        error = min(max(measured.value + measured.slack, 0.0), 1.0)
        delta = corpus_delta(claim, sampled=measured.sampled)
        value, lam = _grid_bound(error, claim, tuning.tune_bits, delta, claim.num_tokens)
        variance = -math.expm1(-lam * error) / -math.expm1(-lam) - error
        uncapped = kl_error_bound(
            error,
            code_length_bits=claim.paid_code_bits,
            tune_bits=tuning.tune_bits,
            delta=delta,
            num_tokens=claim.num_tokens,
            lam=lam,
        )
        return LineValue(
            value,
            variance,
            value - error - variance,
            tuning.tune_bits,
            {"lambda": lam, "uncapped": round_up(uncapped)},
            # An error rate is at most 1, whatever float64 did.
            guard=min(arithmetic_guard(value, lam), 1.0 - value),
        )

    def row_name(self, line: Line) -> str:
        """By k alone."""
        return f"top-{line.top_k} error"

    def curves(self, line: Line, view: EvidenceView) -> LineCurves:
        """Against m with lambda chosen again."""
        error = min(1.0, max(0.0, (line.empirical or 0.0) + line.terms.get("sampling_slack", 0.0)))
        delta = corpus_delta(view.claim, sampled=view.sampling is not None)
        return LineCurves(
            lambda size: _grid_bound(error, view.claim, line.tune_bits, delta, max(1, round(size)))[0],
        )


class CountErrors:
    """z_i = e_i = 1[rank_i >= k]."""

    def __init__(self, top_k: int) -> None:
        """Of this k."""
        self.top_k = top_k

    def evaluate(self, block: Block, per_token: Floats | None) -> TokenSums:
        """How many tokens of the block are errors."""
        if block.rank is None:
            raise InputError(f"the top-{self.top_k} error needs the `rank` column")
        if per_token is not None:
            np.greater_equal(block.rank, self.top_k, out=per_token, casting="unsafe")
        count = float(np.count_nonzero(block.rank >= self.top_k))
        return TokenSums(count, count)

    def worst(self) -> TokenSums:
        """An error."""
        return TokenSums(1.0, 1.0)


def _grid_bound(error: float, claim: Claim, tune_bits: float, delta: float, num_tokens: int) -> tuple[float, float]:
    return kl_grid_bound(
        error, code_length_bits=claim.paid_code_bits, tune_bits=tune_bits, delta=delta, num_tokens=num_tokens
    )
