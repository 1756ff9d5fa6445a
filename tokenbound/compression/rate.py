"""Choosing the rate: golden-section search that keeps a record of what it tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, log, sqrt

from tokenbound.errors import InputError

_GOLDEN = (sqrt(5) - 1) / 2


@dataclass(frozen=True)
class RateSearch:
    """What was tried and what was best.

    Attributes:
        rate: The rate with the smallest value.
        value: Its value.
        tried: (rate, value) in the order tried; shown to the user, because the choice was made on data.
    """

    rate: float
    value: float
    tried: tuple[tuple[float, float], ...]


def choose_rate(
    evaluate: Callable[[float], float], low: float, high: float, *, tolerance: float = 0.05, max_tries: int = 12
) -> RateSearch:
    """Minimise a bound over the rate, on a logarithmic scale.

    The bound as a function of the rate is flat at its minimum, so a few percent of rate are enough. If the values are
    not unimodal the answer is still the best that was tried. Quantizing with another rate makes another artifact,
    which pays its own code: no price beyond its bytes is due under the code prior (`trial` counts claims).

    Args:
        evaluate: Rate to the value to minimise; infinity is allowed, NaN counts as infinity.
        low: Smallest rate.
        high: Largest rate.
        tolerance: Stop when the rates left differ by less than this ratio less one.
        max_tries: Stop after this many evaluations.

    Raises:
        InputError: not 0 < low < high, or nothing finite was found.

    >>> search = choose_rate(lambda rate: (rate - 0.3) ** 2, 0.01, 1.0, max_tries=30, tolerance=1e-3)
    >>> round(search.rate, 2)
    0.3
    """
    if not 0 < low < high or max_tries < 2:
        raise InputError(f"a rate search needs 0 < low < high and at least two tries, got {low}, {high}, {max_tries}")
    tried: list[tuple[float, float]] = []

    def at(position: float) -> float:
        rate = exp(position)
        value = evaluate(rate)
        tried.append((rate, value if value == value else float("inf")))
        return tried[-1][1]

    _golden_section(at, log(low), log(high), log(1 + tolerance), lambda: len(tried) < max_tries)
    rate, value = min(tried, key=lambda item: item[1])
    if not isfinite(value):
        raise InputError(f"no rate between {low} and {high} gave a finite value")
    return RateSearch(rate, value, tuple(tried))


def _golden_section(
    at: Callable[[float], float], left: float, right: float, width: float, may_go_on: Callable[[], bool]
) -> None:
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_a, at_b = at(a), at(b)
    while right - left > width and may_go_on():
        if at_a <= at_b:
            right, b, at_b = b, a, at_a
            a = right - _GOLDEN * (right - left)
            at_a = at(a)
        else:
            left, a, at_a = a, b, at_b
            b = left + _GOLDEN * (right - left)
            at_b = at(b)
