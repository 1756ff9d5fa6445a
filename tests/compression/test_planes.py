"""Large tensors coded exactly in two passes: every dtype and value, sizes, general codecs, hostile bytes."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression import bytestreams
from tokenbound.compression.bytestreams import BARE, XZ, encode_general
from tokenbound.compression.codecs import exact
from tokenbound.compression.codecs.exact import STATIC_ELEMENTS, decode_exact, encode_exact
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.planes import CONSTANT, HUFFMAN, RAW, SPLIT, STATIC, decode_planes, encode_planes

SIDE = 320
TAG = 0x81


def weights(seed: int = 0, side: int = SIDE) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.4 * torch.randn(side, 1, generator=draw))
    return torch.randn(side, side, generator=draw) * scale * 0.02


def decoded(coded: bytes, tensor: torch.Tensor) -> torch.Tensor:
    return decode_exact(memoryview(coded), tuple(tensor.shape), tensor.dtype)


def survives(tensor: torch.Tensor) -> bytes:
    coded = encode_exact(tensor)
    again = decoded(coded, tensor)
    assert again.dtype == tensor.dtype
    assert np.array_equal(tensor_bytes(again), tensor_bytes(tensor))
    return coded


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_survives(dtype: torch.dtype) -> None:
    spread = weights() if dtype.is_floating_point or dtype.is_complex else (weights() * 300).round()
    survives(spread.to(dtype))
    survives(torch.zeros(SIDE, SIDE, dtype=dtype))
    survives(torch.ones(SIDE * SIDE + 1, dtype=dtype))


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1.0, 1e-45, -1e-40, 1e-8, 6e-5, 65504.0, 3.4e38]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_special_values_survive(dtype: torch.dtype) -> None:
    mixed = weights().to(dtype)
    mixed.view(-1)[::97] = torch.tensor(SPECIAL, dtype=dtype).repeat(mixed.numel())[: len(mixed.view(-1)[::97])]
    assert survives(mixed)[0] == TAG
    survives(torch.tensor(SPECIAL, dtype=dtype).repeat(9000))
    bits = torch.randint(0, 256, (STATIC_ELEMENTS * dtype.itemsize,), dtype=torch.uint8)
    survives(bits.view(dtype))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8]),
    st.sampled_from([(STATIC_ELEMENTS,), (257, 256), (1, 70_001), (41, 41, 41)]),
    st.sampled_from([0.0, 0.003, 0.5, 0.999, 1.0]),
    st.integers(0, 255),
    st.integers(0, 9),
)
def test_any_share_of_zeros_survives(
    dtype: torch.dtype, shape: tuple[int, ...], zeros: float, top: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    data = draw.integers(0, top + 1, (int(np.prod(shape)), dtype.itemsize)).astype(np.uint8)
    data[draw.random(len(data)) < zeros] = 0
    survives(torch.from_numpy(data).view(dtype).reshape(shape))


def test_small_tensors_keep_their_adaptive_bytes() -> None:
    assert STATIC_ELEMENTS > 1 << 16
    tensor = weights(side=256)
    planes = exact._encode_planes(tensor_bytes(tensor), rotate=True)
    assert encode_exact(tensor) == min(planes, encode_general(tensor_bytes(tensor).reshape(-1), len(planes)), key=len)


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float16": lambda tensor: tensor.half(),
    "float32": lambda tensor: tensor,
    "float64": lambda tensor: torch.randn(tensor.shape, dtype=torch.float64),
    "float8": lambda tensor: (tensor * 10).to(torch.float8_e4m3fn),
    "bfloat16 in float32": lambda tensor: tensor.bfloat16().float(),
    "float16 in float32": lambda tensor: tensor.half().float(),
    "half of it zero": lambda tensor: tensor.bfloat16() * (torch.arange(tensor.numel()).reshape(tensor.shape) % 7 > 3),
    "dequantized": lambda tensor: ((tensor / 0.01).round() * 0.01).bfloat16(),
    "codes": lambda tensor: (tensor * 100 + 8).clamp(0, 15).to(torch.uint8),
    "int32": lambda tensor: (tensor * 1000).int(),
    "unlike in size": lambda tensor: tensor.exp().bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_is_more_than_a_hundredth_longer(form: str) -> None:
    tensor = FORMS[form](weights(side=512))
    coded, data = survives(tensor), tensor_bytes(tensor)
    planes = exact._encode_planes(data, rotate=tensor.is_floating_point())
    before = min(planes, encode_general(data.reshape(-1), len(planes)), key=len)
    assert len(coded) <= 1.01 * len(before)


@pytest.mark.parametrize("form", ["bfloat16", "float16", "float32", "bfloat16 in float32"])
def test_general_codecs_are_not_run_on_weights(form: str) -> None:
    tensor, called = FORMS[form](weights(side=512)), set[str]()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code.co_name))
    try:
        encode_exact(tensor)
    finally:
        sys.setprofile(None)
    assert encode_exact.__name__ in called
    assert not {"_tagged_xz", "_bare_zstd"} & called
    assert callable(bytestreams._tagged_xz)
    assert callable(bytestreams._bare_zstd)


def test_a_general_codec_is_run_where_rows_repeat_near_or_far() -> None:
    tensor = weights(side=512).bfloat16()
    for copies in (tensor[:32].repeat(16, 1), tensor.repeat(2, 1)):
        coded = survives(copies)
        assert coded[0] in (XZ, BARE)
        assert len(coded) < 0.6 * len(exact._encode_static_planes(tensor_bytes(copies), rotate=True))


def test_how_planes_are_coded() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert survives(weights(side=512).to(dtype))[:2] == bytes([TAG, HUFFMAN])
    assert survives(FORMS["dequantized"](weights(side=512)))[:2] == bytes([TAG, STATIC])
    assert encode_planes(np.full((9, 1), 7, np.uint8)) == bytes([CONSTANT, 7])
    assert encode_planes(np.arange(256, dtype=np.uint8)[:, None])[0] == RAW
    sparse = np.random.default_rng(0).integers(1, 256, (4000, 2)).astype(np.uint8)
    sparse[::2] = 0
    coded = encode_planes(sparse)
    assert bytes([SPLIT, RAW]) in coded
    assert coded[-2:] == bytes([CONSTANT, 0])


# Hostile planes

PLANES = encode_planes(tensor_bytes(weights(side=96).bfloat16().float()))


def read(coded: bytes, shape: tuple[int, int]) -> np.ndarray:
    data = np.empty(shape, np.uint8)
    reader = Reader(coded, "a tensor's byte planes")
    decode_planes(reader, data)
    reader.finish()
    return data


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (b"", "wants 1 bytes"),
        (bytes([RAW, 1, 2]), "wants 9 bytes"),
        (bytes([CONSTANT]), "wants 1 bytes"),
        (bytes([9]), "does not know"),
        (bytes([SPLIT, RAW]), "none is above"),
        (bytes([CONSTANT, 1, 7]), "mean nothing"),
        (bytes([HUFFMAN]) + block(b"\xff\xff"), "not a DEFLATE"),
        (bytes([HUFFMAN]) + block(deflated(b"a" * 8)), "ends too early"),
        (bytes([HUFFMAN]) + block(deflated(b"a" * 10)), "more in a DEFLATE"),
        (bytes([HUFFMAN]) + block(deflated(b"a" * 10**7)), "more in a DEFLATE"),
        (bytes([HUFFMAN]) + block(deflated(b"a" * 9) + b"x"), "more in a DEFLATE"),
        (bytes([HUFFMAN]) + block(deflated(b"abcdefghi")[:-1]), "ends too early"),
        (bytes([STATIC, 2, 0]) + b"\xff" * 32, "wants"),
    ],
)
def test_wrong_planes_are_named(coded: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(coded, (9, 1))


def test_a_deflated_plane_of_many_feeds_survives_and_nothing_may_follow_it() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 17).astype(np.uint8)
    coded = deflated(data.tobytes())
    assert np.array_equal(read(bytes([HUFFMAN]) + block(coded), (len(data), 1))[:, 0], data)
    with pytest.raises(ArtifactError, match="more in a DEFLATE"):
        read(bytes([HUFFMAN]) + block(coded + bytes(1 << 15)), (len(data), 1))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_planes_end_in_bytes_or_a_clear_error(data: st.DataObject) -> None:
    body = bytearray(PLANES)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1) | st.integers(0, 120))
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if kind == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            body.insert(at, data.draw(st.integers(0, 255)))
        else:
            del body[at]
    try:
        read(bytes(body), (96 * 96, 4))
    except ArtifactError:
        return
