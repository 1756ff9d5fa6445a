"""The one reader of JSON records: what could be read in two ways, or exhausts memory, is refused by name.

Python's own reader keeps the last of two equal keys, takes NaN and Infinity, and gives integers of any size. A
certificate is evidence between parties who may read it with other tools, so all of these are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 1 << 28
"""Bytes of a record: a plan that names a million files has some 100 MB; nothing else comes near."""
MAX_DEPTH = 32
"""Levels of nesting: certificates have six, a model's architecture in a sweep's rows perhaps ten."""
MAX_NODES = 20_000_000
"""Values in all: the names of ten million files. YAML's references could multiply a few lines without end."""
INTEGER_BITS = 64
"""Size of integers that other tools can read."""
SUM_BITS = 128
"""Size of the integers in a commit record: its sums are fixed-point numbers with 32 binary places, and a sum of squares
over 2^19 tokens passes 64 bits."""


class StrictJsonError(ValueError):
    """What is wrong with a record, and in which field."""


@dataclass(frozen=True)
class _Refused:
    """Stands in a tree where a value cannot be taken, until its path is known."""

    reason: str


def parse_json(data: bytes, *, integer_bits: int = INTEGER_BITS, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON record.

    Args:
        data: its bytes, UTF-8.
        integer_bits: size of the largest integer.
        max_bytes: how large it may be.

    Raises:
        StrictJsonError: it is larger, or not JSON, or a key is given twice, a number is not finite or too large, or it
            is nested too deeply; the message names the field.

    >>> parse_json(b'{"a": 1}')
    {'a': 1}
    >>> parse_json(b'{"a": {"b": 1, "b": 2}}')
    Traceback (most recent call last):
    tokenbound.store.strict_json.StrictJsonError: field 'a': the key 'b' is given twice
    """
    if len(data) > max_bytes:
        raise StrictJsonError(f"{len(data):,} bytes, more than the {max_bytes:,} of the largest record")
    try:
        tree = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=lambda name: _Refused(f"{name} is not a number in JSON"),
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError:
        raise StrictJsonError(f"nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON: {error}") from None
    check_tree(tree, integer_bits=integer_bits)
    return tree


def check_tree(tree: object, *, integer_bits: int = INTEGER_BITS, max_values: int = MAX_NODES) -> None:
    """Refuse plain data that no record may hold.

    Args:
        tree: dictionaries, lists and scalars.
        integer_bits: size of the largest integer.
        max_values: how many values there may be.

    Raises:
        StrictJsonError: an integer or number is too large, text is not Unicode, or the nesting is too deep.

    >>> check_tree({"seed": 2**64})
    Traceback (most recent call last):
    tokenbound.store.strict_json.StrictJsonError: field 'seed': 18446744073709551616 does not fit into 64 bits
    """
    left: list[tuple[tuple[object, ...], object]] = [((), tree)]
    seen = 0
    while left:
        path, node = left.pop()
        seen += 1
        if seen > max_values:
            raise StrictJsonError(f"more than {max_values:,} values")
        if len(path) > MAX_DEPTH:
            raise StrictJsonError(f"{_field(path[:3])}nested more than {MAX_DEPTH} levels deep")
        reason = _reason(node, integer_bits)
        if reason is not None:
            raise StrictJsonError(_field(path) + reason)
        if isinstance(node, dict):
            for key, value in node.items():
                if isinstance(key, str) and not _is_unicode(key):
                    raise StrictJsonError(f"{_field(path)}the key {key!a} is not Unicode text")
                left.append(((*path, key), value))
        elif isinstance(node, list | tuple):
            left.extend(((*path, index), value) for index, value in enumerate(node))


def _reason(node: object, integer_bits: int) -> str | None:
    """Why a value cannot be taken; None where it can."""
    if isinstance(node, _Refused):
        return node.reason
    if isinstance(node, int) and not isinstance(node, bool):
        limit = 1 << integer_bits
        return None if -limit // 2 <= node < limit else f"{shortened(str(node))} does not fit into {integer_bits} bits"
    if isinstance(node, float) and not math.isfinite(node):
        return f"{node} is not a finite number"
    if isinstance(node, str) and not _is_unicode(node):
        return "the text is not Unicode"
    return None


def _is_unicode(text: str) -> bool:
    """Whether the text has no half of a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | _Refused:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            return _Refused(f"the key {shortened(str(key))!r} is given twice")
        found[key] = value
    return found


def _integer(text: str) -> int | _Refused:
    # Reading thousands of digits takes quadratic time, so they are counted first.
    return int(text) if len(text) <= 48 else _Refused(f"{shortened(text)} does not fit into 64 bits")


def _float(text: str) -> float | _Refused:
    value = float(text)
    return value if math.isfinite(value) else _Refused(f"{shortened(text)} is not a finite number")


def _field(path: tuple[object, ...]) -> str:
    return f"field {'.'.join(shortened(str(part)) for part in path)!r}: " if path else ""


def shortened(text: str, limit: int = 40) -> str:
    """A text of at most so many characters, for an error message.

    >>> shortened("x" * 41) == "x" * 37 + "..."
    True
    """
    return text if len(text) <= limit else text[: limit - 3] + "..."
