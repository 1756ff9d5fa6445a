"""Writing a safetensors file tensor by tensor: the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.tensor_map import Header

_LABELS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
"""What the format calls them."""
DTYPES: Mapping[str, torch.dtype] = {label: dtype for dtype, label in _LABELS.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    headers: Mapping[str, Header],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of tensors that come one at a time.

    Args:
        path: Of the file, which is replaced.
        headers: Dtype and shape of every tensor.
        tensors: The same tensors, in any order.
        metadata: Texts for the file's header.

    Raises:
        ValueError: the format has no such dtype, or the tensors are not those of the headers.
        OSError: the file cannot be written.
    """
    # As the library orders them, so that each begins at a multiple of the size of its elements.
    order = sorted(headers, key=lambda name: (-headers[name][0].itemsize, name))
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in order:
        dtype, shape = headers[name]
        if dtype not in _LABELS:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which a safetensors file cannot hold")
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": _LABELS[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    left = dict(headers)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            if left.pop(name, None) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"tensor {name!r} is not what was announced")
            file.seek(8 + len(text) + starts[name])
            file.write(tensor_bytes(tensor).data)
        file.flush()
        os.fsync(file.fileno())
    if left:
        raise ValueError(f"tensor {min(left)!r} was announced and did not come")
