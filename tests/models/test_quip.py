"""QuIP#'s layout: packed here by its definition, and restored by a product of explicit matrices."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks_support import require_same_weights
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from transformers import MistralConfig, MistralForCausalLM

from tokenbound.errors import InputError
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.quantized.quip import (
    ORDERS,
    RVQ3,
    RVQ4,
    codebook,
    codes_of,
    mix,
    order_of,
    restore,
    short_codebook,
    short_codes_of,
    small_hadamard,
)
from tokenbound.models.quantized.schemes import QUANTIZATION


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


@pytest.mark.parametrize("size", [64, 96, 160, 224, 576, 208, 120, 216, 280, 312, 344])
def test_the_transform_is_a_product_of_hadamard_matrices(size: int) -> None:
    whole = explicit(size)
    assert np.array_equal(whole @ whole.T, size * np.eye(size))
    rows = np.random.default_rng(0).integers(-9, 9, (3, size)) / 4
    assert np.array_equal(mix(torch.from_numpy(rows)).numpy(), rows @ whole.T)


def explicit(size: int) -> np.ndarray:
    """The matrix of a transform, not scaled."""
    order = next((order for order in ORDERS if size % order == 0), 1)
    outer = small_hadamard(order).numpy() if order > 1 else np.eye(1)
    return np.kron(outer, hadamard(size // order))


@pytest.mark.parametrize("order", ORDERS)
def test_the_small_matrices_are_those_that_others_took_from_quip(order: int) -> None:
    """torchao's rotations keep QuIP#'s matrices as they are."""
    matrices = pytest.importorskip("torchao.prototype.spinquant._hadamard_matrices")
    kept = getattr(matrices, f"get_had{order}")()
    assert torch.equal(small_hadamard(order), kept.double())


@pytest.mark.parametrize(
    ("size", "order"), [(4096, 1), (11008, 172), (13824, 108), (5120, 20), (15360, 60), (14336, 28), (27648, 108)]
)
def test_the_layers_of_llama_2_have_their_orders(size: int, order: int) -> None:
    assert order_of(size) == order


def test_sizes_without_a_matrix_are_named() -> None:
    with pytest.raises(InputError, match="size 44 "):
        mix(torch.zeros(1, 44, dtype=torch.float64))
    with pytest.raises(InputError, match=r"size 516 .*order 172"):
        mix(torch.zeros(1, 516, dtype=torch.float64))


def test_the_short_codebook_is_the_start_of_the_lattice() -> None:
    """The 241 shortest points of E8, in the order of their coordinates, and 15 of the next shell."""
    points = short_codebook().numpy()
    whole = np.array(list(product(range(-2, 3), repeat=8)))
    inner = whole[(whole.sum(1) % 2 == 0) & ((whole**2).sum(1) <= 2)]
    assert np.array_equal(points[: len(inner)], inner)
    assert len({tuple(row) for row in points.tolist()}) == 256
    assert np.array_equal(np.bincount((points**2).sum(1).astype(int)), [1, 0, 240, 0, 15])
    assert (points.sum(1) % 2 == 0).all()
    assert (np.abs(points % 1 - points[:, :1] % 1) == 0).all()
    assert points[113:115].tolist() == [[-0.5] * 8, [-0.5] * 6 + [0.5] * 2]
    assert points[240:243].tolist() == [[0.5] * 8, [2, *[0] * 7], [0, 2, *[0] * 6]]
    assert points[255].tolist() == [*[0] * 6, -2, 0]


def pack_short(codes: np.ndarray) -> torch.Tensor:
    """Codes [outputs, inputs / 8] of a byte each, eight of them in a word, the first below."""
    return torch.from_numpy(codes.astype(np.uint8).view("<i8"))


def test_short_codes_are_taken_out_of_their_words() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (16, 24))
    assert np.array_equal(short_codes_of(pack_short(codes)).numpy(), codes)


@pytest.mark.parametrize("number", [RVQ3, RVQ4])
@pytest.mark.parametrize("given", [None, {"resid_scale_override": -1}, {"resid_scale_override": 3.6}])
def test_residual_codebooks_add_a_scaled_point(number: int, given: dict[str, float] | None) -> None:
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 1 << 16, (32, 24))
    if number == RVQ3:
        inner = draw.integers(0, 256, codes.shape)
        words, points, scale = pack_short(inner), short_codebook()[inner].numpy(), 2.04
    else:
        inner = draw.integers(0, 1 << 16, codes.shape)
        words, points, scale = pack(inner), codebook()[inner].numpy(), 3.45
    scale = 3.6 if given and given["resid_scale_override"] > 0 else scale
    sides = {".SU": torch.ones(192), ".SV": torch.full((32,), 0.5), ".Wscale": torch.tensor(0.25)}
    parts = {".Qidxs": torch.cat([pack(codes), words], dim=1), ".codebook_id": torch.tensor(number), **sides}
    joined = (codebook()[codes].numpy() + points / scale).reshape(32, 192)
    dense = explicit(32) @ joined @ explicit(192).T / np.sqrt(32 * 192) / 8
    found = restore(parts, given).double().numpy()
    assert np.abs(found - dense).max() < 1e-6 * np.abs(dense).max()
    for words in (parts[".Qidxs"][:, :-1], parts[".Qidxs"][0]):
        with pytest.raises(InputError, match=r"does not divide|not int64 words"):
            restore({**parts, ".Qidxs": words}, given)


@pytest.mark.parametrize("given", ["3.6", float("nan"), [1]])
def test_a_residual_scale_is_a_number(given: object) -> None:
    parts = {".Qidxs": torch.zeros(32, 4, dtype=torch.int64), ".codebook_id": torch.tensor(RVQ4)}
    with pytest.raises(InputError, match="resid_scale_override"):
        restore(parts, {"resid_scale_override": given})


def layer(outputs: int, inputs: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Tensors of one layer, and its weights from explicit matrices."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 1 << 16, (outputs, inputs // 8))
    points = np.concatenate([codebook().numpy()[row][None] for row in codes]).reshape(outputs, inputs)
    scale = np.float32(draw.uniform(0.01, 0.05))
    left, right = (draw.normal(1, 0.1, size).astype(np.float16) for size in (outputs, inputs))

    def transform(size: int) -> np.ndarray:
        return explicit(size) / np.sqrt(size)

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


def test_joined_layers_are_streamed_and_packed_to_the_same_weights(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    require_same_weights(read_checkpoint(saved[0]), torch.bfloat16)


def test_the_config_gives_the_scale_of_residuals(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    checkpoint, layer = read_checkpoint(saved[0]), "model.layers.0.self_attn.o_proj"
    words = checkpoint.tensors[f"{layer}.Qidxs"]
    twice = {f"{layer}.Qidxs": torch.cat([words, words], dim=1), f"{layer}.codebook_id": torch.tensor(RVQ4)}
    architecture = {**checkpoint.architecture, "quip_params": {"resid_scale_override": 4.0}}
    models = [
        build_model(architecture, tensors, dtype=torch.float32, device="cpu")
        for tensors in (checkpoint.tensors, {**checkpoint.tensors, **twice})
    ]
    plain, residual = (model.get_parameter(f"{layer}.weight").detach() for model in models)
    torch.testing.assert_close(residual, plain * 1.25)


def test_other_codebooks_and_parts_are_refused(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    checkpoint = read_checkpoint(saved[0])
    name = "model.layers.0.self_attn.o_proj"
    for part, value, message in (
        ("codebook_id", torch.tensor(10), "codebook 10 is not known"),
        ("Qidxs", torch.zeros(64, 8, dtype=torch.int16), "not int64 words"),
        ("SU", torch.ones(3), "do not fit 64 x 64"),
        ("A", torch.ones(64, 2), rf"no place for the tensors {name}\.A"),
    ):
        tensors = {**checkpoint.tensors, f"{name}.{part}": value}
        with pytest.raises(InputError, match=message):
            build_model(checkpoint.architecture, tensors, dtype=torch.float32, device="cpu")
