"""Truncated, flipped, forged and bloated artifacts: always a clear error, in little memory and time."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.compression.artifact import (
    decode_artifact,
    encode_artifact,
    parse_artifact,
)
from tokenbound.compression.bytestreams import decode_text, encode_text
from tokenbound.compression.codecs import CODECS, EXACT, GGML, NGRAMS, PACKED, UNIFORM
from tokenbound.compression.container import (
    DIGEST_BYTES,
    ArtifactError,
    Reader,
    Section,
    block,
    container_bytes,
    varint,
    write_container,
)
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.tensor import decode_tensor, encode_tensor
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings

GOLDEN = Path(__file__).parent / "golden"


def sealed(body: bytes) -> bytes:
    """A body with a digest that matches, so that what lies behind the digest is reached."""
    return body + hashlib.sha256(body).digest()[:DIGEST_BYTES]


def small_artifact() -> bytes:
    make = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(24, 20, generator=make),
        "b.weight": torch.randn(16, 4, generator=make).to(torch.bfloat16),
        "c.bias": torch.randn(12, generator=make),
        "d.mask": torch.randn(6, 6, generator=make) > 0,
    }
    return encode_artifact({"model_type": "llama"}, tensors, RoundToNearestSettings(step=0.5), tokenizer=b"tok" * 30)


DATA = small_artifact()


def test_every_truncation_is_refused() -> None:
    for length in range(len(DATA)):
        with pytest.raises(ArtifactError):
            decode_artifact(DATA[:length])


def test_every_flipped_bit_is_refused() -> None:
    for position in range(8 * len(DATA)):
        damaged = bytearray(DATA)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            decode_artifact(bytes(damaged))


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(ArtifactError, match="mean nothing"):
        decode_artifact(DATA + b"\0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "do not start as"),
        (b"PK\x03\x04", "do not start as"),
        (b"tkb\x63" + DATA[4:], "format version 99"),
        (sealed(b"tkb\x01\x00"), "is missing"),
        (sealed(b"tkb\x01\x07\x00\x00"), "unknown or out of order"),
        (sealed(b"tkb\x01\x02\x00\x01\x00\x00"), "unknown or out of order"),
        (sealed(b"tkb\x01\x01\xff\xff\xff\xff\xff\xff\xff\x7f"), "wants"),
        (sealed(b"tkb\x01\x01\x80\x00\x00"), "longer form"),
        (b"tkb\x01\x01" + b"\xff" * 12, "more than 63 bits"),
    ],
)
def test_wrong_frames_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_artifact(data)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_forged_bodies_with_a_true_digest_never_do_more_than_fail(data: st.DataObject) -> None:
    body = bytearray(DATA[:-DIGEST_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(body) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
        byte = data.draw(st.integers(0, 255))
        if kind == "set":
            body[at] = byte
        elif kind == "insert":
            body.insert(at, byte)
        else:
            del body[at]
    try:
        artifact = decode_artifact(sealed(bytes(body)))
    except ArtifactError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in artifact.tensors.values())


def forged(index: bytes, payload: bytes = b"") -> bytes:
    texts = {"architecture": encode_text(b"{}"), "settings": encode_text(b"{}"), "index": encode_text(index)}
    return joined({**texts, "tensors": payload})


def joined(sections: dict[str, bytes]) -> bytes:
    return b"".join(write_container({name: Section.of(section) for name, section in sections.items()}))


def one_tensor(shape: tuple[int, ...], payload: bytes, *, dtype: int = 0, codec: int = 0) -> bytes:
    sizes = b"".join(varint(size) for size in shape)
    index = block(b"w") + varint(1) + bytes([dtype, codec, len(shape)]) + sizes + varint(len(payload))
    return forged(index, payload)


def repeated(
    back: int, *, payload: bytes = b"\0" * 13, second: tuple[int, int, int] = (0, 0, 3), more: bytes = b""
) -> bytes:
    """A float32 vector of three, and a second one (dtype, codec, size) that stands for the one so many places back."""
    dtype, codec, size = second
    columns = [block(b"v\nw"), varint(2), bytes([0, dtype, 0, codec, 1, 1]), varint(3), varint(size)]
    return forged(b"".join(columns) + varint(len(payload)) + varint(0) + varint(back) + more, payload)


def test_a_tensor_may_stand_for_an_earlier_one() -> None:
    tensors = decode_artifact(repeated(1)).tensors
    assert torch.equal(tensors["v"], torch.zeros(3))
    assert torch.equal(tensors["v"], tensors["w"])
    assert tensors["v"].data_ptr() != tensors["w"].data_ptr()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (repeated(0), "'w' repeats one that does not stand before it"),
        (repeated(2), "'w' repeats one that does not stand before it"),
        (repeated(1 << 40), "'w' repeats one that does not stand before it"),
        (one_tensor((3,), b""), "wants 1 bytes"),
        (repeated(1, second=(2, 0, 3)), "'w' repeats 'v', which is of another kind or shape"),
        (repeated(1, second=(0, 5, 3)), "of another kind or shape"),
        (repeated(1, second=(0, 0, 4)), "of another kind or shape"),
        (repeated(1, payload=b"\0" * 29), "code longer than the tensor"),
        (repeated(1, more=b"\1"), "mean nothing"),
    ],
)
def test_forged_repetitions_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_artifact(data)


def test_repetitions_count_as_what_they_decode_to() -> None:
    """A thousand names of one code of zeros: refused before anything is decoded."""
    count, side = 1000, 1 << 12
    names = block("\n".join(f"{number:04}" for number in range(count)).encode())
    payload = encode_tensor("w", torch.zeros(side, side), LosslessSettings()).payload
    index = names + varint(count) + bytes(2 * count) + b"\2" * count + varint(side) * 2 * count
    lengths = varint(len(payload)) + varint(0) * (count - 1) + varint(1) * (count - 1)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=f"declare tensors of {4 * count * side**2} bytes"):
        decode_artifact(forged(index + lengths, bytes(payload)))
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (one_tensor((1 << 20, 1 << 12), b"\0"), "declare tensors of"),
        (one_tensor((1 << 40, 1 << 40), b"\0"), "declare tensors of"),
        (one_tensor((3,), b"\0" * 13, dtype=99), "dtype number 99"),
        (one_tensor((3,), b"\0" * 13, codec=99), "codec 99"),
        (one_tensor((1,) * 9, b"\0" * 5), "9 axes"),
        (one_tensor((3,), b"\0" + b"\0" * 11), "unpacks to 11 bytes"),
        (one_tensor((3,), b"\x77" + b"\0" * 11), "does not know"),
        (one_tensor((3,), b"\x01" + b"\0" * 11), "does not unpack"),
        (one_tensor((3,), b"\x02" + b"\0" * 11), "does not unpack"),
        (one_tensor((3,), b"\x80\xff" + b"\0" * 12), "more byte planes"),
        (one_tensor((3,), b"\0\0\0", dtype=8, codec=1), "cannot have dtype"),
        (one_tensor((3, 3), b"\0" + varint(2000) + b"\0" * 9, codec=1), "at most"),
        (one_tensor((4,), b"\0" + b"\x02" * 4, dtype=9), "boolean"),
        (one_tensor((1 << 20, 1), b"\0\0\x81\x05\0\0", codec=1), "long side"),
        (one_tensor((1, 1 << 20), b"\0\0\x01\x05\0\0", codec=1), "long side"),
        (forged(block(b"b\na") + varint(2)), "rising order"),
        (forged(block(b"a") + varint(2)), "1 names for 2"),
        (forged(block(b"\xff") + varint(1)), "UTF-8"),
        (forged(block(b"") + varint(0), b"extra"), "mean nothing"),
        (forged(block(b"") + varint(0) + b"x"), "mean nothing"),
    ],
)
def test_forged_indexes_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_artifact(data)


def test_nested_json_does_not_exhaust_the_stack() -> None:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    data = joined({"architecture": encode_text(deep), "settings": b"", "index": b"", "tensors": b""})
    with pytest.raises(ArtifactError):
        decode_artifact(data)


def test_a_text_bomb_does_not_unpack_beyond_what_it_declares() -> None:
    packed = encode_text(b"a" * 50_000)
    size = Reader(packed, "x").varint()
    lying = varint(10) + packed[len(varint(size)) :]
    with pytest.raises(ArtifactError, match="declares"):
        decode_text(lying, "x")
    with pytest.raises(ArtifactError, match="at most"):
        decode_text(varint(1 << 27) + packed[len(varint(size)) :], "x")


def test_memory_of_a_bomb_stays_below_what_any_artifact_may_have() -> None:
    payload = b"\0\0\0\0"  # an all-zero grid of 2^22 floats in four bytes: allowed, 16 MiB, no more
    data = one_tensor((1 << 11, 1 << 11), payload + b"\0", codec=1)
    tracemalloc.start()
    try:
        decode_artifact(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * (1 << 24)
    with pytest.raises(ArtifactError, match="declare tensors of"):
        decode_artifact(one_tensor((1 << 12, 1 << 11), payload + b"\0", codec=1))


def model_digest(data: bytes) -> str:
    digest = hashlib.sha256()
    for name, tensor in decode_artifact(data).tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor_bytes(tensor).tobytes())
    return digest.hexdigest()


GOLDEN_DIGEST = "03dfe26f2a34d4edc012136cb064f53c3fb24a54cbaea0eaf73d44eca9649aab"
"""Of the tensors in `golden/every_codec.tokenbound`. It never changes; a format that decodes it to anything else is
another version and refuses it."""


def test_the_golden_artifact_decodes_to_the_same_tensors_for_ever() -> None:
    data = (GOLDEN / "every_codec.tokenbound").read_bytes()
    assert {item.codec for item in parse_artifact(data).coded} == set(CODECS) - {NGRAMS, GGML}
    assert model_digest(data) == GOLDEN_DIGEST


STATIC_DIGEST = "d17f3cfe1f2fab46d06ed89848fd577373ac9cb98f58553947fc3a844c544d2a"
"""Of the tensors in `golden/static.tokenbound`, which are small but in the forms of large ones; as final."""


def test_the_golden_forms_of_large_tensors_decode_to_the_same_for_ever() -> None:
    data = (GOLDEN / "static.tokenbound").read_bytes()
    assert {item.codec for item in parse_artifact(data).coded} == {EXACT, UNIFORM, PACKED}
    assert model_digest(data) == STATIC_DIGEST


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_forged_payloads_of_every_codec_never_do_more_than_fail(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["every_codec", "static"]))
    coded = parse_artifact((GOLDEN / f"{name}.tokenbound").read_bytes()).coded
    item = data.draw(st.sampled_from([item for item in coded if len(item.payload)]))
    payload = bytearray(item.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    codec = data.draw(st.sampled_from([item.codec, *CODECS]))
    try:
        tensor = decode_tensor(replace(item, payload=bytes(payload[: len(payload) - cut]), codec=codec))
    except ArtifactError:
        return
    assert tuple(tensor.shape) == item.shape


def test_a_lossless_artifact_holds_what_it_was_given() -> None:
    tensor = torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert torch.equal(decode_artifact(encode_artifact({}, {"w": tensor}, LosslessSettings())).tensors["w"], tensor)


def split_containers(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = container_bytes(data)
        found.append(data[:size])
        data = data[size:]
    return found


def test_artifacts_say_themselves_where_they_end() -> None:
    other = (GOLDEN / "ngrams.tokenbound").read_bytes()
    assert container_bytes(DATA) == container_bytes(DATA + b"\0") == container_bytes(DATA + other) == len(DATA)
    assert split_containers(DATA + other + DATA) == [DATA, other, DATA]
    for part, whole in zip(split_containers(other + DATA), (other, DATA), strict=True):
        assert model_digest(part) == model_digest(whole)
    for joined in (DATA + other, DATA + DATA):
        with pytest.raises(ArtifactError, match="mean nothing"):
            decode_artifact(joined)
    for rest in (b"\0", b"tkb", other[:-1]):
        with pytest.raises(ArtifactError):
            split_containers(DATA + rest)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_no_artifact_begins_another(length: int) -> None:
    with pytest.raises(ArtifactError):
        container_bytes(DATA[:length])


def test_the_golden_artifacts_hold_every_codec_between_them() -> None:
    found = [parse_artifact(path.read_bytes()).coded for path in sorted(GOLDEN.glob("*.tokenbound"))]
    assert {item.codec for coded in found for item in coded} == set(CODECS)
