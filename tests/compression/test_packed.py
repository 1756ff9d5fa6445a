"""Other tools' layouts, written here from their documented formats: kept bit for bit and well below general codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.inspection import TensorReport, inspect_artifact
from tokenbound.compression.methods.packed import CODE_BITS, GROUPS, Fields, Layout
from tokenbound.compression.settings import LosslessSettings

GROUP = 128
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantized(bits: int, rows: int = 128, columns: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, columns], zero points and scales [rows, groups], asymmetric, range of each group of columns."""
    weights = np.random.default_rng(0).standard_t(6, (rows, columns)) * 0.03
    grouped = weights.reshape(rows, -1, GROUP)
    low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
    scales = np.maximum((high - low) / ((1 << bits) - 1), 1e-8)
    zeros = np.rint(-low / scales)
    codes = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, (1 << bits) - 1)
    return codes.reshape(rows, columns).astype(np.int64), zeros.astype(np.int64), scales.astype(np.float16)


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, lanes] as int32 words [n * bits / 32, lanes], least significant bits first, across words."""
    flags = (codes[:, None, :] >> np.arange(bits)[None, :, None] & 1).astype(np.uint8)
    packed = np.packbits(flags.reshape(-1, codes.shape[1]), axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<i4").T.copy()


def gptq_layout(bits: int) -> dict[str, torch.Tensor]:
    codes, zeros, scales = quantized(bits)
    tensors = {
        "qweight": pack_stream(codes.T, bits),
        "qzeros": pack_stream(np.maximum(zeros - 1, 0), bits).T.copy(),
        "scales": scales.T.copy(),
        "g_idx": (np.arange(codes.shape[1]) // GROUP).astype(np.int32),
    }
    return {f"layer.{name}": torch.from_numpy(value) for name, value in tensors.items()}


def awq_layout() -> dict[str, torch.Tensor]:
    codes, zeros, scales = quantized(4)

    def pack(values: np.ndarray) -> torch.Tensor:
        words = values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
        return torch.from_numpy((words << (4 * np.arange(8, dtype=np.uint32))).sum(2).astype(np.uint32).view(np.int32))

    return {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T.copy())}


def bitsandbytes_layout() -> dict[str, torch.Tensor]:
    table = np.sort(np.random.default_rng(1).normal(size=16)).astype(np.float32)
    blocks = (np.random.default_rng(0).normal(size=(128, 256)) * 0.03).reshape(-1, 64)
    largest = np.abs(blocks).max(1)
    codes = np.abs(blocks[:, :, None] / largest[:, None, None] - (table / np.abs(table).max())).argmin(2).reshape(-1)
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    return {
        "weight": torch.from_numpy(packed[:, None].copy()),
        "weight.absmax": torch.from_numpy(largest.astype(np.float32)),
        "weight.quant_map": torch.from_numpy(table),
        "weight.quant_state.bitsandbytes__nf4": torch.from_numpy(
            np.frombuffer(b'{"quant_type": "nf4"}', np.uint8).copy()
        ),
        "int8.weight": torch.from_numpy(np.rint(blocks * 600).clip(-127, 127).astype(np.int8)),
        "int8.SCB": torch.from_numpy(largest.astype(np.float32)),
    }


def hqq_layout(bits: int) -> dict[str, torch.Tensor]:
    codes, zeros, scales = quantized(bits)
    flat = codes.reshape(-1, GROUP).T
    if bits == 3:
        words = np.concatenate([flat, np.zeros((-len(flat) % 10, flat.shape[1]), np.int64)]).reshape(
            10, -1, flat.shape[1]
        )
        packed = (words << (27 - 3 * np.arange(10))[:, None, None]).sum(0).astype(np.int32)
    else:
        half = len(flat) // 2
        packed = (flat[:half] << 4 | flat[half:]).astype(np.uint8)
    return {
        "W_q": torch.from_numpy(packed),
        "scale": torch.from_numpy(scales.reshape(1, -1)),
        "zero": torch.from_numpy(zeros.astype(np.float16).reshape(1, -1)),
    }


def compressed_tensors_layout() -> dict[str, torch.Tensor]:
    codes, _, scales = quantized(4)
    return {
        "weight_packed": torch.from_numpy(pack_stream(codes.T, 4).T.copy()),
        "weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        "weight_shape": torch.tensor(codes.shape),
    }


def torchao_layout() -> dict[str, torch.Tensor]:
    codes, zeros, scales = quantized(4)
    return {
        "_weight_qdata": torch.from_numpy((codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8)),
        "_weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        "_weight_zero_point": torch.from_numpy(zeros.astype(np.int8)),
        "fp8._weight_qdata": torch.from_numpy(codes.astype(np.float32) - 7).to(torch.float8_e4m3fn),
    }


LAYOUTS = {
    "gptq2": gptq_layout(2),
    "gptq3": gptq_layout(3),
    "gptq4": gptq_layout(4),
    "gptq8": gptq_layout(8),
    "awq": awq_layout(),
    "bitsandbytes": bitsandbytes_layout(),
    "hqq3": hqq_layout(3),
    "hqq4": hqq_layout(4),
    "compressed-tensors": compressed_tensors_layout(),
    "torchao": torchao_layout(),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[TensorReport, ...]]:
    found = {}
    for name, tensors in LAYOUTS.items():
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
        assert row.num_bytes <= 1 + min(row.gzip_bytes, row.zstd_bytes or 0, row.xz_bytes or 0), row.name


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
    fields = Fields(pack_stream(codes, 3).view(np.uint32), Layout(3, 32, 0, True))
    assert np.array_equal([fields.read(step) for step in range(fields.steps)], codes)
