"""Delta artifacts: differences and adapters on a named base."""

from __future__ import annotations

import pytest
import torch

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.weight_delta import (
    adapter_delta,
    apply_delta,
    difference,
    encode_delta,
    encode_difference,
    tensors_sha256,
)
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
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
    return {
        "layers.0.q.lora_A.weight": torch.randn(rank, 16, generator=make),
        "layers.0.q.lora_B.weight": torch.randn(24, rank, generator=make),
        "layers.0.norm.weight": torch.full((16,), 2.0),
    }


@pytest.mark.parametrize("scaling", [2.0, 6 / 3**0.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapter_adds_its_scaled_product(scaling: float, transposed: bool) -> None:
    base, adapter = base_model(), adapter_tensors()
    if transposed:
        base["layers.0.q.weight"] = base["layers.0.q.weight"].T.contiguous()
    delta = adapter_delta(base, adapter, scaling=scaling, transposed=transposed)
    tuned = apply_delta(decode_artifact(encode_delta({}, delta, LosslessSettings())), base)
    product = scaling * (adapter["layers.0.q.lora_B.weight"] @ adapter["layers.0.q.lora_A.weight"])
    expected = base["layers.0.q.weight"] + (product.T if transposed else product)
    torch.testing.assert_close(tuned["layers.0.q.weight"], expected)
    assert torch.equal(tuned["layers.0.norm.weight"], torch.full((16,), 2.0))
    assert torch.equal(tuned["layers.0.k.weight"], base["layers.0.k.weight"])


@pytest.mark.parametrize("kind", ["adapter", "difference"])
def test_a_side_that_is_untied_starts_as_a_copy(kind: str) -> None:
    base, untied = base_model(), {"head.weight": "layers.0.q.weight"}
    head = base["layers.0.q.weight"] + 1
    if kind == "adapter":
        delta = adapter_delta(base, {"head.weight": head}, scaling=1.0, untied=untied)
    else:
        delta = difference(base, {**base, "head.weight": head}, untied=untied)
    assert set(delta.tensors) == {"head.weight"}
    tuned = apply_delta(decode_artifact(encode_delta({}, delta, LosslessSettings())), base)
    torch.testing.assert_close(tuned["head.weight"], head)
    assert torch.equal(tuned["layers.0.q.weight"], base["layers.0.q.weight"])
    for wrong in ({"head.weight": "nowhere"}, {"layers.0.k.weight": "layers.0.q.weight"}):
        with pytest.raises(ArtifactError, match="untied"):
            adapter_delta(base, {}, scaling=1.0, untied=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nowhere.lora_A.weight": torch.ones(3, 16)}, "does not have"),
        ({"layers.0.q.lora_B.weight": torch.ones(5, 3)}, "does not fit"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapter_delta(base_model(), {**adapter_tensors(), **change}, scaling=2.0)
