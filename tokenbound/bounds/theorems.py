"""The bounds themselves, one function per theorem, written as they are proved.

These functions are the reference: plain arrays in, one number out, nothing chosen inside. The certificate's reducer
(:mod:`tokenbound.bounds.exact`, :mod:`tokenbound.bounds.certify`) computes the same sums shard by shard.

Setting. l_1..l_m are the smoothed losses in bits of a hypothesis h with code length L(h), F_i the history up to token
i, mu_i = E[l_i | F_{i-1}]. Each bound holds with probability at least 1 - delta, for all hypotheses of the code at
once, on the risk R = (1/m) sum mu_i; kappa = ln2 (L(h) + L_tune) + ln(1/delta) nats. No independence between tokens
is assumed.

``num_tokens`` is m where the losses given are a sample of a larger corpus: then the mean over the sample may miss the
mean over the corpus, and ``sampling_slack_bits``, an upper bound on that miss at its own failure probability, must be
given.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.codes import kappa_nats
from tokenbound.bounds.constants import AZUMA_M0_STEPS_PER_OCTAVE, KL_LAMBDA_GRID
from tokenbound.bounds.smoothing import (
    Floats,
    check_alpha,
    check_nll,
    loss_interval_bits,
    loss_intervals_bits,
    smoothed_loss_bits,
)
from tokenbound.errors import InputError


def azuma_bound(
    nll_nats: ArrayLike,
    *,
    vocab_size: int,
    alpha: float,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
    num_tokens: int | None = None,
    sampling_slack_bits: float | None = None,
) -> float:
    """Azuma-Hoeffding bound for m fixed before the data: R <= R^ + D sqrt(kappa / (2m)).

    Theorem 3.1 of Lotfi et al. 2024 (arXiv 2407.18158). It holds for one m named beforehand; with an m that depends
    on the data, or looked at while the data grow, use :func:`azuma_anytime_bound`.

    Args:
        nll_nats: [T] unsmoothed losses in nats.
        vocab_size: V, width of the logits.
        alpha: constant smoothing weight.
        code_length_bits: L(h).
        tune_bits: L_tune.
        delta: failure probability.
        num_tokens: m, if not T.
        sampling_slack_bits: required when m is not T.

    Returns:
        Upper bound on the risk, bits per token.

    Raises:
        InputError: see the module; unusable losses or parameters.

    >>> round(azuma_bound([1.0] * 100, vocab_size=256, alpha=0.25, code_length_bits=0, tune_bits=0, delta=0.05), 6)
    3.025943
    """
    m, slack = _corpus_size(nll_nats, num_tokens, sampling_slack_bits)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab_size)
    mean = float(np.mean(smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size)))
    return mean + (high - low) * math.sqrt(kappa / (2 * m)) + slack


def azuma_anytime_bound(
    nll_nats: ArrayLike,
    *,
    vocab_size: int,
    alpha: float,
    m0_index: int,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
    num_tokens: int | None = None,
    sampling_slack_bits: float | None = None,
) -> float:
    """Azuma for all m at once: R <= R^ + D sqrt(kappa / (2m)) (sqrt(m/m0) + sqrt(m0/m)) / 2, m0 = 2^(j/4).

    Hoeffding's lemma makes exp(lambda sum (mu_i - l_i) - i lambda^2 D^2 / 8) a supermartingale; Ville's inequality
    with the one lambda = sqrt(8 kappa / (m0 D^2)) gives every m (Howard et al. 2020). ``tune_bits`` must contain the
    Elias-delta length of j.

    Args:
        nll_nats: [T] unsmoothed losses in nats.
        vocab_size: V.
        alpha: constant smoothing weight.
        m0_index: j >= 1.
        code_length_bits: L(h).
        tune_bits: L_tune, the code of j included.
        delta: failure probability.
        num_tokens: m, if not T.
        sampling_slack_bits: required when m is not T.

    Raises:
        InputError: unusable losses or parameters.

    >>> paid = {"code_length_bits": 0, "tune_bits": 12, "delta": 0.05}
    >>> losses = [1.0] * 10_000
    >>> round(azuma_anytime_bound(losses, vocab_size=256, alpha=0.25, m0_index=53, **paid), 6)
    2.080667
    """
    m, slack = _corpus_size(nll_nats, num_tokens, sampling_slack_bits)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab_size)
    mean = float(np.mean(smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size)))
    return mean + math.fsum(azuma_anytime_gap(high - low, kappa, m, m0_index)) + slack


def azuma_anytime_gap(loss_range_bits: float, kappa: float, num_tokens: int, m0_index: int) -> tuple[float, float]:
    """The gap of any-time Azuma in its two parts (lambda D^2 / 8, kappa / (lambda m)), bits per token.

    Raises:
        InputError: ``m0_index`` is not a positive integer.
    """
    if m0_index < 1:
        raise InputError(f"m0 = 2^(j/4) is coded by j >= 1, got {m0_index!r}")
    m0 = 2.0 ** (m0_index / AZUMA_M0_STEPS_PER_OCTAVE)
    lam = math.sqrt(8 * kappa / m0) / loss_range_bits
    return lam * loss_range_bits**2 / 8, kappa / (lam * num_tokens)


def azuma_predictable_bound(
    nll_nats: ArrayLike,
    *,
    vocab_size: int,
    alpha: ArrayLike,
    lam: float,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
    num_tokens: int | None = None,
    sampling_slack_bits: float | None = None,
) -> float:
    """Azuma with predictable ranges, for all m at once: R <= R^ + lambda mean(D_i^2) / 8 + kappa / (lambda m).

    Hoeffding's lemma given F_{i-1}: the range D_i of token i may depend on everything before it. lambda comes from a
    paid grid.

    Args:
        nll_nats: [T] unsmoothed losses in nats.
        vocab_size: V.
        alpha: [T] predictable smoothing weights, or one.
        lam: lambda > 0, per bit.
        code_length_bits: L(h).
        tune_bits: L_tune, the choice of lambda included.
        delta: failure probability.
        num_tokens: m, if not T.
        sampling_slack_bits: bound on the miss of the mean of l_i + lambda D_i^2 / 8; required when m is not T.

    Raises:
        InputError: unusable losses or parameters.

    >>> paid = {"code_length_bits": 0, "tune_bits": 12, "delta": 0.05}
    >>> alphas = [0.25, 0.01] * 5_000  # the range of a token's loss follows its own weight
    >>> round(azuma_predictable_bound([1.0] * 10_000, vocab_size=256, alpha=alphas, lam=0.005, **paid), 6)
    1.97671
    """
    m, slack = _corpus_size(nll_nats, num_tokens, sampling_slack_bits)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    _check_lambda(lam)
    loss = smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size)
    low, high = loss_intervals_bits(alpha=alpha, vocab_size=vocab_size)
    return float(np.mean(loss + lam / 8 * (high - low) ** 2)) + kappa / (lam * m) + slack


def freedman_bound(
    nll_nats: ArrayLike,
    forecast_bits: ArrayLike,
    *,
    vocab_size: int,
    alpha: ArrayLike,
    lam: float,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
    num_tokens: int | None = None,
    sampling_slack_bits: float | None = None,
    alpha_min: float | None = None,
    floor_bits: float | None = None,
) -> float:
    """Freedman-type bound with predictable forecasts, for all m at once.

    With Y_i the forecast of l_i, clipped to [A_i, B_i], and v(d) = d - ln(1 + d),

        R <= R^ + (1/m) sum v(lambda (Y_i - l_i)) / lambda + kappa / (lambda m).

    Proof: 1 + lambda (Y_i - l_i) > 0 has conditional mean 1 + lambda (Y_i - mu_i) <= exp(lambda (Y_i - mu_i)), so the
    product of (1 + lambda (Y_i - l_i)) exp(-lambda (Y_i - mu_i)) is a nonnegative supermartingale started at 1;
    Ville's inequality (Fan et al. 2015; Waudby-Smith and Ramdas 2024 for the betting form). lambda and the floor must
    come from a code paid in ``tune_bits``.

    Args:
        nll_nats: [T] unsmoothed losses in nats.
        forecast_bits: [T] predictable guesses of the loss (or one constant); clipped here.
        vocab_size: V.
        alpha: constant smoothing weight, or [T] predictable ones.
        lam: lambda per bit, with lambda * (B - smallest forecast) < 1.
        code_length_bits: L(h).
        tune_bits: L_tune.
        delta: failure probability.
        num_tokens: m, if not T.
        sampling_slack_bits: bound on the miss of the mean of l_i + v(lambda (Y_i - l_i)) / lambda; required when m is
            not T.
        alpha_min: lower limit of predictable weights, a constant of the hypothesis; required when ``alpha`` is an
            array.
        floor_bits: y0, lower limit of the forecasts.

    Returns:
        Upper bound on the risk, bits per token.

    Raises:
        InputError: lambda * (B - y0') >= 1, or unusable losses or parameters.

    >>> paid = {"code_length_bits": 0, "tune_bits": 12, "delta": 0.05}
    >>> losses = [0.5, 1.5] * 5_000
    >>> round(freedman_bound(losses, 1.4, vocab_size=256, alpha=0.25, lam=0.06, **paid), 6)  # measured: 1.659
    1.893474
    >>> perfect = smoothed_loss_bits(losses, alpha=0.25, vocab_size=256)
    >>> round(freedman_bound(losses, perfect, vocab_size=256, alpha=0.25, lam=0.06, **paid), 6)
    1.870844
    """
    m, slack = _corpus_size(nll_nats, num_tokens, sampling_slack_bits)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    loss = smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size)
    least_alpha = _least_alpha(alpha, alpha_min)
    _, highest = loss_interval_bits(alpha=least_alpha, vocab_size=vocab_size)
    low, high = loss_intervals_bits(alpha=alpha, vocab_size=vocab_size)
    forecast = _clipped_forecast(forecast_bits, low, high, floor_bits, loss.shape)
    _check_stake(
        lam, highest - _lowest(forecast, floor_bits, loss_interval_bits(alpha=least_alpha, vocab_size=vocab_size)[0])
    )
    return float(np.mean(loss + _v(lam * (forecast - loss)) / lam)) + kappa / (lam * m) + slack


def relative_bound(
    nll_nats: ArrayLike,
    base_nll_nats: ArrayLike,
    forecast_bits: ArrayLike,
    *,
    vocab_size: int,
    alpha: float,
    base_alpha: float,
    lam: float,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
    num_tokens: int | None = None,
    sampling_slack_bits: float | None = None,
    floor_bits: float | None = None,
) -> float:
    """Bound on the excess R(h) - R(h0) of a model over a base that was fixed independently of the tokens.

    The Freedman-type bound for d_i = l_i(h) - l_i(h0) in [A - B0, B - A0]; the models agree on most tokens, so d_i
    varies little. Only the delta artifact is paid. To bound R(h), add a bound on R(h0) at the same base_alpha with
    L(h0) = 0, the two at delta_1 + delta_2 = delta fixed in advance.

    Args:
        nll_nats: [T] unsmoothed losses of the model in nats.
        base_nll_nats: [T] those of the base on the same tokens.
        forecast_bits: [T] predictable guesses of d_i (or one constant); clipped here to [A - B0, B - A0].
        vocab_size: V, of both models.
        alpha: smoothing weight of the model.
        base_alpha: smoothing weight of the base.
        lam: lambda per bit, with lambda * (B - A0 - smallest forecast) < 1.
        code_length_bits: L of the delta artifact.
        tune_bits: L_tune.
        delta: delta_1.
        num_tokens: m, if not T.
        sampling_slack_bits: required when m is not T.
        floor_bits: y0, lower limit of the forecasts.

    Returns:
        Upper bound on R(h) - R(h0), bits per token.

    Raises:
        InputError: arrays of different lengths, lambda too large, or unusable losses or parameters.

    >>> paid = {"code_length_bits": 1_000, "tune_bits": 12, "delta": 0.025}
    >>> model, base = [0.9] * 100_000, [1.0] * 100_000
    >>> round(relative_bound(model, base, -0.12, vocab_size=256, alpha=0.1, base_alpha=0.1, lam=0.05, **paid), 6)
    -0.003062
    """
    m, slack = _corpus_size(nll_nats, num_tokens, sampling_slack_bits)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    loss = smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size)
    base_loss = smoothed_loss_bits(base_nll_nats, alpha=base_alpha, vocab_size=vocab_size)
    if loss.shape != base_loss.shape:
        raise InputError(
            f"the model has {loss.size} losses, the base {base_loss.size}: both must score the same tokens"
        )
    low, high = excess_interval_bits(alpha=alpha, base_alpha=base_alpha, vocab_size=vocab_size)
    excess = loss - base_loss
    forecast = _clipped_forecast(forecast_bits, low, high, floor_bits, excess.shape)
    _check_stake(lam, high - _lowest(forecast, floor_bits, low))
    return float(np.mean(excess + _v(lam * (forecast - excess)) / lam)) + kappa / (lam * m) + slack


def excess_interval_bits(*, alpha: float, base_alpha: float, vocab_size: int) -> tuple[float, float]:
    """The interval [A - B0, B - A0] in bits of the difference of two smoothed losses."""
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab_size)
    base_low, base_high = loss_interval_bits(alpha=base_alpha, vocab_size=vocab_size)
    return low - base_high, high - base_low


def kl_error_bound(
    error: float, *, code_length_bits: float, tune_bits: float, delta: float, num_tokens: int, lam: float
) -> float:
    """Bound on the expected top-k error at one lambda, for all m at once, raw (it may exceed 1).

    e <= (1 - exp(-lambda e^ - kappa/m)) / (1 - exp(-lambda)): Catoni 2007's transform. The mean of exp(-lambda e_i)
    for e_i in [0, 1] of mean p is at most 1 - p (1 - exp(-lambda)), whose logarithm is concave in p, so the mean over
    i of conditional means can be taken inside. Valid for every lambda of a paid grid; the infimum over all lambda > 0
    is the kl-inverse and is not a bound for martingales at this price.

    Args:
        error: empirical error e^ in [0, 1].
        code_length_bits: L(h).
        tune_bits: L_tune, the choice of lambda included.
        delta: failure probability.
        num_tokens: m.
        lam: lambda > 0.

    Raises:
        InputError: an error outside [0, 1] or unusable parameters.

    >>> round(kl_error_bound(0.1, code_length_bits=0, tune_bits=0, delta=0.05, num_tokens=1000, lam=0.5), 6)
    0.131182
    """
    _check_error(error)
    _check_lambda(lam)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    return -math.expm1(-lam * error - kappa / _positive(num_tokens, "num_tokens")) / -math.expm1(-lam)


def kl_grid_bound(
    error: float, *, code_length_bits: float, tune_bits: float, delta: float, num_tokens: int
) -> tuple[float, float]:
    """The smallest :func:`kl_error_bound` over the package's grid, capped at 1, and its lambda.

    Args:
        error: empirical error rate, in [0, 1].
        code_length_bits: L(h), bits.
        tune_bits: L_tune, bits; it must contain log2 of the grid's size, as
            :func:`~tokenbound.bounds.codes.kl_tune_bits` does.
        delta: failure probability, in (0, 1).
        num_tokens: m.

    Raises:
        InputError: an error outside [0, 1] or unusable parameters.

    >>> kl_grid_bound(0.1, code_length_bits=0, tune_bits=4.33, delta=0.05, num_tokens=10_000)
    (0.11075689515905536, 0.125)
    """
    bounds = [
        kl_error_bound(
            error, code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta, num_tokens=num_tokens, lam=lam
        )
        for lam in KL_LAMBDA_GRID
    ]
    best = min(range(len(bounds)), key=bounds.__getitem__)
    return min(bounds[best], 1.0), KL_LAMBDA_GRID[best]


def paper_error_bound(
    error: float, *, code_length_bits: float, tune_bits: float, delta: float, num_tokens: int
) -> float:
    """The paper's bound on an error rate, m fixed, for reproduction: e <= e^ + sqrt(kappa / (2m)) (arXiv 2407.18158).

    Args:
        error: empirical error rate, in [0, 1].
        code_length_bits: L(h), bits.
        tune_bits: L_tune, bits.
        delta: failure probability, in (0, 1).
        num_tokens: m.

    Raises:
        InputError: an error outside [0, 1] or unusable parameters.

    >>> round(paper_error_bound(0.1, code_length_bits=0, tune_bits=0, delta=0.05, num_tokens=1_000), 6)
    0.138702
    """
    _check_error(error)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    return error + math.sqrt(kappa / (2 * _positive(num_tokens, "num_tokens")))


def paper_subsample_bound(
    error: float,
    *,
    loss_range_bits: float,
    code_length_bits: float,
    num_tokens: int,
    num_sampled: int,
    delta: float,
) -> float:
    """The paper's bound from n tokens drawn uniformly out of m, m fixed, for reproduction.

    R <= R^_n + D [sqrt((ln2 L - ln(r delta)) / (2m)) + sqrt(-ln((1 - r) delta) / (2n))], r = n / (n + m), with alpha
    fixed in advance (arXiv 2407.18158). The tokens must be drawn one by one, not in windows.

    Args:
        error: mean smoothed loss (or error) of the sample, R^_n.
        loss_range_bits: D (1 for an error rate).
        code_length_bits: L(h).
        num_tokens: m.
        num_sampled: n.
        delta: failure probability.

    Raises:
        InputError: unusable parameters.

    >>> sizes = {"code_length_bits": 2e6, "num_tokens": 10**8, "num_sampled": 10_000}
    >>> round(paper_subsample_bound(2.0, loss_range_bits=14.0, delta=0.05, **sizes), 6)
    3.336927
    """
    if not (math.isfinite(error) and math.isfinite(loss_range_bits) and loss_range_bits >= 0):
        raise InputError(f"error and loss_range_bits must be finite, got {error!r} and {loss_range_bits!r}")
    m, n = _positive(num_tokens, "num_tokens"), _positive(num_sampled, "num_sampled")
    share = n / (n + m)
    corpus = kappa_nats(code_length_bits=code_length_bits, tune_bits=0.0, delta=share * delta) / (2 * m)
    sample = kappa_nats(code_length_bits=0.0, tune_bits=0.0, delta=(1 - share) * delta) / (2 * n)
    return error + loss_range_bits * (math.sqrt(corpus) + math.sqrt(sample))


def document_losses_bits(loss_bits: ArrayLike, document: ArrayLike) -> Floats:
    """Mean smoothed loss of every document that has a scored token, in order of document id.

    Args:
        loss_bits: [T] smoothed losses.
        document: [T] document id of each token.

    Returns:
        [documents] float64; a document without targets is left out.

    Raises:
        InputError: the arrays differ in length.

    >>> document_losses_bits([1.0, 3.0, 5.0], [7, 7, 9])
    array([2., 5.])
    """
    loss, ids = np.asarray(loss_bits, dtype=np.float64), np.asarray(document)
    if loss.shape != ids.shape or loss.ndim != 1:
        raise InputError(f"losses have shape {loss.shape}, document ids {ids.shape}: one id per token is needed")
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=loss, minlength=counts.size)
    return np.asarray(sums / counts, dtype=np.float64)


def document_bound(
    nll_nats: ArrayLike,
    document: ArrayLike,
    *,
    vocab_size: int,
    alpha: float,
    code_length_bits: float,
    tune_bits: float,
    delta: float,
) -> float:
    """Document-level baseline (Lotfi et al. 2023, arXiv 2312.17173): IID documents, their number fixed in advance.

    The loss of a document is the mean of its smoothed token losses, each document weighs the same, so this bounds
    another risk than the token-level functions: the expected mean loss of a fresh document. Context must not cross
    documents.

    Args:
        nll_nats: [T] unsmoothed losses in nats.
        document: [T] document id of each token.
        vocab_size: V.
        alpha: constant smoothing weight.
        code_length_bits: L(h).
        tune_bits: L_tune.
        delta: failure probability.

    Returns:
        Upper bound on the document risk, bits per token.

    Raises:
        InputError: unusable losses or parameters.

    >>> paid = {"code_length_bits": 0, "tune_bits": 12, "delta": 0.05}
    >>> documents = [i // 10 for i in range(10_000)]  # a thousand documents of ten tokens
    >>> round(document_bound([1.0] * 10_000, documents, vocab_size=256, alpha=0.25, **paid), 6)
    2.573675
    """
    losses = document_losses_bits(smoothed_loss_bits(nll_nats, alpha=alpha, vocab_size=vocab_size), document)
    kappa = kappa_nats(code_length_bits=code_length_bits, tune_bits=tune_bits, delta=delta)
    low, high = loss_interval_bits(alpha=alpha, vocab_size=vocab_size)
    return float(losses.mean()) + (high - low) * math.sqrt(kappa / (2 * _positive(losses.size, "number of documents")))


def oracle_gap_bits(mean_square_bits: float, *, kappa: float, num_tokens: int) -> float:
    """Yardstick, not a bound: sqrt(2 s2 kappa / m), the gap if lambda were free and v(d) were d^2 / 2.

    Args:
        mean_square_bits: s2, mean of (Y_i - l_i)^2 in bits squared.
        kappa: complexity in nats.
        num_tokens: m.
    """
    return math.sqrt(2 * mean_square_bits * kappa / num_tokens)


def _v(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(d - np.log1p(d), dtype=np.float64)


def _clipped_forecast(
    forecast_bits: ArrayLike,
    low: Floats | float,
    high: Floats | float,
    floor_bits: float | None,
    shape: tuple[int, ...],
) -> Floats:
    forecast = np.asarray(forecast_bits, dtype=np.float64)
    if forecast.ndim and forecast.shape != shape:
        raise InputError(f"forecast_bits has shape {forecast.shape}, the losses {shape}")
    if not np.isfinite(forecast).all():
        raise InputError("forecast_bits must be finite")
    if floor_bits is not None:
        forecast = np.maximum(forecast, floor_bits)
    return np.asarray(np.broadcast_to(np.minimum(np.maximum(forecast, low), high), shape), dtype=np.float64)


def _lowest(forecast: Floats, floor_bits: float | None, low: float) -> float:
    """y0': the paid floor if one is given; otherwise the caller vouches for it and only what is seen can be checked."""
    return max(low, floor_bits) if floor_bits is not None else float(forecast.min())


def _least_alpha(alpha: ArrayLike, alpha_min: float | None) -> float:
    weights = check_alpha(alpha)
    if weights.ndim == 0:
        return float(weights) if alpha_min is None else min(alpha_min, float(weights))
    if alpha_min is None:
        raise InputError(
            "predictable alphas need `alpha_min`, the constant of the hypothesis that they never fall below"
        )
    if float(weights.min()) < alpha_min:
        raise InputError(f"an alpha of {weights.min()} lies below alpha_min {alpha_min}")
    return alpha_min


def _corpus_size(nll_nats: ArrayLike, num_tokens: int | None, sampling_slack_bits: float | None) -> tuple[int, float]:
    scored = check_nll(nll_nats).size
    if scored == 0:
        raise InputError("no losses were given")
    m = scored if num_tokens is None else int(_positive(num_tokens, "num_tokens"))
    if m < scored:
        raise InputError(f"num_tokens {m} is smaller than the {scored} losses given")
    if m != scored and sampling_slack_bits is None:
        raise InputError(
            f"{scored} losses stand for num_tokens {m}: `sampling_slack_bits` is required, "
            "the bound on how far their mean may lie below the full mean"
        )
    slack = 0.0 if sampling_slack_bits is None else float(sampling_slack_bits)
    if not (math.isfinite(slack) and slack >= 0):
        raise InputError(f"sampling_slack_bits must be finite and >= 0, got {sampling_slack_bits!r}")
    return m, slack


def _positive(value: int, name: str) -> int:
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _check_lambda(lam: float) -> None:
    if not (math.isfinite(lam) and lam > 0):
        raise InputError(f"lambda must be finite and positive, got {lam!r}")


def _check_stake(lam: float, distance: float) -> None:
    _check_lambda(lam)
    if lam * distance >= 1:
        raise InputError(
            f"lambda {lam} times the distance {distance} from the lowest forecast to the highest loss must be below 1"
        )


def _check_error(error: float) -> None:
    if not 0 <= error <= 1:
        raise InputError(f"an error rate lies in [0, 1], got {error!r}")
