"""Giving an encoded model a smoothing head: trained on what the artifact itself decodes to, then put into it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import ray

from tokenbound.certificate.derived import code_split
from tokenbound.certificate.identity import DEFAULT_PROTOCOL
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.corpus import Text
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.errors import InputError

if TYPE_CHECKING:
    from tokenbound.training.smoothing_fit import SmoothingTask

logger = logging.getLogger(__name__)

Objective = Literal["freedman", "azuma"]

HEAD_TOKENS = 1 << 16
"""Tokens that a head is trained on."""
HIDDEN_BYTES = 1 << 28
"""Memory of their hidden states; of wide models fewer tokens are taken."""
HEAD_STEP = 0.25
"""Quantization step of the head's weights, in units of their standard deviation."""
HEAD_BITS = 2000
"""About what a head costs: the price that its training has in view."""
BATCH = 8


def add_smoothing_head(data: bytes, text: Text, objective: Objective) -> bytes:
    """The artifact with a smoothing head in it; runs inside a Ray session.

    Args:
        data: an artifact without one.
        text: tokens to train it on.
        objective: the bound that it is trained on.

    Raises:
        InputError: the artifact has a head already, or its output head is not of a known form.
    """
    with plain_errors():
        found: bytes = ray.get(ray.remote(_add_head).remote(data, text, objective))
    logger.info("smoothing head: %d bytes more", len(found) - len(data))
    return found


def _add_head(data: bytes, text: Text, objective: Objective) -> bytes:
    from tokenbound.compression.artifact import join_artifact, parse_artifact
    from tokenbound.compression.tensor import encode_tensor
    from tokenbound.config.compress import RoundToNearestSettings
    from tokenbound.models.smoothing_head import BIAS, SMOOTHING, WEIGHT
    from tokenbound.training.smoothing_fit import train_head

    parsed = parse_artifact(data)
    if SMOOTHING in parsed.architecture:
        raise InputError("the artifact has a smoothing head already")
    head = train_head(_task(data, text), objective)
    rounded = RoundToNearestSettings(step=HEAD_STEP)
    coded = [
        *parsed.coded,
        encode_tensor(WEIGHT, head.weight.detach(), rounded),
        encode_tensor(BIAS, head.bias.detach(), rounded),
    ]
    architecture = {**parsed.architecture, SMOOTHING: {"alpha_min": head.alpha_min}}
    return join_artifact(architecture, coded, parsed.settings, tokenizer=parsed.tokenizer, base=parsed.base)


def _task(data: bytes, text: Text) -> SmoothingTask:
    """Hidden states, losses and entropies of random windows, as the artifact's model gives them."""
    import math

    import torch

    from tokenbound.bounds.codes import freedman_tune_bits, kappa_nats
    from tokenbound.bounds.constants import MAX_DEGREE
    from tokenbound.corpus.windows import gather
    from tokenbound.models.replica import Replica
    from tokenbound.training.smoothing_fit import SmoothingTask

    torch.set_num_threads(1)
    replica = Replica.from_artifact(data, dtype=torch.float32, batch=BATCH, length=text.spec.length)
    if replica.head is None:
        raise InputError("what.smoothing_head: the model's output head is not of a known form, so it has no place")
    width = int(replica.model.get_output_embeddings().weight.shape[1])
    corpus, plan = open_plan(text.corpus_root, text.spec)
    hidden, nll, entropy = [], [], []
    windows = text.windows(min(HEAD_TOKENS, HIDDEN_BYTES // (4 * width)))
    for first in range(0, len(windows), BATCH):
        batch = gather(corpus, plan.windows(windows[first : first + BATCH]), text.spec.length)
        scored, states = replica.score_and_hidden(batch.inputs, batch.targets, batch.mask)
        assert states is not None, "the head is known"
        mask = torch.from_numpy(batch.mask)
        hidden.append(states[mask].float().clone())
        nll.append(torch.from_numpy(scored.nll)[mask])
        entropy.append(torch.from_numpy(scored.entropy)[mask])
    bits = math.fsum(code_split(len(data), DEFAULT_PROTOCOL).values()) + HEAD_BITS
    tune = freedman_tune_bits(MAX_DEGREE, choose_alpha=False)
    return SmoothingTask(
        torch.cat(hidden),
        torch.cat(nll),
        torch.cat(entropy),
        vocab_size=replica.vocab_size,
        kappa_nats=kappa_nats(code_length_bits=bits, tune_bits=tune, delta=0.05),
        num_tokens=text.num_tokens,
    )
