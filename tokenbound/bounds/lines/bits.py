"""The bound at the granularity of binary decisions: a token is a sequence of them, and each is a step of a martingale.

Theorem. Fix a binary tree over the ids (:mod:`~tokenbound.bounds.decisions`). Token x_i is the decisions b_i1 .. b_iJ
on the way to its leaf; F_ij is everything before token i and the first j decisions of token i. Let l_ij = -log2 q(b_ij)
with q a function of the decision's level, and let Y_ij be a forecast that is a function of the level too. With
probability at least 1 - delta, for all hypotheses and all m at once and any one lambda that is paid for, where
1 + lambda (Y_ij - l) > 0 for both losses l that decision (i, j) can have,

    R_bits = (1/m) sum_ij E[l_ij | F_i,j-1]
          <= (1/m) sum_ij l_ij + (1/m) sum_ij v(lambda (Y_ij - l_ij)) / lambda + kappa / (lambda m)

Proof. That of `freedman` (:mod:`~tokenbound.bounds.lines.freedman`) with decisions as steps: that decision (i, j)
exists, its node and its level are known given F_i,j-1. Everything is divided by the number m of tokens.

R_bits is another risk than that of the token lines, as the document's is. For predictions fixed in advance and the same
smoothed probabilities, whose product is a distribution over tokens, both have the same expectation. The range of a loss
is that of one decision, and forecasts know the decisions before: so lambda may be several times as large.

The best forecast and smoothing follow from lambda (:mod:`~tokenbound.bounds.decision_bets`). What is chosen, and paid
for, is the tree, lambda, and two numbers by which the model's own probabilities are recalibrated; in a sample also the
budget of a window (:mod:`~tokenbound.bounds.budgets`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenbound.bounds.budgets import WindowBudget
from tokenbound.bounds.claim import Claim, Line, SamplingPlan
from tokenbound.bounds.coded import require_budget, require_member, require_paid
from tokenbound.bounds.codes import decision_tune_bits
from tokenbound.bounds.columns import Floats, Ints, Piece
from tokenbound.bounds.constants import (
    BUDGET_GRID,
    DECISION_ALPHA_GRID,
    DECISION_LAMBDA_GRID,
    DECISION_SLOPE_GRID,
)
from tokenbound.bounds.curves import EvidenceView, LineCurves, fixed_point_at, sweep
from tokenbound.bounds.decision_bets import DecisionBet
from tokenbound.bounds.decisions import DecisionTable, tree_code_bits
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines.base import SeparateBound
from tokenbound.bounds.printing import LineValue, Measured, budget_sentences, line_kappa, yardsticks
from tokenbound.bounds.sampling import SamplingPath, UnitLimits, expected_slacks_of_windows, path_of_windows
from tokenbound.bounds.search import SlackModel, descend
from tokenbound.errors import MismatchError


@dataclass(frozen=True)
class BitsTuning:
    """The grid point of the line."""

    lam: float
    """lambda per bit."""
    slope: float
    """Factor on the model's log-odds."""
    alpha: float
    """Weight of a fair coin in what is expected of a decision."""
    tune_bits: float
    """L_tune: tree, lambda, slope, alpha, budget, K lines and trials."""
    budget: float | None = None
    """In a sample: bits that a window may lose before the rest of it is given fair coins."""

    @property
    def bet(self) -> DecisionBet:
        """What each cell costs."""
        return DecisionBet(self.lam, self.slope, self.alpha)


@dataclass(frozen=True)
class BitsSums:
    """What some shards hold: exact counts, so that every total is a sum over cells."""

    table: DecisionTable
    windows: Floats | None = None
    """[W] sum of z over the decisions of each window in draw order, of a sampled run."""
    window_lengths: Ints | None = None
    """[W] tokens of each window."""
    window_decisions: Ints | None = None
    """[W] decisions of each window."""


