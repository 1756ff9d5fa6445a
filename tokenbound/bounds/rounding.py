"""Printed numbers never lie on the wrong side of the computed ones."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

from tokenbound.bounds.constants import PRINT_DECIMALS

_EXACT = Context(prec=400)
"""Enough digits for any float64 at any number of decimals that is printed."""


def arithmetic_guard(value: float, lam: float | None = None, t: float = 0.0) -> float:
    """An allowance for float64 rounding in a bound, in the units of ``value``.

    Sums of positive terms taken pairwise are off by less than 1e-13 relative for 2^40 tokens. In the betting form four
    roundings of 2^-53 reach each factor 1 + d, and a few of loss and forecast, which are below 64 bits, d / lambda. The
    logarithm of a factor as small as 1 - t magnifies both.

    Args:
        value: the bound.
        lam: lambda per bit of a betting form.
        t: its lambda * (B - y0'): no factor is below 1 - t.
    """
    return 1e-12 * abs(value) + (2.0**-51 * (64 + 1 / lam) / (1 - t) if lam is not None else 0.0)


def round_up(value: float, decimals: int = PRINT_DECIMALS) -> float:
    """The smallest float on the decimal grid that is not below ``value``.

    Args:
        value: what is not finite comes back as it is.
        decimals: digits behind the point.

    >>> round_up(0.1234567891)
    0.12345679
    """
    if not math.isfinite(value):
        return value
    ceiling = Decimal(value).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_CEILING, context=_EXACT)
    rounded = float(ceiling)
    return rounded if rounded >= value else math.nextafter(rounded, math.inf)


def format_bound(value: float, decimals: int = 3) -> str:
    """Decimal text rounded up, for tables.

    Args:
        value: finite.
        decimals: digits behind the point.

    >>> format_bound(2.0001)
    '2.001'
    """
    return str(Decimal(value).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_CEILING, context=_EXACT))
