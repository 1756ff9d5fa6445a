"""LoRA adapters against peft itself: every field of its config gives peft's own logits, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenbound.compression.artifact import assemble_artifact, decode_artifact
from tokenbound.compression.tensor import encode_tensor
from tokenbound.compression.weight_delta import NAMED_BASE, apply_delta
from tokenbound.config.compress import LosslessSettings
from tokenbound.errors import InputError
from tokenbound.models.adapter_config import HARMLESS, UNDERSTOOD, parse_adapter_config
from tokenbound.models.build import build_model
from tokenbound.models.weights import check_adapter, is_same_base, read_base, read_delta

IDS = torch.arange(40).reshape(2, 20) % 37
VOCABULARY = 40
REFUSED = "refused"
"""In the table below: the key must be named by the error."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models whose layers are square, biased, tied or stored transposed."""
    folder = tmp_path_factory.mktemp("bases")
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    std = {"initializer_range": 0.3}
    tokens = {"bos_token_id": 1, "eos_token_id": 0}
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**size, **heads, **std, **tokens)),
        "tied": LlamaForCausalLM(LlamaConfig(**size, **heads, **std, **tokens, tie_word_embeddings=True)),
        "biased": LlamaForCausalLM(LlamaConfig(**size, **heads, **std, **tokens, attention_bias=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**shape, **std, **tokens)),
    }
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def make_adapter(folder: Path, base: Path, config: LoraConfig, edit: dict[str, Any] | None = None) -> Path:
    """An adapter that peft made and trained, as far as random numbers are training."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    if edit:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    return folder


@torch.no_grad()
def peft_logits(folder: Path, base: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(fresh, folder).eval()(IDS).logits


@torch.no_grad()
def our_logits(folder: Path, base: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits of the model that the artifact of the delta stands for, and what it says of its base."""
    weights = read_base(str(base))
    architecture, delta = read_delta(str(folder), weights, base_name=str(base))
    settings = LosslessSettings()
    coded = (encode_tensor(name, tensor, settings, None) for name, tensor in sorted(delta.tensors.items()))
    artifact = decode_artifact(assemble_artifact(architecture, coded, settings, base=delta.reference))
    assert artifact.base is not None
    tensors = apply_delta(artifact, weights.tensors)
    model = build_model(artifact.architecture, tensors, dtype=torch.float32, device="cpu")
    return model(IDS).logits, artifact.base


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **options})


ATTENTION = {"target_modules": ["attn.c_attn", "attn.c_proj"], "fan_in_fan_out": True}

FIELDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "task_type": [("llama", {"task_type": "CAUSAL_LM"})],
    "r": [("llama", {"r": 3})],
    "target_modules": [
        ("llama", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*\.1\..*(up|gate)_proj"}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("tied", {"target_modules": ["lm_head"]}),
        ("gpt2", ATTENTION),
        ("gpt2", {**ATTENTION, "target_modules": ["wte", "c_attn"]}),
        ("gpt2", {**ATTENTION, "target_modules": ["lm_head", "c_fc"]}),
    ],
    "exclude_modules": [
        ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("llama", {"exclude_modules": r".*\.1\.self_attn\.v_proj"}),
    ],
    "lora_alpha": [("llama", {"lora_alpha": 5})],
    "lora_dropout": [("llama", {"lora_dropout": 0.3})],
    "fan_in_fan_out": [("gpt2", ATTENTION)],
    "bias": [
        ("gpt2", {**ATTENTION, "bias": "all"}),
        ("gpt2", {**ATTENTION, "bias": "lora_only"}),
        ("biased", {"bias": "all"}),
    ],
    "use_rslora": [("llama", {"use_rslora": True}), ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}})],
    "modules_to_save": [
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        ("llama", {"modules_to_save": ["mlp"]}),
        ("tied", {"modules_to_save": ["embed_tokens"]}),
        ("tied", {"modules_to_save": ["lm_head"]}),
        ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("gpt2", {**ATTENTION, "modules_to_save": ["wte", "wpe"]}),
    ],
    "init_lora_weights": [
        *(("llama", {"init_lora_weights": init}) for init in (False, "gaussian", "orthogonal", "mica")),
        *((REFUSED, {"init_lora_weights": init}) for init in ("pissa", "pissa_niter_2", "olora")),
    ],
    "layers_to_transform": [("llama", {"layers_to_transform": [1]}), ("llama", {"layers_to_transform": 0})],
    "layers_pattern": [("llama", {"layers_to_transform": [1], "layers_pattern": "layers"})],
    "rank_pattern": [
        ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 8, r".*\.v_proj": 2}}),
        ("gpt2", {**ATTENTION, "rank_pattern": {"attn.c_proj": 1}}),
    ],
    "alpha_pattern": [
        ("llama", {"alpha_pattern": {"v_proj": 48, "^model.layers.1.self_attn.q_proj": 5}}),
        ("llama", {"alpha_pattern": {"q_proj": 7}, "rank_pattern": {"q_proj": 8}}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"embed_tokens": 5}}),
    ],
    "trainable_token_indices": [
        ("llama", {"trainable_token_indices": [3, 1, 17]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [7]}}),
        ("tied", {"trainable_token_indices": [3, 1, 17]}),
        ("tied", {"trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [2, 5]}}),
        ("tied", {"trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [7]}}),
        ("tied", {"trainable_token_indices": {"lm_head": [7]}}),
        ("gpt2", {**ATTENTION, "trainable_token_indices": {"wte": [1, 8]}}),
    ],
    "use_dora": [
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {**ATTENTION, "use_dora": True, "bias": "lora_only"}),
        ("tied", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    ],
    "lora_bias": [
        ("biased", {"lora_bias": True}),
        ("gpt2", {**ATTENTION, "lora_bias": True}),
        (REFUSED, {"lora_bias": True}),  # on layers that have none
    ],
    "ensure_weight_tying": [
        ("llama", {"ensure_weight_tying": True}),
        ("tied", {"ensure_weight_tying": True, "trainable_token_indices": [4, 9]}),
        ("refused tied", {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}),
        ("refused tied", {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]}),
    ],
    "alora_invocation_tokens": [(REFUSED, {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"})],
    "layer_replication": [(REFUSED, {"layer_replication": [(0, 2), (1, 2)]})],
    "target_parameters": [(REFUSED, {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]})],
}
"""Fields of LoraConfig with adapters that peft itself can make: the base, or `refused`, and what is set."""

WRITTEN: dict[str, list[tuple[bool, Any]]] = {
    "peft_type": [(False, "LOHA"), (False, "ADALORA"), (False, None)],
    "task_type": [(False, "SEQ_CLS"), (False, "SEQ_2_SEQ_LM")],
    "auto_mapping": [(True, {"base_model_class": "X", "parent_library": "y"})],
    "peft_version": [(True, "0.1.0")],
    "base_model_name_or_path": [(True, None)],
    "revision": [(True, "v2")],
    "inference_mode": [(True, True)],
    "fan_in_fan_out": [(True, True)],
    "bias": [(False, "some")],
    "init_lora_weights": [(False, name) for name in ("corda", "loftq", "lora_ga", "unheard-of", 3)] + [(True, "eva")],
    "megatron_config": [(False, {"hidden_size": 16})],
    "megatron_core": [(True, "another.core")],
    "loftq_config": [(True, {"loftq_bits": 4})],
    "eva_config": [(True, dataclasses.asdict(EvaConfig()))],
    "corda_config": [(True, {"cache_file": None})],
    "lora_ga_config": [(True, {"direction": "ArB2r"})],
    "velora_config": [(False, {"num_groups": 2})],
    "use_qalora": [(False, True)],
    "qalora_group_size": [(True, 32)],
    "monteclora_config": [(False, {"num_samples": 2})],
    "runtime_config": [(True, {"ephemeral_gpu_offload": True})],
    "use_bdlora": [(False, {"nblocks": 2})],
    "arrow_config": [(False, {"top_k": 2})],
    "kasa_config": [(False, {"beta": 1.0})],
    "unheard_of_key": [(False, 1)],
    "enable_lora": [(False, [True]), (True, None)],
}
"""Values written into the config of an adapter that peft saved: whether it is still the same adapter."""


def test_every_field_of_peft_is_thought_about() -> None:
    """A new field of LoraConfig fails here until it is on one of the lists and has an adapter above."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= FIELDS.keys() | WRITTEN.keys()
    assert not UNDERSTOOD & HARMLESS
    assert fields >= UNDERSTOOD | HARMLESS


CASES = [
    pytest.param(base, options, id=f"{key}-{index}")
    for key, cases in FIELDS.items()
    for index, (base, options) in enumerate(cases)
]


@pytest.mark.parametrize(("base", "options"), CASES)
def test_a_field_gives_the_logits_of_peft_or_is_refused(
    base: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = bases[base.removeprefix(REFUSED).strip() or "llama"]
    folder = make_adapter(tmp_path / "adapter", source, lora(**options))
    if base.startswith(REFUSED):
        key = request.node.callspec.id.rpartition("-")[0]
        with pytest.raises(InputError, match=rf"adapter_config\.json: {key} ") as caught:
            our_logits(folder, source)
        assert "\n" not in str(caught.value)
        return
    found, reference = our_logits(folder, source)
    expected = peft_logits(folder, source)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(IDS).logits
    assert (found - plain).abs().max() > 1e-2
    whole = options.get("use_dora") or "trainable_token_indices" in options
    assert reference["kind"] == ("difference" if whole else "adapter")


@pytest.fixture(scope="module")
def plain_adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("plain") / "adapter", bases["llama"], lora())


def copy_of(folder: Path, target: Path, **edit: Any) -> Path:
    target.mkdir()
    save_file(load_file(folder / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **edit}))
    return target


@pytest.mark.parametrize(
    ("key", "same", "value"),
    [pytest.param(key, *case, id=f"{key}-{case[1]}") for key, cases in WRITTEN.items() for case in cases],
)
def test_a_written_value_changes_nothing_or_is_refused(
    key: str, same: bool, value: Any, bases: dict[str, Path], plain_adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter", **{key: value})
    if same:
        check_adapter(str(folder))
        assert torch.equal(our_logits(folder, bases["llama"])[0], our_logits(plain_adapter, bases["llama"])[0])
        return
    for look in (check_adapter, lambda path: our_logits(Path(path), bases["llama"])):
        with pytest.raises(InputError, match=rf"adapter_config\.json: {key} ") as caught:
            look(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("base", "targets", "wrong"), [("gpt2", ["attn.c_proj"], False), ("llama", ["q_proj"], True)])
def test_a_square_layer_has_the_orientation_of_its_class(
    base: str, targets: list[str], wrong: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = lora(target_modules=targets, fan_in_fan_out=not wrong)
    folder = make_adapter(tmp_path / "adapter", bases[base], config, edit={"fan_in_fan_out": wrong})
    torch.testing.assert_close(
        our_logits(folder, bases[base])[0], peft_logits(folder, bases[base]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("edit", [{"r": True}, {"r": 0}, {"lora_alpha": "8"}, {"rank_pattern": {"q": 0}}, {"r": None}])
def test_values_of_the_wrong_kind_are_refused(edit: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    with pytest.raises(InputError, match="not a valid LoRA config"):
        parse_adapter_config({**config, **edit})


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "modules_to_save"])
def test_patterns_that_could_hang_are_refused(key: str) -> None:
    value = {"target_modules": "(a+)+b", "rank_pattern": {"(a+)+b": 2}, "modules_to_save": ["(a+)+b"]}[key]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    with pytest.raises(InputError, match=r"adapter_config\.json has the pattern"):
        parse_adapter_config({**config, key: value})


PREFIX = "base_model.model."
QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight", "does not target"),
        (f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight", "does not target"),
        (f"{QUERY}.lora_A.default.weight", "belongs to nothing"),
        (f"{QUERY}.weight", "belongs to nothing"),
        (f"{QUERY}.lora_magnitude_vector", "use_dora is not set"),
        (f"{PREFIX}score.weight", "belongs to nothing"),
        (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "belongs to nothing"),
        ("model.norm.weight", "does not begin with"),
        (f"{PREFIX}model.norm.weight", "has shape"),
    ],
)
def test_a_tensor_that_nobody_consumes_is_refused_by_name(
    name: str, message: str, bases: dict[str, Path], plain_adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, name: torch.ones(4, 16)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        our_logits(folder, bases["llama"])
    assert name.removeprefix(PREFIX).split(".lora_magnitude")[0] in str(caught.value)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_a_tensor_that_the_config_promises_is_missed(
    part: str, bases: dict[str, Path], plain_adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[f"{QUERY}.{part}"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"targets model\.layers\.0\.self_attn\.q_proj, but the adapter has no"):
        our_logits(folder, bases["llama"])


def test_factors_of_another_rank_than_the_config_says_are_refused(
    bases: dict[str, Path], plain_adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter", r=8)
    with pytest.raises(InputError, match=r"has shape \(4, 16\).* ask for \(8, 16\)"):
        our_logits(folder, bases["llama"])


def test_adapter_files_that_are_not_there(bases: dict[str, Path], plain_adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickle adapter_model\.bin.*safe_serialization=True"):
        check_adapter(str(folder))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        our_logits(folder, bases["llama"])


def test_full_weights_beside_an_adapter_are_refused(
    bases: dict[str, Path], plain_adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(plain_adapter, tmp_path / "adapter")
    (folder / "model.safetensors").write_bytes((bases["llama"] / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"both an adapter \(adapter_config\.json\) and full weights \(model\."):
        check_adapter(str(folder))


def test_an_adapter_that_names_another_base_says_so(
    bases: dict[str, Path], plain_adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tokenbound"):
        assert NAMED_BASE not in our_logits(plain_adapter, bases["llama"])[1]
        assert not caplog.records
        folder = copy_of(plain_adapter, tmp_path / "adapter", base_model_name_or_path="org/other-llama")
        assert our_logits(folder, bases["llama"])[1][NAMED_BASE] == "org/other-llama"
    assert "trained on org/other-llama, but the base is" in caplog.text


def test_the_same_base_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert is_same_base(str(tmp_path / "link"), f"{tmp_path}/model/")
    assert is_same_base("org/name", "org/name")
    assert not is_same_base("org/name", str(tmp_path / "model"))
    assert not is_same_base("org/name", "other/name")
