"""The embedded default: a byte model shipped with the package, on the standard library that is already there."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from tokenbound.config import RunConfig, validate

if TYPE_CHECKING:
    from tokenbound.certificate import Certificate

DEMO_WINDOWS = 1280
"""Windows that the demo scores: about a minute on two processors."""


def demo_config(output: str, *, windows: int | None = DEMO_WINDOWS) -> RunConfig:
    """The demo as a config.

    Args:
        output: run directory.
        windows: how many to score; None scores every token.

    >>> demo_config("runs/demo").what.sample.windows
    1280
    """
    tree = {
        "what": {
            "model": {"artifact": "demo"},
            "corpus": {
                "source": "python-stdlib",
                "tokenizer": "bytes",
                "tokenizer_is": "given",
                "add_bos": False,
                "add_eos": True,
            },
            "windows": {"length": 512, "context": "packed"},
            "sample": {"windows": windows},
        },
        "how": {"output": output},
    }
    return validate(RunConfig, tree, origin="of the demo")


def demo_artifact() -> bytes:
    """The shipped artifact's bytes.

    >>> from tokenbound.compression.artifact import parse_artifact
    >>> parse_artifact(demo_artifact()).architecture["model_type"]
    'llama'
    """
    return resources.files("tokenbound").joinpath("data/demo.tokenbound").read_bytes()


def demo_certificate() -> Certificate:
    """The demo's model on every token of the standard library that it was trained on, as the README shows it.

    `make demo` scores a sample of that library, which pays for the models that were tried on samples of it before.

    >>> demo_certificate().corpus["files"]
    1790
    """
    from tokenbound.certificate import Certificate

    text = resources.files("tokenbound").joinpath("data/demo.certificate.json").read_text(encoding="utf-8")
    return Certificate.model_validate_json(text)
