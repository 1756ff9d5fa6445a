"""A budget for every window: what a sample need not fear of the windows that it did not draw.

A sample says nothing of windows that are rare enough to be missed, so each of them must be allowed the largest sum that
it can have: every step at the largest z. With a Freedman-type bound that is tens of bits for each token. So the sampled
hypothesis is made one whose windows cannot lose so much. Along a window it adds up z; once the sum exceeds the budget
C, it predicts uniformly for the rest of the window. Such a step has one loss whatever happens, which is its forecast
too, and so its z: log2 V for a token, one bit for a binary decision.

Whether the sum has exceeded C is known before a step, and which steps belong to a window is known from positions alone.
So this is a predictable change of the predictions, paid for by the code word of C, and a bound whose z_i is a function
of predictable predictions and of token i holds for it word for word: no range appears in it, and 1 + lambda (Y - l) = 1
at the changed steps. With z_max the largest z of one step, p that of a uniform one and s_w the steps of window w, the
sum of the window is

    Z_w                           where Z_w <= C: z is never below 0, so no earlier sum exceeded C either
    at most C + z_max + p s_w     otherwise: one step crosses C, and each behind it costs p

The second is what such a window is counted at, so that the order of its steps need not be known. No window of the
corpus exceeds it, and s_w is known from ids alone: so a sample takes the sums about the pilot's mean per step, and only
C + z_max and the excess of p over that mean are left to chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.sampling import UnitLimits

_ROUNDING = 1e-9
"""Far above the relative rounding of a window's sum: a sum so near C counts as one that exceeds it."""


@dataclass(frozen=True)
class WindowBudget:
    """The budget of a line's windows.

    >>> budget = WindowBudget(bits=100.0, highest=12.0, uniform=1.0)
    >>> budget.counted(np.array([90.0, 130.0]), np.array([60, 70])).tolist()
    [90.0, 182.0]
    """

    bits: float
    """C."""
    highest: float
    """z_max of one step."""
    uniform: float
    """p: z of a step that is predicted uniformly."""

    def exceeded(self, sums: Floats) -> NDArray[np.bool_]:
        """[W] whether the sum of z over a window, [W], may have exceeded the budget."""
        return np.asarray(sums * (1 + _ROUNDING) > self.bits)

    def counted(self, sums: Floats, steps: Ints) -> Floats:
        """[W] what each window costs at most.

        Args:
            sums: [W] of z over the steps of each window.
            steps: [W] how many it has.
        """
        return np.where(self.exceeded(sums), self.bits + self.highest + self.uniform * steps, sums)

    def limits(self, steps: Ints, total: int, most: int, every: Ints | None = None) -> UnitLimits:
        """What limits the cost of any window of the corpus.

        Args:
            steps: [W] of the windows drawn, in draw order.
            total: of all windows together.
            most: of the window that has most.
            every: [N] of every window of the corpus, where that is known.
        """
        return UnitLimits(steps, total, most, self.bits + self.highest, self.uniform, every)
