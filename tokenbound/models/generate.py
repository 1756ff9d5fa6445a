"""Sampling text from an artifact, so that a person sees the quality of what was certified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.errors import InputError
from tokenbound.models.build import build_model
from tokenbound.models.weights import Weights, decode_weights


def generate_ids(
    artifact: ArtifactFile | bytes,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    base: Weights | None = None,
) -> Iterator[int]:
    """Sample token ids one by one from the model inside an artifact.

    Args:
        artifact: open, or its bytes.
        prompt: ids to continue; not empty.
        max_new_tokens: how many to sample at most.
        temperature: 0 takes the most probable token.
        top_p: nucleus mass (Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the sampling.
        stop_id: ends the text.
        base: what the artifact changes, where it is a delta.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a temperature or mass out of range, or no base of a
            delta.
        MismatchError: the delta was made on another base.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")
    weights = decode_weights(artifact, base)
    model = build_model(weights.architecture, weights.tensors, dtype=torch.float32, device="cpu")
    size = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if not prompt or not 0 <= min(prompt) <= max(prompt) < size:
        raise InputError(f"the prompt must hold token ids below {size}; it has {prompt[:5]}")
    positions = getattr(model.config, "max_position_embeddings", None) or len(prompt) + max_new_tokens
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(max_new_tokens):
        token = _next(model, ids[-positions:], temperature, top_p, generator)
        if token == stop_id:
            return
        ids.append(token)
        yield token


@torch.inference_mode()
def _next(
    model: torch.nn.Module, context: list[int], temperature: float, top_p: float, generator: torch.Generator
) -> int:
    logits = model(input_ids=torch.tensor([context])).logits[0, -1].float()
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    inside = probabilities.cumsum(-1) - probabilities < top_p
    choice = torch.multinomial(probabilities * inside, 1, generator=generator)
    return int(order[choice])
