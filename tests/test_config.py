"""What a config may not claim."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tokenbound.compression.methods import METHODS
from tokenbound.config import RunConfig, WhatConfig, validate
from tokenbound.errors import InputError

CORPUS = {"source": "text", "paths": ["x"], "tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False}
TOKENS = {"source": "tokens", "paths": ["x"], "vocab_size": 9, "add_bos": False, "add_eos": False}
CALIBRATED = [name for name, method in METHODS.built_in.items() if method.needs_calibration]
HOLDOUT = {"prior": "holdout", "holdout_declaration": "training, and all choices"}


def encoded(method: str) -> dict[str, Any]:
    return {"checkpoint": "x", "compress": {"method": method}}


def what(**sections: Any) -> WhatConfig:
    return WhatConfig.model_validate(
        {"model": {"artifact": "demo"}, "corpus": {**CORPUS, "add_eos": True}, **sections},
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"sample": {"until_slack_bits": 0.1}, "bound": {"methods": ["kl"]}}, "needs a loss line"),
        ({"sample": {"windows": 256}}, "must exceed `pilot_windows` 256"),
        ({"corpus": {**TOKENS, "tokenizer_is": "counted"}}, "no tokenizer to count"),
        ({"bound": {"prior": "holdout"}}, "say what these tokens were not used for"),
        ({"bound": {"methods": ["kl", "document"]}, "windows": {"context": "packed"}}, "context: document"),
        ({"bound": {"methods": ["azuma", "azuma"]}}, "each once"),
        *(({"bound": HOLDOUT, "model": encoded(method)}, "look at the scored tokens") for method in CALIBRATED),
    ],
)
def test_a_claim_that_would_not_hold_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        what(**sections)


def test_a_holdout_may_be_encoded_without_looking_at_it() -> None:
    for method in ("rtn", "lossless"):
        assert what(bound=HOLDOUT, model=encoded(method)).bound.prior == "holdout"
    for methods in (["freedman"], ["azuma", "kl"]):
        assert what(sample={"until_slack_bits": 0.1}, bound={"methods": methods}).sample.until_slack_bits == 0.1


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"windows": {"lenght": 64}}, r"what\.windows\.lenght: unknown key \(got 64\); did you mean `length`\?"),
        ({"depth": 3}, r"what\.depth: unknown key \(got 3\); the keys here are model, corpus, windows, sample, bound"),
        (
            {"model": {"checkpoint": "x", "compress": {"method": "rtn", "stepp": 1.0}}},
            r"compress\.rtn\.stepp: unknown key \(got 1\.0\); did you mean `step`\?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_what_was_meant(sections: dict[str, Any], words: str) -> None:
    tree = {"model": {"artifact": "demo"}, "corpus": {**CORPUS, "add_eos": True}, **sections}
    with pytest.raises(InputError, match=words):
        validate(RunConfig, {"what": tree, "how": {"output": "x"}}, origin="test")
