"""The one reader of YAML configs: no key twice, no number that is text, nothing that grows when it is read."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Hashable
from typing import Any

import yaml
from pydantic import BaseModel

from tokenbound.store.strict_json import StrictJsonError, check_tree, shortened

MAX_BYTES = 1 << 24
"""Bytes of a config: one that names a hundred thousand files has some ten million."""
MAX_VALUES = 1_000_000
"""Values in a config, each counted as often as it is referred to: a few lines of references can stand for billions."""


class StrictYamlError(ValueError):
    """What is wrong with a config's text, and where."""


MAX_MERGED = 100_000
"""Keys that one mapping may get from others by `<<`: they are copied before anything else sees them."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once and is text."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As usual, unless that multiplies a few lines without end."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_MERGED:
            raise StrictYamlError(f"line {node.start_mark.line + 1}: more than {MAX_MERGED:,} keys by merging")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As usual, after looking at the keys."""
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise StrictYamlError(
                    f"line {line}: the key {shortened(str(key_node.value))} is not text; put it in quotes"
                )
            if key_node.value in seen:
                raise StrictYamlError(f"line {line}: the key {shortened(str(key_node.value))!r} is given twice")
            seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep=deep))


# YAML 1.1 takes 1e-3 for text because it has no point; YAML 1.2, JSON and everyone who writes it take it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    r"""Plain data from YAML.

    Raises:
        StrictYamlError: it is not YAML, a key is given twice, a number is not finite or does not fit into 64 bits, or
            the whole is too large or too deep; the message is one line.

    >>> parse_yaml("lr: 3e-3")
    {'lr': 0.003}
    >>> parse_yaml("delta: 0.05\ndelta: 0.5")
    Traceback (most recent call last):
    tokenbound.store.strict_yaml.StrictYamlError: line 2: the key 'delta' is given twice
    """
    if len(text) > MAX_BYTES:
        raise StrictYamlError(f"{len(text):,} characters, more than the {MAX_BYTES:,} of the largest config")
    try:
        tree = yaml.load(text, Loader=_Loader)
        check_tree(tree, max_values=MAX_VALUES)
    except RecursionError:
        raise StrictYamlError("nested too deeply") from None
    except StrictJsonError as error:
        raise StrictYamlError(str(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, StrictYamlError):
            raise
        raise StrictYamlError(" ".join(str(error).rstrip(" ^").split())) from None
    return tree


def as_json(tree: object) -> str:
    """The same data as JSON, which has only text, numbers, booleans, lists and mappings.

    Raises:
        StrictYamlError: there is something else in it.
    """
    try:
        return json.dumps(tree, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise StrictYamlError(str(error)) from None


def _plain(value: object) -> object:
    if isinstance(value, datetime.date | datetime.datetime):  # YAML's, of an unquoted name
        return value.isoformat()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{shortened(str(value))} is neither text nor a number, boolean, list or mapping")
