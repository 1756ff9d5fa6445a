"""Weights per second and core of coding one large tensor: in two passes, adaptively, and by zstd -19 and gzip -9.

    OMP_NUM_THREADS=1 python tests/benchmarks/coder_speed.py

Large tensors are coded in two passes; the adaptive coder, which small ones keep, is run on the same tensor beside it.
Every codec gets the same values in the same process, one after the other; speeds are medians of processor time. The
first table is of quantized integers alone: normal, with rows and columns of unequal size, of which the coder is told
the half-octave exponents (as `kfac` does) or nothing. The second is of whole tensors, from weights to payload and back.
"""

from __future__ import annotations

import argparse
import gzip
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench import machine
from numpy.typing import NDArray

from tokenbound.compression import integers, matrices
from tokenbound.compression.bytestreams import zstd_level
from tokenbound.compression.codecs import UNIFORM, exact
from tokenbound.compression.codecs.uniform import Grid, encode_grid
from tokenbound.compression.dtypes import dtype_code, tensor_bytes
from tokenbound.compression.methods.lossless import LosslessSettings
from tokenbound.compression.methods.rtn import RoundToNearestSettings
from tokenbound.compression.tensor import CodedTensor, decode_tensor, encode_tensor

SPREADS = {1.2: 0.46, 2.0: 0.93, 3.0: 1.95}
"""Standard deviations in steps that take about so many bits per weight."""
UNEVEN = 0.7
"""Standard deviation of the rows' and columns' scales, in half octaves."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STEPS = (1.0, 0.25)
"""Of `rtn`, in standard deviations."""
NEW, OLD = "two passes", "adaptive"


@dataclass(frozen=True)
class Row:
    """One codec on one tensor; speeds in millions of weights per second."""

    what: str
    codec: str
    bits_per_weight: float
    encode: float
    decode: float


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
    what: str,
    codec: str,
    values: NDArray[Any],
    encode: Callable[[], Any],
    decode: Callable[[Any], Any],
    repeat: int,
    check: bool = True,
) -> Row:
    """Medians of a few turns of processor time, and a check that decoding gives the values back."""
    encode_s, decode_s = [], []
    for _ in range(repeat):
        start = time.process_time()
        coded = encode()
        encode_s.append(time.process_time() - start)
        start = time.process_time()
        decoded = decode(coded)
        decode_s.append(time.process_time() - start)
    if check and not np.array_equal(np.asarray(decoded, values.dtype).reshape(values.shape), values):
        raise AssertionError(f"{codec} did not give its values back")
    count, size = len(values.reshape(-1)), len(getattr(coded, "payload", coded))
    return Row(what, codec, 8 * size / count, count / median(encode_s) / 1e6, count / median(decode_s) / 1e6)


def integer_rows(bits: float, side: int, *, general: bool, repeat: int) -> list[Row]:
    """All codecs on the integers of one tensor."""
    values, rows, columns = quantized(side, SPREADS[bits])
    plain, shape, what = values.tobytes(), (side, side), f"{bits} bits"
    zstd = zstd_level(19)
    found = []
    for known, exponents in (("steps known", (rows, columns)), ("nothing known", (None, None))):
        for codec, module in ((NEW, matrices), (OLD, integers)):
            found.append(
                measure(
                    what,
                    f"{codec}, {known}",
                    values,
                    lambda module=module, known=exponents: module.encode_matrix(values, *known),
                    lambda coded, module=module, known=exponents: module.decode_matrix(coded, shape, *known),
                    repeat,
                )
            )
    if general:
        found += [
            measure(
                what,
                "zstd -19",
                values,
                lambda: zstd.compress(plain, asbytes=True),
                lambda coded: np.frombuffer(zstd.decompress(coded, len(plain), asbytes=True), np.int8),
                1,
            ),
            measure(
                what,
                "gzip -9",
                values,
                lambda: gzip.compress(plain, 9, mtime=0),
                lambda coded: np.frombuffer(zlib.decompress(coded, 31), np.int8),
                1,
            ),
        ]
    return found


@contextmanager
def adaptive() -> Iterator[None]:
    """Large tensors are coded as small ones are."""
    never = 1 << 62
    with patch.object(matrices, "STATIC_ELEMENTS", never), patch.object(exact, "STATIC_ELEMENTS", never):
        yield


def both(
    what: str, values: NDArray[Any], encode: Callable[[], CodedTensor], repeat: int, *, is_exact: bool
) -> list[Row]:
    """A tensor in two passes and adaptively."""

    def decode(coded: CodedTensor) -> NDArray[Any]:
        return tensor_bytes(decode_tensor(coded)).view(values.dtype)

    new = measure(what, NEW, values, encode, decode, repeat, is_exact)
    with adaptive():
        return [new, measure(what, OLD, values, encode, decode, 1, is_exact)]


def tensor_rows(side: int, repeat: int) -> list[Row]:
    """Whole tensors: exactly, rounded to nearest, and on a grid such as `kfac` chooses."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(side, side, generator=draw) * torch.exp(0.3 * torch.randn(side, 1, generator=draw)) * 0.02
    found = []
    for dtype in DTYPES:
        tensor, name = weight.to(dtype), str(dtype).removeprefix("torch.")
        values = tensor_bytes(tensor).view(f"u{dtype.itemsize}")
        exactly = lambda tensor=tensor: encode_tensor("w", tensor, LosslessSettings())  # noqa: E731
        found += both(f"lossless {name}", values, exactly, repeat, is_exact=True)
    tensor = weight.bfloat16()
    values = tensor_bytes(tensor).view(np.uint16)
    for step in STEPS:
        rounded = lambda step=step: encode_tensor("w", tensor, RoundToNearestSettings(step=step))  # noqa: E731
        found += both(f"rtn, step {step}", values, rounded, repeat, is_exact=False)
    for bits, spread in SPREADS.items():
        quants, rows, columns = quantized(side, spread)
        grid = Grid(quants, -10, rows, columns, 5)
        on_grid = lambda grid=grid: _coded(grid)  # noqa: E731
        found += both(f"kfac's grid, {bits} bits", values, on_grid, repeat, is_exact=False)
    return found


