"""Tensors read by several processes: the range coder keeps Python's lock, so that threads would wait for each other.

Worth it where one process has idle cores beside it: a replica on an accelerator, or a single one on a large machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.dtypes import bytes_tensor, dtype_of, tensor_bytes
from tokenbound.compression.tensor import CodedTensor, decode_tensor

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

WORTH_ELEMENTS = 1 << 27
"""Below so many elements in all, one process is done before others have started (some 5 seconds)."""

AHEAD = 2
"""Tensors that are given out for each process before the first of them is taken."""


@dataclass(frozen=True)
class FilePart:
    """A tensor whose code lies in a file: what is sent to a process in place of the code."""

    path: str
    start: int
    num_bytes: int
    item: CodedTensor
    """The tensor, without its code."""

    def read(self) -> CodedTensor:
        """The tensor with its code."""
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            return replace(self.item, payload=file.read(self.num_bytes))


def decode_tensors(coded: Sequence[CodedTensor], workers: int) -> dict[str, torch.Tensor]:
    """Decode tensors, bit for bit as `decode_tensor` does.

    Args:
        coded: From `parse_artifact`.
        workers: Processes at most; with one, or where it is not worth more, this process does it.

    Returns:
        By name, in the order given.

    Raises:
        ArtifactError: a payload is not what its codec writes; the message names the tensor.
    """
    found = {item.name: tensor for item, tensor in decode_each(coded, workers)}
    return {item.name: found[item.name] for item in coded}


def decode_each(
    coded: Sequence[CodedTensor], workers: int, sent: Callable[[CodedTensor], CodedTensor | FilePart] | None = None
) -> Iterator[tuple[CodedTensor, torch.Tensor]]:
    """As `decode_tensors`, one after the other in an order of their own: a few are in memory at a time.

    Args:
        coded: As there.
        workers: As there.
        sent: What another process gets of a tensor; default a copy of its code.
    """
    if num_processes(coded, workers) == 1:
        return ((item, decode_tensor(item)) for item in coded)
    return decode_in_processes(coded, workers, sent)


def num_processes(coded: Sequence[CodedTensor], workers: int) -> int:
    """How many processes it is worth to decode in, this one included where it is alone."""
    return max(1, workers) if sum(item.elements for item in coded) >= WORTH_ELEMENTS else 1


def decode_in_processes(
    coded: Sequence[CodedTensor], workers: int, sent: Callable[[CodedTensor], CodedTensor | FilePart] | None = None
) -> Iterator[tuple[CodedTensor, torch.Tensor]]:
    """As `decode_each`, in so many processes whatever the size."""
    for item, decoded in run_in_processes(_decode_bytes, coded, workers, sent):
        yield item, bytes_tensor(decoded, item.shape, dtype_of(item.dtype))


def run_in_processes(
    work: Callable[[CodedTensor], R],
    coded: Sequence[CodedTensor],
    workers: int,
    sent: Callable[[CodedTensor], CodedTensor | FilePart] | None = None,
) -> Iterator[tuple[CodedTensor, R]]:
    """What some work gives for each tensor, one after the other: a few results are in memory at a time.

    Args:
        work: A function of a module, which other processes can import; what it gives is sent between them.
        coded: As in `decode_tensors`.
        workers: Processes.
        sent: As in `decode_each`.
    """
    order = sorted(coded, key=lambda item: -item.elements)  # the longest first, so that none is waited for at the end
    waiting: deque[tuple[CodedTensor, Future[R]]] = deque()
    with ProcessPoolExecutor(min(workers, max(1, len(order))), get_context("spawn")) as pool:
        for item in order:
            waiting.append((item, pool.submit(_run, work, (sent or _portable)(item))))
            if len(waiting) > AHEAD * workers:
                yield _received(*waiting.popleft())
        while waiting:
            yield _received(*waiting.popleft())


def _received(item: CodedTensor, result: Future[R]) -> tuple[CodedTensor, R]:
    return item, result.result()


def _portable(item: CodedTensor) -> CodedTensor:
    """With a payload that can be sent."""
    return replace(item, payload=bytes(item.payload))


def _run(work: Callable[[CodedTensor], R], part: CodedTensor | FilePart) -> R:
    import torch

    torch.set_num_threads(1)
    return work(part.read() if isinstance(part, FilePart) else part)


def _decode_bytes(item: CodedTensor) -> NDArray[np.uint8]:
    return tensor_bytes(decode_tensor(item))
