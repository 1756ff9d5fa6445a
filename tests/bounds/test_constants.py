"""The grids and constants in full: each is part of a code or of a theorem, and changing one moves certificates."""

from __future__ import annotations

from fractions import Fraction

from tokenbound.bounds import constants


def test_the_grid_of_alpha() -> None:
    octaves = [Fraction(1, 2**k) for k in range(1, 28)]
    halves = [Fraction(3, 4) / 2**k for k in range(1, 14)]
    assert [Fraction(alpha) for alpha in constants.ALPHA_GRID] == sorted(octaves + halves)


def test_the_grid_of_t() -> None:
    quarters = [Fraction(mantissa, 4) / 2**-exponent for exponent in range(-13, -1) for mantissa in (4, 5, 6, 7)]
    sixteenths = [Fraction(k, 16) for k in range(8, 15)]
    above = [Fraction(k, 32) for k in (29, 30, 31)] + [1 - Fraction(1, 2**k) for k in range(6, 12)]
    assert [Fraction(t) for t in constants.T_GRID] == quarters + sixteenths + above


def test_the_grids_of_lambda() -> None:
    quarters = [
        Fraction(mantissa, 4) * Fraction(2) ** exponent for exponent in range(-22, 2) for mantissa in (4, 5, 6, 7)
    ]
    assert [Fraction(lam) for lam in constants.AZUMA_LAMBDA_GRID] == quarters
    assert [Fraction(lam) for lam in constants.KL_LAMBDA_GRID] == [Fraction(2) ** k for k in range(-14, 6)]


def test_every_other_constant() -> None:
    above = ("ALPHA_GRID", "T_GRID", "AZUMA_LAMBDA_GRID", "KL_LAMBDA_GRID", *DECISIONS)
    assert {name: value for name, value in vars(constants).items() if name.isupper() and name not in above} == {
        "LN2": 0.6931471805599453,
        "ALPHA_SLOPES": (0, 1, 2, 4, 6, 8, -2, -4),
        "ALPHA_LEVELS": 64,
        "ALPHA_MAX": 0.5,
        "AZUMA_M0_STEPS_PER_OCTAVE": 4,
        "KIND_BITS": 2,
        "DEGREE_BITS": 2,
        "MAX_DEGREE": 3,
        "FLOAT16_BITS": 16,
        "SAMPLING_DELTA_SHARE": 0.5,
        "RELATIVE_DELTA_SHARE": 0.5,
        "PILOT_TARGET_RATIO": 16,
        "STAKE_TARGET_FACTOR": 4,
        "STAKE_CAP": 0.97,
        "BUDGET_GRID": tuple(2.0 ** (k / 4) for k in range(24, 88)),
        "CONTROL_RIDGE_GRID": (1e-4, 1e-2, 1e-1, 1.0),
        "NLL_TOLERANCE_NATS": 1e-5,
        "PRODUCT_GROUP": 16,
        "BLOCK_TOKENS": 8192,
        "RELATIVE_ROWS_PER_SHARD": 4096,
        "RELATIVE_ROWS": 16384,
        "PRINT_DECIMALS": 9,
    }


DECISIONS = ("DECISION_LAMBDA_GRID", "DECISION_SLOPE_GRID", "DECISION_ALPHA_GRID")


def test_the_grids_of_decisions() -> None:
    eighths = [Fraction(k, 8) * Fraction(2) ** exponent for exponent in range(-20, 4) for k in range(8, 16)]
    assert [Fraction(lam) for lam in constants.DECISION_LAMBDA_GRID] == eighths
    assert [Fraction(slope) for slope in constants.DECISION_SLOPE_GRID] == [Fraction(k, 16) for k in range(8, 24)]
    assert [Fraction(a) for a in constants.DECISION_ALPHA_GRID] == [0, *(Fraction(1, 2**k) for k in range(17, 2, -1))]