class Bits(SeparateBound[BitsTuning, BitsSums]):
    """The bound on the loss per token with decisions as steps, computed from a table of counts."""

    name = "bits"
    bounds_risk = False
    stands_alone = False
    columns = ("decision_cell", "decision_count")

    def choose(self, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None) -> BitsTuning:
        """The stake and the recalibration that suit the table, sampling slack included."""
        if evidence.decisions is None or claim.tree is None:
            raise MismatchError(
                "the losses have no table of decisions, which `bits` needs; leave it out of the methods, or score again"
            )
        slack = SlackModel.of(evidence, claim, sampling)
        return choose_bits(evidence.decisions, claim, sampling, slack=slack)

    def sums(self, tuning: BitsTuning, piece: Piece) -> BitsSums:
        """Counts of a piece, and of a sample the z of its windows."""
        found = piece.require_decisions()
        table = DecisionTable.of_cells(found.cell, piece["nll"].size, found.count)
        if piece.window_lengths is None:
            return BitsSums(table)
        values = tuning.bet.value.reshape(-1)[found.cell] * found.count
        decisions = np.rint(found.window_sums(found.count)).astype(np.int64)
        return BitsSums(table, found.window_sums(values), piece.window_lengths, decisions)

    def merge(self, parts: Sequence[BitsSums]) -> BitsSums:
        """Counts of all parts, windows in order."""
        table = sum((part.table for part in parts[1:]), parts[0].table)
        columns = [(part.windows, part.window_lengths, part.window_decisions) for part in parts]
        by_window = [[each for each in column if each is not None] for column in zip(*columns, strict=True)]
        return BitsSums(table, *(np.concatenate(column) if column else None for column in by_window))

    def certify(self, tuning: BitsTuning, sums: BitsSums, claim: Claim, sampling: SamplingPlan | None) -> Line:
        """The printed line."""
        return certify_bits(tuning, sums, claim, sampling)

    def sentences(self, line: Line) -> tuple[str, ...]:
        """What its risk is, and that it is another one."""
        return (
            "The line bits bounds another risk than the token lines, in the same unit: the mean, over the positions of "
            "this corpus, of the expected loss if one binary decision of a token's code were drawn again, given what "
            "came before it and the earlier decisions of that token. A token has "
            f"{line.parameters['decisions_per_token']:.2f} decisions along the tree `{line.parameters['tree']}`, which "
            "looks neither at the model nor at the context. It is never the bound quoted.",
            *budget_sentences(line),
        )

    def curves(self, line: Line, view: EvidenceView) -> LineCurves:
        """Against m and lambda, with slope and alpha held."""
        table = view.evidence.decisions
        if table is None:
            return LineCurves(fixed_point_at(line, view.claim.num_tokens))
        slope, alpha = (float(line.parameters[name]) for name in ("slope", "alpha"))
        means = np.array([mean_value(table, DecisionBet(lam, slope, alpha)) for lam in DECISION_LAMBDA_GRID])
        prices = line.kappa_nats / np.array(DECISION_LAMBDA_GRID)
        chosen = DECISION_LAMBDA_GRID.index(float(line.parameters["lambda"]))
        return LineCurves(
            lambda size: float((means + prices / size).min()),
            by_stake=sweep(DECISION_LAMBDA_GRID, means + prices / view.claim.num_tokens, chosen),
        )


def mean_value(table: DecisionTable, bet: DecisionBet) -> float:
    """Mean per token of the sum of z over its decisions, bits."""
    return _total(table, bet.value) / table.num_tokens


