from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import Stream, settings, tiny_model

from tokenbound.config.run import TrainingConfig
from tokenbound.errors import InputError
from tokenbound.training.loop import IGNORED, draw_batch, schedule, total_steps, train
from tokenbound.training.optimizer import Muon, orthogonalise, split_parameters


def run(
    config: TrainingConfig, folder: Path, *, stop_at: int | None = None, resume: Path | None = None, **changes: Any
) -> tuple[Any, list[float]]:
    losses: list[float] = []

    class Stop(Exception):
        pass

    def on_step(report: Any) -> None:
        losses.append(report.loss_bits)
        if report.step == stop_at:
            raise Stop

    def save(write: Any) -> None:
        write(folder / "state.pt")

    model = tiny_model(**changes)
    with contextlib.suppress(Stop):
        train(model, Stream(), config, on_step=on_step, save=save, resume_from=resume, checkpoint_interval_s=0.0)
    return model, losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, optimizer: str) -> None:
    _, losses = run(settings(optimizer=optimizer, tokens=200 * 4 * 16), tmp_path)
    assert len(losses) == 200
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0.0), ("muon", 0.0), ("muon", 0.3)])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, optimizer: str, dropout: float) -> None:
    changes = {"attention_dropout": dropout}
    whole, all_losses = run(settings(optimizer=optimizer), tmp_path, **changes)
    other = tmp_path / "other"
    other.mkdir()
    run(settings(optimizer=optimizer), other, stop_at=8, **changes)
    torch.manual_seed(99)
    resumed, losses = run(settings(optimizer=optimizer), other, resume=other / "state.pt", **changes)
    assert losses == all_losses[7:]  # the step that was cut off before its save is repeated
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_divergence_and_a_short_corpus_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="diverged"):
        run(settings(optimizer="adamw", lr=1e30, embedding_lr=1e30), tmp_path)
    with pytest.raises(InputError, match=r"diverged at step 0: loss .*, gradient norm nan"):
        train(EndlessSlope(), Stream(), settings(), on_step=lambda _: None, save=lambda _: None)
    with pytest.raises(InputError, match="fewer than"):
        train(tiny_model(), Stream(10), settings(), on_step=lambda _: None, save=lambda _: None)


class EndlessSlope(torch.nn.Module):
    """A finite loss whose gradient is not: the step after it would save weights that are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))

    def forward(self, input_ids: torch.Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=(self.weight * self.weight.abs().sqrt()).expand(*input_ids.shape, -1))


def test_the_schedule_rises_and_falls_to_zero() -> None:
    config = settings(warmup=0.1)
    shares = [schedule(config, step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == 1.0
    assert shares[-1] == pytest.approx(1 / 90)
    assert total_steps(config, 2) == 10


def test_batches_are_a_function_of_seed_step_and_rank() -> None:
    config = settings()
    first, again, other = (draw_batch(Stream(), config, 3, rank) for rank in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == (4, 17)
    assert torch.equal(first.labels, first.tokens[:, 1:])


def test_answers_alone_are_learned() -> None:
    """Nothing but the targets moves the model: where there is none, it stays what it was."""
    once = settings(tokens=4 * 16, weight_decay=0.0, optimizer="adamw")
    labels = draw_batch(Stream(learned=(0, 3)), once, 3, 0).labels
    assert set(labels.flatten().tolist()) == {0, 3, IGNORED}
    found = []
    for learned in (None, (0, 3), ()):
        model = tiny_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, Stream(learned=learned), once, on_step=lambda _: None, save=lambda _: None)
        found.append(any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()))
    assert found == [True, True, False]


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalised_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    update = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(update)
    assert update.shape == shape
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_of_a_stack_each_matrix_is_orthogonalised_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 20, generator=generator))
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    gradient = torch.randn(3, 8, 20, generator=generator)
    stack.grad = gradient.clone()
    for matrix, part in zip(alone, gradient, strict=True):
        matrix.grad = part.clone()
    Muon([stack], lr=0.1).step()
    Muon(alone, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in alone]))
    module = torch.nn.Module()
    module.factor, module.gains = stack, torch.nn.Parameter(torch.ones(4, 1, 3))
    assert [part.shape for part in split_parameters(module)[0]] == [stack.shape]


def test_tied_heads_and_norms_are_not_inner_matrices() -> None:
    model = tiny_model()
    matrices, rest = split_parameters(model)
    embedding = model.get_input_embeddings().weight
    assert any(p is embedding for p in rest)
    assert all(p.ndim == 2 for p in matrices)
    assert len(matrices) + len(rest) == len(list(model.parameters()))
