"""Evidence: what a shard says about which tuning to choose, in a form that merges exactly.

The evidence is a 2-D histogram over (nll, entropy) with bins of constant relative width, exact error counts and
fixed-point sums, all integers: merging is associative and commutative to the last bit, so the choice cannot depend on
the order in which shards finish. The choice made from it is then evaluated exactly over the losses; no approximation
here can lower a bound, it can only choose a slightly worse grid point.

The bins are read from the float32 representation itself: sign, 8 bits of exponent, the first 3 of the mantissa. That
makes eight bins per octave without a logarithm per token: a few nanoseconds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.columns import (
    Floats,
    Ints,
    check_entropy,
    check_length,
    pack,
    unpack,
    window_sums,
    worst_case_windows,
)
from tokenbound.bounds.decisions import DecisionTable
from tokenbound.bounds.relative_evidence import RelativeEvidence, merge_relative_evidence
from tokenbound.bounds.smoothing import check_alpha, check_nll, check_vocab_size
from tokenbound.errors import InputError, MismatchError

BINS_PER_OCTAVE: Final = 8
_MANTISSA_SHIFT: Final = 20  # 23 mantissa bits, of which 3 stay
NLL_OCTAVES: Final = (-12, 7)
"""nll from 2^-12 (below it the loss is 0 to 0.0004 bits) to 2^7 = 128 nats (beyond it any alpha of the grid rules)."""
ENTROPY_OCTAVES: Final = (-8, 4)
"""Entropy from 0.004 to 16 nats: ln V is below 14 for any vocabulary yet built."""
_FIXED_POINT: Final = 2.0**32
_BLOCK: Final = 1 << 15
"""Tokens per block: large against the 15,000 bins that every block adds up, small against the cache."""


def _num_bins(octaves: tuple[int, int]) -> int:
    return (octaves[1] - octaves[0]) * BINS_PER_OCTAVE + 2


NLL_BINS: Final = _num_bins(NLL_OCTAVES)
ENTROPY_BINS: Final = _num_bins(ENTROPY_OCTAVES)


@dataclass(frozen=True)
class Evidence:
    """Mergeable evidence of one or many shards; every field is an exact integer or a minimum."""

    vocab_size: int
    """V, the same in all parts."""
    num_tokens: int
    """Tokens with a finite loss."""
    worst_case_tokens: int
    """Tokens counted at the worst case; they are in no other field."""
    histogram: Ints
    """[NLL_BINS, ENTROPY_BINS] counts. With an alpha column, of the smoothed loss in nats instead of the nll."""
    errors: Mapping[int, int] | None
    """Tokens with rank >= k for each k; null without ranks."""
    has_entropy: bool
    """Without entropies all tokens are in the first entropy bin."""
    alpha_min: float | None
    """Smallest alpha of a smoothing head; null without one."""
    sums: Mapping[str, int]
    """Fixed-point sums in units of 2^-32: nll, entropy, range_squared (D_i^2, smoothing head), moments of windows."""
    relative: RelativeEvidence | None = None
    """Of a delta scored beside its base: what the relative line is tuned on."""
    decisions: DecisionTable | None = None
    """Of all tokens, worst-case ones included: what the `bits` line is tuned on; null where none were scored."""
    head: Evidence | None = None
    """Of a model with a smoothing head: the same tokens smoothed by it. All else is then of the unsmoothed losses."""

    @classmethod
    def from_losses(
        cls,
        nll: ArrayLike,
        entropy: ArrayLike | None = None,
        rank: ArrayLike | None = None,
        alpha: ArrayLike | None = None,
        *,
        vocab_size: int,
        top_k: Sequence[int] = (),
        window_lengths: ArrayLike | None = None,
        worst_case: ArrayLike | int | None = None,
        base_nll: ArrayLike | None = None,
        base_entropy: ArrayLike | None = None,
        decisions: DecisionTable | None = None,
    ) -> Evidence:
        """Evidence of one shard.

        Args:
            nll: [T] unsmoothed losses in nats.
            entropy: [T] predictive entropies in nats, or None (forecasts will be constant).
            rank: [T] ranks, 0 = most probable, or None (no error bounds).
            alpha: [T] weights of a smoothing head, or None.
            vocab_size: V.
            top_k: the ks whose errors are counted.
            window_lengths: [W] tokens of each window, in order; needed for sampled runs, where windows are the units
                drawn.
            worst_case: [W] True where a window has no finite loss (it is then absent from the arrays above); or,
                without `window_lengths`, the number of such tokens.
            base_nll: [T] losses of the base in nats, where the model is a delta; then the entropies are needed too.
            base_entropy: [T] predictive entropies of the base in nats.
            decisions: of all tokens, worst-case ones included.

        Raises:
            InputError: arrays of different lengths, losses or entropies that are not finite, alpha outside (0, 1).
        """
        check_vocab_size(vocab_size)
        losses = check_nll(nll)
        lengths = None if window_lengths is None else np.asarray(window_lengths, dtype=np.int64)
        failed, worst_tokens = worst_case_windows(worst_case, lengths)
        entropies = None if entropy is None else check_entropy(entropy, losses.size)
        ranks = None if rank is None else check_length(np.asarray(rank), losses.size, "rank")
        sums = {"nll": _fixed(float(losses.sum(dtype=np.float64))), "entropy": 0}
        if entropies is not None:
            sums["entropy"] = _fixed(float(entropies.sum(dtype=np.float64)))
        values, alpha_min = losses, None
        if alpha is not None:
            weights = check_alpha(check_length(np.asarray(alpha), losses.size, "alpha"))
            values = -np.log((1 - weights) * np.exp(-losses.astype(np.float64)) + weights / vocab_size)
            alpha_min = float(weights.min()) if weights.size else None
            ranges = np.log2(1 + (1 - weights) * vocab_size / weights)
            sums["range_squared"] = _fixed(float(np.square(ranges).sum()))
        if lengths is not None:
            sums |= _window_moments(values, lengths if failed is None else lengths[~failed])
        return cls(
            vocab_size=int(vocab_size),
            num_tokens=losses.size,
            worst_case_tokens=worst_tokens,
            histogram=_histogram(values, entropies),
            errors=None if ranks is None else {int(k): int(np.count_nonzero(ranks >= k)) for k in top_k},
            has_entropy=entropies is not None,
            alpha_min=alpha_min,
            sums=sums,
            relative=_relative(losses, entropies, base_nll, base_entropy, worst_tokens),
            decisions=decisions,
        )

    @property
    def mean_nll_nats(self) -> float:
        """Unsmoothed mean over the tokens with a finite loss, to 2^-32 nats per shard."""
        return self.sums["nll"] / _FIXED_POINT / max(self.num_tokens, 1)

    @property
    def mean_square_range(self) -> float:
        """With an alpha column: mean of D_i^2, the squared ranges of the smoothed losses in bits."""
        return self.sums["range_squared"] / _FIXED_POINT / self.num_tokens

    def cells(self) -> tuple[Ints, Floats, Floats]:
        """Counts, representative nll in nats and representative entropy in nats of the non-empty cells."""
        rows, columns = np.nonzero(self.histogram)
        return self.histogram[rows, columns], bin_centres(NLL_OCTAVES)[rows], bin_centres(ENTROPY_OCTAVES)[columns]

    def window_deviation_nats(self) -> float | None:
        """Standard deviation of a window's summed loss about (mean loss) * (its tokens); null without windows."""
        count = self.sums.get("windows", 0)
        if not count:
            return None
        mean = self.sums["window_values"] / self.sums["window_tokens"] if self.sums["window_tokens"] else 0.0
        square, cross, tokens = (self.sums[f"window_{name}"] for name in ("square", "cross", "tokens_square"))
        variance = (square - 2 * mean * cross + mean * mean * tokens) / _FIXED_POINT / count
        return float(max(variance, 0.0) ** 0.5)

    def to_json(self) -> str:
        """Compact JSON: the histogram as compressed little-endian integers, some kilobytes per shard."""
        return json.dumps(
            {
                "vocab_size": self.vocab_size,
                "num_tokens": self.num_tokens,
                "worst_case_tokens": self.worst_case_tokens,
                "histogram": pack(np.ascontiguousarray(self.histogram, dtype="<i8").tobytes()),
                "errors": None if self.errors is None else {str(k): n for k, n in sorted(self.errors.items())},
                "has_entropy": self.has_entropy,
                "alpha_min": self.alpha_min,
                "sums": dict(sorted(self.sums.items())),
                **({} if self.relative is None else {"relative": self.relative.to_dict()}),
                **({} if self.decisions is None else {"decisions": self.decisions.to_dict()}),
                **({} if self.head is None else {"head": json.loads(self.head.to_json())}),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """The inverse of :meth:`to_json`.

        Raises:
            MismatchError: the text is not evidence of this version of the package.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(
                vocab_size=int(data["vocab_size"]),
                num_tokens=int(data["num_tokens"]),
                worst_case_tokens=int(data["worst_case_tokens"]),
                histogram=_unpack_histogram(data["histogram"], int(data["num_tokens"])),
                errors=None if data["errors"] is None else {int(k): int(n) for k, n in data["errors"].items()},
                has_entropy=bool(data["has_entropy"]),
                alpha_min=data["alpha_min"],
                sums={str(k): int(n) for k, n in data["sums"].items()},
                relative=RelativeEvidence.from_dict(data["relative"]) if "relative" in data else None,
                decisions=DecisionTable.from_dict(data["decisions"]) if "decisions" in data else None,
                head=cls.from_json(json.dumps(data["head"])) if "head" in data else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError, zlib.error) as error:
            raise MismatchError(f"a shard's evidence is damaged or of another version: {error}") from None


def merge_evidence(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of all shards together; associative and commutative, exactly.

    Raises:
        InputError: nothing to merge.
        MismatchError: the parts disagree about V, the columns or the ks, or only some have a base.

    >>> parts = [Evidence.from_losses([1.0, 2.0], vocab_size=256), Evidence.from_losses([3.0], vocab_size=256)]
    >>> merge_evidence(parts).num_tokens
    3
    """
    if not parts:
        raise InputError("there is no evidence to merge")
    relative = [part.relative for part in parts if part.relative is not None]
    if relative and len(relative) < len(parts):
        raise MismatchError("only some shards were scored beside their base; score the others again")
    tables = [part.decisions for part in parts if part.decisions is not None]
    if tables and len(tables) < len(parts):
        raise MismatchError("only some shards have tables of decisions; score the others again")
    heads = [part.head for part in parts if part.head is not None]
    if heads and len(heads) < len(parts):
        raise MismatchError("only some shards have the alphas of a smoothing head; score the others again")
    return replace(
        reduce(_merge_two, parts),
        relative=merge_relative_evidence(relative) if relative else None,
        decisions=reduce(DecisionTable.__add__, tables) if tables else None,
        head=merge_evidence(heads) if heads else None,
    )


def _merge_two(left: Evidence, right: Evidence) -> Evidence:
    if left.num_tokens == 0 or right.num_tokens == 0:
        full, empty = (left, right) if right.num_tokens == 0 else (right, left)
        if full.vocab_size != empty.vocab_size:
            raise MismatchError(f"shards disagree about the vocabulary: {left.vocab_size} and {right.vocab_size}")
        return replace(full, worst_case_tokens=full.worst_case_tokens + empty.worst_case_tokens)
    if _shape(left) != _shape(right):
        raise MismatchError(f"shards disagree about vocabulary or columns: {_shape(left)} and {_shape(right)}")
    return Evidence(
        vocab_size=left.vocab_size,
        num_tokens=left.num_tokens + right.num_tokens,
        worst_case_tokens=left.worst_case_tokens + right.worst_case_tokens,
        histogram=left.histogram + right.histogram,
        errors=None
        if left.errors is None or right.errors is None
        else {k: n + right.errors[k] for k, n in left.errors.items()},
        has_entropy=left.has_entropy,
        alpha_min=None if left.alpha_min is None or right.alpha_min is None else min(left.alpha_min, right.alpha_min),
        sums={name: value + right.sums[name] for name, value in left.sums.items()},
    )


def _relative(
    nll: NDArray[np.floating],
    entropy: NDArray[np.floating] | None,
    base_nll: ArrayLike | None,
    base_entropy: ArrayLike | None,
    worst_case_tokens: int,
) -> RelativeEvidence | None:
    if base_nll is None:
        return None
    if entropy is None or base_entropy is None:
        raise InputError("losses of a base need the `entropy` and `base_entropy` of every token beside them")
    return RelativeEvidence.from_losses(nll, base_nll, entropy, base_entropy, worst_case_tokens=worst_case_tokens)


def _shape(evidence: Evidence) -> tuple[object, ...]:
    ks = None if evidence.errors is None else tuple(sorted(evidence.errors))
    return evidence.vocab_size, evidence.has_entropy, evidence.alpha_min is not None, ks, tuple(sorted(evidence.sums))


def bin_centres(octaves: tuple[int, int]) -> Floats:
    """Representative value of each bin: half the lower limit, the middles, the upper limit."""
    low, high = octaves
    mantissas = 1 + (np.arange(BINS_PER_OCTAVE) + 0.5) / BINS_PER_OCTAVE
    inner = (2.0 ** np.arange(low, high)[:, None] * mantissas).reshape(-1)
    return np.concatenate([[2.0 ** (low - 1)], inner, [2.0**high]])


def _bin_index(values: NDArray[np.float32], octaves: tuple[int, int], out: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bin of each value, 0 for everything below the first octave (negative values too), the last for all above."""
    first = (127 + octaves[0]) * BINS_PER_OCTAVE - 1
    np.right_shift(values.view(np.int32), _MANTISSA_SHIFT, out=out)
    np.subtract(out, first, out=out)
    np.maximum(out, 0, out=out)
    return np.minimum(out, _num_bins(octaves) - 1, out=out)


def _histogram(values: NDArray[np.floating], entropy: NDArray[np.floating] | None) -> Ints:
    counts = np.zeros(NLL_BINS * ENTROPY_BINS, dtype=np.int64)
    cell, column = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    for start in range(0, values.size, _BLOCK):
        block = np.ascontiguousarray(values[start : start + _BLOCK], dtype=np.float32)
        cells = _bin_index(block, NLL_OCTAVES, cell[: block.size])
        np.multiply(cells, ENTROPY_BINS, out=cells)
        if entropy is not None:
            other = np.ascontiguousarray(entropy[start : start + _BLOCK], dtype=np.float32)
            np.add(cells, _bin_index(other, ENTROPY_OCTAVES, column[: other.size]), out=cells)
        counts += np.bincount(cells, minlength=counts.size)
    return counts.reshape(NLL_BINS, ENTROPY_BINS)


def _window_moments(values: NDArray[np.floating], lengths: Ints) -> dict[str, int]:
    sums = window_sums(values.astype(np.float64), lengths)
    tokens = lengths.astype(np.float64)
    return {
        "windows": int(lengths.size),
        "window_values": _fixed(float(sums.sum())),
        "window_tokens": _fixed(float(tokens.sum())),
        "window_square": _fixed(float(np.square(sums).sum())),
        "window_cross": _fixed(float((sums * tokens).sum())),
        "window_tokens_square": _fixed(float(np.square(tokens).sum())),
    }


def _unpack_histogram(text: str, num_tokens: int) -> Ints:
    size = NLL_BINS * ENTROPY_BINS * 8
    raw = unpack(text, size)
    if len(raw) != size:
        raise ValueError(f"a histogram has {size} bytes, got {len(raw)}")
    histogram = np.frombuffer(raw, dtype="<i8").astype(np.int64).reshape(NLL_BINS, ENTROPY_BINS)
    if int(histogram.min()) < 0 or int(histogram.sum()) != num_tokens:
        raise ValueError("the histogram does not count the tokens")
    return histogram


def _fixed(value: float) -> int:
    return round(value * _FIXED_POINT)
