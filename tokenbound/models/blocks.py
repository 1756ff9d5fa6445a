"""A model as a chain of blocks whose weights are in memory only while they run.

What is outside the list of decoder layers (embeddings, the last norm, the head) and every vector inside it is loaded
once; the matrices of a layer are made from a `TensorSource` when its turn comes, and dropped behind it. The model's own
forward pass runs unchanged: hooks before and behind each layer bring and drop its weights, so masks, rotary embeddings
and whatever else passes from layer to layer are the model's own, and so are all bits.

`BlockChain.stream` turns the loops around: many forward passes, each in a thread of its own, wait before a layer until
its weights are there, go through it one after the other, and wait before the next, whose weights are made meanwhile:

    weights   | layer 0 | layer 1 made      | layer 2 made ...
    passes              | a0  b0  c0  d0    | a1  b1  c1  d1 ...

So weights are made once for many batches, and what is held between two layers is one hidden state for each batch.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Semaphore, Thread, local
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from tokenbound.config.family import FAMILY
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import clean_architecture
from tokenbound.models.hf_model import Loader, blank_model, refuse_uncovered, tied_names, transposed_layers
from tokenbound.models.quantized.layouts import LAYOUTS
from tokenbound.models.quantized.schemes import scheme_of
from tokenbound.models.smoothing_head import BIAS, SMOOTHING, WEIGHT, take_head
from tokenbound.models.sources import SchemeSource, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

HELD_BYTES = 1 << 31
"""Hidden states, masks and the like that passes waiting between two layers may hold together; more passes wait until
these are through, and the weights are made once more for them."""


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model."""

    prefix: str
    """Name of their list in the model."""
    modules: tuple[nn.Module, ...]


