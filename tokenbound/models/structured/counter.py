"""Random numbers that are the same on every machine, for weights that a seed stands for.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") used as a counter: the i-th
number of a stream is a fixed integer function of the stream's key and i. Only 64-bit integer arithmetic, and at most
one float32 product for each value, so neither the NumPy nor the torch version matters. Each tensor has a stream of its
own, named by the seed and the tensor, so that the order of generation does not matter either.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CHUNK = 1 << 20
_MANTISSA_BITS = 24
_ROOT_THREE = 1.7320508075688772
"""The standard deviation of the uniform distribution on (-1, 1) is one over this."""


def stream_key(seed: int, name: str) -> np.uint64:
    """Key of a named stream: the first eight bytes of a SHA-256."""
    return np.uint64(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little"))


def random_words(key: np.uint64, start: int, count: int) -> NDArray[np.uint64]:
    """Words start, start+1, .. of a stream, uint64 [count].

    >>> [hex(int(word)) for word in random_words(np.uint64(0), 0, 2)]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    with np.errstate(over="ignore"):
        words = key + np.arange(start + 1, start + 1 + count, dtype=np.uint64) * _GOLDEN
        words = (words ^ (words >> np.uint64(30))) * _FIRST
        words = (words ^ (words >> np.uint64(27))) * _SECOND
        return np.asarray(words ^ (words >> np.uint64(31)))


def uniform_weights(seed: int, name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    """Independent uniform values with mean zero and the given standard deviation.

    Each is an odd 24-bit integer, exact in float32, times one float32.
    """
    key, count = stream_key(seed, name), math.prod(shape)
    scale = np.float32(std * _ROOT_THREE / (1 << (_MANTISSA_BITS - 1)))
    out = np.empty(count, np.float32)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        top = (random_words(key, start, stop - start) >> np.uint64(64 - _MANTISSA_BITS)).astype(np.int64)
        out[start:stop] = ((top | 1) - (1 << (_MANTISSA_BITS - 1))).astype(np.float32) * scale
    return out.reshape(shape)


def random_signs(seed: int, name: str, count: int) -> NDArray[np.float32]:
    """Independent fair signs, float32 [count] of -1 and 1."""
    return (1 - 2 * (random_words(stream_key(seed, name), 0, count) >> np.uint64(63)).astype(np.int8)).astype(
        np.float32
    )


def random_groups(seed: int, name: str, count: int, groups: int) -> NDArray[np.int64]:
    """A random map of `count` items onto groups whose sizes differ by at most one, int64 [count]."""
    order: NDArray[Any] = np.argsort(random_words(stream_key(seed, name), 0, count), kind="stable")
    out = np.empty(count, np.int64)
    out[order] = np.arange(count) % groups
    return out
