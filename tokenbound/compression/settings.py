"""What a config may ask of the compressor: the built-in methods and those of plugins. Light: no torch, no NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationInfo, WrapValidator

from tokenbound.compression.methods import METHODS, CompressionMethod
from tokenbound.compression.methods.auto import AutoSettings
from tokenbound.compression.methods.e8 import E8Settings
from tokenbound.compression.methods.gptq import GptqSettings
from tokenbound.compression.methods.kfac import KfacSettings
from tokenbound.compression.methods.lossless import LosslessSettings
from tokenbound.compression.methods.rtn import RoundToNearestSettings

__all__ = [
    "AutoSettings",
    "CompressSettings",
    "E8Settings",
    "GptqSettings",
    "KfacSettings",
    "LosslessSettings",
    "RoundToNearestSettings",
]

BY_METHOD = Field(discriminator="method")


def _of_any_method(value: Any, of_built_in: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """Validate settings by the class of the method that they name, which a plugin may bring.

    Raises:
        ValueError: there is no such method, its plugin cannot be used, or the settings are not what it takes.
    """
    name = value.get("method") if isinstance(value, Mapping) else getattr(value, "method", None)
    if not isinstance(name, str):
        return of_built_in(value)
    method = METHODS.get(name)  # also of a built-in name, which a plugin must not claim
    if name in METHODS.built_in:
        return of_built_in(value)
    if info.mode == "json":  # where a number as text is a mistake; pydantic does not say here whether it is
        return _of_plugin(method).validate_json(json.dumps(value), strict=True)
    return _of_plugin(method).validate_python(value)


@cache
def _of_plugin(method: type[CompressionMethod]) -> TypeAdapter[Any]:
    """A union of one more than the plugin's class, so that errors have the form of those of the built-in methods."""
    union: Any = Annotated[Union[method, LosslessSettings], BY_METHOD]  # noqa: UP007 (a class of run time)
    return TypeAdapter(union)


if TYPE_CHECKING:
    CompressSettings = CompressionMethod
else:
    CompressSettings = Annotated[
        Union[tuple(METHODS.built_in.values())],  # noqa: UP007
        BY_METHOD,
        WrapValidator(_of_any_method),
        SerializeAsAny(),
    ]
    """A field of a config: the settings of one method, told apart by `method`."""
