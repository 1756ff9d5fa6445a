"""The forward pass of any architecture: how it is called, and what is said of one that fails.

Shape legend: B windows of a batch, L tokens of a window, d hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.errors import InputError, TokenboundError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def forward(module: nn.Module, ids: torch.Tensor) -> Any:
    """What a model, or its body, returns for token ids [B, L]: causal attention only, positions from 0, no cache.

    Padding stands to the right of a window, where a causal model cannot see it; `probe_causality` checks it.
    """
    return module(input_ids=ids, **forward_options(module))


def forward_options(module: nn.Module) -> dict[str, Any]:
    """Keyword arguments of every forward pass: no key/value cache, where the model knows the word."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if takes_any or "use_cache" in parameters else {}


def last_hidden_state(body: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, d] of token ids [B, L] in one pass."""
    output = forward(body, ids)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return hidden


def own_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits [B, L, V] that a model makes itself of token ids [B, L] in one pass."""
    logits: torch.Tensor = forward(model, ids).logits
    return logits


def rope_switches(config: PretrainedConfig) -> tuple[int, ...]:
    """Numbers of tokens up to which a model rotates positions by other factors than beyond; mostly none.

    LongRoPE (arXiv 2402.13753) has short factors for sequences of up to `original_max_position_embeddings` tokens and
    long ones for longer sequences, and transformers applies one of them to a whole batch, by its padded length. Its
    other dynamic form changes only beyond `max_position_embeddings`, where no window is scored.

    Example:
        >>> from transformers import Phi3Config
        >>> factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        >>> rope_switches(Phi3Config(rope_parameters=factors, original_max_position_embeddings=4096))
        (4096,)
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    original = getattr(text, "original_max_position_embeddings", None)
    found = {
        one.get("original_max_position_embeddings", original) for one in each if one.get("rope_type") == "longrope"
    }
    return tuple(sorted(limit for limit in found if isinstance(limit, int)))


def in_segments(
    run: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, switches: Sequence[int]
) -> torch.Tensor:
    """Run a model over windows so that each position gets the factors of a sequence that ends there.

    A loss may depend on what precedes its token and on nothing else, so neither the padded length nor the end of the
    document may choose the factors. Each segment between two switches is taken from a pass over all that precedes its
    end: tokens up to a switch are scored as in a window that is no longer, and those behind it as in a longer one.

    Args:
        run: from ids [B, l] to hidden states or logits [B, l, ...], in one pass.
        ids: [B, L].
        switches: of `rope_switches`.

    Returns:
        [B, L, ...], from one pass more than there are switches below L.

    Example:
        >>> lengths = lambda ids: torch.full(ids.shape, ids.shape[1])
        >>> in_segments(lengths, torch.zeros(1, 5, dtype=torch.int64), [2]).tolist()
        [[2, 2, 5, 5, 5]]
    """
    length = ids.shape[1]
    ends = [*(switch for switch in switches if switch < length), length]
    if len(ends) == 1:
        return run(ids)
    return torch.cat([run(ids[:, :end])[:, first:] for first, end in pairwise([0, *ends])], dim=1)


@contextmanager
def failures_named(model: nn.Module) -> Iterator[None]:
    """Within, an exception of the model's own code becomes a line that names its architecture.

    For the first passes of a model, whose config and shape nobody may have tried. One that has run is not to blame.

    Raises:
        InputError: the architecture and the cause. What memory, disks and devices raise keeps its name.
    """
    try:
        yield
    except (TokenboundError, OSError, AssertionError):
        raise
    except Exception as error:  # model code trips over a config or a shape in any way
        if is_out_of_memory(error) or _is_of_device(error):
            raise
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
        raise InputError(
            f"the {kind} architecture cannot be run as its config describes it: {text}; correct config.json, or "
            "install the version of transformers that the checkpoint was saved with"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on an accelerator or on the CPU (a plain RuntimeError there)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def _is_of_device(error: BaseException) -> bool:
    """Whether a device failed rather than the model: another one may run it."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
