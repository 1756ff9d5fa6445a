"""From a sample of windows to the mean over all of them, valid at every sample size at once.

Units X_1, X_2, .. (windows) are drawn without replacement in a uniformly random order from N units with unknown total
S. Given the first i - 1, the mean of X_i is M_i = (S - sum_{s<i} X_s) / (N - i + 1). With a forecast Y_i and a stake
lambda_i >= 0, both functions of earlier draws, and lambda_i (hi - Y_i) < 1 for an upper limit hi of the units,

    W_n(S) = prod_{i<=n} (1 + lambda_i (Y_i - X_i)) exp(-lambda_i (Y_i - M_i))

is a nonnegative supermartingale started at 1 (1 + x <= e^x; Waudby-Smith and Ramdas 2020, section 3), so W_n(S) <
1/delta_s for all n with probability 1 - delta_s (Ville). W_n grows with S, hence S lies below the root of W_n(S) =
1/delta_s: the closed form of one sequence.

A mean of several such supermartingales with different stakes is one too. The package mixes stakes tuned to sample
sizes a factor 4 apart: no sample size has to be known in advance, and stopping at any n is valid. The root of the
mixture is found by Newton's method from above; ln of a sum of exponentials is convex, so every iterate is already a
bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import polygamma

from tokenbound.bounds.claim import Claim, SamplingPlan
from tokenbound.bounds.columns import Floats, Ints
from tokenbound.bounds.constants import STAKE_CAP, STAKE_TARGET_FACTOR
from tokenbound.bounds.controls import ControlVariates, adjustments, regress
from tokenbound.errors import IncompleteError, InputError

_NEWTON_STEPS = 12

SLACK_MULTIPLES = (2, 4)
"""A sampled run reports what so many times its windows would leave of the slack."""


def total_upper_bounds(
    values: Floats,
    *,
    num_units: int,
    highest: float,
    log_inverse_delta: float,
    forecasts: Floats,
    stakes: Floats,
) -> Floats:
    """Upper bounds on the total of all units after each draw, all valid at once.

    Args:
        values: [n] units in draw order, each at most ``highest``.
        num_units: N.
        highest: hi.
        log_inverse_delta: ln(1/delta_s).
        forecasts: [n] predictable forecasts Y_i.
        stakes: [n, K] predictable stakes lambda_i of K sequences, mixed with equal weights.

    Returns:
        [n] bounds U_1..U_n; each is at most the one before.

    Raises:
        InputError: more draws than units, a unit above ``highest``, or a stake with lambda_i (hi - Y_i) >= 1.
    """
    n = values.size
    if n > num_units:
        raise InputError(f"{n} units were drawn out of {num_units}")
    if n and float(values.max()) > highest * (1 + 1e-12) + 1e-12:
        raise InputError(f"a unit of {values.max()} exceeds the largest possible {highest}")
    if n and not (float((stakes * (highest - forecasts)[:, None]).max()) < 1 and float(stakes.min()) >= 0):
        raise InputError("every stake must satisfy 0 <= lambda_i and lambda_i * (hi - Y_i) < 1")
    before = np.concatenate([[0.0], np.cumsum(values)])[:-1]
    left = num_units - np.arange(n, dtype=np.float64)
    gains = np.log1p(stakes * (forecasts - values)[:, None])
    offsets = np.cumsum(gains - stakes * (forecasts + before / left)[:, None], axis=0)
    slopes = np.cumsum(stakes / left[:, None], axis=0)
    certain = before + values + (left - 1) * highest  # whatever the rest is, it is not above this
    bounds = np.minimum(_roots(offsets, slopes, log_inverse_delta), certain)
    return np.asarray(np.minimum.accumulate(bounds), dtype=np.float64)


def _roots(offsets: Floats, slopes: Floats, level: float) -> Floats:
    """[n] solutions S of mean_k exp(offset_k + S slope_k) = exp(level), approached from above."""
    log_weight = -math.log(offsets.shape[1])
    with np.errstate(divide="ignore"):
        alone = np.where(slopes > 0, (level - log_weight - offsets) / np.where(slopes > 0, slopes, 1.0), np.inf)
    total = alone.min(axis=1)
    known = np.isfinite(total)
    for _ in range(_NEWTON_STEPS):
        exponents = offsets[known] + total[known, None] * slopes[known] + log_weight
        top = exponents.max(axis=1)
        shares = np.exp(exponents - top[:, None])
        mass = shares.sum(axis=1)
        excess = np.maximum(top + np.log(mass) - level, 0.0)
        total[known] -= excess * mass / np.sum(shares * slopes[known], axis=1)
        if not excess.size or float(excess.max()) < 1e-12:
            break
    return np.asarray(total, dtype=np.float64)


def running_moments(values: Floats, pilot: Floats) -> tuple[Floats, Floats]:
    """[n] mean and standard deviation of pilot and earlier draws, before each draw: predictable by construction."""
    centre = float(pilot.mean()) if pilot.size else 0.0
    shifted = values - centre
    counts = max(pilot.size, 1) + np.arange(values.size)
    sums = np.concatenate([[0.0], np.cumsum(shifted)])[:-1]
    squares = np.concatenate([[0.0], np.cumsum(shifted**2)])[:-1]
    pilot_square = float(np.sum((pilot - centre) ** 2))
    means = sums / counts
    return centre + means, np.sqrt(np.maximum((pilot_square + squares) / counts - means**2, 0.0))


def mixture_stakes(
    forecasts: Floats,
    deviations: Floats,
    *,
    num_units: int,
    highest: float,
    log_inverse_delta: float,
    target_units: int,
) -> Floats:
    """[n, K] stakes, one column for each sample size of a grid around the target, geometric in the odds n / (N - n).

    For variance s2 and sample size n the slack is least at lambda_i = sqrt(2 ln(1/delta_s) / (s2 Q)) / (N - i + 1) with
    Q = sum_{i<=n} (N - i + 1)^-2; stakes are capped at lambda_i (hi - Y_i) <= `STAKE_CAP`.
    """
    left = num_units - np.arange(forecasts.size, dtype=np.float64)
    sizes = _sample_sizes(num_units, target_units)
    level = log_inverse_delta + 0.5 * math.log(len(sizes))  # a part of the mixture's price is usually paid
    with np.errstate(divide="ignore", over="ignore"):
        free = np.array([math.sqrt(2 * level / _inverse_squares(num_units, n)) for n in sizes])
        stakes = free[None, :] / (deviations * left)[:, None]
        cap = np.where(highest > forecasts, STAKE_CAP / np.maximum(highest - forecasts, 1e-300), 0.0)
    return np.asarray(np.minimum(stakes, cap[:, None]), dtype=np.float64)


def _sample_sizes(num_units: int, target_units: int) -> list[int]:
    """Sizes n whose odds n / (N - n), to which Q is proportional, are a factor 4 apart, up to nearly all units."""
    odds = max(target_units / STAKE_TARGET_FACTOR**2, 1.0) / num_units
    sizes = set()
    while odds < STAKE_TARGET_FACTOR**3:
        sizes.add(min(max(round(num_units * odds / (1 + odds)), 1), num_units))
        odds *= STAKE_TARGET_FACTOR
    return sorted(sizes)


def _inverse_squares(num_units: int, n: int) -> float:
    return float(polygamma(1, num_units - n + 1) - polygamma(1, num_units + 1))


@dataclass(frozen=True)
class SamplingPath:
    """Bound on the full mean of one line's z_i after each window beyond the pilot."""

    num_windows: np.ndarray
    """[n] windows drawn, pilot included."""
    upper: Floats
    """[n] U_s: upper bound on the mean of z_i over the whole corpus."""
    sample_mean: Floats
    """[n] mean of z_i over the tokens drawn so far."""
    beta: tuple[float, ...] = ()
    """Of the control variates, as the pilot chose it; empty where none are used."""

    @property
    def slack(self) -> Floats:
        """[n] what scoring only these windows costs, in the units of the line."""
        return np.asarray(self.upper - self.sample_mean, dtype=np.float64)


