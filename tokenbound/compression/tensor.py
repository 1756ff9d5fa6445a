"""One tensor, coded and decoded; an artifact is many of them under one index (see `artifact`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenbound.compression.codecs import CODECS
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.dtypes import dtype_code, dtype_of
from tokenbound.compression.methods import METHODS, CompressionMethod
from tokenbound.compression.symbols import BLOCK_ELEMENTS
from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration

REPEAT_SLACK = 16
"""Bytes by which a code that stands for several tensors may exceed one of them. Exact codes never do by more; without a
limit, a short file could have one long code read again for every tensor that it names."""


def decoded_bytes(shape: Sequence[int], dtype: int) -> int:
    """Memory of a decoded tensor, by its shape and the wire number of its dtype."""
    return math.prod(shape) * dtype_of(dtype).itemsize


def may_repeat(num_bytes: int, shape: Sequence[int], dtype: int) -> bool:
    """Whether a code of so many bytes is short enough to stand for further tensors."""
    return num_bytes <= decoded_bytes(shape, dtype) + REPEAT_SLACK


@dataclass(frozen=True)
class CodedTensor:
    """One tensor, coded.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Wire number of its dtype.
        codec: Wire number of its codec.
        payload: Its code.
        repeats: Of a tensor that an artifact stores no code for: an earlier one, the same to the last bit, whose code
            is this one's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    codec: int
    payload: bytes | memoryview
    repeats: str | None = None

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def decoded_bytes(self) -> int:
        """Memory of the decoded tensor."""
        return decoded_bytes(self.shape, self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Its share of the section of tensors."""
        return 0 if self.repeats else len(self.payload)

    @property
    def may_repeat(self) -> bool:
        """Whether its code is short enough to stand for further tensors."""
        return may_repeat(len(self.payload), self.shape, self.dtype)


def encode_tensor(
    name: str, tensor: torch.Tensor, settings: CompressionMethod, calibration: Calibration | None = None
) -> CodedTensor:
    """Encode one tensor.

    Args:
        name: Its name in the checkpoint.
        tensor: Its values.
        settings: A method with its settings.
        calibration: Of the model, for the methods that need one.

    Raises:
        InputError: a non-finite value, an unknown dtype, a method without its calibration, or a plugin that writes
            what cannot be decoded; by name.
    """
    dtype = dtype_code(tensor.dtype, name)
    _require_finite(name, tensor)
    codec, payload = settings.encode(name, tensor, calibration)
    coded = CodedTensor(name, tuple(tensor.shape), dtype, codec, payload)
    if settings.name not in METHODS.built_in:
        _require_decodable(coded, settings)
    return coded


def _require_decodable(coded: CodedTensor, settings: CompressionMethod) -> None:
    """Decode what a plugin wrote once: an artifact that fails later has cost its calibration and its search."""
    try:
        if coded.codec not in CODECS:
            raise ArtifactError(f"codec {coded.codec} is none of {sorted(CODECS)}")
        decode_tensor(coded)
    except ArtifactError as error:
        raise InputError(
            f"method `{settings.name}` of {METHODS.origin(settings.name)} wrote a code of tensor {coded.name!r} that "
            f"cannot be decoded: {error}; fix the plugin, or choose another method"
        ) from error


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    for part in torch.split(tensor.detach().reshape(-1), BLOCK_ELEMENTS):
        wide = part if part.dtype.itemsize > 1 else part.float()
        if not bool(torch.isfinite(wide).all()):
            raise InputError(f"tensor {name!r} holds NaN or infinity; repair or remove it before compressing")


def decode_tensor(coded: CodedTensor) -> torch.Tensor:
    """Decode one tensor.

    Raises:
        ArtifactError: its payload is not what its codec writes; the message names the tensor.
    """
    try:
        return CODECS[coded.codec].decode(memoryview(coded.payload), coded.shape, dtype_of(coded.dtype))
    except ArtifactError as error:
        raise ArtifactError(f"{error} (tensor {coded.name!r})") from error
