"""Delta artifacts: differences and adapters on a named base."""

from __future__ import annotations

import pytest
import torch

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.delta import apply_delta, encode_adapter, encode_difference, tensors_sha256
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.settings import LosslessSettings, RoundToNearestSettings
from tokenbound.errors import InputError, MismatchError


def base_model() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return {
        "layers.0.q.weight": torch.randn(24, 16, generator=make),
        "layers.0.k.weight": torch.randn(24, 16, generator=make).to(torch.bfloat16),
        "layers.0.norm.weight": torch.ones(16),
        "mask": torch.ones(4, dtype=torch.bool),
    }


def test_a_difference_restores_the_fine_tune_and_unchanged_tensors_are_free() -> None:
    base = base_model()
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["layers.0.q.weight"] += 0.01 * torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    data = encode_difference({}, base, tuned, RoundToNearestSettings(step=0.25))
    artifact = decode_artifact(data)
    assert set(artifact.tensors) == {"layers.0.q.weight"}
    assert artifact.base == inspect_artifact(data).base == {"kind": "difference", "sha256": tensors_sha256(base)}
    restored = apply_delta(artifact, base)
    assert (restored["layers.0.q.weight"] - tuned["layers.0.q.weight"]).abs().max() < 0.01 * 0.25
    assert all(torch.equal(restored[name], base[name]) for name in base if name != "layers.0.q.weight")
    assert len(data) < len(encode_artifact({}, tuned, RoundToNearestSettings(step=0.25)))


def test_another_base_is_refused() -> None:
    base = base_model()
    tuned = {**base, "layers.0.norm.weight": base["layers.0.norm.weight"] * 1.5}
    artifact = decode_artifact(encode_difference({}, base, tuned, LosslessSettings()))
    other = {**base, "layers.0.norm.weight": base["layers.0.norm.weight"] * 1.25}
    with pytest.raises(MismatchError, match="was made on base"):
        apply_delta(artifact, other)
    whole = decode_artifact(encode_artifact({}, base, LosslessSettings()))
    with pytest.raises(ArtifactError, match="not a delta"):
        apply_delta(whole, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": torch.ones(2)}, "differ in tensors"),
        ({"layers.0.q.weight": torch.ones(2, 2)}, "another shape"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, "not floating point"),
    ],
)
def test_fine_tunes_that_are_none_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_difference({}, base_model(), {**base_model(), **change}, LosslessSettings())


def adapter_tensors(rank: int = 3) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(2)
    prefix = "base_model.model.layers.0.q"
    return {
        f"{prefix}.lora_A.weight": torch.randn(rank, 16, generator=make),
        f"{prefix}.lora_B.weight": torch.randn(24, rank, generator=make),
        "base_model.model.layers.0.norm.weight": torch.full((16,), 2.0),
    }


@pytest.mark.parametrize(("stabilized", "scaling"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_an_adapter_adds_its_scaled_product(stabilized: bool, scaling: float) -> None:
    base, adapter = base_model(), adapter_tensors()
    config = {"r": 3, "lora_alpha": 6, "use_rslora": stabilized, "peft_type": "LORA"}
    artifact = decode_artifact(encode_adapter({}, base, adapter, config, LosslessSettings()))
    tuned = apply_delta(artifact, base)
    a, b = (adapter[f"base_model.model.layers.0.q.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(tuned["layers.0.q.weight"], base["layers.0.q.weight"] + scaling * (b @ a))
    assert torch.equal(tuned["layers.0.norm.weight"], torch.full((16,), 2.0))
    assert torch.equal(tuned["layers.0.k.weight"], base["layers.0.k.weight"])


def test_a_peft_adapter_as_saved_gives_the_merged_model(tmp_path: object) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=20)).eval()
    base = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter = get_peft_model_state_dict(wrapped)
    config = wrapped.peft_config["default"].to_dict()
    tuned = apply_delta(decode_artifact(encode_adapter({}, base, adapter, config, LosslessSettings())), base)
    merged = wrapped.merge_and_unload().state_dict()
    for name in base:
        torch.testing.assert_close(tuned[name], merged[name])


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"use_dora": True}, "plain LoRA"),
        ({}, {"peft_type": "IA3"}, "plain LoRA"),
        ({"base_model.model.nowhere.lora_A.weight": torch.ones(3, 16)}, {}, "does not have"),
        ({"base_model.model.layers.0.q.lora_B.weight": torch.ones(5, 3)}, {}, "does not fit"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    change: dict[str, torch.Tensor], config: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode_adapter(
            {}, base_model(), {**adapter_tensors(), **change}, {"r": 3, "lora_alpha": 6, **config}, LosslessSettings()
        )
