"""Parts of a model that have a faster form with the same mathematics, exchanged before anything is scored.

What is exchanged follows from the model alone, never from a measurement, so that every replica computes the same.
"""

from __future__ import annotations

from torch import nn


def fuse_activations(model: nn.Module) -> int:
    """Put torch's one-pass GELU in the place of the eight-pass form that GPT-2 and its relatives bring along.

    Both are the tanh approximation and agree to the last digits of float32. Of a small GPT-2 the body takes a third
    less time on a CPU.

    Args:
        model: a causal LM of transformers; changed in place.

    Returns:
        How many modules were exchanged.

    Example:
        >>> from transformers.activations import ACT2FN
        >>> model = nn.Sequential(nn.Linear(2, 2), ACT2FN["gelu_new"])
        >>> fuse_activations(model), model[1]
        (1, GELU(approximate='tanh'))
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (NewGELUActivation, FastGELUActivation)
    ]
    for parent, name in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    return len(found)
