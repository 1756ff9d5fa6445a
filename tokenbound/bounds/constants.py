"""Every grid and constant of the package that a bound depends on, each with its reason.

All of them were fixed before any data was seen and never depend on the data or on the number of tokens.
That is what makes the union bounds over them free of circularity: a grid point costs ``log2(len(grid))``
bits wherever it was chosen on the scored tokens. Changing a value here changes certificates; it is a new
version of the package.

The grids contain only dyadic fractions with small numerators, so that they are the same floats on every
machine.
"""

from __future__ import annotations

import math
from typing import Final

LN2: Final = math.log(2.0)
"""Nats per bit."""


def _powers(low: int, high: int) -> tuple[float, ...]:
    return tuple(2.0**exponent for exponent in range(low, high + 1))


def _quarter_octaves(low: int, high: int) -> tuple[float, ...]:
    return tuple(mantissa * 2.0 ** (exponent - 2) for exponent in range(low, high) for mantissa in (4, 5, 6, 7))


ALPHA_GRID: Final[tuple[float, ...]] = tuple(sorted(_powers(-27, -1) + tuple(0.75 * 2.0**-k for k in range(1, 14))))
"""40 smoothing weights from 2^-27 (7e-9) to 1/2, half-octaves above 1e-4.

One octave of alpha moves the loss range by one bit out of 15 to 40 and the smoothing loss by alpha bits, so
a finer grid buys nothing below 1e-4; above it the loss itself moves by some thousandths of a bit."""

ALPHA_SLOPES: Final[tuple[int, ...]] = (0, 1, 2, 4, 6, 8, -2, -4)
"""Octaves that alpha(H) rises (falls, where negative) from entropy 0 to log2(V): alpha_min * 2^(slope * u) with
u = H / log2 V, or alpha_min * 2^(-slope * (1 - u)). 0 is the constant alpha. Three bits pay for the choice."""

ALPHA_LEVELS: Final = 64
"""alpha(H) is piecewise constant on 64 equal intervals of the entropy, so that it is a table look-up."""

ALPHA_MAX: Final = 0.5
"""alpha(H) is capped here: beyond one half the uniform part outweighs the model."""

T_GRID: Final[tuple[float, ...]] = (
    *_quarter_octaves(-13, -1),
    *(k / 16 for k in range(8, 15)),
    *(k / 32 for k in range(29, 32)),
    *(1 - 2.0**-k for k in range(6, 12)),
)
"""64 values of t = lambda * (B - y0') in (0, 1): quarter octaves from 2^-13 to 1/2, then towards 1.

Quarter octaves lose at most 0.7 % of the gap; 2^-13 serves kappa/m down to about 1e-10. Where kappa/m is above 0.01,
lambda is as large as the range allows, and the last steps towards 1 are worth some thousandths of a bit."""

AZUMA_LAMBDA_GRID: Final[tuple[float, ...]] = _quarter_octaves(-22, 2)
"""96 values of lambda (per bit) for Azuma with predictable ranges."""

AZUMA_M0_STEPS_PER_OCTAVE: Final = 4
"""Any-time Azuma is tight at m0 = 2^(j/4); the nearest m0 is at most 0.1 % looser than the fixed-m form."""

KL_LAMBDA_GRID: Final[tuple[float, ...]] = _powers(-14, 5)
"""20 powers of two for the bound on errors; every power loses at most a factor 1.07 of the gap."""

DECISION_LAMBDA_GRID: Final[tuple[float, ...]] = tuple(
    mantissa * 2.0 ** (exponent - 3) for exponent in range(-20, 4) for mantissa in range(8, 16)
)
"""192 values of lambda (per bit) for decisions, eight per octave: the grid costs 0.1 % of the gap, and
the line of decisions has hardly anything else to choose."""

DECISION_SLOPE_GRID: Final[tuple[float, ...]] = tuple(k / 16 for k in range(8, 24))
"""16 factors on a model's log-odds, from 1/2 for one that is far too sure of itself to 23/16."""

DECISION_ALPHA_GRID: Final[tuple[float, ...]] = (0.0, *_powers(-17, -3))
"""16 weights of a fair coin in what is expected of a decision. Levels end at a probability of 1e-7, so that 0 will do;
a sample needs more, because one window must not hold all of the sum."""

BUDGET_GRID: Final[tuple[float, ...]] = tuple(2.0 ** (k / 4) for k in range(24, 88))
"""64 budgets of a window of a sample in bits, four per octave, from 64 to 3.5 million: only the range of its sum
depends on them."""

KIND_BITS: Final = 2
"""Names the kind of forecast: constant, running mean, polynomial of the entropy, learned head."""

DEGREE_BITS: Final = 2
"""Names the degree, 0 to 3, of a polynomial forecast."""

MAX_DEGREE: Final = 3
"""Largest degree of a polynomial forecast."""

FLOAT16_BITS: Final = 16
"""Each coefficient of a forecast, and its floor y0, is a float16 written in full."""

SAMPLING_DELTA_SHARE: Final = 0.5
"""A sampled run spends this share of delta on the sampling, the rest on the bound for the full corpus."""

RELATIVE_DELTA_SHARE: Final = 0.5
"""The relative bound spends this share of delta on the excess over the base, the rest on the base's own risk."""

PILOT_TARGET_RATIO: Final = 16
"""The pilot chooses the grid point that is best for a sample of 16 times its own length: a fixed rule, so that
neither the choice nor the stakes can depend on when a run was stopped."""

STAKE_TARGET_FACTOR: Final = 4
"""The sampling sequence mixes stakes tuned to sample sizes this factor apart; a stake a factor 2 off
(sample size off by 4) would lose 25 % of the slack, and the mixture keeps within a factor sqrt(2) of the best."""

STAKE_CAP: Final = 0.97
"""Largest lambda_i * (hi - Y_i): below 1 for validity, and with room: one extreme unit costs ln 33 nats."""

CONTROL_RIDGE_GRID: Final = (1e-4, 1e-2, 1e-1, 1.0)
"""Penalties, as shares of the pilot's windows, at which control variates are regressed on scaled features."""

NLL_TOLERANCE_NATS: Final = 1e-5
"""float32 log-softmax may return nll slightly below zero; down to here it is clipped to zero, below it is refused."""

PRODUCT_GROUP: Final = 16
"""Factors multiplied before a logarithm is taken. (a/V)^16 >= (2^-27 / 2^20)^16 = 2^-752 and (1 - t)^16 >=
2^-176 stay normal float64 numbers, so this saves 15 of 16 logarithms and costs 16 roundings of 1e-16 per group."""

BLOCK_TOKENS: Final = 1 << 13
"""Tokens per block of the exact pass: six float64 buffers of 64 KiB fit into half a MiB of L2 cache."""

RELATIVE_ROWS_PER_SHARD: Final = 1 << 12
RELATIVE_ROWS: Final = 1 << 14
"""The relative bound is tuned on a hashed subset of the tokens: so many rows of a shard, and of all shards together."""

PRINT_DECIMALS: Final = 9
"""Printed bounds are rounded up to this many decimals."""
