"""The methods of compression, one file each, found through `METHODS`.

Adding a method is one file here and one test. The file holds one subclass of `CompressionMethod` (see `base`; `rtn` is
the shortest example): the settings that a config may give, what the method needs, and `encode`, which ends in
`codecs.select`. Config, command line, engine and messages find it here; nothing else is edited. Configs are validated
where neither torch nor NumPy is wanted, so the file imports them inside functions or leaves the work to `quantizers`.

A package of your own may bring one through an entry point; its class is then used by its name like the others:

    [project.entry-points."tokenbound.methods"]
    sign = "my_package.sign:SignMethod"

It chooses values and writes them in a wire form of `codecs`, mostly as integers on a grid (`codecs.uniform.Grid`,
`codecs.select.code_grid`), and cannot bring a wire form of its own: the decoder is part of every hypothesis and must be
this package's. So whoever verifies a certificate need not have the plugin. The artifact names the distribution and
version that encoded it, and so does every certificate of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenbound.compression.methods.base import PLUGIN_KEY, CompressionMethod, SearchMethod, SearchSpace
from tokenbound.plugins import Registry

__all__ = [
    "METHODS",
    "CompressionMethod",
    "SearchMethod",
    "SearchSpace",
    "built_in_methods",
    "plugins_of",
    "settings_record",
]

METHODS = Registry[CompressionMethod](
    "compression method",
    group="tokenbound.methods",
    package="tokenbound.compression.methods",
    contract="tokenbound.compression.methods.base:CompressionMethod",
)
"""By name; a name that is not built in is looked for among the installed plugins."""


def built_in_methods(holds: Callable[[type[CompressionMethod]], bool] = lambda method: True) -> str:
    """The built-in methods of which something holds, for messages.

    >>> built_in_methods(lambda method: method.writes_grid)
    'rtn, kfac or auto'
    """
    *others, last = [name for name, method in reversed(list(METHODS.built_in.items())) if holds(method)]
    return f"{', '.join(others)} or {last}" if others else last


def settings_record(settings: CompressionMethod) -> dict[str, Any]:
    """Settings as an artifact keeps them: with the distribution and version of a plugin.

    Raises:
        InputError: the plugin's distribution is not installed.

    >>> from tokenbound.compression.methods.rtn import RoundToNearestSettings
    >>> settings_record(RoundToNearestSettings(step=0.5))
    {'method': 'rtn', 'step': 0.5}
    """
    origin = None if settings.name in METHODS.built_in else METHODS.origin(settings.name)
    return settings.model_dump(mode="json") | ({} if origin is None else {PLUGIN_KEY: origin})


def plugins_of(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The plugin that encoded an artifact, in the form of `tokenbound.plugins.plugins_used`.

    Read from the artifact and not from what is installed: it may have been encoded elsewhere, or by an older version.

    Args:
        record: The artifact's settings.

    >>> plugins_of({"method": "rtn", "step": 0.5})
    {}
    >>> plugins_of({"method": "sign", "plugin": "toy 1.0"})
    {'tokenbound.methods': {'sign': 'toy 1.0'}}
    """
    origin = record.get(PLUGIN_KEY)
    return {} if origin is None else {METHODS.group: {str(record.get("method")): str(origin)}}