@dataclass(frozen=True)
class UnitLimits:
    """What limits the sum of a window where that is not z_max for each of its tokens.

    A window has a size, known from its ids alone, and a sum of at most ``fixed + rate * size``. Sums are then taken
    about the pilot's mean per unit of size instead of per token.
    """

    sizes: Ints
    """[W] of the windows drawn, in draw order."""
    total_size: int
    """Of all windows of the corpus together."""
    largest_size: int
    """Of the largest of them."""
    fixed: float
    rate: float
    every_size: Ints | None = None
    """[N] of every window of the corpus, where that is known: a limit is then that of its own window."""

    def check(self, sampling: SamplingPlan) -> None:
        """Refuse sizes that the windows of the corpus cannot have.

        Raises:
            InputError: a window is larger than the largest, or they do not add up.
        """
        drawn = int(self.sizes.sum())
        if int(self.sizes.max()) > self.largest_size:
            raise InputError(
                f"a window has the size {int(self.sizes.max())}, the plan says at most {self.largest_size}"
            )
        most = drawn + self.largest_size * (sampling.num_units - self.sizes.size)
        if not drawn <= self.total_size <= most:
            raise InputError(f"windows of the size {drawn} were drawn, all windows have {self.total_size}")


def path_of_windows(
    values: Floats,
    window_lengths: Ints,
    highest_value: float,
    claim: Claim,
    sampling: SamplingPlan,
    *,
    limits: UnitLimits | None = None,
) -> SamplingPath:
    """Slack of every prefix of the draw, for values per token that never exceed ``highest_value``.

    The pilot's windows enter exactly. The others enter as u_j = sum over window j of (z_i - c), c the pilot's mean,
    each at most (z_max - c) s_max; the draw's total is c * (tokens outside the pilot) + sum of u_j. Where the plan has
    control variates, they enter as X_j (:mod:`~tokenbound.bounds.controls`).

    Args:
        values: [W] sums of each window, in draw order.
        window_lengths: [W] tokens of each window.
        highest_value: z_max.
        claim: for delta, K and m.
        sampling: the plan.
        limits: of the sums of windows, where that is not z_max times their tokens.

    Raises:
        IncompleteError: no window beyond the pilot was scored.
        InputError: windows that contradict the plan.
    """
    pilot = sampling.pilot_units
    _check_windows(window_lengths, claim, sampling)
    known = _limits(window_lengths, highest_value, claim, sampling, limits)
    units = _units(values, window_lengths, known, claim, sampling)
    upper = _upper_totals(units.beyond, units, claim, sampling)
    drawn = np.cumsum(window_lengths)[pilot:]
    full = (units.centre * known.total_size + units.pilot_total + upper) / claim.num_tokens
    return SamplingPath(
        num_windows=np.arange(pilot + 1, window_lengths.size + 1),
        upper=np.asarray(full, dtype=np.float64),
        sample_mean=np.asarray(np.cumsum(values)[pilot:] / np.maximum(drawn, 1.0), dtype=np.float64),
        beta=units.beta,
    )


