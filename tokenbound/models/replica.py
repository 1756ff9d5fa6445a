"""A replica: one model, one fixed batch shape, token windows in, per-token statistics out.

Shape legend: B windows of a batch, L tokens of a window, V vocabulary.

The shape never varies: cutting a batch or a window short changes the last bits of the same prefix's logits, and
then a loss would depend on where a document ends or on which windows happened to share a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from tokenbound.bounds.decisions import TreeChoice
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.errors import InputError, ReplicaOutOfMemory
from tokenbound.models.attention import LONGEST, AttentionInBlocks
from tokenbound.models.blocks import BlockChain, build_chain
from tokenbound.models.build import build_model
from tokenbound.models.chunks import (
    OWN_LOGITS_BYTES,
    TokenStatistics,
    chunk_shape,
    logits_statistics,
    require_compiler,
)
from tokenbound.models.decisions import ChunkMasses, tree_tensors
from tokenbound.models.forward import (
    failures_named,
    in_segments,
    is_out_of_memory,
    last_hidden_state,
    own_logits,
    rope_switches,
)
from tokenbound.models.fusion import fuse_activations, fuse_norms
from tokenbound.models.head import Head, body_and_projection, find_head, max_positions
from tokenbound.models.sources import TensorSource
from tokenbound.models.spread import is_spread
from tokenbound.models.weights import Weights, decode_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

WindowStatistics = TokenStatistics[npt.NDArray[Any]]
"""Statistics as NumPy arrays [W, L], cells [W, L, J]; where a position was not scored, nll and entropy are NaN and the
others -1."""


class Replica:
    """A causal LM on a device, ready to score batches of one fixed shape.

    Example::

        replica = Replica(model, batch=16, length=512, device="cpu")
        statistics = replica.score(inputs, targets, mask)      # int64 [W, 512], int64, bool; W <= 16
        mean_nats = statistics.nll[mask].mean()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        chunk_tokens: int | None = None,
        compile: bool = False,
        head: Head | None = None,
        own_logits_bytes: int = OWN_LOGITS_BYTES,
        tree: TreeChoice | None = None,
        chain: BlockChain | None = None,
    ) -> None:
        """Move the model to its device and recognise its head.

        Args:
            model: a causal LM of transformers.
            batch: B, windows per forward pass.
            length: L, tokens per window.
            device: where to run; of a model that `spread_model` placed, where its ids go in.
            chunk_tokens: tokens per chunk of logits; default from `chunk_shape`. Smaller values need less memory.
            compile: fuse the passes over a chunk of logits with `torch.compile`; where that fails they stay apart.
            head: the model's head, where it is known; else it is found.
            own_logits_bytes: memory for logits that the model makes itself, where its head is of no known form.
            tree: along which decisions are recorded too.
            chain: brings the weights of the model's layers, where they are not in memory.

        Raises:
            InputError: a window is longer than the model's positions, its architecture's code fails, or there is no
                compiler to compile with.
            ReplicaOutOfMemory: the model does not fit.
        """
        _refuse_long_windows(model.config, length)
        self.device = torch.device(device)
        if compile:
            require_compiler(self.device)
        self.batch, self.length, self.chunk_tokens = batch, length, chunk_tokens
        self.own_logits_bytes, self.chain = own_logits_bytes, chain
        self.switches, self._has_run = rope_switches(model.config), False
        with _out_of_memory_named(f"a model of {_parameters(model):,} parameters on {self.device}"):
            self.model = model.eval()
            if not is_spread(model) and chain is None:
                cast(torch.nn.Module, model).to(self.device)
            fuse_activations(self.model)
            fuse_norms(self.model)
            with failures_named(self.model):
                self.head = head or self._find_head()
        if self.head is None and self.model.get_output_embeddings() is not None:
            logger.warning(
                "%s: head not recognised, using the model's own logits (slower, more memory)", type(model).__name__
            )
        self.vocab_size = self.head.vocab_size if self.head else self._logits_width()
        self.tree = None if tree is None else tree.over(self.vocab_size)
        self.compile = compile and self._compiles()
        self.gather = self.head is not None and self._gathers(self.head)
        self.smoothing = getattr(self.model, "smoothing_head", None)
        if self.smoothing is not None and self.head is None:
            raise InputError("the model has a smoothing head, but its own output head is not of a known form")

    @classmethod
    def from_artifact(
        cls,
        artifact: ArtifactFile | bytes,
        *,
        dtype: torch.dtype,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        chunk_tokens: int | None = None,
        compile: bool = False,
    ) -> Replica:
        """Decode an artifact and make a replica of the model it holds.

        Args:
            artifact: open, or its bytes; their number is what the certificate pays for.
            dtype: arithmetic of the model body; logits and losses are float32 in any case.
            batch: B, windows per forward pass.
            length: L, tokens per window.
            device: where to run.
            chunk_tokens: see the constructor.
            compile: see the constructor.

        Raises:
            InputError: the bytes are no artifact, or its tensors are not those of its architecture.
            ReplicaOutOfMemory: the model does not fit.
        """
        with _out_of_memory_named("the decoded artifact"):
            weights = decode_weights(artifact)
        options = {"batch": batch, "length": length, "chunk_tokens": chunk_tokens, "compile": compile}
        return cls.from_weights(weights, dtype=dtype, device=device, **options)

    @classmethod
    def from_weights(
        cls, weights: Weights, *, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any
    ) -> Replica:
        """Build a model and make a replica of it.

        Args:
            weights: architecture and tensors.
            dtype: arithmetic of the model body.
            device: where to run.
            options: see the constructor.

        Raises:
            InputError: the tensors are not those of the architecture.
            ReplicaOutOfMemory: the model does not fit.
        """
        with _out_of_memory_named("the model"):
            model = build_model(weights.architecture, weights.tensors, dtype=dtype, device=device)
        return cls(model, device=device, **options)

    @classmethod
    def from_source(
        cls,
        architecture: Mapping[str, Any],
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        form: str = "streamed",
        **options: Any,
    ) -> Replica:
        """Make a replica whose layers have no weights but while they run.

        Args:
            architecture: Hugging Face config as a dict.
            source: its tensors.
            dtype: arithmetic of the model body.
            device: where to run.
            form: `packed` or `streamed`, for messages.
            options: see the constructor.

        Raises:
            InputError: as `from_weights`, or the architecture has no list of layers.
            ReplicaOutOfMemory: a layer does not fit.
        """
        with _out_of_memory_named("the model without its layers"):
            chain = build_chain(architecture, source, dtype=dtype, device=device, form=form)
        return cls(chain.model, device=device, chain=chain, **options)

    def _find_head(self) -> Head | None:
        """The head; of a chain it is looked for behind no layers, which would each have to be loaded many times."""
        if self.chain is None:
            return find_head(self.model)
        with self.chain.without_layers():
            return find_head(self.model)

    @property
    def input_vocab_size(self) -> int:
        """How many ids the input embedding knows; at most V ids can be scored, at most these can be read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _compiles(self) -> bool:
        """Compile for the shape of a whole chunk, once, before anything is scored."""
        tokens = self._rows_of_chunk()
        with _out_of_memory_named(f"a chunk of {tokens} x {self.vocab_size} logits on {self.device}"):
            logits = torch.zeros(tokens, self.vocab_size, device=self.device)
            targets = torch.zeros(tokens, dtype=torch.int64, device=self.device)
            try:
                logits_statistics(logits, targets, chunk_tokens=tokens, compile=True, tree=self.tree)
            except Exception as error:  # compilers fail in many ways, none of which is a reason not to score
                if is_out_of_memory(error):
                    raise
                logger.warning("torch.compile failed (%s); scoring without it", str(error).strip().partition("\n")[0])
                return False
        return True

    def _rows_of_chunk(self) -> int:
        chunk = self.chunk_tokens or chunk_shape(self.vocab_size, self.device)[0]
        return min(chunk, self.batch * self.length)

    def _gathers(self, head: Head) -> bool:
        """Whether the head may skip the positions that are not scored; if not, say once what that costs."""
        with _out_of_memory_named(f"two chunks of {self.vocab_size} logits on {self.device}"):
            matters = head.place_matters(self._rows_of_chunk(), compile=self.compile, tree=self.tree)
        if matters:
            logger.warning("%s: the head's bits depend on a token's place; padding is scored and left out", self.device)
        return not matters

    def _logits_width(self) -> int:
        return int(self._own_logits(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1])

    def check_vocabulary(self, largest_id: int, origin: str = "the corpus") -> None:
        """Refuse ids that the model cannot read or predict.

        Args:
            largest_id: largest token id that will occur, or the tokenizer's size minus one.
            origin: whose id it is, for the message.

        Raises:
            InputError: the id is negative or not below the vocabulary size.
        """
        size = min(self.vocab_size, self.input_vocab_size)
        if not 0 <= largest_id < size:
            raise InputError(
                f"{origin} has token id {largest_id}, but the model's vocabulary has V = {size} ids "
                f"(0..{size - 1}); use the tokenizer that the model was trained with"
            )

    def score(
        self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
    ) -> WindowStatistics:
        """Score any number of windows, B at a time; the last batch is filled up, so that every batch has one shape.

        The ids go to the device once and the statistics come back once, so that batches follow each other there
        without waiting for the host.

        Args:
            inputs: int [W, L] token ids; where a window is shorter, any valid ids to its right.
            targets: int [W, L]; targets[w, j] is predicted from inputs[w, :j+1]. Ignored where `mask` is false.
            mask: bool [W, L], which predictions count.

        Returns:
            nll and entropy (float32, nats) and rank (int32), each [W, L]; with a tree cells (int16 [W, L, J]). A
            non-finite loss is returned as it is, see `unscorable`; where `mask` is false nll and entropy are NaN, rank
            and cells are -1.

        Raises:
            InputError: a token id outside the vocabulary.
            ReplicaOutOfMemory: the batch does not fit; halve it.
        """
        return self._score_batches(inputs, targets, mask, keep_hidden=False)[0]

    def score_and_hidden(
        self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
    ) -> tuple[WindowStatistics, torch.Tensor | None]:
        """As `score`, with the last hidden states [W, L, d] beside it, or None where the head is unknown.

        States behind the last scored token of a window mean nothing.
        """
        return self._score_batches(inputs, targets, mask, keep_hidden=True)

    @torch.inference_mode()
    def rank_limits(
        self,
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_],
        tolerance: float,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The lowest and highest rank that a target could have if logits this close counted either way.

        Args:
            inputs: as in `score`.
            targets: as in `score`.
            mask: as in `score`.
            tolerance: difference of two logits up to which their order is open.

        Returns:
            Two arrays int32 [W, L]: how many logits exceed the target's by more than the tolerance, and how many others
            do not fall below it by more; -1 where `mask` is false.
        """
        rows = len(inputs)
        inputs, targets, mask = self._full_batches(inputs, targets, mask)
        limits = np.full((2, mask.size), -1, np.int32)
        for first in range(0, len(inputs), self.batch):
            batch = slice(first, first + self.batch)
            scored = torch.from_numpy(mask[batch]).flatten().nonzero().squeeze(1)
            wanted = torch.from_numpy(targets[batch]).flatten()
            for some, logits in self._logits_of(torch.from_numpy(inputs[batch]), mask[batch], scored):
                target = logits.gather(1, wanted[some].unsqueeze(1).to(logits.device))
                low = (logits > target + tolerance).sum(1)
                high = (logits >= target - tolerance).sum(1) - 1
                limits[:, first * self.length + some.numpy()] = torch.stack([low, high]).cpu().numpy()
        low, high = limits.reshape(2, len(mask), self.length)[:, :rows]
        return low, high

    @torch.inference_mode()
    def decision_log_odds(
        self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """The log-odds of the decisions along the tree, before they are rounded to levels.

        Args:
            inputs: as in `score`.
            targets: as in `score`.
            mask: as in `score`.

        Returns:
            float32 [W, L, J] in nats, as `TreeTensors.log_odds` gives them; NaN where `mask` is false.
        """
        assert self.tree is not None, "decisions lie along a tree"
        rows = len(inputs)
        inputs, targets, mask = self._full_batches(inputs, targets, mask)
        found = np.full((mask.size, self.tree.outcomes(0).size), np.nan, np.float32)
        for first in range(0, len(inputs), self.batch):
            batch = slice(first, first + self.batch)
            scored = torch.from_numpy(mask[batch]).flatten().nonzero().squeeze(1)
            wanted = torch.from_numpy(targets[batch]).flatten()
            for some, logits in self._logits_of(torch.from_numpy(inputs[batch]), mask[batch], scored):
                ranges = ChunkMasses.empty(tree_tensors(self.tree, logits.device), len(some))
                aims = wanted[some].to(logits.device)
                ranges.take((logits - logits.amax(1, keepdim=True)).exp_(), aims)
                found[first * self.length + some.numpy()] = ranges.log_odds(aims).cpu().numpy()
        return found.reshape(len(mask), self.length, -1)[:rows]

    def _logits_of(
        self, inputs: torch.Tensor, mask: npt.NDArray[np.bool_], scored: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Float32 logits of some positions of one batch, a chunk at a time: (positions, [C, V])."""
        chunk = max(1, self._rows_of_chunk())
        ids = inputs.to(self.device)
        with self._attention(torch.from_numpy(mask)):
            states = self._own_logits(ids) if self.head is None else self._hidden(ids)
        flat = states.flatten(0, 1)
        for some in torch.split(scored, chunk):
            if self.head is None:
                yield some, flat[some.to(flat.device)].float()
            else:
                yield some, self.head.logits(flat[some.to(flat.device)].to(self.head.weight.device))

    def _score_batches(
        self,
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_],
        *,
        keep_hidden: bool,
    ) -> tuple[WindowStatistics, torch.Tensor | None]:
        rows = inputs.shape[0]
        inputs, targets, mask = self._full_batches(inputs, targets, mask)
        parts, cells, states = [], [], []
        batches = [slice(first, first + self.batch) for first in range(0, len(inputs), self.batch)]
        with _out_of_memory_named(f"a batch of {self.batch} x {self.length} tokens on {self.device}"):
            ids, wanted, scored = self._to_device(inputs), self._to_device(targets), torch.from_numpy(mask)
            calls = [partial(self._score, ids[batch], wanted[batch], scored[batch]) for batch in batches]
            for result, hidden in (call() for call in calls) if self.chain is None else self.chain.stream(calls):
                alpha = [] if result.alpha is None else [result.alpha]
                parts.append(torch.stack([result.nll, result.entropy, result.rank.view(torch.float32), *alpha]))
                cells += [] if result.cells is None else [result.cells]
                states += [hidden] if keep_hidden and hidden is not None else []
            host = torch.cat(parts, dim=1).cpu() if parts else torch.empty(3, 0)
            found = self._arrays(host, mask, rows)
            if self.tree is not None:
                found = replace(found, cells=self._cells(cells, mask, rows))
        return found, torch.cat(states)[:rows] if states else None

    def _full_batches(
        self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], mask: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        if not (inputs.shape == targets.shape == mask.shape and inputs.shape[1] == self.length):
            raise ValueError(
                f"inputs {inputs.shape}, targets {targets.shape} and mask {mask.shape} must all be [W, {self.length}]"
            )
        self._check_ids(inputs, self.input_vocab_size)
        targets = np.where(mask, targets, 0)
        self._check_ids(targets, self.vocab_size)
        missing = ((0, -len(inputs) % self.batch), (0, 0))
        return (
            np.pad(inputs, missing).astype(np.int64, copy=False),
            np.pad(targets, missing).astype(np.int64, copy=False),
            np.pad(mask, missing),
        )

    def _check_ids(self, ids: npt.NDArray[Any], size: int) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < size):
            self.check_vocabulary(int(ids.min()) if ids.min() < 0 else int(ids.max()), "a window")

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _arrays(self, host: torch.Tensor, mask: npt.NDArray[np.bool_], rows: int) -> WindowStatistics:
        nll, entropy, rank, *alpha = host.view(len(host), len(mask), self.length).numpy()
        return TokenStatistics(
            alpha=np.where(mask, alpha[0], np.float32(np.nan))[:rows] if alpha else None,
            nll=np.where(mask, nll, np.float32(np.nan))[:rows],
            entropy=np.where(mask, entropy, np.float32(np.nan))[:rows],
            rank=np.where(mask, rank.view(np.int32), np.int32(-1))[:rows],
        )

    def _cells(self, parts: list[torch.Tensor], mask: npt.NDArray[np.bool_], rows: int) -> npt.NDArray[np.int16]:
        assert self.tree is not None, "cells lie along a tree"
        width = self.tree.outcomes(0).size
        cells = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, width), np.int16)
        return np.where(mask[..., None], cells.reshape(*mask.shape, width), np.int16(-1))[:rows]

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        parts = body_and_projection(self.model)
        assert parts is not None, "a head is recognised only on a body with a projection"
        return self._run(partial(last_hidden_state, parts[0]), ids)

    @torch.inference_mode()
    def _score(
        self, inputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
    ) -> tuple[TokenStatistics[torch.Tensor], torch.Tensor | None]:
        options: dict[str, Any] = {"chunk_tokens": self.chunk_tokens, "compile": self.compile, "tree": self.tree}
        if self.head is None:
            return self._score_own_logits(inputs, targets, mask, options), None
        with self._attention(mask):
            hidden = self._hidden(inputs)
        # The head of a model that is spread over GPUs may lie on another one than the last layer.
        flat = hidden.flatten(0, 1).to(self.head.weight.device)
        scored = mask.flatten() if self.gather and not bool(mask.all()) else None
        found = self.head.statistics(flat, targets.flatten().to(flat.device), scored=scored, **options)
        if self.smoothing is None:
            return found, hidden
        return replace(found, alpha=self.smoothing(flat).to(flat.device)), hidden

    def _attention(self, mask: torch.Tensor) -> AbstractContextManager[Any]:
        """Within, the model attends in the way that is fastest for this device and length, never for this batch."""
        return AttentionInBlocks(mask) if self.device.type == "cpu" and self.length <= LONGEST else nullcontext()

    def _score_own_logits(
        self, inputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
    ) -> TokenStatistics[torch.Tensor]:
        rows = self._rows_of_own_logits()
        parts = []
        for first in range(0, self.batch, rows):
            some = slice(first, first + rows)
            with self._attention(mask[some]):
                logits = self._own_logits(inputs[some]).flatten(0, 1)
            parts.append(logits_statistics(logits, targets[some].flatten(), **options))
        return _joined(parts)

    def _own_logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._run(partial(own_logits, self.model), ids)

    def _run(self, part: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """What the model, or its body, makes of token ids [B, L]."""
        with nullcontext() if self._has_run else failures_named(self.model):
            states = in_segments(part, ids, self.switches)
        self._has_run = ids.shape[1] == self.length
        return states

    def _rows_of_own_logits(self) -> int:
        """Windows per pass where the model makes its own logits: a divisor of B, so that every pass has one shape."""
        fitting = max(1, self.own_logits_bytes // (4 * self.length * self.vocab_size))
        return max(rows for rows in range(1, self.batch + 1) if self.batch % rows == 0 and rows <= fitting)


def unscorable(statistics: WindowStatistics, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which windows [W] hold a scored token without a finite loss or entropy (NaN or infinite logits).

    Args:
        statistics: of `Replica.score`, arrays [W, L].
        mask: bool [W, L], which predictions count.

    Returns:
        bool [W]; such a window goes to quarantine, it is never dropped.
    """
    finite = np.isfinite(statistics.nll) & np.isfinite(statistics.entropy)
    return np.asarray((mask & ~finite).any(axis=1))


def _joined(parts: list[TokenStatistics[torch.Tensor]]) -> TokenStatistics[torch.Tensor]:
    cells = [part.cells for part in parts if part.cells is not None]
    return TokenStatistics(
        nll=torch.cat([part.nll for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        rank=torch.cat([part.rank for part in parts]),
        cells=torch.cat(cells) if cells else None,
    )


def _refuse_long_windows(config: PretrainedConfig, length: int) -> None:
    limit = max_positions(config)
    if limit is not None and length > limit:
        raise InputError(
            f"windows.length {length} is longer than the {limit} positions of the model; set it to {limit} or less"
        )


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _out_of_memory_named(what: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ReplicaOutOfMemory(f"out of memory for {what}; use a smaller windows.batch") from error
