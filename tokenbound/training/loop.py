"""The training loop: any causal language model, any stream of token ids, resumable at every step.

The data and the random numbers of a step (dropout) are pure functions of (seed, step, rank), so a run that stops and
resumes does what one that never stopped does, to the last bit where the arithmetic is deterministic.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from tokenbound.config.run import TrainingConfig
from tokenbound.errors import InputError
from tokenbound.training.optimizer import build_optimizers

logger = logging.getLogger(__name__)


class TokenStream(Protocol):
    """A flat sequence of token ids."""

    def __len__(self) -> int:
        """Number of ids."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids at positions [start, stop), integer array of shape [stop - start]."""

    def targets(self, start: int, stop: int) -> np.ndarray | None:
        """Which of them are learned, bool array of the same shape; None where all are."""


@dataclass(frozen=True)
class StepReport:
    """What the loop knows after a step."""

    step: int
    total_steps: int
    tokens: int
    loss_bits: float
    """Smoothed training loss, bits per token."""
    tokens_per_s: float

    @property
    def seconds_left(self) -> float:
        """Time to the end at the present speed, in seconds."""
        return self.tokens / self.step * (self.total_steps - self.step) / max(self.tokens_per_s, 1e-9)

    def to_dict(self) -> dict[str, float]:
        """Everything by name, for progress lines and trackers."""
        return {**asdict(self), "seconds_left": round(self.seconds_left, 1)}


def total_steps(config: TrainingConfig, world_size: int) -> int:
    """Optimizer steps that the token budget pays for."""
    return max(1, config.tokens // (config.batch * config.window * world_size))


def schedule(config: TrainingConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over ``config.warmup`` of the steps, then linear to zero."""
    warmup = max(1, round(config.warmup * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


IGNORED = -100
"""Stands in place of a label that is not learned."""


class Batch(NamedTuple):
    """Windows of a step."""

    tokens: torch.Tensor
    """int64 [batch, window + 1]."""
    labels: torch.Tensor
    """int64 [batch, window]: the next token of each, or `IGNORED`."""


def draw_batch(stream: TokenStream, config: TrainingConfig, step: int, rank: int) -> Batch:
    """Random windows of the stream; a pure function of its arguments."""
    starts = np.random.default_rng([config.seed, step, rank]).integers(0, len(stream) - config.window, config.batch)
    cuts = [(int(start), int(start) + config.window + 1) for start in starts]
    tokens = torch.from_numpy(np.stack([stream.read(*cut).astype(np.int64) for cut in cuts]))
    targets = [stream.targets(*cut) for cut in cuts]
    every = np.ones(config.window, np.bool_)
    learned = torch.from_numpy(np.stack([every if each is None else each[1:] for each in targets]))
    return Batch(tokens, tokens[:, 1:].masked_fill(~learned, IGNORED))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without frozen parameters, which whoever builds the model has anyway."""
    frozen = {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put what `trained_state` returned into a model of the same form."""
    wanted = trained_state(model).keys()
    assert wanted == state.keys(), sorted(wanted ^ state.keys())
    model.load_state_dict(state, strict=False)


def save_state(
    path: Path, *, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, loss_bits: float
) -> None:
    """Write everything that resuming needs."""
    states = {"model": trained_state(model), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save({**states, "step": step, "loss_bits": loss_bits}, path)


def load_state(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    """Restore a state written by :func:`save_state`; the number of finished steps, and the smoothed loss in bits."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    load_trained(model, state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["loss_bits"])


def seed_step(config: TrainingConfig, step: int, rank: int) -> None:
    """Start the random numbers of a step."""
    torch.manual_seed(int(np.random.default_rng([config.seed, step, rank, 1]).integers(1 << 62)))


def train(
    model: nn.Module,
    stream: TokenStream,
    config: TrainingConfig,
    *,
    on_step: Callable[[StepReport], None],
    save: Callable[[Callable[[Path], None]], None],
    resume_from: Path | None = None,
    checkpoint_interval_s: float = 120.0,
    accelerator: Accelerator | None = None,
) -> nn.Module:
    """Train `model` in place and return it unwrapped.

    Args:
        model: a causal language model called as ``model(input_ids=[B, L])``, returning `.logits`, and `.penalty_nats`
            where something is to be added to the mean loss.
        stream: the training tokens; must be longer than one window.
        config: budget, batch, learning rate, seed.
        on_step: told about every step.
        save: called every `checkpoint_interval_s` seconds and at the end, with a function that writes the state.
        resume_from: state file to continue from.
        checkpoint_interval_s: seconds between saves.
        accelerator: device placement and data parallelism; default one is built.

    Raises:
        InputError: the corpus is shorter than a window, or a loss or a gradient is not finite.
    """
    if len(stream) <= config.window:
        raise InputError(f"corpus has {len(stream)} tokens, fewer than training.window + 1 = {config.window + 1}")
    accelerator = accelerator or Accelerator()
    steps = total_steps(config, accelerator.num_processes)
    optimizers = build_optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    done, mean_bits = (0, math.nan) if resume_from is None else load_state(resume_from, model, optimizers)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    model.train()
    started = last_save = time.monotonic()
    for step in range(done, steps):
        _set_rates(optimizers, peaks, schedule(config, step, steps))
        batch = draw_batch(stream, config, step, accelerator.process_index)
        seed_step(config, step, accelerator.process_index)
        bits, norm = _optimizer_step(model, optimizers, batch, accelerator, config)
        if not math.isfinite(bits + norm):
            raise InputError(
                f"training diverged at step {step}: loss {bits}, gradient norm {norm}; lower training.lr = {config.lr}"
            )
        mean_bits = bits if math.isnan(mean_bits) else 0.98 * mean_bits + 0.02 * bits
        per_step = config.batch * config.window * accelerator.num_processes
        speed = (step + 1 - done) * per_step / (time.monotonic() - started)
        on_step(StepReport(step + 1, steps, (step + 1) * per_step, mean_bits, speed))
        if step + 1 == steps or _agreed(time.monotonic() - last_save >= checkpoint_interval_s, accelerator):
            state = {"model": accelerator.unwrap_model(model), "optimizers": optimizers}
            save(partial(save_state, **state, step=step + 1, loss_bits=mean_bits))
            last_save = time.monotonic()
    plain: nn.Module = accelerator.unwrap_model(model)
    return plain


def _agreed(due: bool, accelerator: Accelerator) -> bool:
    """The main process decides for all: clocks differ, and a save is a collective act."""
    if accelerator.num_processes == 1:
        return due
    return bool(broadcast(torch.tensor(int(due), device=accelerator.device)).item())


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], peaks: list[list[float]], share: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * share


def _optimizer_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    accelerator: Accelerator,
    config: TrainingConfig,
) -> tuple[float, float]:
    """Loss in bits per token that is learned, and the norm of its gradient before clipping."""
    tokens, labels = batch.tokens.to(accelerator.device), batch.labels.to(accelerator.device).flatten()
    with accelerator.autocast():
        out = model(input_ids=tokens[:, :-1])
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), labels, ignore_index=IGNORED)
    if not bool((labels != IGNORED).any()):  # the mean of no loss
        loss = 0.0 * out.logits.sum()
    accelerator.backward(loss + getattr(out, "penalty_nats", 0.0))
    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item() / math.log(2), float(norm)
