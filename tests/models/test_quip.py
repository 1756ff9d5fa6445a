"""QuIP#'s layout: packed here by its definition, and restored by a product of explicit matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from transformers import MistralConfig, MistralForCausalLM

from tokenbound.errors import InputError
from tokenbound.models.checkpoint import build_model, read_checkpoint
from tokenbound.models.quantized.methods import QUANTIZATION
from tokenbound.models.quantized.quip import codebook, codes_of, mix, paley


def pack(codes: np.ndarray) -> torch.Tensor:
    """Codes [outputs, inputs / 8] as words: 2 x 2 codes in a word, 8 x 4 words in a tile."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 4), np.uint64).reshape(rows // 16, columns // 8, 8, 4)
    for row in range(rows):
        for column in range(columns):
            point = row % 2 + 2 * (column % 2)
            place = (row // 16, column // 8, row // 2 % 8, column // 2 % 4)
            word, code = int(words[place]), int(codes[row, column])
            word |= (code >> 8) << (8 * point)
            word |= sum((code >> bit & 1) << (32 + 4 * bit + point) for bit in range(8))
            words[place] = word
    return torch.from_numpy(words.reshape(rows, columns // 4).view(np.int64))


def point(code: int) -> np.ndarray:
    """One point of E8P from its code, by the words of the paper: magnitudes, signs, and a shift by their parity."""
    signs, parity = code & 255, bin(code & 255).count("1") % 2
    signs ^= parity
    magnitudes = np.abs(codebook()[code & ~255].numpy() - 0.25)
    odd = magnitudes.sum() % 2 == 1
    turned = np.array([signs >> place & 1 for place in (0, 4, 1, 5, 2, 6, 3, 7)])
    turned[7] ^= odd
    return magnitudes * (1 - 2 * turned) + (-0.25 if parity else 0.25)


def test_the_codebook_is_a_part_of_the_lattice() -> None:
    points = codebook()
    assert len({tuple(row) for row in points.tolist()}) == 1 << 16
    centred = points - 0.25 * torch.where((points[:, :1] - 0.25) % 1 == 0.5, 1, -1)
    assert (centred % 1 == 0.5).all()
    assert (centred.sum(1) % 2 == 0).all()
    norms = centred.square().sum(1)
    assert norms.max() == 12
    assert int((norms == 12).sum()) == 29 * 256
    for code in (0, 1, 255, 256, 12345, 65535, 41 << 8 | 77):
        assert np.array_equal(points[code].numpy(), point(code)), code


def test_codes_are_taken_out_of_their_words() -> None:
    codes = np.random.default_rng(0).integers(0, 1 << 16, (32, 16))
    assert np.array_equal(codes_of(pack(codes)).numpy(), codes)


@pytest.mark.parametrize("size", [64, 96, 160, 224, 576])
def test_the_transform_is_a_product_of_hadamard_matrices(size: int) -> None:
    order = {64: 1, 96: 12, 160: 20, 224: 28, 576: 36}[size]
    outer = paley(order).numpy() if order > 1 else np.eye(1)
    whole = np.kron(outer, hadamard(size // order))
    assert np.array_equal(whole @ whole.T, size * np.eye(size))
    rows = np.random.default_rng(0).integers(-9, 9, (3, size)) / 4
    assert np.array_equal(mix(torch.from_numpy(rows)).numpy(), rows @ whole.T)


def test_unknown_matrices_are_named() -> None:
    with pytest.raises(InputError, match="order 172"):
        mix(torch.zeros(1, 344, dtype=torch.float64))
    with pytest.raises(InputError, match="size 44 "):
        mix(torch.zeros(1, 44, dtype=torch.float64))


def layer(outputs: int, inputs: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Tensors of one layer, and its weights from explicit matrices."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 1 << 16, (outputs, inputs // 8))
    points = np.concatenate([codebook().numpy()[row][None] for row in codes]).reshape(outputs, inputs)
    scale = np.float32(draw.uniform(0.01, 0.05))
    left, right = (draw.normal(1, 0.1, size).astype(np.float16) for size in (outputs, inputs))

    def transform(size: int) -> np.ndarray:
        order = next((order for order in (36, 28, 20, 12) if size % order == 0), 1)
        outer = paley(order).numpy() if order > 1 else np.eye(1)
        return np.kron(outer, hadamard(size // order)) / np.sqrt(size)

    dense = left[:, None] * (transform(outputs) @ (scale * points) @ transform(inputs).T) * right
    parts = {"Qidxs": pack(codes), "SU": torch.from_numpy(right), "SV": torch.from_numpy(left)}
    parts |= {"Wscale": torch.tensor(float(scale)), "codebook_id": torch.tensor(7)}
    return {f".{name}": part for name, part in parts.items()}, dense


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A Mistral whose layers are joined and quantized, and the weights of its layers."""
    shape = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1}
    config = MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tensors, dense = load_file(tmp_path / "model.safetensors"), {}
    joined = {
        "self_attn.qkv_proj": (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)),
        "self_attn.o_proj": (("o_proj", 64),),
        "mlp.upgate_proj": (("up_proj", 192), ("gate_proj", 192)),
        "mlp.down_proj": (("down_proj", 64),),
    }
    for seed, (name, pieces) in enumerate(joined.items()):
        inputs = 192 if "down" in name else 64
        parts, weights = layer(sum(size for _, size in pieces), inputs, seed)
        scales = torch.linspace(0.5, 1.5, len(pieces)) if len(pieces) > 1 else None
        if scales is not None:
            parts[".fuse_scales"] = scales
        start = 0
        for index, (piece, size) in enumerate(pieces):
            key = f"model.layers.0.{name.rpartition('.')[0]}.{piece}.weight"
            del tensors[key]
            dense[key] = weights[start : start + size] * (1 if scales is None else scales[index].item())
            start += size
        tensors |= {f"model.layers.0.{name}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quip_params"] = {"codebook": "E8P12", "codesz": 8, "packsz": 4, "codebook_version": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, dense


def test_a_checkpoint_is_restored(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, dense = saved
    checkpoint = read_checkpoint(folder)
    assert checkpoint.architecture[QUANTIZATION] == {"quant_method": "quip#"}
    model = build_model(checkpoint.architecture, checkpoint.tensors, dtype=torch.float32, device="cpu")
    for name, weights in dense.items():
        found = model.get_parameter(name).double().numpy()
        assert np.abs(found - weights).max() < 1e-6 * np.abs(weights).max(), name
    assert torch.isfinite(model(torch.arange(20).view(1, 20)).logits).all()


def test_other_codebooks_and_parts_are_refused(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    checkpoint = read_checkpoint(saved[0])
    name = "model.layers.0.self_attn.o_proj"
    for part, value, message in (
        ("codebook_id", torch.tensor(17), "codebook 17 is not known"),
        ("Qidxs", torch.zeros(64, 8, dtype=torch.int16), "not int64 words"),
        ("SU", torch.ones(3), "do not fit 64 x 64"),
        ("A", torch.ones(64, 2), rf"no place for the tensors {name}\.A"),
    ):
        tensors = {**checkpoint.tensors, f"{name}.{part}": value}
        with pytest.raises(InputError, match=message):
            build_model(checkpoint.architecture, tensors, dtype=torch.float32, device="cpu")
