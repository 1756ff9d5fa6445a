"""Packed weights hold the same values as the codes that they were read from, in few bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tokenbound.compression.calibration import Calibration, MatrixSums
from tokenbound.compression.codecs import HALF, UNIFORM
from tokenbound.compression.codecs.uniform import Grid, encode_grid
from tokenbound.compression.dtypes import dtype_code
from tokenbound.compression.methods import CompressionMethod
from tokenbound.compression.packed_weights import (
    PackedGrid,
    PackedGroups,
    PackedLattice,
    PlainWeight,
    choose_bits,
    described,
    pack_integers,
    pack_weight,
    restored_weight,
)
from tokenbound.compression.tensor import CodedTensor, decode_tensor, encode_tensor
from tokenbound.config.compress import E8Settings, GptqSettings, LosslessSettings, RoundToNearestSettings

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_same(coded: CodedTensor) -> torch.Tensor:
    """The packed tensor's values, once they are seen to be the codec's, also after it was taken apart and restored."""
    expected, packed = decode_tensor(coded), pack_weight(coded)
    restored = restored_weight(json.loads(json.dumps(described(packed))), packed.tensors)
    assert (type(restored), restored.num_bytes) == (type(packed), packed.num_bytes)
    for found in (packed.dense(CPU), restored.dense(CPU), packed.to(CPU).dense(CPU)):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    return expected


def grid_tensor(grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> CodedTensor:
    return CodedTensor("w", shape, dtype_code(dtype, "w"), UNIFORM, encode_grid(grid))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_integers_of_every_width_come_back(bits: int, columns: int) -> None:
    low = -(1 << bits - 1) + 3
    integers = np.random.default_rng(bits).integers(low, low + (1 << bits), (50, columns), dtype=np.int16)
    packed = pack_integers(integers, bits, low)
    assert np.array_equal(packed.floats(slice(0, 50)).numpy(), integers)
    assert np.array_equal(packed.floats(slice(20, 31)).numpy(), integers[20:31])
    assert sum(plane.numel() for plane in packed.tensors.values()) == 50 * -(-columns // 8) * bits


def test_bits_are_chosen_by_memory_with_outliers() -> None:
    counts = np.zeros(513, np.int64)
    counts[254:258] = 1000
    counts[400] = 1
    assert choose_bits(counts, -256) == (2, -2)  # one outlier is cheaper than 8 bits for all
    counts[400] = 4000
    bits, low = choose_bits(counts, -256) or (0, 0)
    assert bits == 8
    assert low <= -2
    assert low + 256 > 144
    assert choose_bits(np.full(5000, 10), -2500) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_rows", [False, True])
@pytest.mark.parametrize("has_columns", [False, True])
@pytest.mark.parametrize("shrink", [0, 11])
def test_grids_keep_their_bits(dtype: torch.dtype, has_rows: bool, has_columns: bool, shrink: int) -> None:
    generator = np.random.default_rng(0)
    integers = np.rint(3 * generator.standard_normal((300, 301))).astype(np.int32)
    integers[3, 5], integers[299, 300] = 70_000, -129
    rows = generator.integers(-9, 8, 300) if has_rows else None
    columns = generator.integers(-9, 8, 301) if has_columns else None
    coded = grid_tensor(Grid(integers, -13, rows, columns, shrink), (300, 301), dtype)
    require_same(coded)
    packed = pack_weight(coded)
    assert isinstance(packed, PackedGrid)
    assert packed.num_bytes < 0.75 * integers.size


def test_grid_of_experts_keeps_its_shape() -> None:
    integers = np.random.default_rng(0).integers(-4, 4, (5, 40 * 400)).astype(np.int32)
    assert require_same(grid_tensor(Grid(integers, -8, np.arange(5)), (5, 40, 400), torch.bfloat16)).shape[0] == 5


@pytest.mark.parametrize(("end", "base", "kind"), [(110, -20, PackedGrid), (236, 0, PlainWeight)], ids=str)
def test_steps_at_the_ends_of_their_range_keep_their_bits(end: int, base: int, kind: type) -> None:
    """The second grid's rows reach so far down that their share of a step is no product of safe numbers."""
    integers = np.random.default_rng(0).integers(-4, 4, (300, 300)).astype(np.int32)
    low = np.arange(300) % 2 == 0
    sides = np.where(low, -end, end if base else 0)
    coded = grid_tensor(Grid(integers, base, sides, sides if base else None), (300, 300), torch.float32)
    require_same(coded)
    assert isinstance(pack_weight(coded), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "kind", "bits"),
    [
        (RoundToNearestSettings(step=0.25), PackedGrid, 6),
        (GptqSettings(bits=4, group=64), PackedGroups, 5.5),
        (E8Settings(bits=2), PackedLattice, 2.1),
        (E8Settings(bits=4), PackedLattice, 4.1),
        (LosslessSettings(), PlainWeight, 32),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_methods_pack_to_the_same_values(
    dtype: torch.dtype, method: CompressionMethod, kind: type, bits: float
) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 3] = 40
    sums = MatrixSums(torch.ones(64).double(), torch.eye(128).double() / 2, 1000)
    coded = encode_tensor("w", weight, method, Calibration(1000, {"w": sums}))
    require_same(coded)
    packed = pack_weight(coded)
    assert isinstance(packed, kind)
    assert 8 * packed.num_bytes <= bits * weight.numel()


def test_halves_stay_halves() -> None:
    sums = MatrixSums(torch.ones(64).double(), torch.eye(128).double() / 2, 1000, is_embedding=True)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    coded = encode_tensor("w", weight, GptqSettings(), Calibration(1000, {"w": sums}))
    assert coded.codec == HALF
    require_same(coded)
    assert pack_weight(coded).num_bytes == 2 * weight.numel()


def test_integers_that_need_more_than_a_byte_are_kept_as_values() -> None:
    integers = np.random.default_rng(0).integers(-30_000, 30_000, (300, 300)).astype(np.int32)
    coded = grid_tensor(Grid(integers, -30), (300, 300), torch.bfloat16)
    require_same(coded)
    assert isinstance(pack_weight(coded), PlainWeight)
