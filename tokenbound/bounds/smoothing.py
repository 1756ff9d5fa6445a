"""The smoothed loss and the interval that contains it.

Notation: V is the width of the logits, alpha the smoothing weight, p~ = (1 - alpha) p + alpha / V the smoothed
probability of the token that came, l = -log2 p~ its loss in bits. Then A <= l <= B with

    A = -log2(1 - alpha + alpha / V),   B = log2(V / alpha),   D = B - A = log2(1 + (1 - alpha) V / alpha)

(Lotfi et al. 2023, arXiv 2312.17173, section 4; D is their Delta).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.constants import ALPHA_LEVELS, ALPHA_MAX, ALPHA_SLOPES, LN2, NLL_TOLERANCE_NATS
from tokenbound.errors import InputError

Floats = NDArray[np.float64]


def check_nll(nll_nats: ArrayLike, *, name: str = "nll_nats") -> NDArray[np.floating]:
    """Return the losses as a flat float array after refusing what cannot be a loss.

    Raises:
        InputError: not one-dimensional, NaN, infinite, or below -1e-5 nats.
    """
    nll = np.asarray(nll_nats)
    if nll.dtype not in (np.float32, np.float64):
        nll = nll.astype(np.float64)
    if nll.ndim != 1:
        raise InputError(f"{name} must be one flat array of losses, got shape {nll.shape}")
    if nll.size == 0:
        return nll
    low, high = float(nll.min()), float(nll.max())  # NaN propagates through both
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(np.flatnonzero(~np.isfinite(nll))[0])
        raise InputError(
            f"{name}[{bad}] is {nll[bad]}: every loss must be finite (count such a window at the worst case)"
        )
    if low < -NLL_TOLERANCE_NATS:
        raise InputError(f"{name}[{int(nll.argmin())}] is {low}: a negative log-likelihood cannot be below zero")
    return nll


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary of fewer than two entries.

    Raises:
        InputError: ``vocab_size`` is not an integer of at least 2.
    """
    if vocab_size != int(vocab_size) or vocab_size < 2:
        raise InputError(f"vocab_size must be an integer of at least 2, got {vocab_size!r}")


def check_alpha(alpha: ArrayLike) -> Floats:
    """Return alpha as float64 after refusing values outside (0, 1).

    Raises:
        InputError: any value is outside the open interval (0, 1) or NaN.
    """
    weights = np.asarray(alpha, dtype=np.float64)
    if weights.size and not (float(weights.min()) > 0 and float(weights.max()) < 1):
        raise InputError(f"alpha must lie in (0, 1), got values from {weights.min()} to {weights.max()}")
    return weights


def smoothed_loss_bits(nll_nats: ArrayLike, *, alpha: ArrayLike, vocab_size: int) -> Floats:
    """Smoothed loss of each token in bits.

    Args:
        nll_nats: [T] unsmoothed negative log-likelihoods in nats; values in [-1e-5, 0) count as 0.
        alpha: smoothing weight in (0, 1), one number or [T] predictable weights.
        vocab_size: V, width of the logits.

    Returns:
        [T] float64 losses, each in [A, B].

    Raises:
        InputError: a loss that is NaN, infinite or below -1e-5; alpha outside (0, 1); V < 2.

    >>> smoothed_loss_bits([0.0, 1000.0], alpha=0.5, vocab_size=2)
    array([0.4150375, 2.       ])
    """
    check_vocab_size(vocab_size)
    nll = np.maximum(check_nll(nll_nats).astype(np.float64), 0.0)
    weights = check_alpha(alpha)
    if weights.ndim and weights.shape != nll.shape:
        raise InputError(f"alpha has shape {weights.shape}, the losses {nll.shape}")
    return np.asarray(-np.log((1 - weights) * np.exp(-nll) + weights / vocab_size) / LN2, dtype=np.float64)


def loss_interval_bits(*, alpha: float, vocab_size: int) -> tuple[float, float]:
    """The interval (A, B) in bits that contains every smoothed loss.

    Args:
        alpha: smoothing weight, in (0, 1).
        vocab_size: V, width of the logits.

    Raises:
        InputError: alpha outside (0, 1) or V < 2.

    >>> low, high = loss_interval_bits(alpha=0.5, vocab_size=256)
    >>> round(low, 6), high
    (0.994375, 9.0)
    """
    check_vocab_size(vocab_size)
    weight = float(check_alpha(alpha))
    return -math.log1p(-weight + weight / vocab_size) / LN2, math.log(vocab_size / weight) / LN2


def loss_intervals_bits(*, alpha: ArrayLike, vocab_size: int) -> tuple[Floats, Floats]:
    """The intervals (A_i, B_i) in bits for an array of predictable smoothing weights, shapes as ``alpha``.

    Args:
        alpha: smoothing weights, in (0, 1), of any shape.
        vocab_size: V, width of the logits.

    >>> low, high = loss_intervals_bits(alpha=[0.5, 0.25], vocab_size=4)
    >>> high.tolist()
    [3.0, 4.0]
    """
    check_vocab_size(vocab_size)
    weights = check_alpha(alpha)
    return -np.log1p(-weights + weights / vocab_size) / LN2, np.log(vocab_size / weights) / LN2


def alpha_levels(alpha_min: float, slope: int) -> Floats:
    """The table of alpha(H): [64] weights, one for each equal interval of H / log2(V) in [0, 1).

    A positive slope gives alpha_min * 2^(slope * u): more smoothing where the model is unsure. A negative one gives
    alpha_min * 2^(-slope * (1 - u)). Values are capped at 1/2 and never fall below ``alpha_min``, which is the constant
    that the range B is computed from.

    Raises:
        InputError: ``slope`` is not in the package's grid or alpha outside (0, 1).
    """
    if slope not in ALPHA_SLOPES:
        raise InputError(f"alpha slope must be one of {ALPHA_SLOPES}, got {slope!r}")
    weight = float(check_alpha(alpha_min))
    u = np.arange(ALPHA_LEVELS) / (ALPHA_LEVELS - 1)
    octaves = slope * u if slope >= 0 else -slope * (1 - u)
    return np.maximum(np.minimum(weight * 2.0**octaves, ALPHA_MAX), weight)


def entropy_level(entropy_nats: ArrayLike, *, vocab_size: int) -> NDArray[np.int64]:
    """Index into :func:`alpha_levels` for each entropy in nats; entropies outside [0, ln V] go to the end intervals."""
    scaled = np.asarray(entropy_nats, dtype=np.float64) * (ALPHA_LEVELS / math.log(vocab_size))
    return np.clip(scaled, 0, ALPHA_LEVELS - 1).astype(np.int64)