def choose_bits(
    table: DecisionTable, claim: Claim, sampling: SamplingPlan | None = None, *, slack: SlackModel | None = None
) -> BitsTuning:
    """The grid point at which the line is smallest on a table.

    Args:
        table: of all tokens, or of the pilot of a sample.
        claim: what is claimed.
        sampling: how windows were drawn; None where every one was scored.
        slack: the sampling slack to expect.

    Raises:
        MismatchError: a table of no token.

    >>> counts = np.zeros((2, 255), np.int64)
    >>> counts[0, 100], counts[1, 100] = 967_000, 33_000  # the right child has a probability of 0.033
    >>> claim = Claim(256, 256, 40_000, 0.05, num_tokens=200_000, methods=("freedman", "bits"), tree="zipf")
    >>> tuning = choose_bits(DecisionTable(counts, num_tokens=200_000), claim)
    >>> line = certify_bits(tuning, BitsSums(DecisionTable(counts, num_tokens=200_000)), claim)
    >>> round(line.empirical, 3), round(line.value, 3)
    (1.251, 2.232)
    """
    if table.num_tokens == 0:
        raise MismatchError("the table of decisions holds no token; score the corpus again")
    sampled = sampling is not None
    paid = _price(claim, sampled=sampled)
    price = line_kappa(paid, claim, sampled=sampled) / claim.num_tokens
    largest = 0 if sampling is None else sampling.max_unit_decisions or 0
    expected, decisions = slack or SlackModel(), table.num_decisions / table.num_tokens

    def value(point: Sequence[int]) -> float:
        lam, slope, alpha, budget = (grid[index] for grid, index in zip(grids, point, strict=True))
        bet = DecisionBet(lam, slope, alpha)
        mean = mean_value(table, bet)
        most = max(1 - mean / decisions, 0.0) * largest
        rest = expected.with_budget(budget, mean=mean, highest=bet.highest_value, uniform=decisions, most=most)
        return mean + price / lam + rest

    grids = (DECISION_LAMBDA_GRID, DECISION_SLOPE_GRID, DECISION_ALPHA_GRID, BUDGET_GRID if sampled else (0.0,))
    middle = DECISION_SLOPE_GRID.index(1.0), len(DECISION_ALPHA_GRID) // 2, len(grids[3]) // 2
    point = [_nearest_stake(price), *middle]
    best = math.inf
    while (found := value(point)) < best:  # one coordinate after the other, until none moves
        best = found
        for axis, grid in enumerate(grids):

            def along(index: int, axis: int = axis) -> float:
                return value([*point[:axis], index, *point[axis + 1 :]])

            point[axis] = descend(along, point[axis], len(grid))
    lam, slope, alpha, budget = (grid[index] for grid, index in zip(grids, point, strict=True))
    return BitsTuning(lam, slope, alpha, paid, budget if sampled else None)


def certify_bits(tuning: BitsTuning, sums: BitsSums, claim: Claim, sampling: SamplingPlan | None = None) -> Line:
    """The printed line: mean of z, what the sample leaves open, and kappa / (lambda m).

    Args:
        tuning: what :func:`choose_bits` chose.
        sums: of every shard, merged; for sampled runs in draw order.
        claim: what is claimed.
        sampling: how windows were drawn; None where every one was scored.

    Raises:
        MismatchError: a tuning that is not paid for, or tokens are missing or counted twice.
        IncompleteError: a sampled run has no window beyond the pilot.
    """
    _require_coded(tuning, claim, sampled=sampling is not None)
    table, bet = sums.table, tuning.bet
    complete = sampling is None or sampling.pilot_units == sampling.num_units
    if complete and not claim.what_if and table.num_tokens != claim.num_tokens:
        raise MismatchError(f"the table of decisions holds {table.num_tokens} tokens, the corpus {claim.num_tokens}")
    mean, slack, larger, beta = mean_value(table, bet), 0.0, dict[int, float](), tuple[float, ...]()
    if sampling is not None:
        values, lengths, limits = _windows(tuning, sums, sampling)
        mean = math.fsum(values.tolist()) / table.num_tokens
        if not complete:
            path = path_of_windows(values, lengths, 0.0, claim, sampling, limits=limits)
            slack, beta = float(path.upper[-1]) - mean, path.beta
            larger = expected_slacks_of_windows(values, lengths, 0.0, claim, sampling, limits=limits)
    kappa = line_kappa(tuning.tune_bits, claim, sampled=sampling is not None)
    complexity = kappa / (bet.lam * claim.num_tokens)
    value = mean + slack + complexity
    loss = _total(table, bet.loss) / table.num_tokens
    square = _total(table, (bet.forecast - bet.loss) ** 2) / table.num_tokens
    decisions = table.num_decisions / table.num_tokens
    found = LineValue(
        value,
        mean - loss,
        complexity,
        tuning.tune_bits,
        {
            "tree": claim.tree,
            "lambda": bet.lam,
            "slope": bet.slope,
            "alpha": bet.alpha,
            "decisions_per_token": decisions,
            "highest_decision_bits": bet.highest_value,
        },
        yardsticks(mean - loss + complexity, square, kappa, claim.num_tokens),
        guard=1e-12 * abs(value) + _total(table, bet.rounding) / table.num_tokens,
    )
    over = 0 if sums.windows is None or sampling is None else int(_budget(tuning).exceeded(sums.windows).sum())
    measured = Measured(loss, mean, slack, square, sampling is not None, larger, beta, tuning.budget, over)
    bound = Bits()
    guess = min(bound.random_guess(claim, None), decisions)  # coin flips along the tree are a model of no bits
    return bound.printed_line(None, found, measured, claim, guess=guess)


