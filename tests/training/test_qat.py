from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_support import Stream, settings, tiny_model

from tokenbound.compression.artifact import assemble_artifact, decode_artifact, encode_artifact
from tokenbound.compression.codecs.uniform import Grid, grid_values
from tokenbound.compression.integers import encode_matrix, encode_vector
from tokenbound.compression.regrid import artifact_grids, replace_grids, widened
from tokenbound.compression.tensor import encode_tensor
from tokenbound.compression.weight_delta import WeightDelta
from tokenbound.config.compress import RoundToNearestSettings
from tokenbound.config.family import (
    FAMILY,
    DenseFamily,
    KroneckerFamily,
    LoraFamily,
    MonarchFamily,
    SubloraFamily,
)
from tokenbound.models.build import build_model, trained_form
from tokenbound.models.checkpoint import clean_architecture
from tokenbound.models.structured.adapter import adapted_model, count_adapter, factor_names, save_adapter
from tokenbound.models.structured.registry import attach_family, trained_tensors
from tokenbound.models.weights import Weights, decode_weights, read_delta
from tokenbound.training.loop import train
from tokenbound.training.qat import GridModel, TrainedGrid, geometric_bits, round_through


def tiny_artifact(step: float = 0.5) -> tuple[Any, bytes]:
    model = tiny_model()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, encode_artifact({"model_type": "llama"}, tensors, RoundToNearestSettings(step=step))


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_the_price_is_what_the_coder_needs(scale: float) -> None:
    random = np.random.default_rng(0)
    rows = scale * np.exp(random.normal(size=(200, 1)))
    matrix = np.rint(random.laplace(size=(200, 300)) * rows).astype(np.int32)
    assert float(geometric_bits(torch.from_numpy(matrix).float())) == pytest.approx(
        8 * len(encode_matrix(matrix)), rel=0.05
    )
    vector = np.rint(random.laplace(size=5000) * scale * 3).astype(np.int32)
    assert float(geometric_bits(torch.from_numpy(vector).float())) == pytest.approx(
        8 * len(encode_vector(vector)), rel=0.05
    )


def test_larger_integers_cost_more_and_rounding_lets_gradients_through() -> None:
    integers = torch.tensor([[1.0, -2.0], [0.0, 3.0]], requires_grad=True)
    geometric_bits(integers).backward()  # type: ignore[no-untyped-call]
    assert integers.grad is not None
    assert torch.equal(integers.grad.sign(), integers.detach().sign())
    values = torch.tensor([0.4, 1.6], requires_grad=True)
    rounded = round_through(values)
    (rounded * torch.tensor([2.0, 3.0])).sum().backward()
    assert rounded.tolist() == [0.0, 2.0]
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 3.0]


def test_a_step_is_trained_by_the_rounding_error() -> None:
    grid = TrainedGrid(Grid(np.zeros((1, 1), np.int32), -2))
    value, _ = grid(torch.tensor([[0.8]]))
    value.sum().backward()
    step = 0.5
    assert grid.base.grad is not None
    assert float(grid.base.grad) == pytest.approx((round(0.8 / step) - 0.8 / step) * step * np.log(2) / 2)


def test_what_is_trained_on_is_what_is_decoded() -> None:
    model, data = tiny_artifact()
    trained = GridModel(model, artifact_grids(data), 0.0)
    with torch.no_grad():
        for grid in trained.grids:
            grid.base += 0.7
    finished = replace_grids(data, trained.finish())
    ids = torch.arange(7)[None]
    expected = trained(ids).logits
    for name, tensor in decode_artifact(finished).tensors.items():
        model.get_parameter(name).data.copy_(tensor)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert replace_grids(data, artifact_grids(data)) == data


@pytest.mark.parametrize(
    "family",
    [
        DenseFamily(),
        KroneckerFamily(terms=2),
        MonarchFamily(blocks=2),
        LoraFamily(rank=2),
        SubloraFamily(rank=2, dimension=90),
    ],
    ids=lambda family: family.kind,
)
def test_a_finish_repairs_a_coarse_artifact_of_every_family(family: Any) -> None:
    model = tiny_model()
    attach_family(model, family)
    train(model, Stream(), settings(), on_step=lambda report: None, save=lambda write: None)
    architecture = {**clean_architecture(model.config.to_dict()), FAMILY: family.model_dump(mode="json")}
    if family.kind == "dense":
        del architecture[FAMILY]
    data = encode_artifact(architecture, trained_tensors(model), RoundToNearestSettings(step=1.0))
    decoded = decode_artifact(data)
    trained = GridModel(trained_form(decoded.architecture, decoded.tensors), artifact_grids(data), 0.0)
    assert len(trained.grids) == sum(tensor.numel() > 1 for tensor in decoded.tensors.values())
    train(trained, Stream(), settings(tokens=60 * 4 * 16), on_step=lambda report: None, save=lambda write: None)
    finished = replace_grids(data, trained.finish())
    assert pattern_loss(finished) < 0.95 * pattern_loss(data)
    ids = torch.arange(7)[None]
    after = decode_artifact(finished)
    plain = build_model(after.architecture, after.tensors, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(plain(input_ids=ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)


def pattern_loss(data: bytes) -> float:
    """Mean loss of an artifact on the repeating pattern, in nats."""
    artifact = decode_artifact(data)
    model = build_model(artifact.architecture, artifact.tensors, dtype=torch.float32, device="cpu")
    ids = torch.from_numpy(Stream().read(0, 17).astype(np.int64))[None]
    return float(torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:]))


