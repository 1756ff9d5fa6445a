"""Exact round trips, determinism, honest accounting, and refusals by name."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression.artifact import (
    decode_artifact,
    encode_artifact,
    join_artifact,
    parse_artifact,
)
from tokenbound.compression.dtypes import bytes_tensor, tensor_bytes
from tokenbound.compression.inspection import inspect_artifact, xz_bytes
from tokenbound.compression.tensor import encode_tensor
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
from tokenbound.errors import InputError

ARCHITECTURE = {"model_type": "llama", "hidden_size": 64, "name": "größer"}
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(tensor_bytes(a), tensor_bytes(b))


def tiny_model(seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(64, 32, generator=make) * 0.3,
        "layers.0.up.weight": torch.randn(96, 32, generator=make) * 0.1,
        "layers.0.up.bias": torch.randn(96, generator=make) * 0.01,
        "layers.0.norm.weight": 1 + 0.1 * torch.randn(32, generator=make),
        "layers.1.conv.weight": torch.randn(8, 4, 3, generator=make).to(torch.bfloat16),
        "layers.1.steps": torch.arange(7),
        "scale": torch.tensor(0.5),
        "nothing": torch.zeros(0, 5),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lossless_keeps_every_bit_of_every_dtype(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(1)
    values = torch.randn(37, 11, generator=make) * 3
    tensor = (
        values > 0 if dtype == torch.bool else (values.abs() if str(dtype).startswith("torch.u") else values).to(dtype)
    )
    data = encode_artifact(ARCHITECTURE, {"w": tensor}, LosslessSettings())
    artifact = decode_artifact(data)
    assert same_bits(artifact.tensors["w"], tensor)
    assert artifact.architecture == ARCHITECTURE
    assert (artifact.num_bytes, artifact.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([d for d in DTYPES if d != torch.bool]),
    raw=st.binary(min_size=1, max_size=64),
)
def test_lossless_round_trip_of_arbitrary_bits(shape: list[int], dtype: torch.dtype, raw: bytes) -> None:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = (raw * (size // len(raw) + 1))[:size]
    tensor = bytes_tensor(data, tuple(shape), dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.double()).all()):
        with pytest.raises(InputError, match="'w'"):
            encode_artifact(ARCHITECTURE, {"w": tensor}, LosslessSettings())
        return
    assert same_bits(decode_artifact(encode_artifact({}, {"w": tensor}, LosslessSettings())).tensors["w"], tensor)


@pytest.mark.parametrize(
    ("dtype", "values"), [(torch.int64, [0, -(2**63), 2**63 - 1]), (torch.uint64, [0, 2**63, 2**64 - 5])]
)
def test_the_ends_of_wide_integers_survive(dtype: torch.dtype, values: list[int]) -> None:
    for shape in ((3,), (1, 3), (3, 1)):
        tensor = torch.tensor(values, dtype=dtype).reshape(shape)
        assert same_bits(decode_artifact(encode_artifact({}, {"w": tensor}, LosslessSettings())).tensors["w"], tensor)


@pytest.mark.parametrize("chosen", [LosslessSettings(), RoundToNearestSettings(step=0.25)])
def test_same_input_same_bytes_whatever_the_order(chosen: LosslessSettings | RoundToNearestSettings) -> None:
    model = tiny_model()
    first = encode_artifact(ARCHITECTURE, model, chosen)
    again = encode_artifact(dict(reversed(ARCHITECTURE.items())), dict(reversed(model.items())), chosen)
    assert first == again


def test_a_tensor_that_is_a_view_or_not_contiguous_is_kept_by_value() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6).t()[1:, ::2]
    assert same_bits(decode_artifact(encode_artifact({}, {"w": tensor}, LosslessSettings())).tensors["w"], tensor)


def test_round_to_nearest_is_within_half_a_step_and_decodes_to_a_fixed_point() -> None:
    model = tiny_model()
    coded = RoundToNearestSettings(step=0.25)
    decoded = decode_artifact(encode_artifact(ARCHITECTURE, model, coded))
    assert list(decoded.tensors) == sorted(model)
    for name in ("embed.weight", "layers.0.up.weight"):
        error = (decoded.tensors[name] - model[name]).abs().max().item()
        assert 0 < error <= 0.5 * 0.25 * model[name].std().item() * 2**0.26
    assert (decoded.tensors["layers.0.norm.weight"] * 32 % 1 == 0).all()
    for name in ("layers.1.steps", "nothing", "scale"):
        assert same_bits(decoded.tensors[name], model[name])
    assert decoded.settings == {"method": "rtn", "step": 0.25}


def test_every_byte_is_accounted_for() -> None:
    data = encode_artifact(ARCHITECTURE, tiny_model(), RoundToNearestSettings(), tokenizer=b"abc" * 100)
    report = inspect_artifact(data, compare=True)
    assert sum(report.sections.values()) == len(data) == report.num_bytes
    for shares in (report.layers, report.codecs, {"all": report.total}):
        assert sum(share.num_bytes for share in shares.values()) == report.sections["tensors"]
        assert sum(share.elements for share in shares.values()) == report.elements
        assert sum(share.tensors for share in shares.values()) == len(report.tensors)
        assert sum(share.zstd_bytes or 0 for share in shares.values()) == sum(r.zstd_bytes or 0 for r in report.tensors)
    assert report.layers["layers.0"].bits_per_weight == pytest.approx(
        8 * report.layers["layers.0"].num_bytes / (96 * 32 + 96 + 32)
    )
    assert report.code_length_bits > 8 * len(data)
    assert report.bits_per_weight == pytest.approx(8 * len(data) / sum(t.numel() for t in tiny_model().values()))
    assert set(report.layers) == {"embed", "layers.0", "layers.1", "scale", "nothing"}
    row = next(row for row in report.tensors if row.name == "embed.weight")
    assert row.gzip_bytes is not None
    assert row.num_bytes < min(row.gzip_bytes, row.zstd_bytes or 0, row.xz_bytes or 0)


def test_the_tokenizer_is_inside_and_paid_for() -> None:
    text = hashlib.sha512(b"x").digest() * 3
    without = encode_artifact({}, {}, LosslessSettings())
    counted = encode_artifact({}, {}, LosslessSettings(), tokenizer=text)
    assert len(counted) >= len(without) + 64
    assert decode_artifact(counted).tokenizer == text
    assert decode_artifact(without).tokenizer is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_non_finite_weights_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(5, 5)
    tensor[3, 2] = value
    with pytest.raises(InputError, match=r"'model\.bad\.weight' holds NaN or infinity"):
        encode_artifact({}, {"model.bad.weight": tensor.to(dtype)}, LosslessSettings())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.zeros(3, dtype=torch.complex128)}, "'w' has dtype complex128"),
        ({"a\nb": torch.zeros(3)}, "newlines"),
        ({"": torch.zeros(3)}, "not empty"),
        ({"w": torch.zeros(1 << 13, 1 << 10)}, "declare tensors of"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tensors: Mapping[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_artifact({}, tensors, LosslessSettings())


def test_architecture_must_be_plain_json() -> None:
    with pytest.raises(InputError, match="plain JSON"):
        encode_artifact({"a": float("nan")}, {}, LosslessSettings())


@pytest.mark.parametrize("kind", ["gauss", "sparse", "repeat", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_lossless_is_never_longer_than_general_codecs(kind: str, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(3)
    values = torch.randn(128, 96, generator=make)
    if kind == "sparse":
        values *= torch.rand(128, 96, generator=make) < 0.1
    if kind == "repeat":
        values = values[:4].repeat(32, 1)
    if kind == "noise":
        values = torch.randint(-128, 128, (128, 96), generator=make).float()
    tensor = (values * 20).to(dtype) if dtype == torch.int8 else values.to(dtype)
    report = inspect_artifact(encode_artifact({}, {"w": tensor}, LosslessSettings()), compare=True)
    row = report.tensors[0]
    assert row.gzip_bytes is not None
    assert row.num_bytes <= 1 + min(row.gzip_bytes, row.zstd_bytes or 0, row.xz_bytes or 0, tensor.nbytes)


def test_the_same_tensor_is_stored_once() -> None:
    make = torch.Generator().manual_seed(0)
    table, other = torch.randn(256, generator=make), torch.randn(256, generator=make)
    tensors = {f"{layer}.{name}": t for layer in range(9) for name, t in (("a", table), ("b", other), ("c", table))}
    single = encode_artifact({}, {"a": table, "b": other}, LosslessSettings())
    data = encode_artifact({}, tensors, LosslessSettings())
    assert len(data) < len(single) + 80
    decoded = decode_artifact(data).tensors
    assert all(same_bits(decoded[name], tensor) for name, tensor in tensors.items())
    coded = parse_artifact(data).coded
    assert [item.repeats for item in coded[:6]] == [None, None, "0.a", "0.a", "0.b", "0.a"]
    report = inspect_artifact(data)
    assert report.total.num_bytes == report.sections["tensors"] == sum(item.stored_bytes for item in coded)
    assert join_artifact({}, coded, {"method": "lossless"}) == data


def test_the_same_bytes_of_another_kind_are_no_repetition() -> None:
    zeros = {"a": torch.zeros(4, 64), "b": torch.zeros(64, 4), "c": torch.zeros(4, 64, dtype=torch.int32)}
    coded = parse_artifact(encode_artifact({}, zeros, LosslessSettings())).coded
    assert [item.repeats for item in coded] == [None] * 3


def test_a_payload_that_replaces_a_repetition_is_kept() -> None:
    tensors = {"a": torch.arange(9.0), "b": torch.arange(9.0)}
    first, second = parse_artifact(encode_artifact({}, tensors, LosslessSettings())).coded
    assert second.repeats == "a"
    changed = encode_tensor("b", torch.ones(9) / 3, LosslessSettings())
    data = join_artifact({}, [first, replace(second, codec=changed.codec, payload=changed.payload)], {})
    assert torch.equal(decode_artifact(data).tensors["b"], torch.ones(9) / 3)


@pytest.mark.parametrize("size", [0, 1, 5000, 300_000])
def test_the_comparison_with_xz_is_with_its_highest_level(size: int) -> None:
    draw = np.random.default_rng(0)
    plain = (draw.integers(0, 20, size) * draw.integers(0, 2, size)).astype(np.uint8).tobytes()
    assert xz_bytes(plain) == len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME))
