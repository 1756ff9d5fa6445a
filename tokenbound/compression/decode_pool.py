"""Tensors decoded by several processes: the range coder keeps Python's lock, so that threads would wait for each other.

Worth it where one process has idle cores beside it: a replica on an accelerator, or a single one on a large machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.dtypes import bytes_tensor, dtype_of, tensor_bytes
from tokenbound.compression.tensor import CodedTensor, decode_tensor

if TYPE_CHECKING:
    import torch

WORTH_ELEMENTS = 1 << 27
"""Below so many elements in all, one process is done before others have started (some 5 seconds)."""


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
    if num_processes(coded, workers) == 1:
        return {item.name: decode_tensor(item) for item in coded}
    return decode_in_processes(coded, workers)


def num_processes(coded: Sequence[CodedTensor], workers: int) -> int:
    """How many processes it is worth to decode in, this one included where it is alone."""
    return max(1, workers) if sum(item.elements for item in coded) >= WORTH_ELEMENTS else 1


def decode_in_processes(coded: Sequence[CodedTensor], workers: int) -> dict[str, torch.Tensor]:
    """As `decode_tensors`, in so many processes whatever the size."""
    order = sorted(coded, key=lambda item: -item.elements)  # the longest first, so that none is waited for at the end
    with ProcessPoolExecutor(min(workers, max(1, len(order))), get_context("spawn")) as pool:
        waiting = {item.name: pool.submit(_decode_bytes, _portable(item)) for item in order}
        decoded = {}
        for item in coded:
            decoded[item.name] = bytes_tensor(waiting.pop(item.name).result(), item.shape, dtype_of(item.dtype))
    return decoded


def _portable(item: CodedTensor) -> CodedTensor:
    """With a payload that can be sent."""
    return CodedTensor(item.name, item.shape, item.dtype, item.codec, bytes(item.payload))


def _decode_bytes(item: CodedTensor) -> NDArray[np.uint8]:
    import torch

    torch.set_num_threads(1)
    return tensor_bytes(decode_tensor(item))
