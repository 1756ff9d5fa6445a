"""Symbols per second and core of the coder on one large tensor of quantized weights, beside zstd -19 and gzip -9.

    python tests/benchmarks/coder_speed.py

Every codec gets the same integers in the same process, one after the other, as single bytes. The weights are normal
with rows and columns of unequal size, of which the coder is told the half-octave exponents (as `kfac` does) or nothing.
"""

from __future__ import annotations

import argparse
import gzip
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench import machine
from numpy.typing import NDArray

from tokenbound.compression.bytestreams import zstd_level
from tokenbound.compression.integers import decode_matrix, encode_matrix

SPREADS = {1.2: 0.46, 2.0: 0.93, 3.0: 1.95}
"""Standard deviations in steps that take about so many bits per weight."""
UNEVEN = 0.7
"""Standard deviation of the rows' and columns' scales, in half octaves."""


@dataclass(frozen=True)
class Row:
    """One codec on one tensor."""

    bits: float
    codec: str
    bits_per_weight: float
    encode_msym: float
    decode_msym: float


def quantized(side: int, spread: float, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.int64]]:
    """Integers [side, side] and the exponents of rows and columns whose steps are larger."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.rint(rng.normal(size=side) * UNEVEN).astype(np.int64) for _ in range(2))
    scale = (np.float32(spread) * 2 ** (-columns / 2)).astype(np.float32)
    integers = np.empty((side, side), np.int8)
    for index, exponent in enumerate(rows.tolist()):
        drawn = rng.standard_normal(side, np.float32) * scale * np.float32(2 ** (-exponent / 2))
        integers[index] = np.rint(drawn).clip(-127, 127)
    return integers, rows, columns


def measure(
    bits: float, codec: str, integers: Any, encode: Callable[[], Any], decode: Callable[[Any], Any], repeat: int
) -> Row:
    """The best of a few turns of processor time, and a check that decoding gives the integers back."""
    encode_s, decode_s = [], []
    for _ in range(repeat):
        start = time.process_time()
        coded = encode()
        encode_s.append(time.process_time() - start)
        start = time.process_time()
        decoded = decode(coded)
        decode_s.append(time.process_time() - start)
    if not np.array_equal(np.asarray(decoded, np.int8).reshape(integers.shape), integers):
        raise AssertionError(f"{codec} did not give its integers back")
    count = integers.size
    return Row(bits, codec, 8 * len(coded) / count, count / min(encode_s) / 1e6, count / min(decode_s) / 1e6)


def rows_of(bits: float, side: int, *, general: bool, repeat: int) -> list[Row]:
    """All codecs on one tensor."""
    integers, rows, columns = quantized(side, SPREADS[bits])
    plain, shape = integers.tobytes(), (side, side)
    zstd = zstd_level(19)
    found = [
        measure(
            bits,
            "tokenbound, steps known",
            integers,
            lambda: encode_matrix(integers, rows, columns),
            lambda coded: decode_matrix(coded, shape, rows, columns),
            repeat,
        ),
        measure(
            bits,
            "tokenbound, nothing known",
            integers,
            lambda: encode_matrix(integers),
            lambda coded: decode_matrix(coded, shape),
            repeat,
        ),
    ]
    if general:
        found += [
            measure(
                bits,
                "zstd -19",
                integers,
                lambda: zstd.compress(plain, asbytes=True),
                lambda coded: np.frombuffer(zstd.decompress(coded, len(plain), asbytes=True), np.int8),
                1,
            ),
            measure(
                bits,
                "gzip -9",
                integers,
                lambda: gzip.compress(plain, 9, mtime=0),
                lambda coded: np.frombuffer(zlib.decompress(coded, 31), np.int8),
                1,
            ),
        ]
    return found


def table(rows: list[Row]) -> str:
    """Markdown, with sizes relative to the coder where the steps are known."""
    lines = [
        "| aim, bits/weight | codec | bits/weight | size | encode Msym/s | decode Msym/s |",
        "|---|---|---|---|---|---|",
    ]
    ours = {row.bits: row.bits_per_weight for row in reversed(rows) if row.codec.endswith("steps known")}
    for row in rows:
        ratio = row.bits_per_weight / ours[row.bits]
        lines.append(
            f"| {row.bits} | {row.codec} | {row.bits_per_weight:.3f} | {ratio:.3f} "
            f"| {row.encode_msym:.1f} | {row.decode_msym:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=7168, help="rows and columns of the tensor (7168: 51 M symbols)")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-general", action="store_true", help="leave zstd and gzip out")
    chosen = parser.parse_args()
    print(f"{machine()}, {chosen.side}x{chosen.side} symbols, processor time of one thread\n")
    rows: list[Row] = []
    for bits in SPREADS:
        rows += rows_of(bits, chosen.side, general=not chosen.no_general, repeat=chosen.repeat)
    print(table(rows))


if __name__ == "__main__":
    main()
