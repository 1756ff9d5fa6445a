"""The language-model head: how a causal LM turns hidden states into logits, and the statistics of its tokens.

Shape legend: N tokens, d hidden width, V vocabulary (logits width), C tokens of a chunk.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tokenbound.bounds.decisions import DecisionTree
from tokenbound.models.chunks import Rows, TokenStatistics, chunk_shape, chunked_statistics, logits_statistics
from tokenbound.models.forward import last_hidden_state, own_logits
from tokenbound.models.quantized.deployed import is_quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Head", "TokenStatistics", "chunk_shape", "find_head", "logits_statistics", "token_statistics"]

logger = logging.getLogger(__name__)


@torch.inference_mode()
def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    scored: torch.Tensor | None = None,
    compile: bool = False,
    tree: DecisionTree | None = None,
) -> TokenStatistics[torch.Tensor]:
    """Loss, entropy and rank of each target under ``z = softcap * tanh(scale * (hidden W^T + b) / softcap)``.

    Memory is O(C*V) in place of O(N*V). The logits are float32 whatever the dtype of the inputs.

    Args:
        hidden: [N, d] last hidden states.
        weight: [V, d] head matrix.
        bias: [V] or None.
        targets: [N] int64 ids in [0, V).
        softcap: bound of tanh soft-capping, None for none.
        scale: factor on the logits, before soft-capping.
        chunk_tokens: C; default from `chunk_shape`.
        scored: [N] bool; logits are made for these tokens alone (elsewhere nll and entropy are NaN and rank is -1).
            They are gathered into chunks of exactly C; whether a token's place in its chunk moves its bits depends
            on the device's matrix product, see `Head.place_matters`.
        compile: fuse the passes over a chunk with `torch.compile`.
        tree: along which decisions are recorded too; over V ids.

    Returns:
        Tensors [N]: nll and entropy in nats (float32), rank (int32); with a tree cells (int16 [N, J]).

    Raises:
        InputError: `compile` was asked for where there is no compiler.

    Example:
        >>> uniform = token_statistics(torch.zeros(1, 2), torch.ones(4, 2), None, torch.tensor([3]))
        >>> round(uniform.nll.item(), 4), round(uniform.entropy.item(), 4), uniform.rank.item()
        (1.3863, 1.3863, 3)
    """
    head = Head(weight=weight, bias=bias, softcap=softcap, scale=scale)
    return head.statistics(hidden, targets, chunk_tokens=chunk_tokens, scored=scored, compile=compile, tree=tree)


class Head:
    """A linear head with an optional bias, scale and soft-cap, ready to be applied to many batches."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        first: nn.Module | None = None,
    ) -> None:
        """Keep the head's tensors; on a CPU a half-precision matrix is widened to float32 once.

        Args:
            weight: [V, d].
            bias: [V] or None.
            softcap: bound of tanh soft-capping, None for none.
            scale: factor on the logits, before soft-capping.
            first: what hidden states [C, d] go through before the matrix, None for nothing.
        """
        self.native_product = weight.device.type != "cpu" and weight.dtype != torch.float32
        self.weight = weight.detach() if self.native_product else weight.detach().float()
        self.bias = None if bias is None else bias.detach().float()
        self.softcap = softcap
        self.scale = scale
        self.first = first

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.weight.shape[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits [C, V] of hidden states [C, d], written into `out` where given."""
        if out is None:
            out = torch.empty(hidden.shape[0], self.vocab_size, dtype=torch.float32, device=hidden.device)
        self._product(hidden if self.first is None else self.first(hidden), out)
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return out if self.scale == 1.0 else out.mul_(self.scale)

    def _product(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        if self.native_product:
            _wide_product(hidden.to(self.weight.dtype), self.weight.t(), out)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is not None:
            torch.addmm(self.bias, hidden.float(), self.weight.t(), out=out)
        else:
            torch.mm(hidden.float(), self.weight.t(), out=out)

    @torch.inference_mode()
    def statistics(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        chunk_tokens: int | None = None,
        scored: torch.Tensor | None = None,
        compile: bool = False,
        tree: DecisionTree | None = None,
    ) -> TokenStatistics[torch.Tensor]:
        """As `token_statistics`, for hidden states [N, d] and targets [N]."""

        def fill(rows: Rows, out: torch.Tensor) -> torch.Tensor:
            return self.logits(hidden[rows], out)

        return chunked_statistics(
            fill, targets, self.vocab_size, chunk_tokens=chunk_tokens, scored=scored, compile=compile, tree=tree
        )

    def place_matters(self, chunk: int, *, compile: bool = False, tree: DecisionTree | None = None) -> bool:
        """Whether the bits of a token's statistics depend on its place in a chunk or on the tokens beside it.

        Tokens may be gathered (`scored`) only where they do not, or else a loss would depend on where a document
        ends. Two chunks of fixed hidden states are scored as they stand, in reverse, and with a third left out.

        Args:
            chunk: C, tokens of a chunk as they will be scored.
            compile: as they will be scored.
            tree: as they will be scored.
        """
        device, width = self.weight.device, self.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2 * chunk, width, generator=generator).to(device)
        targets = torch.randint(self.vocab_size, (2 * chunk,), generator=generator).to(device)
        scored = torch.rand(2 * chunk, generator=generator) < 2 / 3

        def bits(hidden: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor | None = None) -> torch.Tensor:
            found = self.statistics(hidden, targets, chunk_tokens=chunk, scored=scored, compile=compile, tree=tree)
            cells = [] if found.cells is None else [*found.cells.int().T]
            return torch.stack([found.nll.view(torch.int32), found.entropy.view(torch.int32), found.rank, *cells])

        plain, kept = bits(hidden, targets), scored.to(device)
        return not (
            torch.equal(plain, bits(hidden.flip(0), targets.flip(0)).flip(1))
            and torch.equal(plain[:, kept], bits(hidden, targets, scored)[:, kept])
        )


def _wide_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Half-precision product [C, d] x [d, V] into float32, without rounding in between where the device can."""
    try:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _say_rounded_once(left.device.type)
        out.copy_(torch.mm(left, right))


@cache
def _say_rounded_once(device_type: str) -> None:
    logger.warning("%s cannot write a half-precision product as float32; logits are rounded once more", device_type)


def body_and_projection(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear] | None:
    """The part of a causal LM that ends in hidden states, and its output matrix; None if it is not of that form."""
    body, projection = _body(model), model.get_output_embeddings()
    if body is None or not isinstance(projection, nn.Linear) or is_quantized(projection):
        return None
    return body, projection


def _body(model: PreTrainedModel) -> nn.Module | None:
    """The body, by the prefix that its class declares; where that names no part, the one part that is a model."""
    from transformers import PreTrainedModel

    body: nn.Module = getattr(model, "base_model", model)
    if body is not model:
        return body
    models = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return models[0] if len(models) == 1 else None


@torch.inference_mode()
def find_head(model: PreTrainedModel) -> Head | None:
    """Recognise how a transformers causal LM turns hidden states into logits, and check it against the model.

    The hypothesis (output matrix, bias, what stands before the matrix, the scale and soft-cap that the config names) is
    compared with the model's own logits on fixed ids. Hidden states are also amplified on their way into the model's
    own output matrix, so that logits of size 1, 30 and 300 are compared: a soft-cap cannot hide behind small logits.

    Args:
        model: a causal LM of transformers, in eval mode.

    Returns:
        The head, or None where no hypothesis reproduces the model; the caller then uses the model's own logits.
    """
    parts = body_and_projection(model)
    if parts is None:
        return None
    body, projection = parts
    ids = _check_ids(model)
    try:
        seen, hidden = _projection_input(model, projection, ids), last_hidden_state(body, ids)
    except (TypeError, AttributeError, ValueError) as error:
        logger.info("head not recognised: %s", error)
        return None
    if seen is None:
        return None
    first = None
    if not _is_multiple(seen, hidden):
        first = _step_between(model, hidden, seen)
        if first is None:
            return None
    states = hidden if first is None else seen
    states = states.to(projection.weight.device)  # of a model that is spread over GPUs
    width = own_logits(model, ids).shape[-1]  # rows beyond it are padding that the model cuts off
    weight, bias = projection.weight[:width], None if projection.bias is None else projection.bias[:width]
    for softcap, scale in _hypotheses(model.config.get_text_config()):
        head = Head(weight, bias, softcap, scale)
        if _reproduces(model, head, projection, ids, states):
            return Head(weight, bias, softcap, scale, first)
    return None


def _is_multiple(seen: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether one tensor is the other times a number, up to rounding: that number is among the scales tried later."""
    if seen.shape != hidden.shape:
        return False
    if torch.equal(seen, hidden):
        return True
    wide, wanted = hidden.double(), seen.to(hidden.device).double()
    factor = (wide * wanted).sum() / (wide * wide).sum()
    tolerance = 4 * torch.finfo(seen.dtype).eps * wanted.abs().max()
    return bool(((factor * wide - wanted).abs() <= tolerance).all())


def _step_between(model: PreTrainedModel, hidden: torch.Tensor, seen: torch.Tensor) -> nn.Module | None:
    """The part of a model that makes of the body's hidden states what goes into the output matrix; None without one."""
    for part in model.children():
        try:
            if torch.equal(part(hidden), seen):
                return part
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # a part for something else
            continue
    return None


def _check_ids(model: PreTrainedModel) -> torch.Tensor:
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    count = min(16, max_positions(model.config) or 16)
    ids = (torch.arange(count) * 7919 + 13) % weight.shape[0]
    return torch.as_tensor(ids.unsqueeze(0), device=weight.device)


def max_positions(config: PretrainedConfig) -> int | None:
    """How many positions a transformers config allows; None if it sets no limit (e.g. state-space models)."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _hypotheses(config: PretrainedConfig) -> list[tuple[float | None, float]]:
    softcap = next(
        (
            value
            for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _number(getattr(config, name, None))
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        scale /= _number(getattr(config, name, None))
    named = (float(softcap) if softcap else None, scale)
    return [named] if named == (None, 1.0) else [named, (None, 1.0)]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value else 1.0


def _projection_input(model: PreTrainedModel, projection: nn.Linear, ids: torch.Tensor) -> torch.Tensor | None:
    """What the model feeds into its output matrix; None if it does not call it."""
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    try:
        own_logits(model, ids)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 else None


def _reproduces(
    model: PreTrainedModel, head: Head, projection: nn.Linear, ids: torch.Tensor, hidden: torch.Tensor
) -> bool:
    peak = (hidden[0].float() @ projection.weight.t().float()).abs().max().item()
    if not 0 < peak < float("inf"):
        # Nothing to compare: zero or broken weights. The canary speaks about those; the head is as good as any.
        return True
    return all(
        _agrees(_amplified_logits(model, projection, ids, gain), head.logits((hidden * gain)[0]))
        for gain in (1.0, 1.0 / peak, 30.0 / peak, 300.0 / peak)
    )


def _amplified_logits(model: PreTrainedModel, projection: nn.Linear, ids: torch.Tensor, gain: float) -> torch.Tensor:
    handle = projection.register_forward_pre_hook(lambda _, arguments: (arguments[0] * gain, *arguments[1:]))
    try:
        return own_logits(model, ids)[0]
    finally:
        handle.remove()


def _agrees(own: torch.Tensor, ours: torch.Tensor) -> bool:
    """Equal up to the rounding of the model's own dtype, relative to the largest logit."""
    if own.shape != ours.shape:
        return False
    steps = 64 if own.dtype == torch.float32 else 8
    tolerance = steps * torch.finfo(own.dtype).eps * own.float().abs().max()
    return bool(((own.float() - ours.to(own.device)).abs() <= tolerance).all())
