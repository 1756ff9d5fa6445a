"""Whether a tuning is a word of the code that it says it paid for.

A bound may be tuned on its own losses because every tuning has a code word and the line pays for it. A tuning outside
the grids, or one that pays less than its word is long, has no place in the union bound; it is refused here, whoever
made it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokenbound.bounds.claim import Claim, Tuning
from tokenbound.bounds.constants import ALPHA_GRID, BUDGET_GRID, T_GRID
from tokenbound.bounds.lines.base import token_bound
from tokenbound.errors import MismatchError

_ROUNDING = 1e-9
"""How far a number that is derived from the code word may be off."""


def require_coded(tuning: Tuning, claim: Claim) -> None:
    """Refuse a tuning that its line's code cannot name, or that pays less than its code word.

    Args:
        tuning: of one line.
        claim: whose line it is: K and the trial are part of the price.

    Raises:
        MismatchError: the field that is outside the code.

    >>> claim = Claim(256, 256, code_length_bits=0, delta=0.05, num_tokens=100, methods=("azuma",))
    >>> bound = token_bound("azuma")
    >>> require_coded(bound.charged(Tuning("azuma", vocab_size=256, alpha=0.125), claim), claim)
    """
    if tuning.vocab_size != claim.vocab_size:
        raise MismatchError(f"a line was tuned for V = {tuning.vocab_size}, the claim says {claim.vocab_size}")
    bound = token_bound(tuning.method)
    require_paid(tuning.method, tuning.tune_bits, bound.word_bits(tuning) + claim.shared_bits)
    if tuning.unavailable is None:
        bound.require_coded(tuning, claim)


def require_budget(line: str, budget: float | None, *, has_budget: bool) -> None:
    """Refuse a budget outside its grid, none where windows have one, and one where they have none.

    The two kinds of lines have codes of their own, so that which kind a line is must not be a choice.

    Raises:
        MismatchError: it is one of these.
    """
    if has_budget and budget is None:
        raise MismatchError(f"the line {line} of a sample has no budget; choose its tuning with the plan of the sample")
    if has_budget:
        require_member("budget", budget, BUDGET_GRID)
    elif budget is not None:
        raise MismatchError(f"the line {line} has a budget of {budget}, which lines of a sample alone may have")


def require_paid(line: str, paid: float, length: float) -> None:
    """Refuse a line that pays less for its tuning than its code word is long.

    Raises:
        MismatchError: it does.
    """
    if not paid >= length - _ROUNDING:
        raise MismatchError(f"the line {line} pays {paid} bits for its tuning, whose code word has {length}")


def require_forecast(coefficients: Sequence[float], count: int, y0: float | None) -> None:
    """Refuse coefficients or a floor that are not finite float16 numbers, or another number of them than was paid.

    Raises:
        MismatchError: one is not.
    """
    if len(coefficients) != count:
        raise MismatchError(f"a forecast has {len(coefficients)} coefficients, {count} are paid")
    for name, value in (("y0", y0), *(("coefficient", c) for c in coefficients)):
        if value is None or not math.isfinite(value) or float(np.float16(value)) != value:
            raise MismatchError(f"{name} {value!r} of a forecast is no finite float16")


def require_stake(t: float | None, lam: float | None, distance: float) -> None:
    """Refuse a t outside its grid, or a lambda that is not t / ``distance``.

    Raises:
        MismatchError: either is so.
    """
    require_member("t", t, T_GRID)
    if t is None or lam is None or not math.isclose(lam * distance, t, rel_tol=_ROUNDING):
        raise MismatchError(f"lambda {lam!r} is not t / (B - y0') = {t!r} / {distance!r}")


def require_grid_alpha(name: str, alpha: float | None) -> None:
    """Refuse a smoothing weight outside the package's grid.

    Raises:
        MismatchError: it is outside.
    """
    require_member(name, alpha, ALPHA_GRID)


def require_member(name: str, value: float | None, grid: Sequence[float | None]) -> None:
    """Refuse a value that is not in its grid.

    Raises:
        MismatchError: it is not.
    """
    if value not in grid:
        raise MismatchError(f"{name} {value!r} of a line is not in the grid that its code word points into")
