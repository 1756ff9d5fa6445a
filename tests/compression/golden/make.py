"""How the artifacts beside this file were made; kept for the record. They are never made again."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from gguf_support import ALL, blocks_of, number_of, random_weights

from tokenbound.compression.artifact import assemble_artifact
from tokenbound.compression.calibration import Calibration, MatrixSums
from tokenbound.compression.codecs import UNIFORM
from tokenbound.compression.codecs.ggml import FORMATS, MARK
from tokenbound.compression.codecs.uniform import Grid, encode_grid
from tokenbound.compression.tensor import CodedTensor, encode_tensor
from tokenbound.config.compress import (
    E8Settings,
    GptqSettings,
    KfacSettings,
    LosslessSettings,
    RoundToNearestSettings,
)
from tokenbound.gguf_file import TYPES

SMALL = {
    "matrices.STATIC_ELEMENTS": 1,
    "matrices.SHORT_BYTES": 0,
    "codecs.exact.STATIC_ELEMENTS": 1,
    "codecs.packed.STATIC_CODES": 1,
    "planes.HUFFMAN_LOSS": 1,
}
"""What makes small tensors take the forms of large ones."""


def static() -> None:
    """The forms of large tensors, on small ones."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 72, generator=draw) * torch.exp(torch.randn(96, 1, generator=draw))
    codes = (torch.randn(64, 256, generator=draw) * 2 + 8).clamp(0, 15).to(torch.uint8)
    rows, columns = (torch.randint(-4, 5, (size,), generator=draw).numpy() for size in (96, 72))
    scale = 2.0 ** (-(rows[:, None] + columns[None, :]) / 2)
    grid = Grid(np.rint(weight.numpy() * scale).astype(np.int32), -9, rows, columns, 5)
    lossless = LosslessSettings()
    half_zero = weight * (torch.rand(weight.shape, generator=draw) > 0.5)
    exact = {
        "bfloat16": weight.bfloat16(),
        "float16": weight.half(),
        "float32": weight.bfloat16().float(),
        "zeros": half_zero.bfloat16(),
        "constant": torch.full((80, 80), 3, dtype=torch.int16),
    }
    patches = [patch(f"tokenbound.compression.{name}", value) for name, value in SMALL.items()]
    for each in patches:
        each.start()
    coded = [
        CodedTensor("kfac.weight", (96, 72), 0, UNIFORM, encode_grid(grid)),
        encode_tensor("rtn.coarse", weight.bfloat16(), RoundToNearestSettings(step=0.5)),
        encode_tensor("rtn.fine", weight, RoundToNearestSettings(step=0.01)),
        encode_tensor("packed.qweight", codes[:, ::2] | codes[:, 1::2] << 4, lossless),
        *(encode_tensor(f"exact.{name}", tensor, lossless) for name, tensor in exact.items()),
    ]
    data = assemble_artifact({"model_type": "golden"}, coded, lossless)
    (Path(__file__).parent / "static.tokenbound").write_bytes(data)


def ggml() -> None:
    """Blocks of every type of llama.cpp's, with few codes, so that they are short."""
    coded = []
    for kind in ALL:
        layout, size = FORMATS[number_of(kind)], TYPES[number_of(kind)].size
        blocks = blocks_of(kind, random_weights(16, 256, seed=3)).reshape(-1, size)
        heads, codes, rest = layout.split(blocks)
        sparse = layout.join(heads, codes & layout.symbols // 2, rest & 1).reshape(16, -1)
        coded.append(encode_tensor(f"w{MARK}{kind.lower()}", torch.from_numpy(sparse), LosslessSettings()))
    data = assemble_artifact({"model_type": "golden"}, coded, LosslessSettings())
    (Path(__file__).parent / "ggml.tokenbound").write_bytes(data)


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=draw) * torch.logspace(0, -1, 40)
    moment = torch.diag(torch.logspace(0, 2, 40)).double()
    rows = torch.logspace(0, 2, 48).double()
    sums = {}
    for name in ("kfac.weight", "gptq.weight", "e8.weight"):
        sums[name] = MatrixSums(rows / rows.sum() * moment.trace(), moment, seen=10)
    sums["transposed.weight"] = MatrixSums(sums["e8.weight"].rows, moment, seen=10, transposed=True)
    calibration = Calibration(tokens=10, matrices=sums)
    codes = (torch.randn(64, 128, generator=draw) * 2 + 8).clamp(0, 15).to(torch.uint8)
    lossless = LosslessSettings()
    coded = [
        encode_tensor("kfac.weight", weight, KfacSettings(rate=0.1, damping=0.1), calibration),
        encode_tensor("transposed.weight", weight.T, KfacSettings(rate=0.1, damping=0.1), calibration),
        encode_tensor("gptq.weight", weight, GptqSettings(bits=3, group=16), calibration),
        encode_tensor("e8.weight", weight, E8Settings(bits=3), calibration),
        encode_tensor("half.weight", weight[:4], E8Settings(bits=3), calibration),
        encode_tensor("rtn.weight", weight.to(torch.bfloat16), RoundToNearestSettings(step=0.01)),
        encode_tensor("rtn.norm", 1 + weight[0], RoundToNearestSettings()),
        encode_tensor("exact.weight", weight[:8], lossless),
        encode_tensor("exact.float8", weight[:8].to(torch.float8_e4m3fn), lossless),
        encode_tensor("exact.zeros", torch.zeros(40, 40), lossless),
        encode_tensor("packed.index", torch.arange(300, dtype=torch.int32) // 16, lossless),
        encode_tensor("packed.qweight", (codes[:, ::2] | codes[:, 1::2] << 4), lossless),
        encode_tensor("scalar", torch.tensor(0.5), lossless),
        encode_tensor("nothing", torch.zeros(0, 3), lossless),
    ]
    data = assemble_artifact({"model_type": "golden"}, coded, lossless, tokenizer=b"tokenizer " * 20)
    path = Path(__file__).parent / "every_codec.tokenbound"
    path.write_bytes(data)


if __name__ == "__main__":
    ggml()
