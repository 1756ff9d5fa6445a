"""The embedded default: a byte model shipped with the package, on the standard library that is already there."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from tokenbound.config.run import RunConfig, validate
from tokenbound.shipped import demo_artifact

if TYPE_CHECKING:
    from tokenbound.api import Certificate

__all__ = ["DEMO_WINDOWS", "demo_artifact", "demo_certificate", "demo_config"]

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


def demo_certificate() -> Certificate:
    """The demo's model on every token of the standard library that it was trained on, as the README shows it.

    `make demo` scores a sample of that library, which pays for the models that were tried on samples of it before.

    >>> demo_certificate().corpus["files"]
    1790
    """
    from tokenbound.api import Certificate

    text = resources.files("tokenbound").joinpath("data/demo.certificate.json").read_text(encoding="utf-8")
    return Certificate.model_validate_json(text)