def _coded(grid: Grid) -> CodedTensor:
    return CodedTensor("w", grid.integers.shape, dtype_code(torch.bfloat16, "w"), UNIFORM, encode_grid(grid))


def table(rows: list[Row]) -> str:
    """Markdown, with sizes relative to the first row of the same values."""
    lines = [
        "| values | codec | bits/weight | size | encode M/s | decode M/s |",
        "|---|---|---|---|---|---|",
    ]
    first = {row.what: row.bits_per_weight for row in reversed(rows)}
    for row in rows:
        ratio = row.bits_per_weight / first[row.what]
        speeds = (f"{speed:.1f}" if speed >= 1 else f"{speed:.2f}" for speed in (row.encode, row.decode))
        lines.append(f"| {row.what} | {row.codec} | {row.bits_per_weight:.3f} | {ratio:.4f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def exact_speeds(rows: list[Row]) -> str:
    """Megabytes of the checkpoint per second, where tensors are kept exactly."""
    lines = ["| lossless | size | encode MB/s | decode MB/s | before |", "|---|---|---|---|---|"]
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        new, old = (row for row in rows if row.what == f"lossless {name}")
        lines.append(
            f"| {name} | {new.bits_per_weight / old.bits_per_weight:.4f} | {new.encode * dtype.itemsize:.0f} "
            f"| {new.decode * dtype.itemsize:.0f} "
            f"| {old.encode * dtype.itemsize:.2f} and {old.decode * dtype.itemsize:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=7168, help="rows and columns of integers (7168: 51 M weights)")
    parser.add_argument("--tensor-side", type=int, default=1024, help="rows and columns of whole tensors")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-general", action="store_true", help="leave zstd and gzip out")
    chosen = parser.parse_args()
    print(f"{machine()}, processor time of one thread\n\nIntegers, {chosen.side}x{chosen.side}:\n")
    rows: list[Row] = []
    for bits in SPREADS:
        rows += integer_rows(bits, chosen.side, general=not chosen.no_general, repeat=chosen.repeat)
    print(table(rows))
    print(f"\nTensors, {chosen.tensor_side}x{chosen.tensor_side}:\n")
    rows = tensor_rows(chosen.tensor_side, chosen.repeat)
    print(f"{table(rows)}\n\n{exact_speeds(rows)}")


if __name__ == "__main__":
    main()
