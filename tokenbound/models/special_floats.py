"""Numbers of a config that JSON cannot write: infinities and NaN, as transformers tags them.

An architecture is strict JSON wherever it is stored, so such a number stands there as ``{"__float__": "Infinity"}``,
which is also how transformers writes it into `config.json`. Older checkpoints hold the bare word `Infinity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TAG = "__float__"
_VALUES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def tag_floats(value: Any) -> Any:
    """A copy of plain data in which each number that JSON cannot write is tagged; tuples become lists.

    >>> tag_floats({"time_step_limit": (0.0, float("inf"))})
    {'time_step_limit': [0.0, {'__float__': 'Infinity'}]}
    """
    if isinstance(value, Mapping):
        return {key: tag_floats(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [tag_floats(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def untag_floats(value: Any) -> Any:
    """A copy of plain data with the numbers that `tag_floats` tagged; an unknown tag is kept as it is.

    >>> untag_floats({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    {'time_step_limit': [0.0, inf]}
    """
    if isinstance(value, Mapping):
        if set(value) == {TAG} and value[TAG] in _VALUES:
            return _VALUES[value[TAG]]
        return {key: untag_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [untag_floats(each) for each in value]
    return value
