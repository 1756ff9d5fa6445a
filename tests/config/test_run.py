"""What a config may not claim."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tokenbound.compression.methods import METHODS
from tokenbound.config.run import RunConfig, WhatConfig, dump_config, load_config, validate
from tokenbound.demo import demo_config
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


STRICT = [
    ("what.bound.delta", '"0.05"', "what.bound.delta: Input should be a valid number"),
    ("what.bound.trial", "true", "what.bound.trial: Input should be 'auto' or a valid integer"),
    ("what.bound.trial", '"2"', "what.bound.trial: Input should be 'auto' or a valid integer"),
    ("what.windows.length", "512.0", "what.windows.length: Input should be a valid integer"),
    ("what.corpus.add_bos", "0", "what.corpus.add_bos: Input should be a valid boolean"),
    ("what.bound.delta", ".nan", "nan is not a finite number"),
    ("how.progress_interval_s", ".inf", "inf is not a finite number"),
    ("what.sample.seed", "18446744073709551616", "does not fit into 64 bits"),
]


@pytest.mark.parametrize(("key", "value", "reason"), STRICT)
def test_numbers_are_numbers(key: str, value: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(demo_config("runs/demo")))
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        load_config(RunConfig, path, [f"{key}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("what: {a: 1, a: 2}", "line 1: the key 'a' is given twice"),
        ("what:\n  bound:\n    delta: 0.05\n    delta: 0.5", "line 4: the key 'delta' is given twice"),
        ("what: {1: 2}", "line 1: the key 1 is not text"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)),
            "more than 1,000,000 values",
        ),
        ("a: " + "[" * 5000, "nested too deeply|not readable"),
        ("a: " + "[" * 40 + "]" * 40, "levels deep"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_what_yaml_could_mean_twice_is_refused_in_a_line(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        load_config(RunConfig, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exponent_needs_no_point(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(demo_config("runs/demo")).replace("delta: 0.05", "delta: 5e-2"))
    assert load_config(RunConfig, path).what.bound.delta == 0.05
    assert load_config(RunConfig, path, ["what.bound.delta=1E-3"]).what.bound.delta == 0.001


def test_texts_that_cannot_be_stored_are_refused_with_their_place() -> None:
    with pytest.raises(InputError, match=r"how\.output: 'run-\\udcff' is not UTF-8 and cannot be stored"):
        validate(RunConfig, {"how": {"output": "run-\udcff"}}, origin="x")


def place(**model: Any) -> str:
    return what(model=model).model.checkpoint_place


def test_a_checkpoint_may_be_a_revision_and_a_file(tmp_path: Path) -> None:
    assert place(checkpoint="org/name") == "org/name"
    assert place(checkpoint="org/name", revision="v1") == "org/name@v1"
    assert place(checkpoint="org/name", revision="v1", file="q4.gguf") == "org/name@v1#q4.gguf"
    assert place(checkpoint=str(tmp_path), file="q4.gguf") == f"{tmp_path}/q4.gguf"
    assert place(checkpoint="s3://bucket/models/", file="q4.gguf") == "s3://bucket/models/q4.gguf"
    assert place(checkpoint="m.gguf") == "m.gguf"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"checkpoint": "org/name@v1", "revision": "v2"}, "`revision: v2` applies to a hub id without `@`"),
        ({"checkpoint": "./folder", "revision": "v2"}, "applies to a hub id"),
        ({"checkpoint": "s3://bucket/model", "revision": "v2"}, "applies to a hub id"),
        ({"artifact": "demo", "revision": "v2"}, "`revision: v2` applies to a `checkpoint`; remove it"),
        ({"artifact": "demo", "file": "m.gguf"}, r"`file: m\.gguf` applies to a `checkpoint`; remove it"),
        ({"checkpoint": "org/name", "file": "model.bin"}, r"`file: model\.bin` names a GGUF file"),
        ({"checkpoint": "m.gguf", "file": "n.gguf"}, r"`file: n\.gguf` names a GGUF file"),
    ],
)
def test_a_revision_or_a_file_that_does_not_apply_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        what(model=model)