def bits_path(tuning: BitsTuning, sums: BitsSums, claim: Claim, sampling: SamplingPlan) -> SamplingPath:
    """Bounds on the full mean of z after each window of a sample.

    Raises:
        IncompleteError: no window beyond the pilot was scored.
        MismatchError: sums or a plan without what a sample needs.
    """
    values, lengths, limits = _windows(tuning, sums, sampling)
    return path_of_windows(values, lengths, 0.0, claim, sampling, limits=limits)


def _windows(tuning: BitsTuning, sums: BitsSums, sampling: SamplingPlan) -> tuple[Floats, Ints, UnitLimits]:
    """[W] what each window costs under its budget, [W] its tokens, and what limits the cost of any window."""
    if sums.windows is None or sums.window_lengths is None or sums.window_decisions is None:
        raise MismatchError("the bits line of a sampled run needs the sums of its windows")
    if sampling.max_unit_decisions is None or sampling.num_decisions is None:
        raise MismatchError("the plan of the sample does not say how many decisions its windows have")
    budget, decisions = _budget(tuning), sums.window_decisions
    limits = budget.limits(decisions, sampling.num_decisions, sampling.max_unit_decisions)
    return budget.counted(sums.windows, decisions), sums.window_lengths, limits


def _budget(tuning: BitsTuning) -> WindowBudget:
    if tuning.budget is None:
        raise MismatchError("the bits line of a sampled run needs the budget of a window")
    return WindowBudget(tuning.budget, tuning.bet.highest_value, uniform=1.0)


def _require_coded(tuning: BitsTuning, claim: Claim, *, sampled: bool) -> None:
    if claim.tree is None:
        raise MismatchError("the claim names no tree of decisions")
    require_member("lambda", tuning.lam, DECISION_LAMBDA_GRID)
    require_member("slope", tuning.slope, DECISION_SLOPE_GRID)
    require_member("alpha", tuning.alpha, DECISION_ALPHA_GRID)
    require_budget(Bits.name, tuning.budget, has_budget=sampled)
    require_paid(Bits.name, tuning.tune_bits, _price(claim, sampled=sampled))


def _price(claim: Claim, *, sampled: bool) -> float:
    """Length in bits of the code word of a grid point, with K lines and trials."""
    return decision_tune_bits(tree_code_bits(claim.tree_lengths), has_budget=sampled) + claim.shared_bits


def _total(table: DecisionTable, values: Floats) -> float:
    """Sum of a value per cell over all decisions, rounded once."""
    return math.fsum((table.counts * values).reshape(-1).tolist())


def _nearest_stake(price: float) -> int:
    """Where the search begins: sqrt(2 price), as if the variance were one bit^2 per token."""
    return int(np.argmin(np.abs(np.log2(DECISION_LAMBDA_GRID) - 0.5 * math.log2(2 * price))))
