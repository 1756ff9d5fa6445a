"""Other tools' layouts: kept bit for bit and well below general codecs."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import layouts_support as layouts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.bytestreams import zstd_level
from tokenbound.compression.codecs import packed
from tokenbound.compression.codecs.packed import (
    CODE_BITS,
    GROUPS,
    STATIC_CODES,
    Fields,
    Layout,
    decode_packed,
    encode_packed,
    encode_static,
)
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.inspection import TensorReport, inspect_artifact
from tokenbound.compression.tensor import decode_tensor, encode_tensor
from tokenbound.config.compress import LosslessSettings

MAKERS: dict[str, Callable[[np.ndarray], layouts.Tensors]] = {
    **{f"gptq{bits}": lambda weights, bits=bits: layouts.gptq(weights, bits)[0] for bits in (2, 3, 4, 8)},
    "gptq4 by activation": lambda weights: layouts.gptq(weights, 4, act_order=True)[0],
    "awq": lambda weights: layouts.awq(weights)[0],
    "bitsandbytes4": lambda weights: layouts.bitsandbytes_4bit(weights)[0],
    "bitsandbytes4 nested": lambda weights: layouts.bitsandbytes_4bit(weights, nested=True)[0],
    "bitsandbytes8": lambda weights: layouts.bitsandbytes_8bit(weights)[0],
    **{f"hqq{bits}": lambda weights, bits=bits: layouts.hqq(weights, bits)[0] for bits in (2, 3, 4)},
    "compressed-tensors": layouts.compressed_tensors,
    "torchao": layouts.torchao,
}
LAYOUTS = {name: make(layouts.random_weights()) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[TensorReport, ...]]:
    found = {}
    for name, tensors in LAYOUTS.items():
        tensors = {f"layer{part}": tensor for part, tensor in tensors.items()}
        data = encode_artifact({"quantization_config": {"quant_method": name}}, tensors, LosslessSettings())
        decoded = decode_artifact(data).tensors
        for key, value in tensors.items():
            assert decoded[key].dtype == value.dtype
            assert np.array_equal(tensor_bytes(decoded[key]), tensor_bytes(value)), (name, key)
        found[name] = inspect_artifact(data, compare=True).tensors
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_come_back_bit_for_bit_and_never_longer(
    name: str, reports: dict[str, tuple[TensorReport, ...]]
) -> None:
    for row in reports[name]:
        assert row.gzip_bytes is not None
        assert row.num_bytes <= min(row.gzip_bytes, row.zstd_bytes or 0, row.xz_bytes or 0), row.name


@pytest.mark.parametrize("name", MAKERS)
def test_whole_checkpoints_are_below_general_codecs(name: str) -> None:
    """Which see tables and settings that all layers share once, in a window over the whole file."""
    tensors = {
        f"model.layers.{layer}.mlp.up_proj{part}": tensor.contiguous()
        for layer in range(6)
        for part, tensor in MAKERS[name](layouts.random_weights(64, 128, seed=layer)).items()
    }
    file = save(tensors)
    general = (
        gzip.compress(file, 9, mtime=0),
        zstd_level(19).compress(file, asbytes=True),
        lzma.compress(file, preset=9),
    )
    data = encode_artifact({"quantization_config": {"quant_method": name}}, tensors, LosslessSettings())
    assert len(data) < min(map(len, general))
    decoded = decode_artifact(data).tensors
    for key, tensor in tensors.items():
        assert np.array_equal(tensor_bytes(decoded[key]), tensor_bytes(tensor)), key


@pytest.mark.parametrize(("name", "saving"), [("gptq2", 0.08), ("gptq3", 0.08), ("gptq4", 0.01), ("awq", 0.01)])
def test_weights_are_well_below_zstd(name: str, saving: float, reports: dict[str, tuple[TensorReport, ...]]) -> None:
    row = next(row for row in reports[name] if "qweight" in row.name)
    assert row.codec == "packed"
    assert row.num_bytes < (1 - saving) * (row.zstd_bytes or 0)


def test_group_indices_cost_next_to_nothing(reports: dict[str, tuple[TensorReport, ...]]) -> None:
    row = next(row for row in reports["gptq4"] if "g_idx" in row.name)
    assert row.num_bytes < 32


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_words_are_taken_apart_and_put_together(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([8, 16, 32, 64]))
    layout = Layout(data.draw(st.sampled_from(CODE_BITS)), width, 0, data.draw(st.booleans()))
    steps = layout.bits * data.draw(st.integers(1, 4) | st.just(300))
    if not layout.fits(steps):
        return
    made = np.random.default_rng(data.draw(st.integers(0, 99)))
    words = made.integers(0, 1 << width, (steps, 2), f"u{width // 8}", endpoint=False)
    fields = Fields(words, layout)
    codes = [fields.read(step) for step in range(fields.steps)]
    assert sum(map(len, codes)) == 2 * layout.count(steps)
    assert fields.fold > 1 or steps < 256
    again = Fields(np.zeros_like(words), layout)
    for step, row in enumerate(codes):
        assert 0 <= row.min() <= row.max() < 1 << layout.bits
        again.write(step, row)
    again.set_spare(fields.spare())
    assert np.array_equal(again.words, words)


def test_layout_bytes_are_a_bijection() -> None:
    layouts = [
        Layout(bits, 32, axis, across, group)
        for bits in CODE_BITS
        for axis in (0, 1)
        for across in (False, True)
        for group in GROUPS
    ]
    assert [Layout.read(layout.to_byte(), 32) for layout in layouts] == layouts
    assert len({layout.to_byte() for layout in layouts}) == len(layouts)


def test_a_layout_that_crosses_words_is_gptqs_three_bits() -> None:
    codes = np.arange(64).reshape(32, 2) % 8
    fields = Fields(layouts.pack_stream(codes, 3).view(np.uint32), Layout(3, 32, 0, True))
    assert np.array_equal([fields.read(step) for step in range(fields.steps)], codes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_words_survive_under_a_static_table(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([8, 16, 32, 64]))
    layout = Layout(
        data.draw(st.sampled_from(CODE_BITS)), width, data.draw(st.integers(0, 1)), data.draw(st.booleans())
    )
    shape = (layout.bits * data.draw(st.integers(1, 4) | st.just(300)), data.draw(st.integers(1, 9)))
    if not layout.fits(shape[0]) or not packed._steps_allowed(layout.count(shape[0]), shape[1]):
        return
    made = np.random.default_rng(data.draw(st.integers(0, 99)))
    top = 1 << data.draw(st.integers(0, width))
    words = made.integers(0, top - 1, shape, f"u{width // 8}", endpoint=True)
    words = words if layout.axis == 0 else np.ascontiguousarray(words.T)
    dtype = getattr(torch, f"uint{width}")
    coded = encode_static(words, layout)
    assert np.array_equal(
        tensor_bytes(decode_packed(memoryview(coded), words.shape, dtype)), tensor_bytes(torch.from_numpy(words))
    )


def symmetric(rows: int, columns: int, *, zeros: bool = False) -> torch.Tensor:
    """Words of eight codes of four bits, round a middle or round zero points of groups of 128."""
    draw = np.random.default_rng(0)
    middle = np.repeat(draw.integers(4, 12, (rows * 8 // 128, columns)), 128, axis=0) if zeros else 8
    codes = np.rint(draw.normal(size=(rows * 8, columns)) * 2.2 + middle).clip(0, 15).astype(np.uint32)
    words = sum(codes[place::8] << np.uint32(4 * place) for place in range(8))
    return torch.from_numpy(np.asarray(words, np.uint32).view(np.int32))


def test_codes_without_zero_points_take_one_table_and_others_their_means() -> None:
    alike, grouped = symmetric(128, 384), symmetric(128, 384, zeros=True)
    assert alike.numel() * 8 >= STATIC_CODES
    for words, is_static in ((alike, True), (grouped, False)):
        coded = encode_packed(words, 1 << 30)
        assert coded is not None
        assert bool(coded[0] & 0x40) == is_static
        assert torch.equal(decode_packed(memoryview(coded), tuple(words.shape), words.dtype), words)
        layout = packed._best_layout(packed._words(words))
        assert len(coded) <= 1.01 * len(packed._encode_layout(packed._words(words), layout))


@pytest.mark.parametrize(
    ("first", "message"), [(0x40 | 1 << 4, "does not fit it"), (0x80, "is unknown"), (0x40, "does not fit its codes")]
)
def test_forged_static_forms_are_named(first: int, message: str) -> None:
    words = np.full((64, 64), 0x4444, np.uint16)
    coded = bytearray(encode_static(words, Layout(4, 16, 0, False)))
    coded[0] = first
    with pytest.raises(ArtifactError, match=message):
        decode_packed(memoryview(bytes(coded)), (64, 64), torch.int16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_an_integer_without_axes_comes_back(dtype: torch.dtype) -> None:
    """QuIP#'s files hold the number of their codebook so."""
    for value in (0, 7, 127):
        coded = encode_tensor("codebook_id", torch.tensor(value, dtype=dtype), LosslessSettings())
        assert decode_tensor(coded).item() == value