def expected_slacks_of_windows(
    values: Floats,
    window_lengths: Ints,
    highest_value: float,
    claim: Claim,
    sampling: SamplingPlan,
    *,
    limits: UnitLimits | None = None,
) -> dict[int, float]:
    """Slack per token that 2 n and 4 n windows would leave if the further ones were like the n drawn. No bound.

    The same sequence runs on over the windows beyond the pilot, repeated; a multiple beyond N is left out, since all
    windows leave no slack.
    """
    known = _limits(window_lengths, highest_value, claim, sampling, limits)
    units = _units(values, window_lengths, known, claim, sampling)
    others, drawn = sampling.num_units - sampling.pilot_units, window_lengths.size
    found = {}
    for factor in SLACK_MULTIPLES:
        if factor * drawn < sampling.num_units:
            repeated = np.resize(units.beyond, factor * drawn - sampling.pilot_units)
            upper = float(_upper_totals(repeated, units, claim, sampling)[-1])
            found[factor] = max(upper - others * float(repeated.mean()), 0.0) / claim.num_tokens
    return found


@dataclass(frozen=True)
class _Units:
    """The windows as the sequence takes them."""

    beyond: Floats
    """[n] X_j of the windows beyond the pilot, in draw order."""
    pilot: Floats
    """[n_p] X_j of the pilot's."""
    pilot_total: float
    """Sum of u_j over the pilot."""
    centre: float
    """c."""
    highest: float
    """Hi: the largest that X_j of a window outside the pilot can be."""
    beta: tuple[float, ...] = ()
    """Of the control variates; empty where none are used."""


def _limits(
    lengths: Ints, highest_value: float, claim: Claim, sampling: SamplingPlan, given: UnitLimits | None
) -> UnitLimits:
    """Those given; else a window's size is its tokens, each of which has a value of at most z_max."""
    if given is None:
        every = None if sampling.controls is None else sampling.controls.lengths
        return UnitLimits(lengths, claim.num_tokens, sampling.max_unit_tokens, 0.0, highest_value, every)
    given.check(sampling)
    return given


