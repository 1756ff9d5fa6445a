"""What every printed line is made of: what was measured, what the bound computes from it, and its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenbound.bounds.claim import Claim, Line, corpus_delta
from tokenbound.bounds.codes import kappa_nats
from tokenbound.bounds.constants import LN2
from tokenbound.bounds.theorems import oracle_gap_bits

BUDGET = "window_budget_bits"
"""Parameter of a line whose windows have a budget."""


def budget_sentences(line: Line) -> tuple[str, ...]:
    """What a reader must be told of the budget of a line's windows; nothing where they have none."""
    budget = line.parameters.get(BUDGET)
    if budget is None:
        return ()
    over = line.parameters["windows_over_budget"]
    came = "No window drawn" if not over else f"{over:,} window{'s' if over > 1 else ''} drawn"
    return (
        f"In the bound {line.method}, a window that has lost {budget:,.0f} bits is predicted uniformly for the rest of "
        f"it, so that windows which were not drawn cannot lose much more. {came} exceeded that.",
    )


@dataclass(frozen=True)
class Measured:
    """What the data say about one line: means over the scored tokens and the slack for the rest."""

    empirical: float
    """Mean loss in bits, or mean error."""
    value: float
    """Mean of z_i, which the bound averages."""
    slack: float = 0.0
    """How far the mean of z_i over the whole corpus may lie above it."""
    square: float = 0.0
    """Mean of (Y_i - l_i)^2, bits^2."""
    sampled: bool = False
    larger: Mapping[int, float] = field(default_factory=dict)
    """Expected slack at multiples of the sample."""
    beta: tuple[float, ...] = ()
    """Of the control variates; empty where none are used."""
    budget: float | None = None
    """Of the windows of a sample, bits; null where they have none."""
    over_budget: int = 0
    """Windows drawn that exceed it."""

    @property
    def parameters(self) -> dict[str, object]:
        """What the pilot chose besides the grid point, for the reader."""
        found: dict[str, object] = {"control_variates": list(self.beta)} if self.beta else {}
        return found if self.budget is None else {**found, BUDGET: self.budget, "windows_over_budget": self.over_budget}


@dataclass(frozen=True)
class LineValue:
    """The value of a line before it is rounded up, and its parts: empirical + variance + complexity + slack."""

    value: float
    variance: float
    """What the fluctuation of the losses adds."""
    complexity: float
    """What the code length, the tuning and the confidence add."""
    tune_bits: float
    """L_tune, the cost of K lines and of earlier trials included."""
    parameters: Mapping[str, object] = field(default_factory=dict)
    """The grid point in words, for the reader."""
    yardsticks: Mapping[str, float] = field(default_factory=dict)
    """Terms that are no part of the value."""
    guard: float | None = None
    """Allowance for float64 rounding; None where the value is a sum of positive terms."""
    notes: tuple[str, ...] = ()
    """Warnings to print with the line."""


def line_terms(found: LineValue, measured: Measured, claim: Claim) -> dict[str, float]:
    """The additive parts of a line's value in the order printed, and its yardsticks."""
    terms = {
        "empirical": measured.empirical,
        "variance": found.variance,
        **complexity_terms(found.complexity, found.tune_bits, claim, sampled=measured.sampled),
        **found.yardsticks,
        "sampling_slack": measured.slack,
    }
    if measured.sampled:
        terms["sample_mean"] = measured.value
        terms |= {f"slack_at_{factor}n": slack for factor, slack in measured.larger.items()}
    return terms


def complexity_terms(complexity: float, tune_bits: float, claim: Claim, *, sampled: bool) -> dict[str, float]:
    """The complexity term by what it pays for, in proportion to the nats of kappa."""
    kappa = line_kappa(tune_bits, claim, sampled=sampled)
    split = dict(claim.code_split) or {"code": claim.code_length_bits}
    paid = {name: (bits if claim.paid_code_bits else 0.0) for name, bits in split.items()}
    nats = {**{name: LN2 * bits for name, bits in paid.items()}, "tune": LN2 * tune_bits}
    nats["delta"] = math.log(1 / corpus_delta(claim, sampled=sampled))
    return {"complexity": complexity, **{name: complexity * part / kappa for name, part in nats.items()}}


def line_kappa(tune_bits: float, claim: Claim, *, sampled: bool) -> float:
    """Kappa of a line in nats: the model's code, the line's tuning, and the delta that is left for the corpus.

    Args:
        tune_bits: L_tune of the line.
        claim: what is claimed.
        sampled: whether windows were sampled; the sampling then spends a share of delta.
    """
    delta = corpus_delta(claim, sampled=sampled)
    return kappa_nats(code_length_bits=claim.paid_code_bits, tune_bits=tune_bits, delta=delta)


def yardsticks(gap: float, mean_square_bits: float, kappa: float, num_tokens: int) -> dict[str, float]:
    """The oracle gap, no bound, and the gap in units of it; the latter only where forecasts ever missed.

    >>> yardsticks(0.5, 2.0, kappa=100.0, num_tokens=10_000)
    {'oracle_gap': 0.2, 'gap_over_oracle': 2.5}
    """
    oracle = oracle_gap_bits(mean_square_bits, kappa=kappa, num_tokens=num_tokens)
    return {"oracle_gap": oracle, **({"gap_over_oracle": gap / oracle} if oracle > 0 else {})}


def random_guess(claim: Claim, top_k: int | None) -> float:
    """What guessing uniformly among the tokenizer's ids achieves: log2 V_tok bits, or an error of 1 - k / V_tok.

    Args:
        claim: of which V_tok is used.
        top_k: k of an error; None for a loss.

    >>> claim = Claim(512, 256, code_length_bits=0, delta=0.05, num_tokens=100)
    >>> random_guess(claim, None), random_guess(claim, 10)
    (8.0, 0.9609375)
    """
    vocab = claim.tokenizer_vocab_size
    return math.log2(vocab) if top_k is None else max(0.0, 1 - top_k / vocab)


def notes_of(claim: Claim, printed: float, guess: float) -> list[str]:
    """The warnings that a line of any bound may need: a hypothetical corpus, and a value that says nothing."""
    what_if = f"what-if: the same losses, a larger m ({claim.num_tokens} tokens); not a bound"
    vacuous = f"vacuous: not below a random guess ({guess:.4g})"
    return [what_if] * claim.what_if + [vacuous] * (printed >= guess)


ALPHA_WORDS = {"column": ", head", "constant": ", fixed alpha", "entropy": ", alpha(H)"}
"""Behind the name of a line, where a certificate has several lines of one bound: where its smoothing comes from."""


def alpha_words(line: Line) -> str:
    """Where the smoothing of a line comes from, if the smoothing head of a model gives others to compare with."""
    return ALPHA_WORDS.get(str(line.parameters.get("alpha_from")), "")
