"""Code lengths: what a hypothesis and its tuning cost in bits.

All codes are prefix-free and fixed before the data, so that sum over hypotheses of 2^-length <= 1 (Kraft) and the
union bound of Lotfi et al. 2024 (arXiv 2407.18158, section 3) applies with prior weight P(h) = 2^-length.
"""

from __future__ import annotations

import math
from typing import Final

from tokenbound.bounds.constants import (
    ALPHA_GRID,
    ALPHA_SLOPES,
    AZUMA_LAMBDA_GRID,
    BUDGET_GRID,
    DECISION_ALPHA_GRID,
    DECISION_LAMBDA_GRID,
    DECISION_SLOPE_GRID,
    DEGREE_BITS,
    FLOAT16_BITS,
    KIND_BITS,
    KL_LAMBDA_GRID,
    LN2,
    MAX_DEGREE,
    T_GRID,
)
from tokenbound.errors import InputError


def elias_delta_bits(n: int) -> int:
    """Length in bits of the Elias-delta code word of a positive integer (Elias 1975).

    With N = floor(log2 n) the word has N + 2 floor(log2(N + 1)) + 1 bits.

    Raises:
        InputError: ``n`` is not a positive integer.

    >>> [elias_delta_bits(n) for n in (1, 2, 3, 17, 8000)]
    [1, 4, 4, 9, 19]
    """
    if isinstance(n, bool) or n != int(n) or n < 1:
        raise InputError(f"Elias-delta codes positive integers, got {n!r}")
    exponent = int(n).bit_length() - 1
    return exponent + 2 * ((exponent + 1).bit_length() - 1) + 1


def artifact_code_length_bits(num_bytes: int) -> int:
    """Code length in bits of an artifact of ``num_bytes`` bytes: the bits themselves and their number in Elias-delta.

    Raises:
        InputError: ``num_bytes`` is not a positive integer.

    >>> artifact_code_length_bits(1000)
    8019
    """
    if num_bytes != int(num_bytes) or num_bytes < 1:
        raise InputError(f"an artifact has at least one byte, got {num_bytes!r}")
    bits = 8 * int(num_bytes)
    return bits + elias_delta_bits(bits)


def protocol_code_length_bits(protocol: bytes, default: bytes) -> int:
    """Code length in bits of a scoring protocol, given as canonical JSON bytes.

    The package default costs one bit; any other costs a bit and its bytes written out.

    Args:
        protocol: canonical JSON of the protocol used.
        default: canonical JSON of the package's default protocol, a constant of the package.

    Raises:
        InputError: ``protocol`` is empty.

    >>> protocol_code_length_bits(b"{}", default=b"{}")
    1
    """
    if protocol == default:
        return 1
    return 1 + artifact_code_length_bits(len(protocol))


SMOOTHING_BITS: Final = math.log2(len(ALPHA_GRID) * len(ALPHA_SLOPES))
"""Choosing alpha_min and the slope of alpha(H); a constant alpha is slope 0."""


def shared_tune_bits(num_lines: int, trial: int) -> float:
    """What every printed line pays for the K - 1 others and for the configurations tried before it.

    Args:
        num_lines: K, lines of the certificate, named before scoring.
        trial: ordinal of this configuration among all tried on these tokens, from 1.

    Raises:
        InputError: either is not a positive integer.

    >>> shared_tune_bits(4, 1)
    3.0
    """
    if num_lines < 1:
        raise InputError(f"a certificate has at least one line, got {num_lines!r}")
    return math.log2(num_lines) + elias_delta_bits(trial)


def azuma_tune_bits(*, m0_index: int | None, choose_alpha: bool) -> float:
    """Tuning of an Azuma line: alpha where it was chosen, and j of m0 = 2^(j/4) unless m was declared.

    >>> azuma_tune_bits(m0_index=2, choose_alpha=False)
    4.0
    """
    alpha_bits = math.log2(len(ALPHA_GRID)) if choose_alpha else 0.0
    return alpha_bits + (elias_delta_bits(m0_index) if m0_index is not None else 0)


def azuma_predictable_tune_bits() -> float:
    """Tuning of Azuma with predictable ranges (a smoothing head): lambda from its grid."""
    return math.log2(len(AZUMA_LAMBDA_GRID))


def decision_tune_bits(tree_bits: float, *, has_budget: bool = False) -> float:
    """Tuning of a line over decisions: the tree, lambda, and the slope and fair coin of its recalibration.

    Args:
        tree_bits: length of the tree's code word.
        has_budget: whether windows have a budget, as those of a sample do.

    >>> round(decision_tune_bits(2.0), 2), round(decision_tune_bits(2.0, has_budget=True), 2)
    (17.58, 23.58)
    """
    points = len(DECISION_LAMBDA_GRID) * len(DECISION_SLOPE_GRID) * len(DECISION_ALPHA_GRID)
    return tree_bits + math.log2(points) + budget_bits(has_budget=has_budget)


def budget_bits(*, has_budget: bool) -> float:
    """Length of the code word of a window's budget, which lines of a sample alone have.

    >>> budget_bits(has_budget=True)
    6.0
    """
    return math.log2(len(BUDGET_GRID)) if has_budget else 0.0


def kl_tune_bits() -> float:
    """Tuning of a bound on errors: lambda from its grid."""
    return math.log2(len(KL_LAMBDA_GRID))


def freedman_tune_bits(degree: int, *, choose_alpha: bool) -> float:
    """Tuning of a Freedman line: smoothing, t, kind and degree of the forecast, float16 coefficients and floor y0.

    Raises:
        InputError: ``degree`` is not 0, 1, 2 or 3.
    """
    return _forecast_tune_bits(degree, degree + 1) + (SMOOTHING_BITS if choose_alpha else 0.0)


def relative_tune_bits(degree: int) -> float:
    """Tuning of a relative line: two alphas, t, and a polynomial of total degree ``degree`` in two entropies.

    Raises:
        InputError: ``degree`` is not 0, 1, 2 or 3.
    """
    coefficients = (degree + 1) * (degree + 2) // 2
    return _forecast_tune_bits(degree, coefficients) + 2 * math.log2(len(ALPHA_GRID))


def _forecast_tune_bits(degree: int, num_coefficients: int) -> float:
    if degree not in range(MAX_DEGREE + 1):
        raise InputError(f"a polynomial forecast has degree 0 to {MAX_DEGREE}, got {degree!r}")
    return math.log2(len(T_GRID)) + KIND_BITS + DEGREE_BITS + FLOAT16_BITS * (num_coefficients + 1)


def kappa_nats(*, code_length_bits: float, tune_bits: float, delta: float) -> float:
    """The complexity kappa = ln2 * (L(h) + L_tune) + ln(1/delta), in nats.

    Args:
        code_length_bits: L(h), bits.
        tune_bits: L_tune, bits.
        delta: failure probability, in (0, 1).

    Raises:
        InputError: a negative or non-finite length, or delta outside (0, 1).

    >>> round(kappa_nats(code_length_bits=0, tune_bits=0, delta=0.05), 6)
    2.995732
    """
    for name, bits in (("code_length_bits", code_length_bits), ("tune_bits", tune_bits)):
        if not (math.isfinite(bits) and bits >= 0):
            raise InputError(f"{name} must be a finite number of bits >= 0, got {bits!r}")
    if not 0 < delta < 1:
        raise InputError(f"delta is a probability in (0, 1), got {delta!r}")
    return LN2 * (code_length_bits + tune_bits) + math.log(1 / delta)
