"""Synthetic losses for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenbound.bounds.decisions import LEVELS, MAX_LEVEL, level_of
from tokenbound.certificate.decisions import window_decisions
from tokenbound.store.losses import Losses


def make_losses(lengths: list[int], *, unscored: tuple[int, ...] = (), seed: int = 0) -> Losses:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    failed = np.isin(np.arange(len(lengths)), unscored)
    tokens_failed = np.repeat(failed, lengths)
    nan = np.float32(np.nan)
    return Losses(
        window_id=np.arange(len(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        unscored=failed,
        document=np.arange(total) // 7,
        position=(np.arange(total) % 7).astype(np.int32),
        nll=np.where(tokens_failed, nan, generator.gamma(1.0, 1.5, total)).astype(np.float32),
        entropy=np.where(tokens_failed, nan, generator.gamma(2.0, 0.7, total)).astype(np.float32),
        rank=np.where(tokens_failed, 257, generator.integers(0, 257, total)).astype(np.int32),
        token=generator.integers(0, 257, total).astype(np.int32),
    )


def with_decisions(losses: Losses, *, decisions: int = 8, spread: float = 3.0, seed: int = 0) -> Losses:
    """The same losses beside so many random decisions of each token."""
    generator = np.random.default_rng(seed)
    odds = generator.normal(-2, spread, (losses.num_tokens, decisions))
    outcomes = (generator.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.int64)
    cells = (outcomes * LEVELS + level_of(odds) + MAX_LEVEL).astype(np.int16)
    padded = np.full((len(losses.window_id), int(losses.window_lengths.max(initial=0)), decisions), -1, np.int16)
    padded[np.arange(padded.shape[1]) < losses.window_lengths[:, None]] = cells
    return replace(losses, tables=window_decisions(padded))


def with_base(losses: Losses, *, seed: int = 0) -> Losses:
    """The same losses beside those of a base that is a little worse on one token in five."""
    changed = np.random.default_rng(seed).random(losses.num_tokens) < 0.2
    base_nll = losses.nll + np.where(changed, np.float32(0.3), np.float32(0))
    return replace(losses, base_nll=base_nll, base_entropy=losses.entropy)
