"""What a method is: settings that a config may give it, and how a tensor is coded under them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from tokenbound.errors import InputError

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.codecs import Coded

PLUGIN_KEY = "plugin"
"""Beside the settings in an artifact: name and version of the distribution whose method encoded it."""


class CompressionMethod(BaseModel, ABC):
    """A way to compress a model, tensor by tensor: an instance is a choice of its settings.

    A subclass declares `method: Literal["its name"] = "its name"`, its options as further fields with a default and a
    docstring each, the attributes below that differ, and `encode`.

    Attributes:
        name: The default of `method`: what configs and `--method` call it.
        needs_calibration: It looks at tokens: `encode` is given a calibration of the model, so configs must name a
            corpus, and a `holdout` prior does not allow it.
        codes_adapters: It can code the factors of a LoRA adapter, of which there is no calibration.
        writes_grid: It codes matrices as `UNIFORM`, whose integers `finish` can train further.
        is_exact: It keeps every bit, so that other tools' quantized weights may be given to it.
        is_search: It is a `SearchMethod`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    codes_adapters: ClassVar[bool] = True
    writes_grid: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False
    is_search: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Take the name from the field `method`, so that it is spelt once.

        Raises:
            TypeError: a field has the name under which artifacts keep the plugin.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if PLUGIN_KEY in cls.model_fields:
            raise TypeError(f"the settings of {cls.__name__} cannot have a field {PLUGIN_KEY!r}; rename it")
        if "method" in cls.model_fields:
            cls.name = cls.model_fields["method"].default

    @abstractmethod
    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Code one tensor.

        Tensors are coded independently, in any order, on any machine: the code may depend on nothing but the arguments
        and the settings, and the same arguments must give the same bytes.

        Args:
            name: Its name in the checkpoint.
            tensor: Finite, on the CPU, of any shape and dtype: also scalars, empty tensors and integers, which
                `codecs.select.code_exact` takes.
            calibration: Of the model; None where none was collected, which `calibrated` turns into an error.

        Returns:
            Number and payload of one of the wire forms of `codecs`.

        Raises:
            InputError: the tensor cannot be coded; the message names it.
        """

    def calibrated(self, calibration: Calibration | None) -> Calibration:
        """The calibration that `encode` was given.

        Raises:
            InputError: there is none.
        """
        if calibration is None:
            raise InputError(
                f"method `{self.name}` needs a calibration; collect one with `collect_calibration` and pass it as "
                "`calibration`"
            )
        return calibration


@dataclass(frozen=True)
class SearchSpace:
    """One setting of another method, to be searched for the smallest bound.

    Attributes:
        setting: What the setting is called.
        low: Smallest value tried.
        high: Largest value tried.
        tries: Most values tried.
        method: The method at a value.
        limits: Names of the settings that move `low` and `high`; None where nothing does.
    """

    setting: str
    low: float
    high: float
    tries: int
    method: Callable[[float], CompressionMethod]
    limits: tuple[str, str] | None = None


class SearchMethod(CompressionMethod, ABC):
    """A search over another method's settings: it encodes the whole model for each and keeps the best artifact.

    It needs tokens of the corpus, on which each candidate is scored; the artifact names the method that was chosen.
    """

    needs_calibration: ClassVar[bool] = True
    is_search: ClassVar[bool] = True

    @abstractmethod
    def space(self, *, of_adapter: bool) -> SearchSpace:
        """What is searched.

        Args:
            of_adapter: The tensors are the factors of an adapter, of which there is no calibration.
        """

    def encode(self, name: str, tensor: torch.Tensor, calibration: Calibration | None) -> Coded:
        """Refuse: one tensor says nothing about a bound.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"method `{self.name}` searches over whole artifacts; use `tokenbound compress`, or encode with the method "
            "that it searches"
        )