def test_a_finish_trains_the_factors_of_an_adapter(tmp_path: Path) -> None:
    base = tiny_base()
    family = LoraFamily(rank=2, alpha=4, layers=("q_proj", "down_proj"))
    model = adapted_model(base, family)
    assert count_adapter(base, family) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, Stream(), settings(lr=0.05), on_step=lambda report: None, save=lambda write: None)
    save_adapter(model, "somewhere", tmp_path)
    architecture, delta = read_delta(str(tmp_path), base)
    data = encode_delta(architecture, delta, RoundToNearestSettings(step=1.0))
    again = adapted_model(base, family)
    names = factor_names(again)
    tensors = decode_artifact(data).tensors
    again.load_state_dict({name: tensors[coded] for name, coded in names.items()}, strict=False)
    trained = GridModel(again, artifact_grids(data), 0.0, names)
    train(trained, Stream(), settings(tokens=40 * 4 * 16), on_step=lambda report: None, save=lambda write: None)
    finished = decode_weights(replace_grids(data, trained.finish()), base)
    plain = build_model(finished.architecture, finished.tensors, dtype=torch.float32, device="cpu")
    ids = torch.arange(7)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)
    changed = [name for name, tensor in finished.tensors.items() if not torch.equal(tensor, base.tensors[name])]
    assert [name.split(".")[-2] for name in changed] == ["q_proj", "down_proj"]


def test_an_adapter_is_saved_as_peft_reads_it(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_base()
    model = adapted_model(base, LoraFamily(rank=2))
    train(model, Stream(), settings(lr=0.05), on_step=lambda report: None, save=lambda write: None)
    save_adapter(model, "somewhere", tmp_path)
    plain = build_model(base.architecture, base.tensors, dtype=torch.float32, device="cpu")
    ids = torch.arange(7)[None]
    before = plain(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def tiny_base() -> Weights:
    model = tiny_model()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Weights(clean_architecture(model.config.to_dict()), tensors)


def encode_delta(architecture: dict[str, Any], delta: WeightDelta, settings: RoundToNearestSettings) -> bytes:
    coded = [encode_tensor(name, tensor, settings) for name, tensor in delta.tensors.items()]
    return assemble_artifact(architecture, coded, settings, base=delta.reference)


def test_grids_of_rows_and_columns_keep_their_exponents() -> None:
    exponents = np.array([1, -3]), np.array([0, 2, 5])
    grid = Grid(np.array([[1, 2, -3], [4, 0, 6]], np.int32), -8, *exponents)
    weights = torch.from_numpy(grid_values(grid))
    again = TrainedGrid(grid).finish(weights)
    assert np.array_equal(again.integers, grid.integers)
    assert again.rows is not None
    assert again.columns is not None
    assert (again.base, again.rows.tolist(), again.columns.tolist()) == (-8, [1, -3], [0, 2, 5])


def test_a_price_on_bits_makes_the_artifact_shorter() -> None:
    sizes = []
    for price in (0.0, 1e-2):
        model, data = tiny_artifact(0.25)
        trained = GridModel(model, artifact_grids(data), price)
        train(trained, Stream(), settings(), on_step=lambda report: None, save=lambda write: None)
        sizes.append(len(replace_grids(data, trained.finish())))
    assert sizes[1] < 0.9 * sizes[0]


def test_what_has_no_grid_is_frozen() -> None:
    model, data = tiny_artifact()
    grids = artifact_grids(data)
    name = "model.layers.0.mlp.up_proj.weight"
    trained = GridModel(model, {name: grids[name]}, 0.0)
    assert [n for n, p in trained.model.named_parameters() if p.requires_grad] == [name]


def test_a_training_may_begin_on_wider_steps() -> None:
    """Of several texts in a name the longest counts; an octave wider, weights are rounded to twice the step."""
    model, data = tiny_artifact()
    grids = artifact_grids(data)
    wide = widened(grids, {"weight": 1, "embed_tokens.weight": 2, "q_proj.weight": 0, "absent": 5})
    shifts = {name: wide[name].base - grids[name].base for name in grids}
    embedding = "model.embed_tokens.weight"
    assert shifts[embedding] == 2
    assert {shift for name, shift in shifts.items() if "q_proj" in name} == {0}
    assert {shift for name, shift in shifts.items() if "q_proj" not in name and name != embedding} == {1}
    found = GridModel(model, wide, 0.0).finish()[embedding]
    step = 2 ** (grids[embedding].base / 2)
    weights = model.get_parameter(embedding).detach().numpy()
    assert np.array_equal(found.integers, np.rint(weights / (2 * step)))
    assert widened(grids, {}) == grids
