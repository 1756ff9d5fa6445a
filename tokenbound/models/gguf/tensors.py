"""The tensors of a GGUF file, each read from it when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from tokenbound.compression.codecs.ggml import MARK
from tokenbound.compression.tensor_map import Header, TensorMap
from tokenbound.errors import InputError
from tokenbound.gguf_file import GgufFile, locate_gguf, read_gguf
from tokenbound.models.gguf.architectures import Config, architecture_of
from tokenbound.models.gguf.checkpoint import PART, read_gguf_architecture, stored_header, stored_names, stored_tensor
from tokenbound.models.gguf.dense import dense_weights
from tokenbound.models.quantized.schemes import QUANTIZATION
from tokenbound.store.copies import local_copy


class GgufTensors(TensorMap):
    """The tensors of a GGUF file by the model's names. A process reads the file's header once."""

    names: Mapping[str, tuple[str, ...]]

    def __init__(
        self,
        path: Path,
        origin: str,
        *,
        dense: bool,
        names: Mapping[str, tuple[str, ...]],
        headers: Mapping[str, Header],
    ) -> None:
        """Read nothing yet; `of` makes one.

        Args:
            path: The file on this machine.
            origin: What the checkpoint was named by: a machine without this file finds it by that name.
            dense: Whether blocks stand for their weights, in float32.
            names: The names of each tensor's parts as they are stored here; of most it is one.
            headers: Dtype and shape of each tensor.
        """
        self.path, self.origin, self.dense = path, origin, dense
        self.names, self.headers = dict(names), dict(headers)

    @staticmethod
    def of(path: Path, origin: str, *, dense: bool) -> GgufTensors:
        """All tensors of a file.

        Args:
            path: as in `__init__`.
            origin: as in `__init__`.
            dense: as in `__init__`.

        Raises:
            InputError: the file is not sound, or holds what is not understood.
        """
        file, config, stored = _opened(path)
        dense = dense and QUANTIZATION in config
        names: dict[str, tuple[str, ...]] = {}
        for name in sorted(stored):  # so that the parts of a tensor come in their order
            target = name.partition(MARK)[0].partition(PART)[0] if dense else name
            names[target] = (*names.get(target, ()), name)
        headers = {name: _dense_header(file, parts, stored) for name, parts in names.items()}
        if not dense:
            headers = {name: stored_header(file, stored[name]) for name in names}
        return GgufTensors(path, origin, dense=dense, names=names, headers=headers)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            InputError: the file is missing or damaged by now.
        """
        path = self.path if self.path.exists() else locate_gguf(local_copy(self.origin))
        if path is None:
            raise InputError(f"{self.origin} is not a GGUF file any more; put it back")
        file, config, stored = _opened(path)
        parts = {part: stored_tensor(file, config, stored[part]) for part in self.names[name]}
        if not self.dense:
            return parts[name]
        return dense_weights(parts, dtype=torch.float32, transposed=lambda layer: _is_transposed(file, layer))[name]

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor."""
        return self.headers[name]

    def only(self, names: Collection[str]) -> GgufTensors:
        """Those of these names."""
        kept = {name: parts for name, parts in self.names.items() if name in names}
        headers = {name: self.headers[name] for name in kept}
        return GgufTensors(self.path, self.origin, dense=self.dense, names=kept, headers=headers)


def _opened(path: Path) -> tuple[GgufFile, Config, dict[str, str]]:
    """A file's header, its config, and ggml's name of each tensor; kept as long as the file stays as it is."""
    found = path.stat()
    return _parsed(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=2)
def _parsed(path: Path, mtime_ns: int, size: int) -> tuple[GgufFile, Config, dict[str, str]]:
    file = read_gguf(path)
    return file, read_gguf_architecture(path), stored_names(file)


def _is_transposed(file: GgufFile, layer: str) -> bool:
    entry = architecture_of(file)
    return entry.is_transposed and layer.startswith(entry.prefix)


def _dense_header(file: GgufFile, parts: tuple[str, ...], stored: Mapping[str, str]) -> Header:
    """Of a tensor whose blocks have become weights, and whose parts are joined along their second axis."""
    dtype, shape = stored_header(file, stored[parts[0]])
    if MARK in parts[0]:
        dtype, shape = torch.float32, file.tensors[stored[parts[0]]].shape
        if _is_transposed(file, parts[0]):
            shape = shape[::-1]
    rows = sum(file.tensors[stored[part]].shape[1] for part in parts) if len(parts) > 1 else 0
    return dtype, (shape[0], rows, *shape[2:]) if rows else tuple(shape)
