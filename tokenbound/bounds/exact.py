"""The exact pass: every printed line evaluated over every loss, shard by shard.

float64 throughout; sums are pairwise within a block, and the sums of blocks, of a shard's pieces and of shards are
added by ``math.fsum``, which rounds once. Blocks and pieces depend on the shard alone, so that neither the tree of the
reduction nor the number of workers changes a digit of a certificate.

Freedman's sum is computed in its betting form: since l + v(lambda (Y - l)) / lambda = Y - ln(1 + lambda (Y - l)) /
lambda, a token contributes its forecast and one factor 1 + lambda (Y - l); factors are multiplied in groups before
the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.claim import Tuning
from tokenbound.bounds.columns import Floats, Ints, check_entropy, check_length, window_sums, worst_case_windows
from tokenbound.bounds.constants import ALPHA_LEVELS, BLOCK_TOKENS, LN2, PRODUCT_GROUP
from tokenbound.bounds.smoothing import alpha_levels, check_alpha, check_nll, loss_interval_bits, loss_intervals_bits
from tokenbound.errors import InputError, MismatchError

FIELDS: Final = ("value", "loss", "square")
"""Per shard and line: sums of z_i (what the bound averages), of l_i or e_i (bits), and of (Y_i - l_i)^2 (bits^2)."""


@dataclass(frozen=True)
class LineSums:
    """Exact sums of every line over some shards. Merging concatenates; totals are taken once, by ``math.fsum``."""

    num_tokens: int
    """Tokens, worst-case ones included."""
    worst_case_tokens: int
    """Tokens counted at the worst case."""
    shards: Floats
    """[S, lines, 3] sums of the fields `FIELDS`."""
    nll: Floats
    """[S] sums of the unsmoothed nll in nats over the tokens with a finite loss."""
    windows: Floats | None = None
    """[lines, W] sum of z_i over each window in draw order; null unless windows were given."""
    window_lengths: Ints | None = None
    """[W] tokens of each window."""

    def total(self, line: int, name: str) -> float:
        """Exactly rounded total of one field of one line."""
        return math.fsum(self.shards[:, line, FIELDS.index(name)].tolist())

    def mean(self, line: int, name: str) -> float:
        """Mean per token of one field of one line."""
        return self.total(line, name) / self.num_tokens

    @property
    def mean_nll_nats(self) -> float:
        """Unsmoothed mean nll of the tokens with a finite loss, nats."""
        return math.fsum(self.nll.tolist()) / max(self.num_tokens - self.worst_case_tokens, 1)

    def collapsed(self) -> LineSums:
        """The same sums as of one shard, each total rounded once."""
        lines = range(self.shards.shape[1])
        totals = np.array([[[self.total(line, name) for name in FIELDS] for line in lines]])
        nll = np.array([math.fsum(self.nll.tolist())])
        return replace(self, shards=totals.reshape(1, len(lines), len(FIELDS)), nll=nll)

    def select(self, lines: slice) -> LineSums:
        """The sums of some of the lines, e.g. when one pass evaluated two claims."""
        windows = None if self.windows is None else self.windows[lines]
        return replace(self, shards=self.shards[:, lines], windows=windows)


def line_sums(
    tunings: Sequence[Tuning],
    nll: ArrayLike,
    entropy: ArrayLike | None = None,
    rank: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    *,
    window_lengths: ArrayLike | None = None,
    worst_case: ArrayLike | int | None = None,
) -> LineSums:
    """Evaluate every line over one shard.

    Args:
        tunings: the lines.
        nll: [T] unsmoothed losses in nats, as stored.
        entropy: [T] entropies in nats; needed by forecasts of degree 1 and more and by alpha(H).
        rank: [T] ranks; needed by `kl` lines.
        alpha: [T] weights of a smoothing head; needed where a tuning says so.
        window_lengths: [W] tokens of each window in draw order, for sampled runs; with the worst-case windows' own.
        worst_case: [W] True where a window has no finite loss (it is then absent from the arrays above); or, without
            `window_lengths`, the number of such tokens.

    Raises:
        InputError: losses that are not finite, arrays of different lengths, a column that a line needs and is absent.

    >>> sums = line_sums([Tuning("kl", vocab_size=256, top_k=1)], nll=[0.1, 2.0, 0.3, 0.2], rank=[0, 3, 0, 0])
    >>> sums.num_tokens, sums.mean(0, "loss")
    (4, 0.25)
    """
    columns = _Columns.checked(nll, entropy, rank, alpha)
    lengths = None if window_lengths is None else np.asarray(window_lengths, dtype=np.int64)
    failed, worst_tokens = worst_case_windows(worst_case, lengths)
    evaluators = [_evaluator(tuning) for tuning in tunings]
    per_token = None if lengths is None else np.empty((len(tunings), columns.size))
    blocks, nll_sum = _block_sums(evaluators, columns, per_token)
    totals = np.array(
        [[math.fsum(blocks[:, line, f].tolist()) for f in range(len(FIELDS))] for line in range(len(tunings))]
    )
    totals = totals.reshape(len(tunings), len(FIELDS))
    for line, evaluator in enumerate(evaluators):
        totals[line] += np.array(evaluator.worst()) * worst_tokens
    windows = None
    if per_token is not None and lengths is not None:
        windows = _window_values(evaluators, per_token, lengths, failed)
    return LineSums(columns.size + worst_tokens, worst_tokens, totals[None], np.array([nll_sum]), windows, lengths)


def merge_sums(parts: Sequence[LineSums]) -> LineSums:
    """The sums of all shards together. For sampled runs the parts must be in draw order.

    Raises:
        InputError: nothing to merge.
        MismatchError: the parts are of different lines, or only some have windows.

    >>> top_1 = [Tuning("kl", vocab_size=256, top_k=1)]
    >>> parts = [line_sums(top_1, nll=[0.1, 0.1], rank=[0, 0]), line_sums(top_1, nll=[2.0, 2.0], rank=[3, 1])]
    >>> merge_sums(parts).mean(0, "loss")
    0.5
    """
    if not parts:
        raise InputError("there are no sums to merge")
    if len({part.shards.shape[1:] for part in parts}) > 1 or len({part.windows is None for part in parts}) > 1:
        raise MismatchError("shards were evaluated for different lines")
    windows = [part.windows for part in parts if part.windows is not None]
    lengths = [part.window_lengths for part in parts if part.window_lengths is not None]
    return LineSums(
        num_tokens=sum(part.num_tokens for part in parts),
        worst_case_tokens=sum(part.worst_case_tokens for part in parts),
        shards=np.concatenate([part.shards for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        windows=np.concatenate(windows, axis=1) if windows else None,
        window_lengths=np.concatenate(lengths) if lengths else None,
    )


def highest_value(tuning: Tuning) -> float:
    """Largest possible z_i of a line: B (azuma), 1 (kl), y0' - (B - y0') ln(1 - t) / t (freedman)."""
    return _evaluator(tuning).worst()[0]


@dataclass(frozen=True)
class _Columns:
    nll: NDArray[np.floating]
    entropy: NDArray[np.floating] | None
    rank: NDArray[np.integer] | None
    alpha: Floats | None
    clip: bool

    @classmethod
    def checked(
        cls, nll: ArrayLike, entropy: ArrayLike | None, rank: ArrayLike | None, alpha: ArrayLike | None
    ) -> _Columns:
        losses = check_nll(nll)
        size = losses.size
        return cls(
            losses,
            None if entropy is None else check_entropy(entropy, size),
            None if rank is None else check_length(np.asarray(rank), size, "rank"),
            None if alpha is None else check_alpha(check_length(np.asarray(alpha), size, "alpha")),
            clip=bool(size and losses.min() < 0),
        )

    @property
    def size(self) -> int:
        return int(self.nll.size)


class _Block:
    """Buffers of one block, reused for all blocks; `likelihood` is exp(-nll), shared by the lines."""

    def __init__(self) -> None:
        self.likelihood = np.empty(BLOCK_TOKENS)
        self.log_loss = np.empty(BLOCK_TOKENS)
        self.entropy_bits = np.empty(BLOCK_TOKENS)
        self.forecast = np.empty(BLOCK_TOKENS)
        self.factor = np.empty(BLOCK_TOKENS)
        self.size = 0
        self.nll_sum = 0.0
        self.has_entropy = False
        self.rank: NDArray[np.integer] | None = None
        self.alpha: Floats | None = None

    def load(self, columns: _Columns, start: int) -> None:
        nll = columns.nll[start : start + BLOCK_TOKENS]
        self.size = nll.size
        likelihood = self.likelihood[: self.size]
        np.negative(nll, out=likelihood)
        self.nll_sum = -float(likelihood.sum())
        if columns.clip:
            np.minimum(likelihood, 0.0, out=likelihood)  # nll in [-1e-5, 0) counts as 0
        np.exp(likelihood, out=likelihood)
        self.has_entropy = columns.entropy is not None
        if columns.entropy is not None:
            entropy = columns.entropy[start : start + self.size]
            np.multiply(entropy, 1 / LN2, out=self.entropy_bits[: self.size], dtype=np.float64)
        self.rank = None if columns.rank is None else columns.rank[start : start + self.size]
        self.alpha = None if columns.alpha is None else columns.alpha[start : start + self.size]


def _log_of_product(factors: Floats) -> float:
    """Ln of the product of positive factors near 1, one logarithm per group of factors."""
    grouped = factors.size - factors.size % PRODUCT_GROUP
    products = np.multiply.reduce(factors[:grouped].reshape(PRODUCT_GROUP, -1), axis=0)
    np.log(products, out=products)
    return float(products.sum()) + float(np.log(factors[grouped:]).sum())


class _Error:
    """z_i = e_i = 1[rank_i >= k]."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def evaluate(self, block: _Block, per_token: Floats | None) -> tuple[float, float, float]:
        if block.rank is None:
            raise InputError(f"the top-{self.top_k} error needs the `rank` column")
        if per_token is not None:
            np.greater_equal(block.rank, self.top_k, out=per_token, casting="unsafe")
        count = float(np.count_nonzero(block.rank >= self.top_k))
        return count, count, 0.0

    def worst(self) -> tuple[float, float, float]:
        return 1.0, 1.0, 0.0


