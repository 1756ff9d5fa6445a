"""Regular expressions in the configs of quantizers: none that could be matched for ever.

compressed-tensors, torchao and transformers hold the names of a model's layers against patterns from its config, with
`re`, which tries one after the other all ways in which a pattern may spread over a name. Here these ways are counted
before anything is matched. A sequence with d repetitions of open length, of one character each, spreads over n
characters in at most C(n + d, d) ways; alternatives add up and sequences multiply. A repetition of what is itself
ambiguous grows exponentially, and is refused, as are references to groups. Light: this does not pull in torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import comb
from typing import Any

from tokenbound.errors import InputError

_parser: Any = re._parser  # type: ignore[attr-defined]  # the parser that `re.compile` uses; it has no public name
_PREFIX = "re:"

NAME_CHARACTERS = 128
"""Length of a layer's name, above those that models have."""
MAX_WAYS = 1 << 28
"""Of all patterns of a config together. Twenty patterns with four open repetitions each are within it."""
MAX_CHARACTERS = 1 << 12
"""Of one pattern."""
MAX_OPEN = 8
"""Open repetitions that one pattern may have in sequence."""

Ways = Counter[int]
"""How many sequences there are with so many open repetitions."""


class _Ambiguous(Exception):
    """A pattern whose ways are not bounded by a polynomial of small degree."""


def require_quick_patterns(config: object, *, place: str = "the model's quantization config") -> None:
    """Refuse a config with patterns that might take for ever.

    Every text of the config is looked at, whatever it is used for: what is a pattern is for the packages to say.

    Args:
        config: texts in lists and mappings; those that begin with `re:` must be patterns.
        place: what the config is, for the message.

    Raises:
        InputError: the message shows the pattern.

    >>> require_quick_patterns({"ignore": ["lm_head", "re:.*self_attn.*"]})
    >>> require_quick_patterns({"ignore": ["re:(a+)+b"]})
    Traceback (most recent call last):
    tokenbound.errors.InputError: the model's quantization config has the pattern '(a+)+b', which may take too long...
    """
    total = 0
    for text in set(_texts(config)):
        total += _count(text, place)
        if total > MAX_WAYS:
            raise InputError(_refusal(text, "with the others of the config", place))


def _texts(tree: object) -> Iterator[str]:
    """All texts of a config, keys too."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def _count(text: str, place: str) -> int:
    """Ways of one text as a pattern; 0 for what is none."""
    pattern = text.removeprefix(_PREFIX)
    if len(pattern) > MAX_CHARACTERS:
        raise InputError(_refusal(pattern, f"having {len(pattern)} characters", place))
    try:
        found = _sequence(_parser.parse(pattern))
    except _Ambiguous as error:
        raise InputError(_refusal(pattern, str(error), place)) from None
    except (re.error, RecursionError, OverflowError) as error:
        if text.startswith(_PREFIX):
            raise InputError(f"{place} has the pattern {pattern[:60]!r}: {error}") from None
        return 0
    return sum(count * comb(NAME_CHARACTERS + order, order) for order, count in found.items())


def _refusal(pattern: str, reason: str, place: str) -> str:
    return (
        f"{place} has the pattern {pattern[:60]!r}, which may take too long to match "
        f"({reason}); write it with fewer repetitions, or name the layers"
    )


def _sequence(items: Iterable[tuple[Any, Any]]) -> Ways:
    total = Counter({0: 1})
    for item in items:
        ways, before = _item(*item), total
        total = Counter()
        for (order, count), (more, times) in ((a, b) for a in before.items() for b in ways.items()):
            total[order + more] += count * times
        if max(total) > MAX_OPEN:
            raise _Ambiguous(f"more than {MAX_OPEN} repetitions in sequence")
    return total


def _item(kind: Any, value: Any) -> Ways:
    name = str(kind)
    if name.endswith("_REPEAT"):
        return _repetition(*value)
    if name == "BRANCH":
        return sum((_sequence(branch) for branch in value[1]), Counter())
    if name == "SUBPATTERN":
        return _sequence(value[-1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return _sequence(value[1])
    if name == "ATOMIC_GROUP":
        return _sequence(value)
    if name.startswith("GROUPREF"):
        raise _Ambiguous("it refers to a group")
    return Counter({0: 1})


def _repetition(least: int, most: int, inner: Any) -> Ways:
    ways = _sequence(inner)
    if most <= 1:
        return ways + Counter({0: 1 - least})
    if ways != Counter({0: 1}) or inner.getwidth()[0] < 1:
        raise _Ambiguous("a repetition inside a repetition")
    return Counter({0: most - least + 1}) if most - least < NAME_CHARACTERS else Counter({1: 1})
