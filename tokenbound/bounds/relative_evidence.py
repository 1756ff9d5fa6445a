"""What a shard says about which relative tuning to choose: a subset of its tokens, in a form that merges exactly.

A histogram over two losses and two entropies would be empty almost everywhere. Instead the tokens with the smallest
hashes are kept; the hash depends on a token's values and its place in the shard alone, so the subset is the same in
whatever order shards are merged.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenbound.bounds.columns import check_entropy, check_length, pack, unpack
from tokenbound.bounds.constants import RELATIVE_ROWS, RELATIVE_ROWS_PER_SHARD
from tokenbound.bounds.smoothing import check_nll
from tokenbound.errors import InputError, MismatchError


@dataclass(frozen=True)
class RelativeEvidence:
    """A hashed subset of the tokens, to tune on; merging is associative and commutative."""

    num_tokens: int
    """Tokens it stands for."""
    worst_case_tokens: int
    """Tokens counted at the worst case."""
    keys: NDArray[np.uint64]
    """[R] hashes, ascending."""
    rows: NDArray[np.float32]
    """[R, 4] nll, base_nll, entropy, base_entropy in nats."""

    @classmethod
    def from_losses(
        cls,
        nll: ArrayLike,
        base_nll: ArrayLike,
        entropy: ArrayLike,
        base_entropy: ArrayLike,
        *,
        worst_case_tokens: int = 0,
    ) -> RelativeEvidence:
        """Evidence of one shard: the 4096 tokens whose hash is smallest.

        Args:
            nll: [T] losses of the model, nats.
            base_nll: [T] losses of the base on the same tokens.
            entropy: [T] entropies of the model's predictions.
            base_entropy: [T] those of the base.
            worst_case_tokens: tokens that one of the two could not score.

        Raises:
            InputError: arrays of different lengths, or values that are not finite.
        """
        columns = check_pair(nll, base_nll, entropy, base_entropy)
        rows = np.stack([np.asarray(column, dtype=np.float32) for column in columns], axis=1)
        keys = _row_hash(rows)
        kept = (
            np.argpartition(keys, RELATIVE_ROWS_PER_SHARD)[:RELATIVE_ROWS_PER_SHARD]
            if keys.size > RELATIVE_ROWS_PER_SHARD
            else slice(None)
        )
        return _smallest(keys[kept], rows[kept], RELATIVE_ROWS_PER_SHARD, len(rows), worst_case_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, at most some 90 kB per shard."""
        return {
            "num_tokens": self.num_tokens,
            "worst_case_tokens": self.worst_case_tokens,
            "keys": pack(self.keys.astype("<u8").tobytes()),
            "rows": pack(self.rows.astype("<f4").tobytes()),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RelativeEvidence:
        """The inverse of :meth:`to_dict`.

        Raises:
            MismatchError: the data is not relative evidence.
        """
        try:
            keys = np.frombuffer(unpack(data["keys"], RELATIVE_ROWS * 8), dtype="<u8").astype(np.uint64)
            rows = (
                np.frombuffer(unpack(data["rows"], RELATIVE_ROWS * 16), dtype="<f4")
                .astype(np.float32)
                .reshape(keys.size, 4)
            )
            return cls(int(data["num_tokens"]), int(data["worst_case_tokens"]), keys, rows)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise MismatchError(f"a shard's relative evidence is damaged or of another version: {error}") from None


def merge_relative_evidence(parts: Sequence[RelativeEvidence]) -> RelativeEvidence:
    """The evidence of all shards together.

    Raises:
        InputError: nothing to merge.

    >>> shard = RelativeEvidence.from_losses([0.1, 2.0], [0.3, 2.1], [0.2, 1.5], [0.3, 1.6])
    >>> merge_relative_evidence([shard, shard]).num_tokens
    4
    """
    if not parts:
        raise InputError("there is no evidence to merge")
    keys, rows = np.concatenate([p.keys for p in parts]), np.concatenate([p.rows for p in parts])
    tokens, worst = sum(p.num_tokens for p in parts), sum(p.worst_case_tokens for p in parts)
    return _smallest(keys, rows, RELATIVE_ROWS, tokens, worst)


def check_pair(
    nll: ArrayLike, base_nll: ArrayLike, entropy: ArrayLike, base_entropy: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The four columns of a model and its base.

    Raises:
        InputError: different lengths, or values that are not finite.
    """
    losses = check_nll(nll)
    base_losses = check_length(check_nll(base_nll, name="base_nll"), losses.size, "base_nll")
    base_entropies = check_entropy(base_entropy, losses.size, "base_entropy")
    return losses, base_losses, check_entropy(entropy, losses.size), base_entropies


def _row_hash(rows: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A 64-bit mix (splitmix64's finaliser) of each row's bits and its place in the shard."""
    bits = np.ascontiguousarray(rows).view(np.uint32).astype(np.uint64)
    state = np.arange(len(rows), dtype=np.uint64)
    for column in bits.T:
        state = (state ^ column) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def _smallest(
    keys: NDArray[np.uint64], rows: NDArray[np.float32], limit: int, tokens: int, worst: int
) -> RelativeEvidence:
    order = np.lexsort((*rows.T, keys))[:limit]  # rows break ties, so that the order of merging cannot matter
    return RelativeEvidence(tokens, worst, keys[order], rows[order])
