"""Tensors by name that are read when they are asked for: what a model is while it must not be held in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Header = tuple["torch.dtype", tuple[int, ...]]
"""Of a tensor its dtype and shape."""


class TensorMap(Mapping[str, "torch.Tensor"]):
    """Tensors by name, each read or computed anew whenever it is asked for: whoever needs one twice keeps it."""

    @abstractmethod
    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor, which is not read for it.

        Raises:
            KeyError: there is none of this name.
        """

    names: Mapping[str, object]
    """The names, in order, as keys."""

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; none is read for it."""
        return name in self.names


class RenamedTensors(TensorMap):
    """The tensors of another mapping, under names of their own.

    Example:
        >>> import torch
        >>> tensors = RenamedTensors({"w": torch.zeros(2)}, {"model.w": "w", "copy.w": "w"})
        >>> sorted(tensors), tensors.header("copy.w")
        (['copy.w', 'model.w'], (torch.float32, (2,)))
    """

    names: Mapping[str, str]

    def __init__(self, source: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        """Read nothing yet.

        Args:
            source: The tensors.
            names: Of each name here, the one there.
        """
        self.source, self.names = source, dict(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.source[self.names[name]]

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor."""
        return header_of(self.source, self.names[name])


class OverlaidTensors(TensorMap):
    """The tensors of a mapping, some of them replaced."""

    def __init__(self, source: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]) -> None:
        """Read nothing yet.

        Args:
            source: The tensors.
            changed: Those that take the place of others, or are added.
        """
        self.source, self.changed = source, changed

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.changed[name] if name in self.changed else self.source[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(dict.fromkeys([*self.source, *self.changed]))

    def __len__(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.changed or name in self.source

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor."""
        return header_of(self.changed if name in self.changed else self.source, name)


def header_of(tensors: Mapping[str, torch.Tensor], name: str) -> Header:
    """Dtype and shape of a tensor, which is read only where there is no other way."""
    if isinstance(tensors, TensorMap):
        return tensors.header(name)
    tensor = tensors[name]
    return tensor.dtype, tuple(tensor.shape)
