"""What makes another configuration, and what is declared."""

from __future__ import annotations

from typing import Any

import pytest

from tokenbound.certificate.identity import configuration, declarations, scoring_identity, scoring_protocol
from tokenbound.config.run import WhatConfig

SAMPLE = {"windows": 300}
HOLDOUT = {"prior": "holdout", "holdout_declaration": "nothing"}
BASE = {"artifact": "a", "base": "b", "base_is_independent": "random"}


def key(artifact: str = "a", base: str | None = None, **sections: Any) -> str:
    """The name in the register of a run with these sections."""
    corpus = {"source": "text", "paths": ["x"], "tokenizer": "bytes", "tokenizer_is": "given"}
    tree = {"model": {"artifact": "a"}, "corpus": {**corpus, "add_bos": False, "add_eos": True}, **sections}
    what = WhatConfig.model_validate(tree)
    identity = scoring_identity(
        artifact_sha256=artifact,
        corpus_sha256="c",
        tokens_sha256="t",
        protocol=scoring_protocol(what.model, what.corpus, what.windows),
        sample=what.sample,
        base=None if base is None else {"sha256": base},
    )
    return configuration(what, [identity]).key


@pytest.mark.parametrize(
    "same",
    [
        {"artifact": "another"},
        {"windows": {"length": 64}},
        {"model": {"artifact": "a", "dtype": "bfloat16"}},
        {"bound": {"methods": ["bits", "kl", "azuma", "freedman"], "top_k": [100, 1, 10]}},
        {"bound": {"trial": 7}},
    ],
)
def test_with_every_token_scored_models_and_protocols_are_paid_in_the_code(same: dict[str, Any]) -> None:
    assert key(**same) == key()


@pytest.mark.parametrize(
    "bound",
    [
        {"delta": 0.01},
        {"methods": ["azuma"]},
        {"top_k": [1]},
        {"declared_tokens": 5},
        {"unscorable": "worst_case"},
        HOLDOUT,
    ],
)
@pytest.mark.parametrize("sample", [{}, SAMPLE])
def test_another_claim_is_another_configuration(bound: dict[str, Any], sample: dict[str, Any]) -> None:
    assert key(bound=bound, sample=sample) != key(sample=sample)


def test_bases_are_numbered() -> None:
    """The base of a delta pays no code, so a sweep over bases pays for each by its ordinal."""
    assert len({key(base=base, model=BASE) for base in ("first", "second")}) == 2
    assert key("another", base="first", model=BASE) == key(base="first", model=BASE)


@pytest.mark.parametrize("shared", [{"sample": SAMPLE}, {"bound": HOLDOUT}])
@pytest.mark.parametrize("change", [{"artifact": "another"}, {"windows": {"length": 64}}])
def test_a_sample_or_a_holdout_is_drawn_for_one_model(shared: dict[str, Any], change: dict[str, Any]) -> None:
    assert key(**shared, **change) != key(**shared)


@pytest.mark.parametrize("change", [{"seed": 1}, {"pilot_windows": 128}, {"evaluation": 1}])
def test_another_draw_is_another_configuration(change: dict[str, Any]) -> None:
    assert key(sample={**SAMPLE, **change}) != key(sample=SAMPLE)


@pytest.mark.parametrize("change", [{"windows": 400}, {"until_slack_bits": 0.1}])
def test_where_a_sample_stops_is_no_part_of_it(change: dict[str, Any]) -> None:
    assert key(sample={**SAMPLE, **change}) == key(sample=SAMPLE)


def test_all_that_may_move_a_loss_is_declared() -> None:
    corpus = {"source": "text", "paths": ["x"], "tokenizer": "bytes", "tokenizer_is": "given"}
    tree = {"model": {"artifact": "a"}, "corpus": {**corpus, "add_bos": False, "add_eos": True}}
    words = " ".join(declarations(WhatConfig.model_validate(tree)))
    for name in ("package", "torch", "device", "transformers", "numpy", "compile", "threads"):
        assert name in words
