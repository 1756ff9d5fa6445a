"""Other tools' quantized checkpoints: encoded exactly, and scored as deployed or with the weights they stand for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import layouts_support as layouts
import pytest
import torch
from blocks_support import require_same_weights
from quantized_support import save_compressed, save_torchao, save_with_layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.config.compress import LosslessSettings
from tokenbound.errors import InputError
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.probe import probe_causality
from tokenbound.models.quantized.keys import KNOWN
from tokenbound.models.quantized.layouts import LAYOUTS, unpack_stream
from tokenbound.models.quantized.schemes import (
    QUANTIZATION,
    RECORDS,
    SCHEMES,
    arithmetic_of,
    require_package,
    scheme_of,
)
from tokenbound.models.replica import Replica
from tokenbound.models.weights import read_base

IDS = torch.arange(40).view(2, 20)
GROUP = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 with a tied head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def through_an_artifact(folder: Path, dtype: torch.dtype) -> Any:
    """The model that is scored: from nothing but the artifact's bytes, whose tensors are the stored ones."""
    checkpoint = read_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    artifact = decode_artifact(encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings()))
    assert artifact.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert artifact.tensors[name].dtype == tensor.dtype
        assert (tensor_bytes(artifact.tensors[name]) == tensor_bytes(tensor)).all(), name
    return build_model(artifact.architecture, artifact.tensors, dtype=dtype, device="cpu")


# --- As deployed --------------------------------------------------------------------------------------------------


