"""Every causal architecture of transformers: right to rounding, or refused in one line."""

from __future__ import annotations

import pytest
from architectures_support import TABLE, TOLERANCE, outcome, table_rows
from transformers import __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SOME = ("bamba", "deepseek_v3", "modernbert-decoder")
"""An infinite number in the config; latent attention with experts; a layer before the output matrix."""


@pytest.mark.parametrize("model_type", SOME)
def test_some_architectures_are_right(model_type: str) -> None:
    found = outcome(model_type)
    assert not found.is_refused, found.result
    assert found.has_head
    assert found.error_nats < TOLERANCE


def test_attention_in_both_directions_is_refused() -> None:
    assert "depends on later tokens" in outcome("xlnet").result


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_architecture_is_right_or_refused(model_type: str) -> None:
    found = outcome(model_type)
    if found.is_refused:
        assert "\n" not in found.result
        assert model_type in found.result or "not causal as it runs here" in found.result
    else:
        assert found.error_nats < TOLERANCE


def test_the_table_has_every_architecture_of_its_version() -> None:
    if f"transformers {__version__}," not in TABLE.read_text(encoding="utf-8"):
        pytest.skip("the table is of another version of transformers")
    assert set(table_rows()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
