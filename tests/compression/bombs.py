"""Artifacts of a few bytes that ask for as much memory as they may, and what decoding them takes.

Run as a script (in a process of its own, see `test_hostile`) it prints each bomb's declared bytes and peak as JSON.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import isqrt

import numpy as np
import torch
from peak_memory import held, peak_over

from tokenbound.compression.artifact import FREE_BYTES, decode_artifact, join_artifact, parse_artifact
from tokenbound.compression.bytestreams import BARE, RANGE, XZ, ZSTD, _xz, encode_bytes, zstd_level
from tokenbound.compression.codecs import EXACT, GROUPS, HALF, LATTICE, NGRAMS, PACKED, UNIFORM
from tokenbound.compression.codecs.exact import encode_exact
from tokenbound.compression.codecs.groups import GroupCodes, encode_groups
from tokenbound.compression.codecs.lattice import LatticeCodes, encode_lattice
from tokenbound.compression.codecs.packed import Layout, _encode_layout
from tokenbound.compression.codecs.uniform import Grid, encode_grid
from tokenbound.compression.container import Reader, block
from tokenbound.compression.dtypes import dtype_code
from tokenbound.compression.integers import encode_matrix, encode_vector
from tokenbound.compression.matrices import encode_static
from tokenbound.compression.ngram_codec import CONTEXT, ENTRY, MAX_NUMBERS, Candidates, encode_ngrams, read_tree
from tokenbound.compression.planes import CONSTANT, HUFFMAN, SPLIT
from tokenbound.compression.tensor import CodedTensor
from tokenbound.errors import InputError

FREE = FREE_BYTES // 2
"""Declared bytes of a bomb."""


def general(tag: int, size: int) -> bytes:
    zeros = np.zeros(size, np.uint8)
    packed = {
        ZSTD: lambda: zstd_level(19).compress(zeros, asbytes=True),
        BARE: lambda: zstd_level(19).compress(zeros, asbytes=True)[4:],
        XZ: lambda: _xz(zeros),
        RANGE: lambda: encode_bytes(zeros),
    }[tag]()
    return bytes([tag]) + packed


def lattice(side: int, bits: int) -> bytes:
    planes = [np.zeros(side * side // 8, np.uint8) for _ in range(max(2, bits))]
    return encode_lattice(LatticeCodes(planes, np.float32(1), bits), transposed=False)


def groups(side: int, group: int) -> bytes:
    count = -(-side // group)
    zeros = np.zeros((side, count), np.int32)
    return encode_groups(
        GroupCodes(np.zeros((side, side), np.int32), zeros.astype(np.float16), zeros, group), transposed=True
    )


def static_matrix(side: int, *, varied: bool) -> bytes:
    values = np.zeros((side, side), np.int8)
    coded = b"\0\0" + encode_static(values, None, None)
    if not varied:
        return coded
    classes = encode_vector(np.arange(side) % 60)
    head = len(coded) - len(encode_static(values, None, None)) + 2
    rest = Reader(coded[head:], "")
    rest.block()
    rest.block()
    begins = bytes(15)  # of 119 sums
    return coded[:head] + 2 * block(classes) + begins + bytes(rest.take(rest.remaining))


def split_planes(count: int, width: int) -> bytes:
    """All zero, and said to be half of something else."""
    half = np.zeros(count, np.uint8)
    half[::2] = 1
    return b"\x81" + deflated(half.tobytes()) + bytes([SPLIT, CONSTANT, 1, CONSTANT, 0]) * (width - 1)


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return bytes([HUFFMAN]) + block(packer.compress(data) + packer.flush())


def square(dtype: torch.dtype) -> int:
    return int((FREE // dtype.itemsize) ** 0.5)


FLOATS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
Made = tuple[int, tuple[int, ...], torch.dtype, bytes]


COPIES = 8
"""Tensors that one code stands for."""


def bombs() -> dict[str, Callable[[], Made]]:
    """By name: codec, shape, dtype and payload; in `COPIES` tensors where the name says so."""
    made: dict[str, Callable[[], Made]] = {}

    def add(name: str, codec: int, shape: tuple[int, ...], dtype: torch.dtype, payload: Callable[[], bytes]) -> None:
        made[f"{name} {str(dtype).removeprefix('torch.')}"] = lambda: (codec, shape, dtype, payload())

    for dtype in FLOATS:
        side = square(dtype)
        flat = side * side
        add("matrix", UNIFORM, (side, side), dtype, lambda s=side: encode_grid(Grid(np.zeros((s, s), np.int8), 0)))
        add("vector", UNIFORM, (flat,), dtype, lambda n=flat: encode_grid(Grid(np.zeros(n, np.int8), 0)))
        add(
            "column",
            UNIFORM,
            (side, side),
            dtype,
            lambda s=side: (
                b"\1\0" + block(encode_vector(np.zeros(s, np.int64))) + encode_matrix(np.ones((s, s), np.int8))
            ),
        )
        if dtype.itemsize > 1:
            add("lattice", LATTICE, (side // 8 * 8,) * 2, dtype, lambda s=side: lattice(s // 8 * 8, 3))
            add("groups", GROUPS, (side, side), dtype, lambda s=side: groups(s, 4))
        add("static matrix", UNIFORM, (side, side), dtype, lambda s=side: static_matrix(s, varied=False))
        add("static classes", UNIFORM, (side, side), dtype, lambda s=side: static_matrix(s, varied=True))
        if dtype.itemsize > 1:
            count = side * side
            add("split planes", EXACT, (side, side), dtype, lambda n=count, w=dtype.itemsize: split_planes(n, w))
        add("deflated", EXACT, (flat,), dtype, lambda n=flat, w=dtype.itemsize: b"\x81" + deflated(bytes(n)) * w)
        add("planes", EXACT, (side, side), dtype, lambda s=side, d=dtype: encode_exact(torch.zeros(s, s, dtype=d)))
        for tag in (ZSTD, BARE, XZ, RANGE):
            add(f"general {tag}", EXACT, (flat,), dtype, lambda t=tag, n=flat * dtype.itemsize: general(t, n))
    half = square(torch.float32)
    add("half", HALF, (half, half), torch.float32, lambda: encode_exact(torch.zeros(half, half, dtype=torch.float16)))
    for dtype, axis, bits in product((torch.uint8, torch.int32, torch.int64), (0, 1), (2, 8)):
        side, width = square(dtype), 8 * dtype.itemsize
        add(
            f"packed {axis} {bits}",
            PACKED,
            (side, side),
            dtype,
            lambda s=side, w=width, a=axis, b=bits: _encode_layout(
                np.zeros((s, s), f"u{w // 8}"), Layout(b, w, a, False)
            ),
        )
    add("wide packed", PACKED, (2, FREE // 2), torch.uint8, lambda: bytes([0, 8, 0]))
    count = FREE // 8
    add("differences", PACKED, (count,), torch.int64, lambda: b"\xff" + encode_vector(np.ones(count, np.int8)))
    side = square(torch.float32) // 3
    for name, payload in (
        ("planes", lambda: encode_exact(torch.zeros(side, side))),
        ("general", lambda: general(XZ, 4 * side * side)),
    ):
        add(f"repeated {name}", EXACT, (side, side), torch.float32, payload)
    for name, numbers in ngrams(FREE // 4).items():
        made[f"n-grams {name}"] = lambda numbers=numbers: ngram_bomb(*numbers)
    return made


class Grown:
    """A sequence whose numbers follow a rule: (kind, order, owners, symbols) to numbers."""

    left = MAX_NUMBERS

    def __init__(self, header: tuple[int, int, int], rule: Callable[..., np.ndarray]) -> None:
        self._header, self._rule = header, rule
        self.parts = [np.array(header)]

    def header(self) -> tuple[int, int, int]:
        return self._header

    def take(self, kind: int, order: int, candidates: Candidates) -> np.ndarray:
        parts = candidates.parts([candidates.count] if candidates.count else [])
        found = [self._rule(kind, order, owners, symbols) for owners, symbols, _ in parts]
        self.parts.append(np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64))
        return self.parts[-1]


def ngram_bomb(vocab_size: int, order: int, rule: Callable[..., np.ndarray]) -> Made:
    source = Grown((vocab_size, order, 40), rule)
    read_tree(source)
    numbers = np.concatenate(source.parts).astype(np.int32)
    return NGRAMS, numbers.shape, torch.int32, encode_ngrams(numbers)


def ngrams(count: int) -> dict[str, tuple[int, int, Callable[..., np.ndarray]]]:
    """Trees of about so many numbers: vocabulary, order, rule."""
    side, half = isqrt(count // 2), isqrt(count // 7)

    def everything(kind: int, order: int, owners: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        return np.ones(len(symbols))

    def no_pair_is_lengthened(kind: int, order: int, owners: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        return np.full(len(symbols), kind != CONTEXT or order == 1)

    def one_context(kind: int, order: int, owners: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        return (symbols == 0) if kind == CONTEXT else np.ones(len(symbols))

    def small_contexts(kind: int, order: int, owners: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        if kind != ENTRY or order != 1:
            return np.ones(len(symbols))
        return np.where(owners < half, symbols >= half, symbols == half)

    return {
        "of one symbol": (count - 8, 0, everything),
        "of pairs": (side, 2, no_pair_is_lengthened),
        "in a chain": (count // 18, 16, one_context),
        "of two symbols": (round(count ** (1 / 3)) - 1, 2, everything),
        "of three symbols": (round(count ** (1 / 4)) - 1, 3, everything),
        "with small contexts": (2 * half, 3, small_contexts),
    }


def artifact(made: Made, copies: int = 1) -> bytes:
    codec, shape, dtype, payload = made
    one = CodedTensor("w", shape, dtype_code(dtype, "w"), codec, payload)
    return join_artifact({}, [replace(one, name=f"w{copy}") for copy in range(copies)], {})


def decode(data: bytes) -> None:
    with suppress(InputError):
        decode_artifact(data)


def measure(names: list[str]) -> dict[str, dict[str, int]]:
    found, every = {}, bombs()
    for name in names or every:
        data = artifact(every[name](), COPIES if name.startswith("repeated") else 1)
        declared = sum(item.decoded_bytes for item in parse_artifact(data).coded)
        found[name] = {
            "declared": declared,
            "artifact": len(data),
            "peak": peak_over(held(), lambda data=data: decode(data)),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    decode(artifact(bombs()["matrix float32"]()))
    print(json.dumps(measure(sys.argv[1:])))