def find_layers(model: PreTrainedModel) -> Layers | None:
    """The list of decoder layers of a causal LM; None if it has none of as many as its config says.

    Args:
        model: a causal LM of transformers; one on the meta device serves.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({id(each) for each in module}) == count
    ]
    if not found:
        return None
    prefix, layers = max(found, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    tied = tied_names(model)
    if any(name.startswith(f"{prefix}.") for name in (*tied, *tied.values())):
        return None  # a weight that belongs to two places is not one layer's to bring and drop
    return Layers(prefix, tuple(layers))


@dataclass(frozen=True)
class _Slot:
    """A parameter of a layer that is there only while the layer runs."""

    module: nn.Module
    name: str
    absent: nn.Parameter
    """On the meta device."""
    source: str | None
    """The tensor that it is; None where it is made of several."""


class Block:
    """A layer, what of it comes and goes, and from where."""

    def __init__(self, module: nn.Module, slots: Sequence[_Slot], joined: Sequence[str]) -> None:
        self.module, self.slots, self.joined = module, slots, joined
        """Tensors that are joined or divided to become parameters."""

    def drop(self) -> None:
        """Give the weights up."""
        for slot in self.slots:
            slot.module._parameters[slot.name] = slot.absent


class BlockChain:
    """Brings the weights of each layer of a model when it runs."""

    def __init__(self, blocks: Sequence[Block], prefix: str, loader: Loader, device: torch.device) -> None:
        """Hang hooks before and behind each layer.

        Args:
            blocks: the layers of the loader's model, without matrices, in the order of their list.
            prefix: name of that list.
            loader: makes what several tensors become.
            device: where weights go.
        """
        self.model, self.blocks, self.device = loader.model, tuple(blocks), device
        self.prefix, self._loader = prefix, loader
        self.held_bytes = HELD_BYTES
        self.on_served: Callable[[int], None] | None = None
        """Told of each layer that all waiting passes have gone through."""
        self._thread = local()
        for index, block in enumerate(self.blocks):
            block.module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            block.module.register_forward_hook(partial(self._leave, index), always_call=True)

    def load(self, index: int) -> None:
        """Make the weights of a layer.

        Raises:
            InputError: a tensor cannot be made or is of another shape than the layer asks for.
        """
        block, source = self.blocks[index], self._loader.source
        for slot in block.slots:
            if slot.source is not None:
                tensor = source.tensor(slot.source, self.device)
                if tensor.shape != slot.absent.shape:
                    raise InputError(
                        f"tensor {slot.source!r} has shape {tuple(tensor.shape)}, but the architecture asks for "
                        f"{tuple(slot.absent.shape)}; give the config.json that belongs to the tensors"
                    )
                weight = tensor.to(slot.absent.dtype)
                slot.module._parameters[slot.name] = nn.Parameter(weight, requires_grad=slot.absent.requires_grad)
        if block.joined:
            self._loader.load(block.joined, self.device)
            for slot in block.slots:
                slot.module._parameters[slot.name].requires_grad_(slot.absent.requires_grad)  # type: ignore[union-attr]

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread: _Pass[Any] | None = getattr(self._thread, "current", None)
        if thread is None:
            self.load(index)
        else:
            thread.wait_at(index, _bytes_of((args, kwargs)))

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if getattr(self._thread, "current", None) is None:
            self.blocks[index].drop()

    @contextmanager
    def without_layers(self) -> Iterator[None]:
        """Within, the model goes from its embeddings straight to its last norm."""
        path, _, name = self.prefix.rpartition(".")
        parent = self.model.get_submodule(path)
        layers = parent._modules[name]
        parent._modules[name] = nn.ModuleList()
        try:
            yield
        finally:
            parent._modules[name] = layers

    def stream(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make several calls that each run the model forward, layer by layer for all of them; see the module.

        Args:
            calls: run one at a time, each in a thread of its own. What one needs of thread-local state (inference mode,
                function modes) it must set up itself.

        Returns:
            What they return, in their order.
        """
        results: list[T] = []
        rest = list(calls)
        while rest:
            first = _Pass(self._thread, rest[0])
            with _closing([first]) as passes:
                first.resume()
                fitting = max(1, self.held_bytes // first.held_bytes) if first.held_bytes else len(rest)
                for call in rest[1:fitting]:
                    passes.append(_Pass(self._thread, call))
                    passes[-1].resume()
                self._run(passes)
                results += [each.result() for each in passes]
                rest = rest[len(passes) :]
        return results

    def _run(self, passes: Sequence[_Pass[Any]]) -> None:
        """Serve the passes where they wait, layer by layer, until every one is at its end."""
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as maker:
            ahead: tuple[int, Future[None]] | None = None
            before = -1
            while (index := next((each.place for each in passes if each.place is not None), None)) is not None:
                if ahead is None or ahead[0] != index:
                    self._forget(ahead)
                    ahead = (index, maker.submit(self.load, index))
                ahead[1].result()
                guess = index + (1 if index >= before else -1)
                before = index
                ahead = (guess, maker.submit(self.load, guess)) if 0 <= guess < len(self.blocks) else None
                try:
                    for each in passes:
                        if each.place == index:
                            each.resume()
                finally:
                    self.blocks[index].drop()
                if self.on_served is not None:
                    self.on_served(index)
            self._forget(ahead)

    def _forget(self, ahead: tuple[int, Future[None]] | None) -> None:
        """Drop weights that were made for a layer at which no pass waits."""
        if ahead is not None:
            ahead[1].result()
            self.blocks[ahead[0]].drop()

    @contextmanager
    def recomputing(self, folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
        """Within, a backward pass goes through the model: each layer is computed once more when its turn comes.

        Passes wait before the layer on the way back too, so that its weights are made once for all of them. What goes
        into a layer on the way there is kept in files. On a CPU alone, where the backward pass runs in the thread that
        calls for it.

        Args:
            folder: for these files: the hidden states of all passes, once for each layer.
            on_wait: called on the way back before a pass waits, with whatever gradients it has left in parameters.
        """
        for index, block in enumerate(self.blocks):
            block.module.forward = partial(self._recomputed, index, block.module.forward, folder, on_wait)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in self.blocks:
                del block.module.forward

    def _recomputed(
        self,
        index: int,
        forward: Callable[..., Any],
        folder: Path,
        on_wait: Callable[[], None],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[Any, ...]:
        is_named = not args
        hidden = kwargs.pop("hidden_states") if is_named else args[0]
        rest: list[Any] = []

        def run(states: torch.Tensor) -> torch.Tensor:
            output = forward(hidden_states=states, **kwargs) if is_named else forward(states, *args[1:], **kwargs)
            rest[:] = [output] if isinstance(output, tuple) else []
            states_out: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return states_out

        def before_backward() -> None:
            on_wait()
            thread: _Pass[Any] | None = getattr(self._thread, "current", None)
            if thread is None:
                self.load(index)
            else:
                thread.wait_at(index, 0)

        def after_backward() -> None:
            if getattr(self._thread, "current", None) is None:
                self.blocks[index].drop()

        out: torch.Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
            hidden, run, folder, before_backward, after_backward
        )
        return (out, *rest[0][1:]) if rest else out


class _Recomputed(torch.autograd.Function):
    """A layer whose inner results are not kept: its input is, in a file, and it is computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
        folder: Path,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> torch.Tensor:
        """The layer's output."""
        ctx.run, ctx.before, ctx.after = run, before, after
        ctx.path = folder / f"{uuid.uuid4().hex}.pt"
        torch.save(hidden.detach().clone(), ctx.path)
        return run(hidden.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        """The gradient of its input; those of its parameters are added to them."""
        ctx.before()
        try:
            hidden = torch.load(ctx.path, weights_only=True).requires_grad_(True)
            ctx.path.unlink()
            with torch.enable_grad():
                torch.autograd.backward(ctx.run(hidden), gradient)
        finally:
            ctx.after()
        return hidden.grad, None, None, None, None


class _Abandoned(BaseException):
    """Ends a waiting pass whose others failed."""


class _Pass(Generic[T]):
    """One call in a thread of its own, which runs only while whoever resumed it waits."""

    def __init__(self, thread: local, call: Callable[[], T]) -> None:
        self._local, self._call = thread, call
        self._turn, self._idle = Semaphore(0), Semaphore(0)
        self._abandoned = False
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.place: int | None = None
        """The layer before which it waits; None before the start and at the end."""
        self.held_bytes = 0
        """What it holds there: its arguments, and the hidden states that the model began with."""
        self._thread = Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        self._turn.acquire()
        self._local.current = self
        try:
            if not self._abandoned:
                self._result.append(self._call())
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.place = None
            del self._call  # and with it what the call was given
            self._idle.release()

    def wait_at(self, index: int, held_bytes: int) -> None:
        """Called by the pass itself: let go until it is resumed."""
        self.place, self.held_bytes = index, held_bytes
        self._idle.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned

    def resume(self) -> None:
        """Let it run to the next layer, or to its end; what it raised is raised here."""
        self._turn.release()
        self._idle.acquire()
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """What the call returned; once."""
        return self._result.pop()

    def close(self) -> None:
        """End it, wherever it is."""
        self._abandoned = True
        self._turn.release()
        self._thread.join()


@contextmanager
def _closing(passes: list[_Pass[Any]]) -> Iterator[list[_Pass[Any]]]:
    try:
        yield passes
    finally:
        for each in passes:
            each.close()


def _bytes_of(tree: object) -> int:
    """Memory of the tensors in a call's arguments, and of its first once more: the model keeps what it began with."""
    tensors = [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + (tensors[0].untyped_storage().nbytes() if tensors else 0)


# --- From a source to a chain -------------------------------------------------------------------------------------


def require_layers(architecture: Mapping[str, Any], form: str) -> None:
    """Refuse an architecture whose weights cannot come and go layer by layer.

    Args:
        architecture: Hugging Face config as a dict.
        form: `packed` or `streamed`, for the message.

    Raises:
        InputError: it has no list of layers, or its layers are not those of transformers' plain model.
    """
    if reason := _unchained(architecture):
        raise InputError(f"how.weights: {form} is not possible, because {reason}; set how.weights: dense")


def has_layers(architecture: Mapping[str, Any]) -> bool:
    """Whether the weights of an architecture can come and go layer by layer."""
    return _unchained(architecture) is None


def _unchained(architecture: Mapping[str, Any]) -> str | None:
    kind = architecture.get("model_type")
    if FAMILY in architecture or kind == "markov":
        return "the model is of a family that is not made of decoder layers alone"
    scheme = scheme_of(architecture)
    if scheme is not None and scheme.package is not None:
        return f"{scheme.name} layers are loaded by their own package"
    if scheme is not None and scheme.name not in LAYOUTS:
        return f"weights of {scheme.name} codes are made all at once"
    if find_layers(blank_model({key: value for key, value in architecture.items() if key != SMOOTHING})) is None:
        return f"the {kind} architecture has no list of decoder layers"
    return None


def build_chain(
    architecture: Mapping[str, Any],
    source: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    form: str = "streamed",
) -> BlockChain:
    """Make the causal LM that an architecture and its tensors define, with layers whose weights come and go.

    What is refused is what `build_model` refuses.

    Args:
        architecture: Hugging Face config as a dict, `model_type` included.
        source: its tensors.
        dtype: arithmetic of the model body.
        device: where the model is to run.
        form: `packed` or `streamed`, for messages.

    Raises:
        InputError: as `build_model`, or the architecture has no list of layers.
    """
    architecture, device = clean_architecture(architecture), torch.device(device)
    require_layers(architecture, form)
    names, smoothing = set(source.names), None
    if SMOOTHING in architecture:
        head = {name: source.tensor(name, torch.device("cpu")) for name in (WEIGHT, BIAS) if name in names}
        architecture, _, smoothing = take_head(architecture, head)
        names -= {WEIGHT, BIAS}
    blank = blank_model(architecture, len(names))
    scheme = scheme_of(architecture)
    if scheme is not None:
        source = SchemeSource(source, scheme, architecture, dtype=dtype, transposed=transposed_layers(blank))
        names = set(source.names)
    refuse_uncovered(blank, {name: _outline(source, name) for name in names})
    loader = Loader(blank, source, names, dtype=dtype)
    layers = find_layers(loader.model)
    assert layers is not None, "checked above"
    blocks = _blocks(loader, layers)
    slots = [slot for block in blocks for slot in block.slots]
    away = {slot.source for slot in slots if slot.source is not None} | {name for b in blocks for name in b.joined}
    source.keep(away)
    loader.finish(sorted(names - away), device)
    if smoothing is not None:
        loader.model.smoothing_head = smoothing.requires_grad_(False).to(device)
    return BlockChain(blocks, layers.prefix, loader, device)


def _outline(source: TensorSource, name: str) -> torch.Tensor:
    return torch.empty(source.shape(name) or (0,), dtype=source.dtype(name), device="meta")


def _blocks(loader: Loader, layers: Layers) -> list[Block]:
    sources: dict[str, str] = {}
    joined: list[list[str]] = [[] for _ in layers.modules]
    for name, (target, is_joined) in loader.targets.items():
        if not target.startswith(f"{layers.prefix}."):
            continue
        index = int(target.removeprefix(f"{layers.prefix}.").partition(".")[0])
        if is_joined:
            joined[index].append(name)
        else:
            sources[target] = name
    return [
        Block(module, list(_slots(module, f"{layers.prefix}.{index}", sources, bool(joined[index]))), joined[index])
        for index, module in enumerate(layers.modules)
    ]


def _slots(layer: nn.Module, prefix: str, sources: Mapping[str, str], has_joined: bool) -> Iterator[_Slot]:
    """What of a layer comes and goes: its parameters of two axes or more, and whatever several tensors become."""
    for path, module in layer.named_modules(prefix=prefix):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            source = sources.get(f"{path}.{name}")
            if source is None and not has_joined:
                continue  # missing, which the loader refuses
            if source is None or parameter.ndim > 1:
                yield _Slot(module, name, parameter, source)
