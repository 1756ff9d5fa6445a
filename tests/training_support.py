"""A model, a stream and settings small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenbound.compression.artifact import encode_artifact
from tokenbound.config.compress import LosslessSettings
from tokenbound.config.run import TrainingConfig
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.smoothing_head import BIAS, SMOOTHING, WEIGHT


class Stream:
    """A repeating pattern that is easy to learn."""

    def __init__(self, size: int = 2000, *, learned: tuple[int, ...] | None = None) -> None:
        self.ids = (np.arange(size) % 7).astype(np.uint16)
        self.learned = learned
        """Ids that are targets; all where it is None."""

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def targets(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.learned is None else np.isin(self.read(start, stop), self.learned)


def tiny_model(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            use_cache=False,
            **changes,
        )
    )


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"tokens": 20 * 4 * 16, "window": 16, "batch": 4, "optimizer": "muon", "lr": 0.02, **changes}
    )


def artifact_with_head(checkpoint: Path, alpha_min: float = 2.0**-6) -> bytes:
    """The tiny model with a head whose alphas vary."""
    loaded = read_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    head = {WEIGHT: torch.randn(1, 16, generator=generator), BIAS: torch.zeros(1)}
    architecture = {**loaded.architecture, SMOOTHING: {"alpha_min": alpha_min}}
    return encode_artifact(architecture, {**loaded.tensors, **head}, LosslessSettings())