def _units(values: Floats, lengths: Ints, known: UnitLimits, claim: Claim, sampling: SamplingPlan) -> _Units:
    """X_j = u_j - beta . (g_j - g) with u_j = (sum of window j) - c (its size); X_j = u_j without control variates."""
    pilot, controls = sampling.pilot_units, sampling.controls
    centre = math.fsum(values[:pilot].tolist()) / max(float(known.sizes[:pilot].sum()), 1.0)
    units = values - centre * known.sizes
    total = math.fsum(units[:pilot].tolist())

    def limits(sizes: Floats) -> Floats:
        """What u_j never exceeds in windows of at most these sizes."""
        return np.asarray(known.fixed + max(known.rate - centre, 0.0) * sizes)

    largest = np.array([known.largest_size], dtype=np.float64)
    if controls is None or pilot == sampling.num_units:
        return _Units(units[pilot:], units[:pilot], total, centre, float(limits(largest)[0]))
    _check_draw(controls, lengths, claim)
    level = sampling.log_inverse_delta(claim)
    every = limits(largest if known.every_size is None else known.every_size.astype(np.float64))
    fit = regress(controls, units[:pilot], every, draws=sampling.target_draws, log_inverse_delta=level)
    units = units - adjustments(controls.features[controls.order[: lengths.size]], fit.beta, fit.mean)
    return _Units(units[pilot:], units[:pilot], total, centre, fit.highest, tuple(fit.beta.tolist()))


def _check_draw(controls: ControlVariates, lengths: Ints, claim: Claim) -> None:
    """The sums are of a prefix of the draw whose features are known."""
    if controls.num_tokens != claim.num_tokens:
        raise InputError(
            f"control variates are of {controls.num_tokens} tokens, the whole corpus has {claim.num_tokens}"
        )
    drawn = controls.order[: lengths.size]
    if not np.array_equal(controls.lengths[drawn], lengths):
        raise InputError("the sums are of other windows, or in another order, than the draw of the control variates")


def _upper_totals(beyond: Floats, units: _Units, claim: Claim, sampling: SamplingPlan) -> Floats:
    """[n] upper bounds on the total of the windows outside the pilot after each of ``beyond``."""
    num_units, level = sampling.num_units - sampling.pilot_units, sampling.log_inverse_delta(claim)
    if not beyond.size:  # the pilot is the whole corpus
        return np.empty(0)
    forecasts, deviations = running_moments(beyond, units.pilot)
    stakes = mixture_stakes(
        forecasts,
        deviations,
        num_units=num_units,
        highest=units.highest,
        log_inverse_delta=level,
        target_units=sampling.target_draws,
    )
    upper = total_upper_bounds(
        beyond,
        num_units=num_units,
        highest=units.highest,
        log_inverse_delta=level,
        forecasts=forecasts,
        stakes=stakes,
    )
    if beyond.size == num_units:  # nothing is left to chance
        upper[-1] = math.fsum(beyond.tolist())
    return upper


def _check_windows(lengths: np.ndarray, claim: Claim, sampling: SamplingPlan) -> None:
    if lengths.size <= sampling.pilot_units and lengths.size < sampling.num_units:
        raise IncompleteError(
            f"{lengths.size} windows are scored, the pilot alone takes {sampling.pilot_units}: score more windows"
        )
    if lengths.size > sampling.num_units:
        raise InputError(f"{lengths.size} windows were scored, the plan has {sampling.num_units}")
    if int(lengths.max()) > sampling.max_unit_tokens:
        raise InputError(f"a window has {int(lengths.max())} tokens, the plan says at most {sampling.max_unit_tokens}")
    tokens = int(lengths.sum())
    if tokens > claim.num_tokens or (lengths.size == sampling.num_units and tokens != claim.num_tokens):
        raise InputError(f"{lengths.size} windows have {tokens} tokens, the whole corpus {claim.num_tokens}")


def first_prefix(paths: Sequence[SamplingPath], slack_bits: float) -> int | None:
    """Windows, pilot included, of the first complete prefix at which no line's slack exceeds ``slack_bits``, or None.

    Stopping there is valid, and so is going on later: the sequences are valid at every n at once.

    Args:
        paths: of every line that is watched, over the same windows.
        slack_bits: largest slack.

    Raises:
        InputError: no line to watch.

    >>> from tokenbound.bounds import Tuning, line_sums, sampling_path
    >>> claim = Claim(256, 256, code_length_bits=0, delta=0.05, num_tokens=10_000, methods=("azuma",))
    >>> plan = SamplingPlan(num_units=1_000, max_unit_tokens=10, pilot_units=8)
    >>> azuma = (Tuning("azuma", vocab_size=256, alpha=0.1),)
    >>> sums = line_sums(azuma, nll=[0.5, 1.5] * 1_000, window_lengths=[10] * 200)
    >>> first_prefix([sampling_path(azuma[0], 0, sums, claim, plan)], slack_bits=0.5)
    92
    """
    if not paths:
        raise InputError("`until_slack_bits` needs a loss line: add freedman or azuma to `methods`")
    reached = np.flatnonzero(np.max([path.slack for path in paths], axis=0) <= slack_bits)
    return int(paths[0].num_windows[reached[0]]) if reached.size else None
