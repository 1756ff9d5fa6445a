"""Code lengths: prefix-freeness, Kraft sums, and the price of tuning."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenbound.bounds import codes
from tokenbound.bounds.constants import (
    ALPHA_GRID,
    ALPHA_SLOPES,
    AZUMA_LAMBDA_GRID,
    KL_LAMBDA_GRID,
    MAX_DEGREE,
    T_GRID,
)
from tokenbound.errors import InputError


def elias_delta_word(n: int) -> str:
    """The code word itself, built from its definition."""
    binary = f"{n:b}"
    length = f"{len(binary):b}"
    return "0" * (len(length) - 1) + length + binary[1:]


def test_elias_delta_is_the_length_of_a_prefix_free_word():
    words = [elias_delta_word(n) for n in range(1, 3000)]
    assert [len(word) for word in words] == [codes.elias_delta_bits(n) for n in range(1, 3000)]
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


@given(st.integers(1, 2**62))
def test_elias_delta_of_any_size(n):
    assert codes.elias_delta_bits(n) == len(elias_delta_word(n))


@pytest.mark.parametrize("n", [0, -3, 1.5, True])
def test_elias_delta_refuses_what_is_not_a_positive_integer(n):
    with pytest.raises(InputError):
        codes.elias_delta_bits(n)


def test_artifact_lengths_satisfy_kraft():
    """All byte strings of b bytes have one length: 256^b of them at 2^-(8b + L_E(8b)) each."""
    total = sum(Fraction(1, 2 ** codes.elias_delta_bits(8 * b)) for b in range(1, 5000))
    assert total <= 1
    assert codes.artifact_code_length_bits(10) == 80 + codes.elias_delta_bits(80)


def test_protocol_code_is_prefix_free():
    """One bit for the default; others start with the other bit, then are self-delimiting like an artifact."""
    assert codes.protocol_code_length_bits(b'{"a":1}', b'{"a":1}') == 1
    longer = codes.protocol_code_length_bits(b'{"a":2}', b'{"a":1}')
    assert longer == 1 + 56 + codes.elias_delta_bits(56)
    with pytest.raises(InputError):
        codes.protocol_code_length_bits(b"", b"{}")


def test_freedman_tuning_code_satisfies_kraft():
    """Every tuning that the code can name, counted: grids, one of four kinds, four degrees, float16 words."""
    words = 2**16
    total = 0.0
    for degree in range(MAX_DEGREE + 1):
        tunings = len(ALPHA_GRID) * len(ALPHA_SLOPES) * len(T_GRID) * words ** (degree + 1) * words
        total += tunings * 2.0 ** -codes.freedman_tune_bits(degree, choose_alpha=True)
    assert total <= 1 / 4 * (1 + 1e-9)  # the polynomial is one of four kinds
    assert total >= 1 / 4 * (1 - 1e-9)  # and nothing is wasted: a shorter code would be no code


def test_relative_tuning_code_satisfies_kraft():
    words = 2**16
    total = 0.0
    for degree in range(MAX_DEGREE + 1):
        coefficients = (degree + 1) * (degree + 2) // 2
        tunings = len(ALPHA_GRID) ** 2 * len(T_GRID) * float(words) ** (coefficients + 1)
        total += tunings * 2.0 ** -codes.relative_tune_bits(degree)
    assert total == pytest.approx(1 / 4)


def test_grid_codes_satisfy_kraft():
    assert len(KL_LAMBDA_GRID) * 2 ** -codes.kl_tune_bits() == pytest.approx(1)
    assert len(AZUMA_LAMBDA_GRID) * 2 ** -codes.azuma_predictable_tune_bits() == pytest.approx(1)
    azuma = sum(len(ALPHA_GRID) * 2 ** -codes.azuma_tune_bits(m0_index=j, choose_alpha=True) for j in range(1, 20000))
    assert azuma <= 1
    fixed = len(ALPHA_GRID) * 2 ** -codes.azuma_tune_bits(m0_index=None, choose_alpha=True)
    assert fixed == pytest.approx(1)


def test_lines_and_trials_share_one_budget():
    """K lines and infinitely many trials: their prior weights add up to at most one."""
    total = sum(5 * 2 ** -codes.shared_tune_bits(5, trial) for trial in range(1, 20000))
    assert total <= 1
    assert codes.shared_tune_bits(1, 1) == 1


def test_grids_are_constants_of_the_package():
    """Size and order are part of the code; a change is a new version and moves certificates."""
    assert (len(ALPHA_GRID), len(ALPHA_SLOPES), len(T_GRID), len(KL_LAMBDA_GRID)) == (40, 8, 64, 20)
    for grid in (ALPHA_GRID, T_GRID, KL_LAMBDA_GRID, AZUMA_LAMBDA_GRID):
        assert list(grid) == sorted(set(grid))
        assert all(float(np.float32(value)) == value for value in grid), "dyadic: the same on every machine"
    assert ALPHA_GRID[0] < 1e-8
    assert ALPHA_GRID[-1] == 0.5
    assert 0 < T_GRID[0] < T_GRID[-1] < 1


def test_kappa_adds_up():
    kappa = codes.kappa_nats(code_length_bits=100, tune_bits=20, delta=0.05)
    assert kappa == pytest.approx(120 * math.log(2) + math.log(20))


@pytest.mark.parametrize(
    "bad",
    [
        {"code_length_bits": -1},
        {"code_length_bits": math.nan},
        {"tune_bits": math.inf},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
    ],
)
def test_kappa_refuses(bad):
    with pytest.raises(InputError):
        codes.kappa_nats(**{"code_length_bits": 1.0, "tune_bits": 1.0, "delta": 0.05, **bad})


@pytest.mark.parametrize("degree", [-1, 4])
def test_degree_out_of_the_code_is_refused(degree):
    with pytest.raises(InputError, match="degree"):
        codes.freedman_tune_bits(degree, choose_alpha=True)