class _Unavailable:
    """A line that cannot be computed; its sums are zero and never read."""

    def evaluate(self, block: _Block, per_token: Floats | None) -> tuple[float, float, float]:
        if per_token is not None:
            per_token.fill(0.0)
        return 0.0, 0.0, 0.0

    def worst(self) -> tuple[float, float, float]:
        return 0.0, 0.0, 0.0


class _Azuma:
    """z_i = l_i at a constant alpha."""

    def __init__(self, tuning: Tuning) -> None:
        alpha = _required(tuning.alpha, "alpha")
        self.weight, self.uniform = 1 - alpha, alpha / tuning.vocab_size
        self.highest = loss_interval_bits(alpha=alpha, vocab_size=tuning.vocab_size)[1]

    def evaluate(self, block: _Block, per_token: Floats | None) -> tuple[float, float, float]:
        smoothed = block.factor[: block.size]
        np.multiply(block.likelihood[: block.size], self.weight, out=smoothed)
        np.add(smoothed, self.uniform, out=smoothed)
        if per_token is None:
            total = -_log_of_product(smoothed) / LN2
        else:
            np.multiply(np.log(smoothed, out=smoothed), -1 / LN2, out=per_token)
            total = float(per_token.sum())
        return total, total, 0.0

    def worst(self) -> tuple[float, float, float]:
        return self.highest, self.highest, 0.0


