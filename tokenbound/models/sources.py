"""Where a model's tensors come from, by name and one at a time, so that nobody needs all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol

import torch

from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.packed_weights import PackedWeight, pack_weight
from tokenbound.compression.tensor_map import header_of
from tokenbound.models.packed_file import PackedFile
from tokenbound.models.quantized.layouts import dense_layer, quantized_layers, weight_names
from tokenbound.models.quantized.schemes import Scheme


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None where only making it would tell."""
        ...

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype in which a tensor is given; None for that of the model."""
        ...

    def keep(self, names: Collection[str]) -> None:
        """Told once which tensors will be asked for again and again."""
        ...

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on a device, made anew or shared: not to be changed.

        Raises:
            InputError: it cannot be made; by name.
        """
        ...


class MapSource:
    """Tensors of a mapping: in memory, or read or decoded one by one whenever they are asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, which is not read for it."""
        return header_of(self._tensors, name)[1]

    def dtype(self, name: str) -> torch.dtype | None:
        """Its dtype, likewise."""
        return header_of(self._tensors, name)[0]

    def keep(self, names: Collection[str]) -> None:
        """Nothing is kept that the mapping does not keep."""

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on a device."""
        return self._tensors[name].to(device)


class PackedSource(MapSource):
    """Tensors of an artifact, of which those that are asked for often are kept in few bits, on the device if it can be.

    The others are decoded whenever they are asked for.
    """

    def __init__(self, artifact: ArtifactFile, device: torch.device, *, workers: int = 1) -> None:
        """Nothing is decoded yet.

        Args:
            artifact: a whole model.
            device: where packed weights are kept and values are made of them.
            workers: threads that decode.
        """
        super().__init__(artifact.tensors)
        self._artifact, self._device, self._workers = artifact, device, workers
        self._packed: dict[str, PackedWeight] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return sum(weight.num_bytes for weight in self._packed.values())

    def keep(self, names: Collection[str]) -> None:
        """Decode these once and keep them in few bits."""
        ordered = sorted(names)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="packing") as pool:
            self._packed.update(zip(ordered, pool.map(self._pack, ordered), strict=True))

    def _pack(self, name: str) -> PackedWeight:
        coded = self._artifact.coded(name)
        try:
            return pack_weight(coded).to(self._device)
        finally:
            self._artifact.release(coded)

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on a device."""
        weight = self._packed.get(name)
        return super().tensor(name, device) if weight is None else weight.dense(device)


class PackedFileSource(MapSource):
    """Tensors of an artifact, each made from the packed weights of a file whenever it is asked for."""

    def __init__(self, artifact: ArtifactFile, file: PackedFile, device: torch.device, *, resident: bool) -> None:
        """Nothing is read yet.

        Args:
            artifact: a whole model.
            file: its packed weights.
            device: where packed weights stay.
            resident: whether packed weights that are asked for often stay in memory: on an accelerator as a copy, else
                as pages that the processes of this machine share. If not, a weight's pages go once its values are made.
        """
        super().__init__(artifact.tensors)
        self._file, self._device, self._is_resident = file, device, resident
        self._kept: dict[str, PackedWeight] = {}

    def keep(self, names: Collection[str]) -> None:
        """Keep these on the device, if anything stays in memory."""
        for name in sorted(names) if self._is_resident else ():
            with self._file.reading(name, releases=self._device.type != "cpu") as weight:
                self._kept[name] = weight.to(self._device)

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on a device."""
        if (kept := self._kept.get(name)) is not None:
            return kept.dense(device)
        with self._file.reading(name) as weight:
            made = weight.to(device).dense(device)
            return made.clone() if self._file.holds(made) else made


class SchemeSource:
    """The dense weights that another tool's packed codes stand for; what belongs to no quantized layer is as it was.

    The weights are made on the host whatever the device, by the function that makes those of a dense replica.
    """

    def __init__(
        self,
        inner: TensorSource,
        scheme: Scheme,
        architecture: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        transposed: Callable[[str], bool] = lambda layer: False,
    ) -> None:
        """Find the quantized layers among the names.

        Args:
            inner: Packed codes, scales and what is not quantized.
            scheme: How it is quantized.
            architecture: With the quantization config.
            dtype: Of the weights.
            transposed: Of a layer's name, whether the model keeps its weight as [inputs, outputs].
        """
        self._inner, self._scheme, self._architecture = inner, scheme, architecture
        self._dtype, self._transposed = dtype, transposed
        names = set(inner.names)
        self._parts = {
            layer: [part for part in layout.parts if layer + part in names]
            for layer, layout in quantized_layers(scheme, names).items()
        }
        self._layer_of = {name: layer for layer in self._parts for name in weight_names(scheme, layer)}
        taken = {layer + part for layer, parts in self._parts.items() for part in parts}
        self._names = (names - taken) | self._layer_of.keys()
        self._made: dict[str, dict[str, torch.Tensor]] = {}
        self._lock = Lock()

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors of the unquantized model."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; of a quantized weight it is not known before it is made."""
        return None if name in self._layer_of else self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Its dtype; quantized weights come in that of the model."""
        return None if name in self._layer_of else self._inner.dtype(name)

    def keep(self, names: Collection[str]) -> None:
        """Keep what these weights are made of."""
        layers = {self._layer_of[name] for name in names if name in self._layer_of}
        parts = {layer + part for layer in layers for part in self._parts[layer]}
        self._inner.keep(parts | {name for name in names if name not in self._layer_of})

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on a device. Weights that one layer holds together are made together and given once."""
        layer = self._layer_of.get(name)
        if layer is None:
            return self._inner.tensor(name, device)
        with self._lock:
            if name not in self._made.get(layer, {}):
                self._made[layer] = self._dense(layer)
            weight = self._made[layer].pop(name)
            if not self._made[layer]:
                del self._made[layer]
        return weight.to(device)

    def _dense(self, layer: str) -> dict[str, torch.Tensor]:
        parts = {part: self._inner.tensor(layer + part, torch.device("cpu")) for part in self._parts[layer]}
        return dense_layer(
            self._scheme,
            self._architecture,
            layer,
            parts,
            dtype=self._dtype,
            transposed=self._transposed(layer),
        )
