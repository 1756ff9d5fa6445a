"""What a claim counts in K, and the claims beside it; its fields at the edge of what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tokenbound.bounds import Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.claim import corpus_delta
from tokenbound.bounds.lines.base import token_bound
from tokenbound.errors import InputError

CLAIM = Claim(300, 256, 100.0, 0.05, 5000)
HEAD = replace(CLAIM, head_alpha_min=0.01)


@pytest.mark.parametrize(
    ("edge", "beyond"),
    [
        ({"tokenizer_vocab_size": 2}, {"tokenizer_vocab_size": 1}),
        ({"tokenizer_vocab_size": 300}, {"tokenizer_vocab_size": 301}),
        ({"num_tokens": 1}, {"num_tokens": 0}),
        ({"code_length_bits": 0.0}, {"code_length_bits": -1e-9}),
        ({"code_length_bits": 1e300}, {"code_length_bits": math.inf}),
        ({"delta": 5e-324}, {"delta": 0.0}),
        ({"delta": 1 - 2.0**-53}, {"delta": 1.0}),
        ({"num_bases": 0}, {"num_bases": -1}),
        ({"trial": 1}, {"trial": 0}),
        ({"top_k": (1,)}, {"top_k": (0, 5)}),
        ({"top_k": (5, 1)}, {"top_k": (5, 1, 5)}),
        ({"has_alpha": True, "alpha_min": 5e-324}, {"has_alpha": True, "alpha_min": 0.0}),
        ({"has_alpha": True, "alpha_min": 1 - 2.0**-53}, {"has_alpha": True, "alpha_min": 1.0}),
        ({"code_split": {"a": 60.0, "b": 40.0 - 0.9e-6}}, {"code_split": {"a": 60.0, "b": 40.0 - 1.5e-6}}),
        ({"methods": ("azuma",), "top_k": ()}, {"methods": ("kl",), "top_k": ()}),
    ],
)
def test_a_field_may_be_at_its_edge_and_not_beyond(edge: dict[str, Any], beyond: dict[str, Any]) -> None:
    assert replace(CLAIM, **edge)
    with pytest.raises(InputError):
        replace(CLAIM, **beyond)


def test_what_comes_by_itself_stands_before_what_is_named() -> None:
    names = [bound.name for bound in replace(CLAIM, methods=("kl", "azuma")).bounds]
    assert names == ["relative", "kl", "azuma"]


def test_lines_that_bound_the_risk_come_first() -> None:
    claim = replace(CLAIM, methods=("kl", "azuma", "freedman"), top_k=(10, 1))
    assert claim.lines == (("azuma", None), ("freedman", None), ("kl", 10), ("kl", 1))


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 5),
        ({"methods": ("azuma",)}, 1),
        ({"methods": ("kl",), "top_k": (1, 2)}, 2),
        ({"methods": ("azuma", "document"), "num_documents": 1}, 2),
        ({"num_bases": 1}, 6),
        ({"num_bases": 9}, 6),
        ({"beside_lines": 4}, 9),
    ],
)
def test_every_line_counts_in_k(changes: dict[str, Any], count: int) -> None:
    claim = replace(CLAIM, **changes)
    assert claim.num_lines == count
    assert claim.shared_bits == math.log2(count) + 1


@pytest.mark.parametrize(
    ("methods", "entropy", "beside"),
    [
        (("freedman", "azuma", "kl"), True, [("freedman",), ("freedman",), ("freedman", "azuma")]),
        (("freedman", "azuma", "kl"), False, [("freedman",), ("freedman", "azuma")]),
        (("azuma", "kl"), True, [("azuma",)]),
        (("freedman",), True, [("freedman",), ("freedman",), ("freedman",)]),
        (("freedman",), False, [("freedman",), ("freedman",)]),
    ],
)
def test_the_claims_of_a_smoothing_head_share_one_k(
    methods: tuple[str, ...], entropy: bool, beside: list[tuple[str, ...]]
) -> None:
    """Whatever is printed of a model with a head holds together, so every claim counts the lines of all."""
    claim = replace(HEAD, methods=methods, top_k=(1,), has_entropy=entropy)
    companions = claim.companions
    assert [each.methods for each in companions] == beside
    printed = len(claim.lines) + sum(len(each.lines) for each in companions)
    assert claim.num_lines == printed
    for each in companions:
        assert each.num_lines == printed
        assert each.shared_bits == claim.shared_bits
        assert each.head_alpha_min is None
        assert each.companions == ()
    *compared, head = companions
    assert (head.has_alpha, head.alpha_min) == (True, 0.01)
    assert [each.alphas for each in compared] == ["constant", "entropy"][: len(compared)]
    assert not any(each.has_alpha for each in compared)


def test_a_model_without_a_head_has_no_companions() -> None:
    assert CLAIM.companions == ()
    assert CLAIM.head_lines == 0


def test_only_a_token_level_loss_is_the_risk_that_is_quoted() -> None:
    def line(method: str, top_k: int | None) -> Line:
        return Line(method, top_k, 1.0, 1.0, 1.0, 1.0, False, 8.0, {}, {})

    assert line("freedman", None).bounds_risk
    assert line("azuma", None).bounds_risk
    assert line("relative", None).bounds_risk
    assert not line("freedman", 5).bounds_risk
    assert not line("kl", 1).bounds_risk
    assert not line("document", None).bounds_risk


def test_bounds_that_are_not_named_have_no_lines() -> None:
    kl = token_bound("kl")
    assert kl.rows(CLAIM) == (1, 10, 100)
    assert kl.rows(replace(CLAIM, methods=("azuma",))) == ()
    without = replace(CLAIM, methods=("azuma",), top_k=())
    kl.check_claim(without)
    assert token_bound("freedman").rows(without) == ()
    assert token_bound("freedman").compared_alphas(without) == ()


@pytest.mark.parametrize(("prior", "paid"), [("code", 100.0), ("holdout", 0.0)])
def test_a_holdout_pays_no_code(prior: Any, paid: float) -> None:
    assert replace(CLAIM, prior=prior).paid_code_bits == paid


def test_a_what_if_has_at_least_the_real_tokens() -> None:
    same = CLAIM.with_larger_corpus(5000)
    assert (same.num_tokens, same.what_if) == (5000, True)
    with pytest.raises(InputError, match="larger"):
        CLAIM.with_larger_corpus(4999)


def test_delta_is_halved_where_windows_are_drawn() -> None:
    assert corpus_delta(CLAIM, sampled=True) == 0.025
    assert corpus_delta(CLAIM, sampled=False) == 0.05


@pytest.mark.parametrize(("pilot", "target", "draws"), [(1, 16, 15), (10, 160, 150), (62, 992, 930), (63, 1000, 937)])
def test_a_pilot_has_sixteen_times_its_length_in_view(pilot: int, target: int, draws: int) -> None:
    plan = SamplingPlan(1000, 10, pilot)
    assert (plan.target_units, plan.target_draws) == (target, draws)
    assert SamplingPlan(1000, 10, 1000).target_draws == 1


@pytest.mark.parametrize("plan", [(1, 1, 1), (10, 1, 10), (10, 1, 1)])
def test_the_smallest_plans(plan: tuple[int, int, int]) -> None:
    assert SamplingPlan(*plan, evaluation=1).log_inverse_delta(CLAIM) == pytest.approx(
        math.log(1 / 0.025) + math.log(2) * 1 + math.log(2) + math.log(5), rel=1e-14
    )


def test_records_come_back_from_json() -> None:
    tuning = Tuning("freedman", 300, alpha=0.5, coefficients=(1.0, 2.0), degree=1)
    assert Tuning.from_dict(tuning.to_dict()) == tuning
    line = Line("azuma", None, 1.0, 1.0, 1.0, 1.0, False, 8.0, {"a": 1.0}, {"b": 2})
    assert Line.from_dict(line.to_dict()) == line
    assert line.to_dict()["terms"] == {"a": 1.0}
    assert line.to_dict()["parameters"] == {"b": 2}


@pytest.mark.parametrize("vocab", [1, 2.5, -7])
def test_the_width_of_the_logits_is_an_integer(vocab: Any) -> None:
    with pytest.raises(InputError, match=r"^vocab_size must be an integer"):
        replace(CLAIM, vocab_size=vocab, tokenizer_vocab_size=2)


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        ((0, 5, 1), "num_units and max_unit_tokens must be positive"),
        ((5, 0, 1), "num_units and max_unit_tokens must be positive"),
        ((5, 5, 0), r"pilot_units must lie in 1\.\.5"),
        ((5, 5, 6), r"pilot_units must lie in 1\.\.5"),
        ((5, 5, 5, 0), "Elias-delta codes positive integers"),
        ((5, 5, 5, 1, 0), "evaluation counts from 1"),
    ],
)
def test_impossible_plans_name_their_field(plan: tuple[int, int, int], field: str) -> None:
    with pytest.raises(InputError, match=field):
        SamplingPlan(*plan)
