"""Rounding with error feedback: the error of each column is made good, as far as possible, by the later ones.

With a quadratic cost E H E' and H^-1 = U'U (U upper triangular), rounding column j and then moving every later
column k by -(error_j / U_jj) U_jk leaves exactly the cost sum_j d_j error_j^2, d_j = 1 / U_jj^2: the diagonal of the
LDL decomposition of H (GPTQ: Frantar et al. 2022, arXiv 2210.17323; LDLQ: Chee et al. 2023, arXiv 2307.13304).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DAMPING = 0.01
"""Part of the mean diagonal that is added to H: statistics of few tokens must not be trusted to be singular."""
BLOCK_COLUMNS = 128

Rounder = Callable[[torch.Tensor, int], torch.Tensor]
"""(columns [rows, width], index of the first) to the values that they are given."""


def inverse_factor(moment: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """U upper triangular with (H + damping * mean(diag H) * I)^-1 = U'U.

    Args:
        moment: H [n, n], symmetric, not negative. An all-zero H counts as the identity.
        damping: Raised tenfold until the factorization succeeds.
    """
    moment = moment.double()
    mean = float(moment.diagonal().mean()) if len(moment) else 0.0
    if not mean > 0:
        return torch.eye(len(moment), dtype=torch.float64)
    identity = torch.eye(len(moment), dtype=torch.float64)
    while True:
        # H = L L' with the columns in reverse order gives the upper factor of H^-1 without inverting twice.
        flipped = torch.flip(moment + damping * mean * identity, (0, 1))
        lower, info = torch.linalg.cholesky_ex(flipped)
        if not int(info):
            factor: torch.Tensor = torch.linalg.solve_triangular(torch.flip(lower, (0, 1)), identity, upper=True)
            return factor
        damping = max(10 * damping, 1e-6)


def conditional_variances(factor: torch.Tensor) -> torch.Tensor:
    """d_j = 1 / U_jj^2: what an error in column j costs once later columns have answered it [n]."""
    return factor.diagonal().square().reciprocal()


def round_with_feedback(weights: torch.Tensor, factor: torch.Tensor, rounder: Rounder, width: int = 1) -> torch.Tensor:
    """Round a matrix column by column (or `width` columns at a time) with feedback.

    Args:
        weights: [rows, columns]; not changed.
        factor: From `inverse_factor` [columns, columns].
        rounder: Called with consecutive groups of columns, adjusted for all earlier errors.
        width: Columns per call; groups of lattice quantizers. Within a group there is no feedback.

    Returns:
        The adjusted matrix that was rounded, so that callers can look at what the rounder saw [rows, columns].
    """
    work = weights.double().clone()
    columns = work.shape[1]
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        errors = torch.zeros(len(work), stop - start, dtype=torch.float64)
        for left in range(start, stop, width):
            right = min(left + width, stop)
            error = work[:, left:right] - rounder(work[:, left:right], left).double()
            scaled = torch.linalg.solve_triangular(factor[left:right, left:right], error, upper=True, left=False)
            errors[:, left - start : right - start] = scaled
            work[:, right:stop] -= scaled @ factor[left:right, right:stop]
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work
