"""Every tensor exactly as it is: byte planes, each raw or range coded, or a general codec where that is shorter.

A float's sign bit is moved to its low end first, so that its top byte is exponent alone, the only part of a trained
weight that is far from uniform. Planes go from high to low, and each knows where all higher ones were zero. Small
tensors have adaptively coded planes; those of large ones are coded in two passes (see `planes`), and general codecs are
run on a large tensor only where a sample of it promises that they win.

    tensor   the code of `bytestreams.encode_general` of its bytes
             or 0x80 | one bit for each plane, the low one first, whether it is coded | from high to low: the plane's
             bytes, or `bytestreams.encode_bytes` of them in a block
             or 0x81 | `planes`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.bytestreams import (
    QUICK_FLOATS,
    QUICK_MARGIN,
    Bytes,
    decode_bytes,
    decode_general,
    encode_bytes,
    encode_general,
    entropy_bytes,
    promising_general,
)
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.dtypes import bytes_tensor, tensor_bytes
from tokenbound.compression.planes import decode_planes, encode_planes
from tokenbound.compression.symbols import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch

_PLANES = 0x80
"""Tag of adaptively coded planes, beside the tags of `encode_general`."""
_STATIC_PLANES = 0x81
"""Tag of planes coded in two passes."""
STATIC_ELEMENTS = (1 << 16) + 1
"""Tensors of at least so many elements are coded in two passes."""
_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_WORTH_CODING = 0.995
"""A plane is range coded only if its entropy is below this part of its size."""


def encode_exact(tensor: torch.Tensor) -> bytes:
    """The shortest exact code that we have of a tensor of any dtype."""
    data = tensor_bytes(tensor)
    is_float = tensor.is_floating_point()
    if len(data) >= STATIC_ELEMENTS:
        coded = _encode_static_planes(data, rotate=is_float)
        general = promising_general(data.reshape(-1), len(coded), QUICK_FLOATS if is_float else QUICK_MARGIN)
        return coded if general is None else min(coded, general, key=len)
    planes = _encode_planes(data, rotate=is_float)
    general = encode_general(data.reshape(-1), len(planes))
    return min(planes, general, key=len)


def decode_exact(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `encode_exact`.

    Raises:
        ArtifactError: the payload is not such a code of this shape and dtype.
    """
    count, width = int(np.prod(shape, dtype=np.int64)), dtype.itemsize
    if len(payload) and payload[0] in (_PLANES, _STATIC_PLANES):
        decode = _decode_planes if payload[0] == _PLANES else _decode_static_planes
        data = decode(payload, count, width)
        if dtype.is_floating_point:
            _rotate(data, left=False)
        return bytes_tensor(data.reshape(-1), shape, dtype)
    return bytes_tensor(decode_general(payload, count * width, "a tensor"), shape, dtype)


def plain_bytes(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The tensor's own bytes: what a general codec would be given."""
    return tensor_bytes(decode_exact(payload, shape, dtype)).tobytes()


def _encode_planes(data: Bytes, *, rotate: bool) -> bytes:
    data = _rotated(data) if rotate else data
    mask, parts = 0, []
    contexts = np.zeros(len(data), np.uint8)
    for index in reversed(range(data.shape[1])):
        plane = np.ascontiguousarray(data[:, index])
        if _is_skewed(plane, contexts) and len(coded := encode_bytes(plane, contexts)) < len(plane):
            mask |= 1 << index
            parts.append(block(coded))
        else:
            parts.append(plane.tobytes())
        contexts |= plane != 0
    return bytes([_PLANES, mask]) + b"".join(parts)


def _encode_static_planes(data: Bytes, *, rotate: bool) -> bytes:
    return bytes([_STATIC_PLANES]) + encode_planes(_rotated(data) if rotate else data)


def _decode_static_planes(payload: memoryview, count: int, width: int) -> Bytes:
    reader = Reader(payload, "a tensor's byte planes")
    reader.byte()
    data = np.empty((count, width), np.uint8)
    decode_planes(reader, data)
    reader.finish()
    return data


def _is_skewed(plane: Bytes, contexts: Bytes) -> bool:
    entropy = sum(entropy_bytes(plane[contexts == context]) for context in (0, 1))
    return entropy < _WORTH_CODING * len(plane)


def _decode_planes(payload: memoryview, count: int, width: int) -> Bytes:
    reader = Reader(payload, "a tensor's byte planes")
    _, mask = reader.take(2)
    if mask >> width:
        raise ArtifactError("artifact: a tensor has more byte planes than its dtype")
    data = np.empty((count, width), np.uint8)
    contexts = None  # of the first plane all alike
    for index in reversed(range(width)):
        plane = data[:, index]
        if mask >> index & 1:
            decode_bytes(reader.block(), plane, contexts)
        else:
            plane[:] = np.frombuffer(reader.take(count), np.uint8)
        if index:
            contexts = np.zeros(count, np.uint8) if contexts is None else contexts
            contexts |= plane != 0
    reader.finish()
    return data


def _rotated(data: Bytes) -> Bytes:
    data = data.copy()
    _rotate(data, left=True)
    return data


def _rotate(data: Bytes, *, left: bool) -> None:
    """Move the sign bit of little-endian floats [n, width] to the low end, or back, in place."""
    width = data.shape[1]
    if width not in _WORDS:
        return
    words: NDArray[Any] = data.reshape(-1).view(_WORDS[width])
    one, rest = _WORDS[width](1), _WORDS[width](8 * width - 1)
    for start in range(0, len(words), BLOCK_ELEMENTS):
        part = words[start : start + BLOCK_ELEMENTS]
        part[:] = (part << one) | (part >> rest) if left else (part >> one) | (part << rest)
