"""The embedded default: a byte model shipped with the package, on the standard library that is already there."""

from __future__ import annotations

from importlib import resources

from tokenbound.config import RunConfig, validate

DEMO_WINDOWS = 1280
"""Windows that the demo scores: about a minute on two processors."""


def demo_config(output: str, *, windows: int | None = DEMO_WINDOWS) -> RunConfig:
    """The demo as a config; `windows=None` scores every token."""
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
    """The shipped artifact's bytes."""
    return resources.files("tokenbound").joinpath("data/demo.tokenbound").read_bytes()
