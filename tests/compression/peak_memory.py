"""Measures, in a process of its own, how much memory coding takes: prints what `test_memory` asks for as JSON.

Peaks are the kernel's (VmHWM, which Linux lets a process set back), so that allocations of torch, NumPy and native
codecs all count. Sizes are in bytes, and those of peaks are over what the process held before there was a model.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenbound.compression.artifact import (
    decode_artifact,
    encode_artifact,
)
from tokenbound.compression.codecs import GROUPS, LATTICE
from tokenbound.compression.codecs.groups import GroupCodes, encode_groups
from tokenbound.compression.codecs.lattice import LatticeCodes, encode_lattice
from tokenbound.compression.dtypes import dtype_code
from tokenbound.compression.tensor import CodedTensor, decode_tensor
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings

SIDE, LAYERS = 2048, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "uint8": torch.uint8}


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def held() -> int:
    """Resident bytes, after what was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_over(base: int, function: Callable[[], Any]) -> int:
    """The highest resident size while the function runs, less `base`."""
    held()
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return _status("VmHWM") - base


def make_tensor(dtype: torch.dtype, seed: int, side: int = SIDE) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(side, side, generator=draw, dtype=torch.float32).to(dtype)
    codes = (torch.randn(side, side, generator=draw) * 2 + 8).clamp(0, 15).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return packed if dtype == torch.uint8 else packed.contiguous().view(torch.int32)


def settings_of(method: str) -> Any:
    return LosslessSettings() if method == "lossless" else RoundToNearestSettings(step=float(method))


def quantized(codec: int) -> CodedTensor:
    """A tensor in a codec whose quantizer is not what is measured."""
    draw = np.random.default_rng(0)
    if codec == GROUPS:
        codes = draw.integers(0, 16, (SIDE, SIDE)).astype(np.int32)
        scales = draw.random((SIDE, SIDE // 64)).astype(np.float16)
        payload = encode_groups(GroupCodes(codes, scales, np.full(scales.shape, 8, np.int32), 64), transposed=True)
    else:
        planes = [draw.integers(0, 256, SIDE * SIDE // 8).astype(np.uint8) for _ in range(3)]
        payload = encode_lattice(LatticeCodes(planes, np.float32(0.1), 3), transposed=False)
    return CodedTensor("w", (SIDE, SIDE), dtype_code(torch.float32, "w"), codec, payload)


def measure(case: str) -> dict[str, int]:
    """What a case of the form method-dtype takes to encode and to decode."""
    method, name = case.split("-")
    settings, dtype = settings_of(method), DTYPES[name]
    decode_artifact(encode_artifact({}, {"w": make_tensor(dtype, 0, 512)}, settings))  # libraries are loaded now
    sizes, data = measure_encoding(dtype, settings)
    decoding = peak_over(held(), lambda: decode_artifact(data))
    return {**sizes, "artifact": len(data), "decode": decoding}


def measure_encoding(dtype: torch.dtype, settings: Any) -> tuple[dict[str, int], bytes]:
    base = held()
    model = {f"layers.{index}.weight": make_tensor(dtype, index) for index in range(LAYERS)}
    bytes_of = [tensor.nbytes for tensor in model.values()]
    made: list[bytes] = []
    encoding = peak_over(base, lambda: made.append(encode_artifact({}, model, settings)))
    return {"model": sum(bytes_of), "largest": max(bytes_of), "encode": encoding}, made[0]


def measure_codec(case: str) -> dict[str, int]:
    """What decoding of one tensor takes."""
    item = quantized({"groups": GROUPS, "lattice": LATTICE}[case])
    decode_tensor(item)
    base = held()
    size = item.decoded_bytes
    return {
        "model": size,
        "largest": size,
        "artifact": len(item.payload),
        "decode": peak_over(base, lambda: decode_tensor(item)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({case: (measure if "-" in case else measure_codec)(case) for case in sys.argv[1:]}))
