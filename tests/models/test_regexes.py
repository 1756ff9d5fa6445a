"""Patterns of quantization configs: what people write passes, what would hang is refused before it is matched."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.errors import InputError
from tokenbound.models.quantized.regexes import require_quick_patterns

NAME = "model.language_model.layers.10.mlp.experts.127.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        "re:.*lm_head",
        "re:.*mlp.gate$",
        r"re:model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
        r"re:^(?!.*experts).*\.(gate|up|down)_proj$",
        r"re:.*layers\.(0|1|2|[3-9])\.mlp\.experts\.[0-9]+\..*_proj",
        r"re:(?:language_)?model\.layers\.([0-9]|1[0-9])\..*",
        r"re:language\.layers\..+\.q_proj.weight",
        "re:.*(self_attn|attention)$",
        "re:vision_tower.*",
        "re:[a-z_]{1,40}_proj",
        "model.layers.0.mlp",
        "Linear",
        "*",
        "",
    ],
)
def test_usual_patterns_pass(pattern: str) -> None:
    require_quick_patterns({"config_groups": {"group_0": {"targets": [pattern]}}, "ignore": [pattern]})


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("re:(a+)+$", "inside a repetition"),
        ("re:(?:model|mode.)*x", "inside a repetition"),
        ("re:([a-z.]*)*x", "inside a repetition"),
        ("re:(?:a?){60}x", "inside a repetition"),
        ("re:(?:|.)+x", "inside a repetition"),
        ("re:(?:(?:.{9}){9}){9}x", None),
        ("re:" + ".*" * 9 + "x", "more than 8"),
        ("re:" + ".*" * 7 + "x", "with the others"),
        ("re:" + "(?:l?|l)" * 40 + "x", "with the others"),
        ("re:^(?=.*.*.*.*.*.*.*x).*", "with the others"),
        (r"re:(.*)\1x", "refers to a group"),
        ("re:(.)?(?(1)a|b)", "refers to a group"),
        ("re:" + "a" * 5000, "5000 characters"),
        ("re:(unclosed", "unterminated subpattern"),
        ("re:" + "(" * 2000 + ")" * 2000, ""),
        ("re:a{99999999999999999999}", ""),
        ("(a+)+$", "inside a repetition"),
    ],
)
def test_patterns_that_may_hang_are_refused(pattern: str, reason: str | None) -> None:
    started = time.monotonic()
    if reason is None:  # fixed lengths all through: one way
        require_quick_patterns([pattern])
    else:
        with pytest.raises(InputError, match="quantization config has the pattern") as caught:
            require_quick_patterns({"ignore": {pattern: None}})
        assert reason in str(caught.value)
    assert time.monotonic() - started < 5


def test_the_patterns_of_a_config_count_together() -> None:
    several = [f"re:.*.*.*.*{number}" for number in range(100)]
    require_quick_patterns(several[:10])
    with pytest.raises(InputError, match="with the others"):
        require_quick_patterns(several)


PIECES = st.sampled_from(
    ["a", ".", "l", "[a-z]", r"\.", r"\d", "model", "$", "^", "q|k", "?", "*", "+", "{2,5}", "(", ")"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_what_passes_is_matched_soon(pattern: str) -> None:
    try:
        re.compile(pattern)
        require_quick_patterns(["re:" + pattern])
    except (re.error, InputError):
        return
    started = time.process_time()
    re.match(pattern, NAME)
    assert time.process_time() - started < 5
