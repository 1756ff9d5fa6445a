"""Blocks of llama.cpp: taken apart as its own code does, kept bit for bit, and shorter than in its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_support import ALL, blocks_of, number_of, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression.artifact import decode_artifact, encode_artifact, parse_artifact
from tokenbound.compression.codecs import GGML
from tokenbound.compression.codecs.ggml import FORMATS, MARK, decode_blocks, encode_blocks, plain_blocks
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.tensor import decode_tensor, encode_tensor
from tokenbound.config.compress import LosslessSettings
from tokenbound.gguf_file import PLAIN, TYPES

GOLDEN = Path(__file__).parent / "golden/ggml.tokenbound"

SHARE = {"Q4_0": 0.95, "Q4_1": 0.95, "Q5_0": 0.96, "Q5_1": 0.95, "Q8_0": 0.98, "TQ2_0": 0.8, "MXFP4": 0.95}
SHARE |= {"Q2_K": 0.9, "Q3_K": 0.95, "Q4_K": 0.97, "Q5_K": 0.97, "Q6_K": 0.98}
"""At most this part of the blocks' bytes is left of random normal weights."""


def tensor_of(kind: str, rows: int = 128, columns: int = 1024) -> torch.Tensor:
    return torch.from_numpy(blocks_of(kind, random_weights(rows, columns)))


def test_there_is_a_format_for_every_type_of_weights() -> None:
    """But for those that hold activations, and those that llama.cpp's reference does not make yet."""
    for number, kind in TYPES.items():
        assert GGMLQuantizationType(number).name == kind.name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (kind.elements, kind.size)
    assert {kind.name for kind in TYPES.values()} == set(ALL) | set(PLAIN)
    others = {kind.name for kind in GGMLQuantizationType} - {kind.name for kind in TYPES.values()}
    assert others == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4", "Q1_0"} & others


@pytest.mark.parametrize("kind", ALL)
def test_blocks_are_joined_to_what_they_were(kind: str) -> None:
    """Any bytes are: infinite scales and codes that no quantizer makes too."""
    number = number_of(kind)
    blocks = np.random.default_rng(0).integers(0, 256, (513, TYPES[number].size), dtype=np.uint8)
    assert np.array_equal(FORMATS[number].join(*FORMATS[number].split(blocks)), blocks)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_codes_belong_to_the_groups_whose_scales_they_have(kind: str) -> None:
    """A weight is its code times its group's scale less its group's minimum: or hints would be of other groups."""
    layout, blocks = FORMATS[number_of(kind)], tensor_of(kind, 16).numpy()
    heads, codes, _ = layout.split(blocks.reshape(-1, TYPES[number_of(kind)].size))
    scales, minima = layout.hints(heads)
    middle = 0 if minima is not None else layout.symbols // 2
    values = codes.view(np.int8).astype(np.float32) if kind == "Q8_0" else codes.astype(np.float32) - middle
    found = scales[:, :, None] * values - (0 if minima is None else minima[:, :, None])
    np.testing.assert_allclose(
        found.reshape(-1), quants.dequantize(blocks, GGMLQuantizationType[kind]).reshape(-1), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("kind", ALL)
def test_tensors_come_back_bit_for_bit_and_never_longer(kind: str) -> None:
    tensor = tensor_of(kind)
    coded = encode_tensor(f"w{MARK}{kind.lower()}", tensor, LosslessSettings())
    assert torch.equal(decode_tensor(coded), tensor)
    assert len(coded.payload) <= SHARE.get(kind, 1.0) * tensor.numel() + 16
    if coded.codec == GGML:
        assert plain_blocks(memoryview(coded.payload), tuple(tensor.shape), tensor.dtype) == tensor.numpy().tobytes()


def test_formats_with_known_shares_use_the_codec() -> None:
    for kind in SHARE:
        assert encode_tensor(f"w{MARK}{kind.lower()}", tensor_of(kind, 32), LosslessSettings()).codec == GGML


def test_scales_of_weights_that_were_bfloat16_are_shorter() -> None:
    """Few low bytes occur beside each high one; minima are such weights themselves."""
    weights = torch.from_numpy(random_weights(256, 2048))
    sizes = []
    for values in (weights, weights.bfloat16().float()):
        blocks = torch.from_numpy(blocks_of("Q4_1", values.numpy()))
        sizes.append(len(encode_blocks(f"w{MARK}q4_1", blocks) or b""))
    assert sizes[1] < 0.985 * sizes[0]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("w", torch.zeros(4, 18, dtype=torch.uint8)),
        (f"w{MARK}q4_0", torch.zeros(4, 19, dtype=torch.uint8)),
        (f"w{MARK}q4_0", torch.zeros(4, 18, dtype=torch.int8)),
        (f"w{MARK}q4_0", torch.zeros(0, 18, dtype=torch.uint8)),
        (f"w{MARK}q9_9", torch.zeros(4, 18, dtype=torch.uint8)),
    ],
)
def test_what_is_no_tensor_of_blocks_is_coded_otherwise(name: str, tensor: torch.Tensor) -> None:
    assert encode_blocks(name, tensor) is None
    assert torch.equal(decode_tensor(encode_tensor(name, tensor, LosslessSettings())), tensor)


def test_blocks_of_zeros_come_back() -> None:
    for kind in ALL:
        tensor = torch.zeros(3, 2, TYPES[number_of(kind)].size, dtype=torch.uint8)
        coded = encode_tensor(f"w{MARK}{kind.lower()}", tensor, LosslessSettings())
        assert torch.equal(decode_tensor(coded), tensor)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_forged_blocks_never_do_more_than_fail(data: st.DataObject) -> None:
    item = data.draw(st.sampled_from(parse_artifact(GOLDEN.read_bytes()).coded))
    payload = bytearray(item.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    shape = data.draw(st.sampled_from([item.shape, (1, item.shape[-1]), (3, 18), (0, 18), ()]))
    try:
        tensor = decode_blocks(memoryview(bytes(payload[: len(payload) - cut])), shape, torch.uint8)
    except ArtifactError:
        return
    assert tuple(tensor.shape) == shape


GOLDEN_DIGEST = "90cc0c29ee11718f9057e3a0ee8600778bd0705ff9f97861f93789b593152a8c"
"""Of the tensors in the golden artifact, one of each type; it never changes."""


def test_the_golden_blocks_decode_to_the_same_for_ever() -> None:
    data = GOLDEN.read_bytes()
    assert {item.codec for item in parse_artifact(data).coded} == {GGML}
    digest = hashlib.sha256()
    for name, tensor in decode_artifact(data).tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor_bytes(tensor).tobytes())
    assert digest.hexdigest() == GOLDEN_DIGEST


def test_an_artifact_holds_tensors_of_any_type() -> None:
    tensors = {f"{kind}{MARK}{kind.lower()}": tensor_of(kind, 8, 512) for kind in ("Q4_K", "IQ2_XS", "Q8_0")}
    decoded = decode_artifact(encode_artifact({}, tensors, LosslessSettings())).tensors
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())
