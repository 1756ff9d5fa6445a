"""Checkpoints: read exactly, built completely, refused with a cure."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    T5Config,
    ViTConfig,
)

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.config.compress import LosslessSettings
from tokenbound.errors import InputError
from tokenbound.models.build import build_model
from tokenbound.models.checkpoint import check_checkpoint, clean_architecture, other_weights, read_checkpoint
from tokenbound.models.hf_model import blank_model
from tokenbound.models.replica import Replica
from tokenbound.store.strict_json import parse_json

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "tied llama": LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=4),
    "mixtral": MixtralConfig(**SMALL, **HEADS, num_local_experts=3, num_experts_per_tok=2),
    "deepseek (persistent buffer)": DeepseekV3Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    ),
}


def make_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def build(checkpoint, **changes):
    tensors = changes.pop("tensors", checkpoint.tensors)
    options = {"dtype": torch.float32, "device": "cpu"} | changes
    return build_model(checkpoint.architecture, tensors, **options)


@pytest.fixture
def saved(tmp_path):
    """A small GPT-2 on disk, its directory and its model."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_read_and_built_again_bit_for_bit(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in checkpoint.tensors.items())
    again = build(checkpoint)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_models_own_names_are_accepted_too():
    model = make_model("mixtral")
    again = build_model(model.config.to_dict(), model.state_dict(), dtype=torch.float32, device="cpu")
    for (name, before), (_, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_a_tied_copy_is_left_out_and_a_differing_one_is_kept(tmp_path):
    model = make_model("tied llama")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    embeddings = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": embeddings.clone()}, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).tensors.keys() == stored.keys()
    save_file({**stored, "lm_head.weight": embeddings + 1}, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert "lm_head.weight" in checkpoint.tensors
    again = build(checkpoint)
    assert torch.equal(again.lm_head.weight, embeddings + 1)
    assert torch.equal(again.model.embed_tokens.weight, embeddings)


def test_buffers_and_bare_names_of_old_checkpoints(saved):
    directory, model = saved
    stored = load_file(directory / "model.safetensors")
    old = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    save_file(old, directory / "model.safetensors")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.tensors.keys() == {key.removeprefix("transformer.") for key in stored}
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        assert torch.equal(build(checkpoint)(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match=r"h\.0\.attn\.bias.*leave them out"):
        build(checkpoint, tensors=old)


def test_sharded_checkpoints(saved):
    directory, model = saved
    model.save_pretrained(directory, max_shard_size="12KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = build(read_checkpoint(directory))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(InputError, match=f"the index .* is stale: it names {shards[0].name}, which is missing"):
        read_checkpoint(directory)


def test_shard_index_is_checked(saved):
    directory, model = saved
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="12KB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"extra.weight": next(iter(places.values()))}}))
    with pytest.raises(
        InputError, match=r"the index .* is stale: it and its shards disagree about tensor 'extra\.weight'"
    ):
        read_checkpoint(directory)
    index.write_text(json.dumps({"weight_map": places | {"extra.weight": "../outside.safetensors"}}))
    with pytest.raises(InputError, match="not a file beside it"):
        read_checkpoint(directory)
    index.write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        read_checkpoint(directory)


def random_gpt2(seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()


def loaded_by_transformers(directory):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return {name: tensor for name, tensor in model.state_dict().items() if "wte" in name}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)


@pytest.fixture
def sharded(tmp_path):
    """Shards with an index, and another model of the same shape in one file, of which transformers takes the latter."""
    random_gpt2(1).save_pretrained(tmp_path / "model", max_shard_size="12KB")
    random_gpt2(2).save_pretrained(tmp_path / "other")
    return tmp_path / "model", tmp_path / "other" / "model.safetensors"


def test_two_sets_of_weights_are_refused_by_both_names(sharded):
    directory, single = sharded
    shutil.copy(single, directory)
    assert same(load_file(single), loaded_by_transformers(directory))
    for look in (read_checkpoint, check_checkpoint):
        with pytest.raises(
            InputError, match=r"two sets of weights, model\.safetensors and model\.safetensors\.index\.json"
        ):
            look(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"two sets of weights, model\.safetensors and model-00001-of-"):
        read_checkpoint(directory)


def test_an_index_of_the_one_file_is_one_set(saved):
    directory, _ = saved
    places = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert read_checkpoint(directory).tensors.keys() == places.keys()


def test_shards_that_the_index_does_not_name(sharded):
    directory, single = sharded
    shutil.copy(single, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(
        InputError, match=r"stale, or .* two sets of weights: model-00001-of-00002\.safetensors is not in"
    ):
        read_checkpoint(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model-q4.gguf",
        "adapter_model.safetensors",
    ],
)
def test_other_weights_are_named_and_not_read(name, saved, sharded, caplog):
    directory, _ = saved
    shutil.copy(sharded[1], directory / name)
    for harmless in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.json"):
        (directory / harmless).write_bytes(b"{}")
    assert same(load_file(directory / "model.safetensors"), loaded_by_transformers(directory))
    with caplog.at_level("WARNING", logger="tokenbound"):
        assert same(read_checkpoint(directory).tensors, loaded_by_transformers(directory))
    assert f"also holds {name}, which" in caplog.text
    assert other_weights(directory) == [name]


def test_an_adapter_beside_full_weights_is_refused_as_transformers_would_apply_it(saved):
    from peft import LoraConfig, get_peft_model

    directory, model = saved
    plain = loaded_by_transformers(directory)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    wrapped.save_pretrained(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(directory)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    applied = AutoModelForCausalLM.from_pretrained(directory)
    assert any("lora_A" in name for name, _ in applied.named_parameters())
    assert not any("lora_A" in name for name in plain)
    for look in (read_checkpoint, check_checkpoint):
        with pytest.raises(InputError, match=r"full weights \(model\.safetensors\) and an adapter \(adapter_config"):
            look(directory)


def test_adapters_in_sub_folders_are_pointed_to(tmp_path):
    (tmp_path / "french").mkdir()
    (tmp_path / "french" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no config\.json, but adapters in french; give the folder of one"):
        read_checkpoint(tmp_path)


def test_a_config_that_names_other_weights_is_refused(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match=r"transformers_weights names the weights 'other\.safetensors'"):
        read_checkpoint(directory)


def test_missing_unknown_and_misshapen_tensors_are_named(saved):
    checkpoint = read_checkpoint(saved[0])
    name = "transformer.h.1.mlp.c_fc.weight"
    fewer = {key: tensor for key, tensor in checkpoint.tensors.items() if key != name}
    with pytest.raises(InputError, match=f"no tensor for {name}; they would be random"):
        build(checkpoint, tensors=fewer)
    with pytest.raises(InputError, match=r"no place for the tensors transformer\.h\.1\.ghost"):
        build(checkpoint, tensors={**checkpoint.tensors, "transformer.h.1.ghost": torch.zeros(2)})
    with pytest.raises(InputError, match=f"another shape.*{name}"):
        build(checkpoint, tensors={**checkpoint.tensors, name: torch.zeros(3, 3)})


def test_a_persistent_buffer_must_be_covered():
    model = make_model("deepseek (persistent buffer)")
    tensors = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in tensors]
    assert buffers, "this test needs a model with a persistent buffer"
    del tensors[buffers[0]]
    with pytest.raises(InputError, match=f"no tensor for {buffers[0]}"):
        build_model(model.config.to_dict(), tensors, dtype=torch.float32, device="cpu")


def test_both_sides_of_a_tie_missing(saved):
    checkpoint = read_checkpoint(saved[0])
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if "wte" not in key}
    with pytest.raises(InputError, match=r"no tensor for .*wte\.weight"):
        build(checkpoint, tensors=tensors)


def test_dtype_of_the_body(saved):
    checkpoint = read_checkpoint(saved[0])
    assert {p.dtype for p in build(checkpoint, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype_are_the_numbers_that_they_are(saved, dtype):
    checkpoint, name = read_checkpoint(saved[0]), "transformer.h.1.mlp.c_fc.weight"
    tensor = (checkpoint.tensors[name] * 100).abs().to(dtype)
    again = build(checkpoint, tensors={**checkpoint.tensors, name: tensor})
    assert torch.equal(again.get_parameter(name), tensor.float())
    with pytest.raises(InputError, match=rf"tensors {name} are complex"):
        build(checkpoint, tensors={**checkpoint.tensors, name: tensor.to(torch.complex64)})


def test_pickle_weights_are_refused_unread(saved):
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"would run code")
    with pytest.raises(InputError, match=r"pickle weights only \(pytorch_model\.bin\).*save_pretrained"):
        read_checkpoint(directory)


def test_missing_files(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(InputError, match="is a file; give the directory"):
        read_checkpoint(directory / "config.json")
    with pytest.raises(InputError, match="does not exist; give a directory or a hub id"):
        read_checkpoint(tmp_path / "nowhere" / "at" / "all")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(InputError, match=r"has other\.safetensors but neither"):
        read_checkpoint(directory)
    (directory / "other.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read_checkpoint(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not readable JSON"):
        read_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        read_checkpoint(directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter without its base model; name the base"):
        read_checkpoint(directory)


def test_damaged_safetensors(saved):
    directory, _ = saved
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        read_checkpoint(directory)


def test_the_hub_is_asked_for_safetensors_and_json_only(saved, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(saved[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert read_checkpoint("some-org/some-model@v1.0").directory == saved[0]
    assert asked["name"] == "some-org/some-model"
    assert asked["revision"] == "v1.0"
    assert asked["allow_patterns"] == ["*.safetensors", "*.json"]


def test_an_unreachable_hub_is_a_clear_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"could not be fetched from the hub \(no connection\)"):
        read_checkpoint("some-org/some-model")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (BertConfig().to_dict(), "encoder-only"),
        (BartConfig().to_dict(), "encoder-decoder"),
        (T5Config().to_dict(), "encoder-decoder"),
        (ViTConfig().to_dict(), "not a causal language model"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        ({"model_type": "of-the-future"}, "not known to the installed transformers"),
        ({}, "not known to the installed transformers"),
        (LlamaConfig().to_dict() | {"hidden_size": "wide"}, "config is not valid"),
        (LlamaConfig(**SMALL, **HEADS).to_dict() | {"num_hidden_layers": 10**9}, "1000000000 layers but only 1"),
        (LlamaConfig().to_dict() | {"quantization_config": {"quant_method": "vptq"}}, "quantized with 'vptq'"),
    ],
)
def test_architectures_that_cannot_be_scored(architecture, message):
    with pytest.raises(InputError, match=message):
        build_model(architecture, {"a": torch.zeros(1)}, dtype=torch.float32, device="cpu")


def test_unknown_quantizations_are_refused_early(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantized with 'aqlm'.*dequantize"):
        read_checkpoint(directory)


SAME = {
    "return_dict": False,
    "use_return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "output_router_logits": True,
    "torchscript": True,
    "is_decoder": True,
    "tie_encoder_decoder": True,
    "problem_type": "regression",
    "chunk_size_feed_forward": 4,
    "pad_token_id": -1,
    "eos_token_id": [1, 400],
    "architectures": ["BertModel"],
    "use_cache": "anything",
    "gradient_checkpointing": True,
    "temperature": 2.0,
}
"""Keys that change no logits."""

REFUSED = {
    "pruned_heads": ({"0": [1]}, r"pruned_heads = .*'0': \[1\].* is not supported; prune the weights"),
    "pad_token_id": (61, r"llama architecture .* pad_token_id = 61 is outside the vocabulary of 61, so set it to null"),
    "is_encoder_decoder": (True, "encoder-decoder"),
    "tie_word_embeddings": ("yes", "llama config is not valid"),
    "model_type": (["llama"], "not known to the installed transformers"),
    "hidden_act": ("nope", "llama architecture does not define a model: KeyError: 'nope'; correct config.json"),
    "num_attention_heads": (0, "llama .*; correct config.json"),
    "rope_parameters": ({"rope_type": "nope"}, "llama .*; correct config.json"),
    "sub_configs": ({}, "llama config is not valid"),
    "to_dict": (1, "llama config is not valid"),
}
"""Keys with values of which no model can be made: one line that names the architecture and the cause."""


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("llama"), make_model("llama")
    model.save_pretrained(folder)
    with torch.inference_mode():
        return folder, json.loads((folder / "config.json").read_text()), model(torch.arange(20).view(1, 20)).logits


@pytest.mark.parametrize("key", SAME)
def test_keys_that_choose_outputs_change_no_losses(key, small_llama, tmp_path):
    folder, config, expected = small_llama
    (tmp_path / "config.json").write_text(json.dumps({**config, key: SAME[key]}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    model = build(read_checkpoint(tmp_path))
    with torch.inference_mode():
        assert torch.equal(model(torch.arange(20).view(1, 20)).logits, expected)
    replica = Replica(model, batch=2, length=16)
    assert replica.head is not None  # the body's hidden states are found too


@pytest.mark.parametrize("key", REFUSED)
def test_configs_that_define_no_model_are_refused_in_one_line(key, small_llama, tmp_path):
    folder, config, _ = small_llama
    value, message = REFUSED[key]
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    for look in (read_checkpoint, check_checkpoint):
        with pytest.raises(InputError, match=message) as caught:
            look(tmp_path)
        assert "\n" not in str(caught.value)


def test_outputs_of_a_nested_config_are_left_out_too():
    config = {**LlamaConfig(**SMALL, **HEADS).to_dict(), "inner": {"return_dict": False, "width": 2}}
    assert blank_model(config).config.inner == {"width": 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", ["one", "same", "other"])
def test_a_tie_that_contradicts_the_tensors_is_what_transformers_loads_or_refused(tied, stored, tmp_path):
    make_model("tied llama").save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    embeddings = tensors["model.embed_tokens.weight"]
    if stored != "one":
        tensors["lm_head.weight"] = embeddings + (stored == "other")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if not tied and stored == "one":
        with pytest.raises(InputError, match=r"no tensor for lm_head\.weight; they would be random"):
            build(read_checkpoint(tmp_path))
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        assert torch.equal(build(read_checkpoint(tmp_path))(ids).logits, theirs(ids).logits)


def test_nothing_in_a_config_names_code_to_run(saved):
    directory, _ = saved
    config = json.loads((directory / "config.json").read_text())
    hostile = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "_attn_implementation": "some-org/some-kernel",
        "attn_implementation": "some-org/some-kernel",
        "fusion_config": {"all": True},
    }
    (directory / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (directory / "config.json").write_text(json.dumps(config | hostile))
    checkpoint = read_checkpoint(directory)
    assert not hostile.keys() & checkpoint.architecture.keys()
    assert build_model(
        {**checkpoint.architecture, **hostile}, checkpoint.tensors, dtype=torch.float32, device="cpu"
    ).config._attn_implementation in ("sdpa", "eager")


def test_cleaning_reaches_nested_configs_and_copies():
    given = {"model_type": "x", "text_config": {"dtype": "float16", "width": [1]}}
    cleaned = clean_architecture(given)
    assert cleaned == {"model_type": "x", "text_config": {"width": [1]}}
    cleaned["text_config"]["width"].append(2)
    assert given["text_config"]["width"] == [1]


@pytest.mark.parametrize("spelling", ["as transformers writes it", "as a bare word"])
@torch.inference_mode()
def test_infinity_in_a_config_survives_an_artifact(spelling, tmp_path):
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    assert tree["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    if spelling == "as a bare word":
        path.write_text(json.dumps({**tree, "time_step_limit": [0.0, math.inf], "low": -math.inf, "no": math.nan}))
    checkpoint = read_checkpoint(tmp_path)
    data = encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings())
    stored = decode_artifact(data)
    assert stored.architecture == parse_json(json.dumps(checkpoint.architecture, allow_nan=False).encode())
    again = build_model(stored.architecture, stored.tensors, dtype=torch.float32, device="cpu")
    assert tuple(again.config.time_step_limit) == (0.0, math.inf)
    if spelling == "as a bare word":
        assert again.config.low == -math.inf
        assert math.isnan(again.config.no)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_an_unknown_tag_of_a_number_is_refused(tmp_path):
    config = Mamba2Config(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=2
    )
    tree = clean_architecture(config.to_dict()) | {"time_step_limit": [0.0, {"__float__": "1e999"}]}
    with pytest.raises(InputError, match=r"the mamba2 config is not valid: .*time_step_limit"):
        blank_model(tree)


def test_tokenizer_directory(saved, tmp_path):
    directory, _ = saved
    assert read_checkpoint(directory).tokenizer_dir is None
    (directory / "tokenizer.json").write_text("{}")
    assert read_checkpoint(directory).tokenizer_dir == directory
    shutil.rmtree(directory)


def test_loading_is_silent(saved, capfd, caplog):
    build(read_checkpoint(saved[0]))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Loading" not in captured.err