def torchao_config(name: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    group = quantization.PerGroup(GROUP)
    return {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8 with int8 inputs": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
    }[name]()


@pytest.fixture(scope="module")
def int8(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain model in torchao's int8."""
    folder = tmp_path_factory.mktemp("int8")
    save_torchao(plain, folder, torchao_config("int8"))
    return folder


def parts_of(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a model; of torchao's weights what they are made of."""
    found = {}
    for name, tensor in model.state_dict().items():
        inside = [*getattr(tensor, "tensor_data_names", []), *getattr(tensor, "optional_tensor_data_names", [])]
        found |= {f"{name} {part}": getattr(tensor, part) for part in inside if getattr(tensor, part) is not None}
        found |= {} if inside else {name: tensor}
    return found


def assert_same_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What is scored is the model that transformers loads from the checkpoint, to the last bit."""
    model, original = through_an_artifact(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    ours, theirs = parts_of(model), parts_of(original)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert (tensor_bytes(ours[name]) == tensor_bytes(tensor)).all(), name
    return model


def some(fast: list[str], slow: list[str]) -> list[Any]:
    """Cases, of which some belong to the long suite."""
    return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("name", some(["int8", "int4"], ["int8 with int8 inputs", "float8"]))
def test_torchao_is_scored_as_it_was_saved(name: str, plain: Path, tmp_path: Path) -> None:
    save_torchao(plain, tmp_path, torchao_config(name))
    model = assert_same_model(tmp_path)
    assert "torchao" in type(model.model.layers[0].mlp.up_proj.weight).__module__
    probe_causality(Replica(model, batch=3, length=16))


@pytest.mark.parametrize("preset", some(["W4A16", "W8A8"], ["W8A16", "FP8_DYNAMIC", "W4A8"]))
def test_compressed_tensors_is_scored_as_it_was_saved(preset: str, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_compressed(plain, tmp_path, preset)
    probe_causality(Replica(assert_same_model(tmp_path), batch=3, length=16))


def test_packed_zero_points_are_restored(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_compressed(plain, tmp_path, "W4A16_ASYM")
    model, stored = through_an_artifact(tmp_path, torch.bfloat16), load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    words, zeros = stored[f"{name}.weight_packed"], stored[f"{name}.weight_zero_point"]
    codes = unpack_stream(words.T.contiguous(), 4).T.float()
    zeros = unpack_stream(zeros, 4).float().repeat_interleave(GROUP, 1)
    scales = stored[f"{name}.weight_scale"].float().repeat_interleave(GROUP, 1)
    assert torch.equal(model.get_parameter(f"{name}.weight"), ((codes - zeros) * scales).bfloat16())


def test_scales_that_look_across_the_batch_are_refused(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_compressed(plain, tmp_path, "W8A8", strategy="tensor")
    model = through_an_artifact(tmp_path, torch.bfloat16)
    with pytest.raises(InputError, match="not causal as it runs here"):
        probe_causality(Replica(model, batch=3, length=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore": ["re:(.*m*)*!"]}, r"pattern '\(\.\*m\*\)\*!', which may take too long"),
        ({"ignore": ["re:(lm_head"]}, "unterminated subpattern"),
    ],
)
def test_patterns_that_might_hang_are_refused(
    changes: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    save_compressed(plain, tmp_path, "W4A16")
    checkpoint = read_checkpoint(tmp_path)
    architecture = {**checkpoint.architecture, QUANTIZATION: {**checkpoint.architecture[QUANTIZATION], **changes}}
    with pytest.raises(InputError, match=message):
        build_model(architecture, checkpoint.tensors, dtype=torch.bfloat16, device="cpu")


def test_another_dtype_than_the_weights_is_refused(int8: Path) -> None:
    with pytest.raises(InputError, match=r"what\.model\.dtype float32: .*_proj computes in bfloat16; set"):
        through_an_artifact(int8, torch.float32)


def test_every_stored_tensor_is_needed_and_no_other(int8: Path) -> None:
    checkpoint = read_checkpoint(int8)
    layer = "model.layers.0.mlp.up_proj"
    for part in [name for name in checkpoint.tensors if name.startswith(layer)]:
        fewer = {name: tensor for name, tensor in checkpoint.tensors.items() if name != part}
        with pytest.raises(InputError):
            build_model(checkpoint.architecture, fewer, dtype=torch.bfloat16, device="cpu")
    more = {**checkpoint.tensors, f"{layer}.ghost": torch.zeros(2)}
    with pytest.raises(InputError, match=r"no place for the tensors .*ghost"):
        build_model(checkpoint.architecture, more, dtype=torch.bfloat16, device="cpu")


def test_a_config_calls_nothing_but_records(int8: Path) -> None:
    checkpoint = read_checkpoint(int8)
    for kind in ("quantize_", "torch", "LinearActivationQuantizedTensor", "os", "nonsense"):
        config = {**checkpoint.architecture[QUANTIZATION], "quant_type": {"default": {"_type": kind, "_data": {}}}}
        with pytest.raises(InputError, match=f"names {kind} "):
            build_model(
                {**checkpoint.architecture, QUANTIZATION: config},
                checkpoint.tensors,
                dtype=torch.bfloat16,
                device="cpu",
            )


def test_records_stand_in_the_artifact_and_may_be_shards(int8: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(int8)
    names = {name for name, record in checkpoint.architecture[RECORDS].items() if record["_type"] == "Int8Tensor"}
    assert names == set(checkpoint.architecture[RECORDS])
    assert len(names) == 7
    with safe_open(int8 / "model.safetensors", "pt") as file:
        header = file.metadata()
    places = {}
    for index, part in enumerate(("mlp", "self_attn", "")):
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if part in name and name not in places}
        save_file(tensors, tmp_path / f"{index}.safetensors", header)
        places |= dict.fromkeys(tensors, f"{index}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copy(int8 / "config.json", tmp_path)
    again = read_checkpoint(tmp_path)
    assert again.architecture == checkpoint.architecture
    assert again.tensors.keys() == checkpoint.tensors.keys()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchao", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, package, None)
    for method in ("torchao", "compressed-tensors"):
        with pytest.raises(InputError, match=rf"quantized with {method}.*tokenbound\[quantized\]"):
            require_package({QUANTIZATION: {"quant_method": method}})
    require_package({QUANTIZATION: {"quant_method": "gptq"}})
    require_package({})


# --- With the weights that the codes stand for --------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "group_size": GROUP}
BITS_AND_BYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
DENSE: dict[str, tuple[dict[str, Any], Any]] = {
    **{
        f"gptq {bits} bit": ({**GPTQ, "bits": bits}, lambda w, bits=bits: layouts.gptq(w, bits, GROUP))
        for bits in (2, 3, 4, 8)
    },
    "gptq in the order of activations": (
        {**GPTQ, "bits": 4, "desc_act": True},
        lambda w: layouts.gptq(w, 4, GROUP, act_order=True),
    ),
    "gptq v2": (
        {**GPTQ, "bits": 3, "checkpoint_format": "gptq_v2"},
        lambda w: layouts.gptq(w, 3, GROUP, older=False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, lambda w: layouts.awq(w, GROUP)),
    "bitsandbytes 4 bit": (BITS_AND_BYTES, lambda w: layouts.bitsandbytes_4bit(w)),
    "bitsandbytes 4 bit, nested": (BITS_AND_BYTES, lambda w: layouts.bitsandbytes_4bit(w, nested=True)),
    "bitsandbytes 8 bit": ({"load_in_8bit": True}, layouts.bitsandbytes_8bit),
    **{
        f"hqq {bits} bit": ({"quant_method": "hqq"}, lambda w, bits=bits: layouts.hqq(w, bits, GROUP))
        for bits in (1, 2, 3, 4, 8)
    },
    "hqq whose config does not say so": ({}, lambda w: layouts.hqq(w, 4, GROUP)),
}


@pytest.mark.parametrize("name", DENSE)
def test_layouts_are_scored_with_the_weights_they_stand_for(name: str, plain: Path, tmp_path: Path) -> None:
    settings, lay_out = DENSE[name]
    dense = save_with_layout(plain, tmp_path, settings, lay_out)
    dtype = torch.float16 if "8 bit" in name else torch.float32
    checkpoint = read_checkpoint(tmp_path)
    model = build_model(checkpoint.architecture, checkpoint.tensors, dtype=dtype, device="cpu")
    for key, tensor in dense.items():
        assert torch.equal(model.get_parameter(key), tensor.to(dtype)), key
    assert "dense" in str(arithmetic_of(checkpoint.architecture))


def test_an_artifact_keeps_every_tensor_of_a_layout(plain: Path, tmp_path: Path) -> None:
    dense = save_with_layout(plain, tmp_path, *DENSE["gptq 3 bit"])
    model = through_an_artifact(tmp_path, torch.float32)
    for key, tensor in dense.items():
        assert torch.equal(model.get_parameter(key), tensor.float()), key


@pytest.mark.parametrize("name", ["gptq 3 bit", "awq", "bitsandbytes 4 bit, nested", "bitsandbytes 8 bit", "hqq 4 bit"])
def test_layers_of_a_layout_are_streamed_and_packed_to_the_same_weights(name: str, plain: Path, tmp_path: Path) -> None:
    save_with_layout(plain, tmp_path, *DENSE[name])
    require_same_weights(read_checkpoint(tmp_path), torch.bfloat16)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq_restores_the_same_bits_itself(bits: int, axis: int) -> None:
    package = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    config = package.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    made = package.HQQLinear(torch.nn.Linear(128, 64, bias=False), config, compute_dtype=torch.bfloat16, device="cpu")
    parts = {f".{name}": part for name, part in made.state_dict().items() if part is not None}
    (layout,) = LAYOUTS["hqq"]
    assert set(parts) <= set(layout.parts)
    assert torch.equal(layout.restore(parts, {}), made.dequantize().float())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_restores_the_same_bits_itself(kind: str, nested: bool) -> None:
    package = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weights = torch.randn(64, 128) * 0.05
    four, eight = LAYOUTS["bitsandbytes"]
    if kind == "int8":
        codes, scales, _ = package.int8_vectorwise_quant(weights.half())
        ours = eight.restore({".weight": codes, ".SCB": scales}, {})
        theirs = package.int8_vectorwise_dequant(codes, scales)
    else:
        codes, state = package.quantize_4bit(weights, quant_type=kind, compress_statistics=nested, blocksize=64)
        parts = {f".weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        ours, theirs = four.restore({".weight": codes, **parts}, {}), package.dequantize_4bit(codes, state)
    assert torch.equal(ours, theirs.float())


def test_a_layer_that_is_kept_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
    model.save_pretrained(tmp_path)
    name = "transformer.h.0.mlp.c_proj"
    tensors = load_file(tmp_path / "model.safetensors")
    parts, weights = layouts.gptq(tensors.pop(f"{name}.weight").T.double().numpy(), 4, GROUP)
    save_file({**tensors, **{name + part: tensor for part, tensor in parts.items()}}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {**GPTQ, "bits": 4}}))
    found = through_an_artifact(tmp_path, torch.float32).get_parameter(f"{name}.weight")
    assert torch.equal(found, torch.from_numpy(weights).T)


def damaged(settings: dict[str, Any], tensors: dict[str, torch.Tensor], case: str) -> tuple[dict[str, Any], str]:
    """Spoil one layer; returns the settings and what the error must say."""
    layer = "model.layers.0.mlp.up_proj"
    if case == "missing part":
        del tensors[f"{layer}.scales"]
        return settings, rf"gptq layer {layer} has no '\.scales'"
    if case == "missing words":
        del tensors[f"{layer}.qweight"]
        return settings, rf"no tensor for {layer}\.weight; they would be random"
    if case == "group out of range":
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"] + 7
        return settings, "belongs to group 8 of 2"
    if case == "other words":
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"].to(torch.int64)
        return settings, f"gptq layer {layer}: packed words must be int32"
    if case == "fewer scales":
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"][:, 1:]
        return settings, "disagree"
    if case == "unknown bits":
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"][:20]
        return settings, "codes of 6 bits"
    return {**settings, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is made for one kernel"


CASES = ["missing part", "missing words", "group out of range", "other words", "fewer scales", "unknown bits", "marlin"]


@pytest.mark.parametrize("case", CASES)
def test_layers_that_do_not_lie_as_they_should_are_named(case: str, plain: Path, tmp_path: Path) -> None:
    settings, lay_out = DENSE["gptq 4 bit"]
    save_with_layout(plain, tmp_path, settings, lay_out)
    checkpoint = read_checkpoint(tmp_path)
    tensors = dict(checkpoint.tensors)
    settings, message = damaged(settings, tensors, case)
    with pytest.raises(InputError, match=message):
        build_model({**checkpoint.architecture, QUANTIZATION: settings}, tensors, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["bitsandbytes 4 bit, nested", "bitsandbytes 8 bit", "hqq 3 bit", "awq"])
def test_no_part_of_a_layer_may_be_forged_or_missing(name: str, plain: Path, tmp_path: Path) -> None:
    settings, lay_out = DENSE[name]
    save_with_layout(plain, tmp_path, settings, lay_out)
    checkpoint = read_checkpoint(tmp_path)
    layer = "model.layers.0.mlp.up_proj"
    idle = {f"{layer}.{part}" for part in ("weight_format", "nbits", "unpack_view_dtype", "view_as_float")}
    idle |= {f"{layer}.{part}" for part in ("offload_meta", "encoded_state_dict", "stores_quant_config")}
    idle |= {f"{layer}.channel_wise"}
    for part in [part for part in checkpoint.tensors if part.startswith(layer) and part not in idle]:
        for forged in (None, torch.full((3, 5), 9, dtype=torch.uint8)):
            tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if key != part}
            tensors |= {} if forged is None else {part: forged}
            with pytest.raises(InputError):
                build_model(checkpoint.architecture, tensors, dtype=torch.float32, device="cpu")


# --- Refused by name ----------------------------------------------------------------------------------------------


def test_where_a_quantization_stands_and_which_it_is(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    cases = {
        r"quantized with 'vptq'.*torchao, .*can\)": {"quantization_config": {"quant_method": "vptq"}},
        r"'text_config', which is not read": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        r"'compression_config', which is not read": {"compression_config": {"format": "dense"}},
    }
    for message, keys in cases.items():
        (tmp_path / "config.json").write_text(json.dumps(config | keys))
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path)


def test_no_delta_of_codes(plain: Path, tmp_path: Path) -> None:
    save_with_layout(plain, tmp_path, *DENSE["awq"])
    with pytest.raises(InputError, match="a delta cannot be taken of awq codes"):
        read_base(str(tmp_path))


# --- Zero points and keys -----------------------------------------------------------------------------------------


def symmetric_layer(bits: int, stored: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer of symmetric codes whose zero points are stored as one number, and its weights."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (32, 64)).numpy()
    scales = (torch.rand(2, 64) + 0.5).half()
    zeros = torch.full((2, 64), stored).numpy()
    parts = {
        ".qweight": torch.from_numpy(layouts.pack_stream(codes, bits)),
        ".qzeros": torch.from_numpy(layouts.pack_stream(zeros.T, bits)).T.contiguous(),
        ".scales": scales,
        ".g_idx": torch.arange(32, dtype=torch.int32) // 16,
    }
    centred = torch.from_numpy(codes).float() - (1 << bits - 1)
    return parts, (centred * scales.float().repeat_interleave(16, 0)).T


FORMATS = [{}, *({key: value} for key in ("checkpoint_format", "format") for value in ("gptq", "gptq_v2"))]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("stated", FORMATS, ids=str)
def test_symmetric_zeros_are_the_middle_whatever_the_format_says(
    bits: int, newer: bool, stated: dict[str, str]
) -> None:
    (layout,) = LAYOUTS["gptq"]
    parts, weights = symmetric_layer(bits, (1 << bits - 1) - (0 if newer else 1))
    assert torch.equal(layout.restore(parts, {"bits": bits, "sym": True, **stated}), weights)
    assert torch.equal(layout.restore(parts, {"bits": bits, **stated}), weights)
    by_field = layout.restore(parts, {"bits": bits, "sym": False, **stated})
    agrees = newer == ("gptq_v2" in stated.values())
    assert torch.equal(by_field, weights) == agrees
    parts, _ = symmetric_layer(bits, (1 << bits - 1) + 1)
    with pytest.raises(InputError, match=r"sym is true, but the stored zero points .* save it again"):
        layout.restore(parts, {"bits": bits, "sym": True, **stated})


@pytest.mark.parametrize(
    ("settings", "edit", "message"),
    [
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, {}, "disagree"),
        ({"checkpoint_format": "gptq_v3"}, {}, "gptq_v3"),
        ({"desc_act": True}, {".g_idx": None}, "no g_idx"),
        ({}, {".g_idx": torch.zeros(32, dtype=torch.int32)}, "uses 1 of 2 groups"),
    ],
)
def test_gptq_layers_that_kernels_read_differently_are_refused(
    settings: dict[str, Any], edit: dict[str, Any], message: str
) -> None:
    (layout,) = LAYOUTS["gptq"]
    parts = {name: part for name, part in ({**symmetric_layer(4, 7)[0], **edit}).items() if part is not None}
    with pytest.raises(InputError, match=message):
        layout.restore(parts, {"bits": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_point": False}, "zero_point is false"),
        ({"group_size": 2 * GROUP}, "group_size 32 does not give"),
        ({"version": "gemm", "format": "gemv"}, "gemm and gemv"),
        ({"bits": 8}, "8 bits is not known"),
    ],
)
def test_awq_keys_that_contradict_the_tensors(settings: dict[str, Any], message: str) -> None:
    (layout,) = LAYOUTS["awq"]
    parts, weights = layouts.awq(layouts.random_weights(64, 64), GROUP)
    assert torch.equal(layout.restore(parts, {"group_size": GROUP, "zero_point": True}), torch.from_numpy(weights))
    with pytest.raises(InputError, match=message):
        layout.restore(parts, settings)


ODD = [
    ("gptq", "adapter", {"rank": 8}),
    ("gptq", "rotation", "hadamard"),
    ("gptq", "is_marlin_format", True),
    ("gptq", "pack_dtype", "int64"),
    ("gptq", "data_type", "mx_fp"),
    ("gptq", "dynamic", {"+:.*q_proj": {"sym": False}}),
    ("gptq", "dynamic", {"+:.*q_proj": {"rotation": "hadamard"}}),
    ("awq", "backend", "llm-awq"),
    ("awq", "rotation", "hadamard"),
    ("bitsandbytes", "llm_int8_has_fp16_weight", True),
    ("bitsandbytes", "bnb_4bit_quant_type", "int4"),
    ("hqq", "quant_zero", True),
    ("quip#", "had_left", True),
    ("compressed-tensors", "kv_cache_scheme", {"num_bits": 8}),
    ("compressed-tensors", "transform_config", {"config_groups": {"u": {}}}),
    ("compressed-tensors", "sparsity_config", {"format": "sparse-24-bitmask"}),
    ("torchao", "quant_type_kwargs", {"group_size": 8}),
    *((name, "unheard_of_key", 1) for name in SCHEMES),
]


@pytest.mark.parametrize(("name", "key", "value"), ODD)
def test_a_key_that_is_not_understood_is_refused(name: str, key: str, value: Any) -> None:
    for empty in (None, False, "", {}, []):
        scheme_of({QUANTIZATION: {"quant_method": name, key: empty}})
    with pytest.raises(InputError, match=rf"quantization_config: {key} = .* is not understood for {name}; if it"):
        scheme_of({QUANTIZATION: {"quant_method": name, key: value}})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq", GPTQConfig(bits=4, sym=False, desc_act=True)),
        ("awq", AwqConfig(bits=4)),
        ("bitsandbytes", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("bitsandbytes", BitsAndBytesConfig(load_in_8bit=True)),
    ],
)
def test_every_key_that_transformers_writes_is_thought_about(name: str, config: Any) -> None:
    """A key that a new version of transformers writes fails here until it is on a list."""
    written = config.to_dict()
    assert written.keys() <= KNOWN[name] | {"llm_int8_has_fp16_weight"}
    assert scheme_of({QUANTIZATION: {**written, "quant_method": name}}) is not None