class _AzumaPredictable:
    """z_i = l_i + lambda D_i^2 / 8 with the alphas of a smoothing head."""

    def __init__(self, tuning: Tuning) -> None:
        self.vocab_size, self.lam = tuning.vocab_size, _required(tuning.lam, "lam")
        self.alpha_min = _required(tuning.alpha, "alpha")
        low, self.highest = loss_interval_bits(alpha=self.alpha_min, vocab_size=self.vocab_size)
        self.worst_value = self.highest + self.lam * (self.highest - low) ** 2 / 8

    def evaluate(self, block: _Block, per_token: Floats | None) -> tuple[float, float, float]:
        alpha = _head_alphas(block, self.alpha_min)
        loss = np.log((1 - alpha) * block.likelihood[: block.size] + alpha / self.vocab_size) / -LN2
        low, high = loss_intervals_bits(alpha=alpha, vocab_size=self.vocab_size)
        value = loss + self.lam / 8 * np.square(high - low)
        if per_token is not None:
            np.copyto(per_token, value)
        return float(value.sum()), float(loss.sum()), 0.0

    def worst(self) -> tuple[float, float, float]:
        return self.worst_value, self.highest, 0.0


class _Freedman:
    """z_i = Y_i - ln(1 + lambda (Y_i - l_i)) / lambda.

    Works in nats with the logarithm g = ln p~ = -l, so that Y - l = Y + g; sums are converted to bits at the end.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.alpha, self.vocab_size = _required(tuning.alpha, "alpha"), tuning.vocab_size
        self.slope, self.column = tuning.alpha_slope, tuning.alpha_column
        self.lam_bits = _required(tuning.lam, "lam")
        low, high = loss_interval_bits(alpha=self.alpha, vocab_size=self.vocab_size)
        self.floor_bits = max(low, _required(tuning.y0, "y0"))
        self.highest_bits = high
        if not self.lam_bits * (high - self.floor_bits) < 1:
            raise InputError(f"lambda {self.lam_bits} * (B - y0') must be below 1")
        self.floor, self.high = self.floor_bits * LN2, high * LN2
        self.coefficients = [c * LN2 for c in tuning.coefficients]
        self.lam = self.lam_bits / LN2
        self.levels = alpha_levels(self.alpha, self.slope)
        lows, highs = loss_intervals_bits(alpha=self.levels, vocab_size=self.vocab_size)
        self.level_lows, self.level_highs = np.maximum(lows * LN2, self.floor), highs * LN2
        self.level_weights, self.level_uniforms = 1 - self.levels, self.levels / self.vocab_size
        self.level_scale = ALPHA_LEVELS / math.log2(self.vocab_size)

    def evaluate(self, block: _Block, per_token: Floats | None) -> tuple[float, float, float]:
        log_loss, forecast, factor = (b[: block.size] for b in (block.log_loss, block.forecast, block.factor))
        level, alpha = self._smooth(block, log_loss)
        np.log(log_loss, out=log_loss)
        self._forecast(block, forecast, level, alpha)
        loss_sum, forecast_sum = -float(log_loss.sum()), float(forecast.sum())
        np.add(forecast, log_loss, out=log_loss)  # Y - l
        square = float(np.dot(log_loss, log_loss))
        np.multiply(log_loss, self.lam, out=factor)
        np.add(factor, 1.0, out=factor)
        if per_token is None:
            value = forecast_sum - _log_of_product(factor) / self.lam
        else:
            np.log(factor, out=factor)
            np.multiply(factor, -1 / self.lam, out=factor)
            np.add(factor, forecast, out=factor)
            np.multiply(factor, 1 / LN2, out=per_token)
            value = float(per_token.sum()) * LN2
        return value / LN2, loss_sum / LN2, square / LN2**2

    def worst(self) -> tuple[float, float, float]:
        distance = self.highest_bits - self.floor_bits
        value = self.floor_bits - math.log1p(-self.lam_bits * distance) / self.lam_bits
        return value, self.highest_bits, distance**2

    def _smooth(self, block: _Block, smoothed: Floats) -> tuple[Ints | None, Floats | None]:
        likelihood = block.likelihood[: block.size]
        if self.column:
            alpha = _head_alphas(block, self.alpha)
            np.multiply(likelihood, 1 - alpha, out=smoothed)
            np.add(smoothed, alpha / self.vocab_size, out=smoothed)
            return None, alpha
        if self.slope == 0:
            np.multiply(likelihood, 1 - self.alpha, out=smoothed)
            np.add(smoothed, self.alpha / self.vocab_size, out=smoothed)
            return None, None
        if not block.has_entropy:
            raise InputError("alpha(H) needs the `entropy` column")
        scratch = block.factor[: block.size]
        np.multiply(block.entropy_bits[: block.size], self.level_scale, out=scratch)
        np.minimum(np.maximum(scratch, 0.0, out=scratch), ALPHA_LEVELS - 1, out=scratch)
        level = scratch.astype(np.int64)
        np.multiply(likelihood, np.take(self.level_weights, level, out=scratch, mode="clip"), out=smoothed)
        np.add(smoothed, np.take(self.level_uniforms, level, out=scratch, mode="clip"), out=smoothed)
        return level, None

    def _forecast(self, block: _Block, forecast: Floats, level: Ints | None, alpha: Floats | None) -> None:
        if len(self.coefficients) == 1:
            forecast.fill(self.coefficients[0])
        elif not block.has_entropy:
            raise InputError("a forecast of degree 1 or more needs the `entropy` column")
        else:
            entropy = block.entropy_bits[: block.size]
            np.multiply(entropy, self.coefficients[-1], out=forecast)
            for coefficient in self.coefficients[-2:0:-1]:
                np.add(forecast, coefficient, out=forecast)
                np.multiply(forecast, entropy, out=forecast)
            np.add(forecast, self.coefficients[0], out=forecast)
        low: float | Floats = self.floor
        high: float | Floats = self.high
        if level is not None:
            low, high = self.level_lows[level], self.level_highs[level]
        elif alpha is not None:
            lows, highs = loss_intervals_bits(alpha=alpha, vocab_size=self.vocab_size)
            low, high = np.maximum(lows * LN2, self.floor), highs * LN2
        np.maximum(forecast, low, out=forecast)
        np.minimum(forecast, high, out=forecast)


_Evaluator = _Error | _Azuma | _AzumaPredictable | _Freedman | _Unavailable


def _evaluator(tuning: Tuning) -> _Evaluator:
    if tuning.unavailable is not None:
        return _Unavailable()
    if tuning.method == "kl":
        return _Error(int(_required(tuning.top_k, "top_k")))
    if tuning.method == "freedman":
        return _Freedman(tuning)
    if tuning.method == "azuma":
        return _AzumaPredictable(tuning) if tuning.alpha_column else _Azuma(tuning)
    raise InputError(f"unknown method {tuning.method!r}")


def _block_sums(evaluators: Sequence[_Evaluator], columns: _Columns, per_token: Floats | None) -> tuple[Floats, float]:
    starts = range(0, columns.size, BLOCK_TOKENS)
    result = np.zeros((len(starts), len(evaluators), len(FIELDS)))
    nll_sums = []
    block = _Block()
    for row, start in enumerate(starts):
        block.load(columns, start)
        nll_sums.append(block.nll_sum)
        for line, evaluator in enumerate(evaluators):
            out = None if per_token is None else per_token[line, start : start + block.size]
            result[row, line] = evaluator.evaluate(block, out)
    return result, math.fsum(nll_sums)


def _window_values(
    evaluators: Sequence[_Evaluator], per_token: Floats, lengths: Ints, failed: NDArray[np.bool_] | None
) -> Floats:
    scored = lengths if failed is None else np.where(failed, 0, lengths)
    rows = [window_sums(values, scored) for values in per_token]
    if failed is not None:
        for row, evaluator in zip(rows, evaluators, strict=True):
            row[failed] = evaluator.worst()[0] * lengths[failed]
    return np.array(rows).reshape(len(evaluators), lengths.size)


def _head_alphas(block: _Block, alpha_min: float) -> Floats:
    if block.alpha is None:
        raise InputError("this model has a smoothing head: its `alpha` column is needed")
    if block.alpha.size and float(block.alpha.min()) < alpha_min:
        raise InputError(
            f"an alpha of {block.alpha.min()} lies below alpha_min {alpha_min}, which the bound is built on"
        )
    return block.alpha


def _required(value: float | None, name: str) -> float:
    if value is None:
        raise InputError(f"the tuning lacks `{name}`")
    return value
