"""A budget for every window: what a sample need not fear of the windows that it did not draw.

A sample says nothing of windows that are rare enough to be missed, and the bound allows each the largest sum that it
can have: every decision at the largest z. So the sampled hypothesis is made one whose windows cannot lose so much.
Along a window it adds up the z of its decisions; once the sum exceeds the budget C, the rest of the window is given
fair coins, whose loss, forecast and z are all exactly one bit.

Whether the sum has exceeded C is known before a decision, and which decisions belong to a window is known from
positions alone. So this is a predictable change of the predictions, paid for by the code word of C, and every line
whose steps are decisions holds for it word for word. With z_max the largest z of one decision and d_w the decisions of
window w, its sum is

    Z_w                         where Z_w <= C: z is never below 0, so no earlier sum exceeded C either
    at most C + z_max + d_w     otherwise: one decision crosses C, and those behind it cost a bit each

The second is what such a window is counted at, so that the order of its decisions need not be known. No window of the
corpus exceeds it, and d_w is known from ids alone: so a sample takes the sums about the pilot's mean per decision, and
only C + z_max and the excess of a fair coin over that mean are left to chance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.columns import Floats

_ROUNDING = 1e-9
"""Far above the relative rounding of a window's sum: a sum so near C counts as one that exceeds it."""


def exceeds_budget(sums: Floats, budget: float) -> NDArray[np.bool_]:
    """[W] whether the sum of a window may have exceeded its budget.

    Args:
        sums: [W] of z over the decisions of each window.
        budget: C in bits.
    """
    return np.asarray(sums * (1 + _ROUNDING) > budget)


def budgeted_sums(sums: Floats, decisions: NDArray[np.number], *, budget: float, highest: float) -> Floats:
    """[W] what each window costs at most under its budget.

    Args:
        sums: [W] of z over the decisions of each window.
        decisions: [W] how many it has.
        budget: C in bits.
        highest: z_max.

    >>> budgeted_sums(np.array([90.0, 130.0]), np.array([60, 70]), budget=100.0, highest=12.0).tolist()
    [90.0, 182.0]
    """
    return np.where(exceeds_budget(sums, budget), budget + highest + decisions, sums)
