"""What a replica needs, predicted from an architecture alone: no weight is read and none is allocated.

Shape legend: B windows of a batch, L tokens of a window, V vocabulary, C tokens of a chunk of logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tokenbound.models.chunks import OWN_LOGITS_BYTES, chunk_shape
from tokenbound.models.forward import last_hidden_state, own_logits
from tokenbound.models.fusion import fuse_activations
from tokenbound.models.head import body_and_projection
from tokenbound.models.hf_model import blank_model
from tokenbound.models.structured.ngram_lm import MarkovModel
from tokenbound.models.structured.registry import attach_decoded, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ReplicaMemory:
    """Memory of one replica on its device."""

    parameters: int
    """Weights, each tied one counted once."""
    weights_bytes: int
    """The same in bytes, in the arithmetic of the body; on a CPU with the head's float32 copy."""
    activations_bytes: int
    """Most that one forward pass of the body holds at once."""
    logits_bytes: int
    """One chunk of logits and its scratch."""

    @property
    def total_bytes(self) -> int:
        """Sum of the parts; the hidden states are among the activations when the head runs."""
        return self.weights_bytes + self.activations_bytes + self.logits_bytes


def random_model(architecture: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM, fresh from its initialisation, in the form in which its family is decoded; on the current device."""
    blank = blank_model(architecture)
    model: PreTrainedModel = type(blank)._from_config(blank.config, dtype=dtype)
    attach_decoded(model, family_of(architecture))
    model.eval()
    return model


def replica_memory(
    architecture: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    batch: int,
    length: int,
    device: str,
    make: Callable[[Mapping[str, Any], torch.dtype], PreTrainedModel] = random_model,
) -> ReplicaMemory:
    """Predict the memory of one replica: the body's forward pass runs on tensors without storage.

    Args:
        architecture: Hugging Face config as a dict, `model_type` included.
        dtype: arithmetic of the body.
        batch: B.
        length: L.
        device: `cpu` or `cuda`, which decides the chunk of logits.
        make: builds the model from architecture and dtype.

    Raises:
        InputError: the architecture defines no causal language model.

    Example:
        >>> shape = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...              num_attention_heads=4, vocab_size=1000, tie_word_embeddings=True)
        >>> found = replica_memory(shape, dtype=torch.float32, batch=2, length=32, device="cpu")
        >>> found.parameters, found.weights_bytes // found.parameters
        (146240, 4)
    """
    with _without_storage():
        model = make(architecture, dtype)
        fuse_activations(model)
        parameters = list(model.parameters())
        weights = sum(_bytes(parameter) for parameter in parameters) + sum(_bytes(buffer) for buffer in model.buffers())
        parts = body_and_projection(model)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        with torch.inference_mode(), LiveBytes() as live:
            output = own_logits(model, ids) if parts is None else last_hidden_state(parts[0], ids)
        vocab_size = output.shape[-1] if parts is None else parts[1].weight.shape[0]
    if parts is not None and device == "cpu" and dtype != torch.float32:
        weights += 4 * parts[1].weight.numel()
    logits = _logits_bytes(vocab_size, torch.device(device)) + (OWN_LOGITS_BYTES if parts is None else 0)
    return ReplicaMemory(sum(p.numel() for p in parameters), weights, live.peak, logits)


def markov_memory(model: MarkovModel, *, batch: int, length: int, device: str) -> ReplicaMemory:
    """As `replica_memory`, of back-off n-grams: one window is looked up, and what that takes grows with the windows."""
    tables = sum(_bytes(buffer) for buffer in model.buffers()) + _bytes(model.embedding.weight)
    vocab_size = model.config.vocab_size
    with torch.inference_mode(), LiveBytes() as live:
        model(torch.arange(length)[None] % vocab_size)
    entries, contexts = (
        sum(buffer.numel() for name, buffer in model.named_buffers() if name.startswith(kind))
        for kind in ("symbols", "escapes")
    )
    return ReplicaMemory(
        entries + 2 * contexts, tables, batch * live.peak, _logits_bytes(vocab_size, torch.device(device))
    )


@contextmanager
def _without_storage() -> Iterator[None]:
    """Tensors made inside have shapes, strides and a device, and no memory.

    Unlike the meta device they choose the kernels of a real one: attention does not materialise its scores.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, until the last tensor of each is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; what it returns counts unless it lies in the memory of an argument."""
        self._watch((args, kwargs), counted=False)
        result = function(*args, **(kwargs or {}))
        self._watch(result, counted=True)
        return result

    def _watch(self, tree: object, *, counted: bool) -> None:
        for tensor in tree_iter(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                continue
            size_bytes = storage.nbytes() if counted else 0
            self._known.add(storage._cdata)
            self.now += size_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, size_bytes)

    def _forget(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.now -= size_bytes


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _logits_bytes(vocab_size: int, device: torch.device) -> int:
    chunk_tokens, block_rows = chunk_shape(vocab_size, device)
    return 4 * vocab_size * (chunk_tokens + block_rows)
