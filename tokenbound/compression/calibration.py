"""What a quantizer needs to know about a model: how much each error in each weight costs, to second order.

With labels drawn from the model itself, the expected squared gradient of the loss is the Fisher matrix, and to
second order replacing a weight matrix W [out, in] by W + E raises the mean token loss by about

    1/2 E[ sum_i g_i^2 (e_i . x)^2 ],     g = dL/dy,  e_i a row of E,

over a layer y = W x, x its input at a token and L the sum of token losses. The expectation is approximated by one
Kronecker product, sum_i r_i e_i M e_i', with the right margins: r_i is E[g_i^2 |x|^2], M is E[|g|^2 x x'] divided by
its trace. (K-FAC, Martens & Grosse 2015, arXiv 1503.05671, takes E[g_i^2] and E[x x'], as if gradients and inputs were
independent. They are not: a first token that everything attends to has both large.) An embedding is the case where x
picks a row: r_v sums |g|^2 over the occurrences of token v, and M is the second moment of g. Of every other parameter
only the mean squared gradient is kept. Gradients of different tokens' sampled losses are independent with mean
zero, so the square of a whole batch's gradient estimates the sum of squares without a pass per token.

Sums are kept, not means: calibrations of parts of a corpus, made anywhere, add up (`merge_calibrations`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import nn

from tokenbound.errors import InputError

CHUNK_TOKENS = 4096
"""Rows that enter a second moment at once."""
CALIBRATION_SEED = 0
UNSEEN_TOKENS = 0.5
"""Tokens of average cost that every row of a matrix is credited with."""


@dataclass
class MatrixSums:
    """Sums over calibration tokens for one matrix seen as [rows, columns]; uses of a tied matrix simply add up.

    Attributes:
        rows: sum_t g_ti^2 |x_t|^2 (a layer), or sum of |g_t|^2 over the occurrences of each token (an embedding)
            [rows], float64.
        moment: sum_t |g_t|^2 x_t x_t' (a layer), or sum_t g_t g_t' (an embedding) [columns, columns], float64. Its
            trace is the sum of `rows`.
        seen: Rows that entered.
        transposed: The tensor is stored [columns, rows] (GPT-2's Conv1D).
    """

    rows: torch.Tensor
    moment: torch.Tensor
    seen: int = 0
    transposed: bool = False
    is_embedding: bool = False
    """Whether an embedding is among its uses."""

    def add(self, other: MatrixSums) -> None:
        """Add another part's sums."""
        self.rows += other.rows
        self.moment += other.moment
        self.seen += other.seen
        self.is_embedding |= other.is_embedding


@dataclass(frozen=True)
class Curvature:
    """The quadratic cost of errors in a matrix seen as [rows, columns]: 1/2 sum_i rows_i (E moment E')_ii nats.

    Attributes:
        rows: [rows], float64, positive.
        moment: [columns, columns], float64, symmetric, not negative, of trace one.
        transposed: As in `MatrixSums`.
    """

    rows: torch.Tensor
    moment: torch.Tensor
    transposed: bool
    is_embedding: bool


@dataclass
class Calibration:
    """Everything collected, by tensor name.

    Attributes:
        tokens: Calibration tokens seen.
        matrices: Of each matrix that linear layers and embeddings use.
        squares: Sum over batches of squared batch gradients of every other parameter, averaged over its elements.
    """

    tokens: int = 0
    matrices: dict[str, MatrixSums] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    def curvature(self, name: str) -> Curvature | None:
        """The cost of errors in a matrix; None if it was not seen in use.

        Every row is given half a token of average cost on top of what was seen, so that a token which calibration
        text happens to lack is not free to be rounded away.
        """
        sums = self.matrices.get(name)
        if sums is None or not self.tokens or not float(sums.rows.sum()) > 0:
            return None
        total = float(sums.rows.sum())
        rows = (sums.rows + UNSEEN_TOKENS * total / max(sums.seen, 1)) / self.tokens
        return Curvature(rows, sums.moment / total, sums.transposed, sums.is_embedding)

    def square(self, name: str) -> float | None:
        """Mean squared gradient of a token's loss with respect to one element of a parameter."""
        return self.squares[name] / self.tokens if self.tokens and name in self.squares else None

    def add(self, other: Calibration) -> None:
        """Add another part's sums."""
        self.tokens += other.tokens
        for name, sums in other.matrices.items():
            if name in self.matrices:
                self.matrices[name].add(sums)
            else:
                self.matrices[name] = replace(sums, rows=sums.rows.clone(), moment=sums.moment.clone())
        for name, value in other.squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + value


def merge_calibrations(parts: Iterable[Calibration]) -> Calibration:
    """The calibration of all parts' tokens together."""
    merged = Calibration()
    for part in parts:
        merged.add(part)
    return merged


def write_calibration(calibration: Calibration) -> bytes:
    """A calibration as bytes for `read_calibration`; a work file, no wire form."""
    matrices = {name: vars(sums) for name, sums in calibration.matrices.items()}
    stream = BytesIO()
    torch.save({"tokens": calibration.tokens, "matrices": matrices, "squares": calibration.squares}, stream)
    return stream.getvalue()


def read_calibration(data: bytes) -> Calibration:
    """Inverse of `write_calibration`."""
    tree = torch.load(BytesIO(data), weights_only=True)
    matrices = {name: MatrixSums(**sums) for name, sums in tree["matrices"].items()}
    return Calibration(tree["tokens"], matrices, tree["squares"])


Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def collect_calibration(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    names: Collection[str] | None = None,
    seed: int = CALIBRATION_SEED,
    run: Callable[[Sequence[Callable[[], None]], Collector], None] | None = None,
) -> Calibration:
    """Run a causal language model forward and backward over some tokens and collect what quantizers need.

    Any model of `nn.Linear`, GPT-2's `Conv1D` and `nn.Embedding` layers gives full statistics; parameters of other
    modules give their mean squared gradient. Memory: activations of one batch, and 8 in^2 bytes for each layer
    asked for; pass `names` to take a large model in several goes.

    Args:
        model: Called as `model(input_ids)`, returning `.logits` [B, L, V] or the logits.
        batches: Token ids [B, L], or pairs of ids and a boolean mask [B, L] of the positions that count.
        names: Tensors to collect for; None for all.
        seed: Of the labels drawn from the model.
        run: Makes the passes, one for each batch, on a CPU; it may let one wait while others go on, and takes from the
            collector what it has to keep. Default: one after the other.

    Raises:
        InputError: no tokens, or a loss that is not finite.
    """
    device = next(model.parameters()).device
    calibration = Calibration()
    draw = torch.Generator(device=device).manual_seed(seed)
    wanted = {name for name, _ in model.named_parameters()} if names is None else set(names)
    with _hooked(model, wanted, calibration) as state:
        passes = (partial(_one_batch, model, batch, device, draw, state) for batch in batches)
        if run is not None:
            run([*passes], state)
        else:
            for each in passes:
                each()
    if not calibration.tokens:
        raise InputError("calibration saw no tokens; give it at least one batch")
    return calibration


def _one_batch(model: nn.Module, batch: Batch, device: torch.device, draw: torch.Generator, state: Collector) -> None:
    ids, mask = batch if isinstance(batch, tuple) else (batch, torch.ones_like(batch, dtype=torch.bool))
    ids = ids.to(device)
    state.mask = mask.to(device).reshape(-1)
    with torch.enable_grad():
        out = model(ids)
        logits = (out if isinstance(out, torch.Tensor) else out.logits).flatten(0, 1)
        loss = torch.zeros((), device=ids.device)
        for rows, keep in zip(torch.split(logits, CHUNK_TOKENS), torch.split(state.mask, CHUNK_TOKENS), strict=True):
            labels = torch.multinomial(torch.softmax(rows.detach().float(), -1), 1, generator=draw).squeeze(1)
            token_losses = nn.functional.cross_entropy(rows.float(), labels, reduction="none")
            loss = loss + (token_losses * keep).sum()
        if not bool(torch.isfinite(loss)):
            raise InputError("the model's loss is not finite on the calibration tokens")
        loss.backward()  # type: ignore[no-untyped-call]
    state.calibration.tokens += int(mask.sum())
    state.collect_squares()


class Collector:
    """Hooks' shared state during one collection.

    Attributes:
        calibration: What was collected so far.
    """

    def __init__(self, calibration: Calibration, others: dict[str, tuple[nn.Module, str]]) -> None:
        self.calibration = calibration
        self.others = others
        self._of_thread = threading.local()
        self._mask = torch.zeros(0, dtype=torch.bool)

    @property
    def mask(self) -> torch.Tensor:
        """Counted positions of the batch that this thread runs; on a GPU the backward pass has threads of its own."""
        found: torch.Tensor = getattr(self._of_thread, "mask", self._mask)
        return found

    @mask.setter
    def mask(self, mask: torch.Tensor) -> None:
        self._of_thread.mask = self._mask = mask

    def take(self, prefix: str) -> dict[str, MatrixSums]:
        """Give up the sums of the matrices below a name."""
        names = [name for name in self.calibration.matrices if name.startswith(prefix)]
        return {name: self.calibration.matrices.pop(name) for name in names}

    def sums(self, name: str, rows: int, columns: int, transposed: bool) -> MatrixSums:
        """The accumulators of a tensor."""
        if name not in self.calibration.matrices:
            zero = torch.zeros(rows, dtype=torch.float64)
            moment = torch.zeros(columns, columns, dtype=torch.float64)
            self.calibration.matrices[name] = MatrixSums(zero, moment, 0, transposed)
        return self.calibration.matrices[name]

    def masked(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of counted tokens [n, features]; a module that sees other rows (an expert) keeps all of its own."""
        flat = values.detach().reshape(-1, values.shape[-1])
        return flat[self.mask] if len(flat) == len(self.mask) else flat

    def collect_squares(self) -> None:
        """Add the squares of what one batch has left as gradients; called before another batch goes on."""
        is_counted = bool(self.mask.any())
        for name, (module, attribute) in self.others.items():
            parameter = module._parameters[attribute]
            if parameter is not None and parameter.grad is not None and is_counted:
                square = float(parameter.grad.double().square().mean())
                self.calibration.squares[name] = self.calibration.squares.get(name, 0.0) + square
                parameter.grad = None


def add_moment(moment: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Add the rows' weighted second moment, chunk by chunk: float32 products, float64 sums.

    Args:
        moment: [n, n], changed in place.
        rows: [tokens, n].
        weights: [tokens], or None for ones.
    """
    for start in range(0, len(rows), CHUNK_TOKENS):
        wide = rows[start : start + CHUNK_TOKENS].float()
        other = wide if weights is None else wide * weights[start : start + CHUNK_TOKENS, None]
        moment += (other.T @ wide).double().cpu()


def _hook_layer(module: nn.Module, name: str, state: Collector) -> Callable[..., None]:
    transposed = not isinstance(module, nn.Linear)

    def forward(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:
            return  # nothing flows back through it, or it will be computed again
        features = state.masked(inputs[0])
        sums = state.sums(name, output.shape[-1], features.shape[1], transposed)
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: _add_layer(sums, features, state.masked(grad))
        )

    return forward


def _add_layer(sums: MatrixSums, features: torch.Tensor, grad: torch.Tensor) -> None:
    costs = torch.cat([part.float().square().sum(1) for part in torch.split(grad, CHUNK_TOKENS)])
    add_moment(sums.moment, features, costs)
    for start in range(0, len(grad), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        sizes = features[part].float().square().sum(1)
        sums.rows += (sizes @ grad[part].float().square()).double().cpu()
    sums.seen += len(grad)


def _hook_embedding(module: nn.Embedding, name: str, state: Collector) -> Callable[..., torch.Tensor]:
    def forward(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        output = output.detach().requires_grad_(True)
        sums = state.sums(name, module.num_embeddings, module.embedding_dim, False)
        sums.is_embedding = True
        ids = inputs[0].detach().expand(output.shape[:-1]).reshape(-1)
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: _add_embedding(sums, ids, grad.detach().flatten(0, -2), state.mask)
        )
        return output

    return forward


def _add_embedding(sums: MatrixSums, ids: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor) -> None:
    if len(ids) == len(mask):
        ids, grad = ids[mask], grad[mask]
    costs = grad.float().square().sum(1).double()
    sums.rows += torch.bincount(ids, weights=costs, minlength=len(sums.rows)).cpu()
    add_moment(sums.moment, grad)
    sums.seen += len(ids)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


@contextmanager
def _hooked(model: nn.Module, wanted: set[str], calibration: Calibration) -> Iterator[Collector]:
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    uses = [
        (module, canonical[id(module.weight)])
        for module in model.modules()
        if _is_layer(module) or isinstance(module, nn.Embedding)
    ]
    covered = {name for _, name in uses}
    others = {
        name: _place(model, name) for name, _ in model.named_parameters() if name not in covered and name in wanted
    }
    state = Collector(calibration, others)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    handles = []
    try:
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in others and parameter.is_floating_point())
        for module, name in uses:
            if isinstance(module, nn.Embedding):  # always hooked: gradients start here
                handles.append(module.register_forward_hook(_hook_embedding(module, name, state)))
            elif name in wanted:
                handles.append(module.register_forward_hook(_hook_layer(module, name, state)))
        yield state
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(required[name])
        model.train(training)
