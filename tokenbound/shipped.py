"""Data that ships with the package, for every part of it."""

from __future__ import annotations

from importlib import resources


def demo_artifact() -> bytes:
    """The shipped artifact's bytes.

    >>> from tokenbound.compression.artifact import parse_artifact
    >>> parse_artifact(demo_artifact()).architecture["model_type"]
    'llama'
    """
    return resources.files("tokenbound").joinpath("data/demo.tokenbound").read_bytes()
