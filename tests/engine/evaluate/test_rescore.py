"""How rescoring compares: ties, means, signs, and what a draw can find."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from losses_support import make_losses

from tokenbound.bounds.decisions import LEVELS, MAX_LEVEL, TreeChoice, level_of
from tokenbound.certificate.decisions import window_decisions
from tokenbound.engine.evaluate.rescore import (
    SYSTEMATIC_NATS,
    TIE_LOGITS,
    TOLERANCE_NATS,
    TYPICAL_NATS,
    _Comparison,
    _draw,
    detectable_share,
)
from tokenbound.errors import MismatchError
from tokenbound.models.replica import Replica


def comparison(dtype: str = "float32", top_k: tuple[int, ...] = (1, 10)) -> _Comparison:
    return _Comparison(SimpleNamespace(protocol={"dtype": dtype}, top_k=list(top_k), vocab_size=257))  # type: ignore[arg-type]


def compare_columns(off: np.ndarray, dtype: str = "float32") -> None:
    """Recorded losses that differ from the model's by `off` in windows of 16 tokens."""
    check, losses = comparison(dtype), make_losses([16] * (len(off) // 16))
    scored = losses.nll.astype(np.float64) - off
    for start in range(0, len(off), 16):
        cut = slice(start, start + 16)
        check._column(losses, cut, scored[cut], "nll")
    check.finish()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_symmetric_rounding_passes_and_a_shift_of_its_mean_does_not(dtype: str) -> None:
    generator, tokens = np.random.default_rng(0), 16_000
    noise = generator.normal(0, TYPICAL_NATS[dtype] / 10, tokens)
    compare_columns(noise, dtype)
    shift = SYSTEMATIC_NATS[dtype] + 5 * TYPICAL_NATS[dtype] / 10 / math.sqrt(tokens)
    with pytest.raises(MismatchError, match="in the mean of 16,000 tokens"):
        compare_columns(noise - shift, dtype)
    with pytest.raises(MismatchError, match="in the mean of 16,000 tokens"):
        compare_columns(noise + shift, dtype)


def test_honest_checks_hardly_ever_fail() -> None:
    """Four standard errors: of 300 honest checks none fails, with any number of tokens."""
    generator = np.random.default_rng(1)
    for tokens in (16, 160, 1600):
        for _ in range(100):
            compare_columns(generator.normal(0, 2e-4 if tokens > 16 else 1e-5, tokens))


def test_noise_buys_no_room_for_a_shift() -> None:
    """Noise beyond what rounding leaves does not widen the interval of the mean."""
    tokens = 16_000
    signs = np.where(np.arange(tokens) % 2, 1, -1)
    with pytest.raises(MismatchError):
        compare_columns(signs * 4.9e-4 - 1e-4)


def test_one_token_or_window_beyond_the_tolerance_is_refused() -> None:
    off = np.zeros(160)
    off[7] = 2 * TOLERANCE_NATS["float32"]
    with pytest.raises(MismatchError, match=r"differs from the model's by up to 0.01"):
        compare_columns(off)
    off[:16] = TOLERANCE_NATS["float32"] / 5
    off[7] = 0
    with pytest.raises(MismatchError, match=r"differs from the model's by up to 0.001"):
        compare_columns(off)


def ranks(recorded: list[int], scored: list[int], low: list[int], high: list[int]) -> _Comparison:
    check = comparison()
    columns = {"rank": scored, "lowest_rank": low, "highest_rank": high}
    check._ranks(np.array(recorded), {name: np.array(value) for name, value in columns.items()}, 3)
    return check


def test_a_rank_moves_by_ties_alone() -> None:
    ranks([0, 5, 2], [1, 5, 0], [0, 5, 0], [1, 5, 2]).finish()
    for recorded in ([0, 5], [4, 5]):
        with pytest.raises(MismatchError, match=r"window 3: 1 of 2 recorded ranks.*leave 1 to 3"):
            ranks(recorded, [2, 5], [1, 5], [3, 5])


def test_ties_that_all_fall_one_way_are_refused() -> None:
    """Among tied tokens rounding makes as many right as wrong; a forger makes all of them right."""
    ranks([0, 1] * 100, [1, 0] * 100, [0] * 200, [1] * 200).finish()
    ranks([0] * 16, [1] * 16, [0] * 16, [1] * 16).finish()
    with pytest.raises(MismatchError, match="at top-1: of the tokens whose logits tie, 17 became right and 0 wrong"):
        ranks([0] * 17, [1] * 17, [0] * 17, [1] * 17).finish()


@pytest.mark.parametrize("own_logits", [False, True])
def test_rank_limits_count_the_logits_that_tie(own_logits: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
    replica = Replica(model, batch=2, length=8)
    if own_logits:
        replica.head = None
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, 50, (3, 8)), generator.integers(0, 50, (3, 8))
    mask = generator.random((3, 8)) < 0.7
    logits = model(torch.from_numpy(inputs)).logits.detach()
    target = logits.gather(2, torch.from_numpy(targets)[..., None])
    for tolerance in (0.0, 0.02):
        low, high = replica.rank_limits(inputs, targets, mask, tolerance)
        assert (low[~mask] == -1).all()
        assert (high[~mask] == -1).all()
        np.testing.assert_array_equal(low[mask], (logits > target + tolerance + 1e-6).sum(2).numpy()[mask])
        np.testing.assert_array_equal(high[mask], (logits >= target - tolerance - 1e-6).sum(2).numpy()[mask] - 1)
    own = replica.score(inputs, targets, mask).rank
    assert ((low <= own) & (own <= high))[mask].all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_batch_shapes_and_threads_agree(dtype: str) -> None:
    """What really differs between machines: the order of additions. It passes every comparison."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=997, max_position_embeddings=64, initializer_range=0.1, **sizes)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, 997, (32, 64)), generator.integers(0, 997, (32, 64))
    mask = np.ones((32, 64), bool)
    threads = torch.get_num_threads()
    found = []
    try:
        for batch, count in ((16, 1), (3, 2)):
            torch.set_num_threads(count)
            replica = Replica(model, batch=batch, length=64, tree=TreeChoice("zipf"))
            found.append(replica.score(inputs, targets, mask))
        low, high = replica.rank_limits(inputs, targets, mask, TIE_LOGITS[dtype])
        log_odds = replica.decision_log_odds(inputs, targets, mask)
    finally:
        torch.set_num_threads(threads)
    first, second = found
    check = comparison(dtype)
    tables: Any = SimpleNamespace(window_id=np.arange(32), tables=window_decisions(first.cells))
    tree = TreeChoice("zipf").over(997)
    assert (level_of(log_odds)[second.cells >= 0] == (second.cells % LEVELS - MAX_LEVEL)[second.cells >= 0]).all()
    if dtype == "bfloat16":  # the same weights in float32 differ by more than two machines do, and still pass
        log_odds = Replica(model.float(), batch=16, length=64, tree=TreeChoice("zipf")).decision_log_odds(
            inputs, targets, mask
        )
        moved = level_of(log_odds) != second.cells % LEVELS - MAX_LEVEL
        assert 0.001 < moved[second.cells >= 0].mean() < 0.5
    for row in range(32):
        tokens = {"token": targets[row], "nll": second.nll[row], "outcomes": tree.outcomes(targets[row])}
        check._decisions(tables, row, {**tokens, "log_odds": log_odds[row]})
        recorded: Any = SimpleNamespace(nll=first.nll[row], entropy=first.entropy[row])
        for name in ("nll", "entropy"):
            check._column(recorded, slice(0, 64), getattr(second, name)[row], name)
        columns = {"rank": second.rank[row], "lowest_rank": low[row], "highest_rank": high[row]}
        check._ranks(first.rank[row], columns, row)
    check.finish()


def miss(population: int, drawn: int, forged: int) -> float:
    """Probability that a draw meets none of the forged, by counting every draw."""
    draws = list(combinations(range(population), drawn))
    return sum(min(draw, default=population) >= forged for draw in draws) / len(draws)


@pytest.mark.parametrize(("population", "drawn"), [(8, 3), (10, 1), (9, 8), (6, 6), (12, 5)])
def test_the_share_that_would_be_found_is_hypergeometric(population: int, drawn: int) -> None:
    forged = round(detectable_share(population, drawn) * population)
    assert miss(population, drawn, forged) <= 0.05
    assert forged == 1 or miss(population, drawn, forged - 1) > 0.05


class Ledger:
    """Shards of three, five and four windows."""

    sizes = (3, 5, 4)
    num_shards, last_windows = 3, 2

    def record(self, shard: int) -> Any:
        return SimpleNamespace(windows=self.sizes[shard])

    def losses(self, shard: int) -> int:
        return shard


def test_the_draw_is_without_replacement_and_fresh() -> None:
    ledger: Any = Ledger()
    drawn, total = _draw(ledger, 100)
    assert total == 3 + 5 + 2  # a sample stops inside its last shard
    assert [(shard, rows.tolist()) for shard, rows in drawn] == [(0, [0, 1, 2]), (1, [0, 1, 2, 3, 4]), (2, [0, 1])]
    assert sum(len(rows) for _, rows in _draw(ledger, 7)[0]) == 7

    def one(seed: int | None = None) -> list[tuple[int, list[int]]]:
        return [(shard, rows.tolist()) for shard, rows in _draw(ledger, 4, seed)[0]]

    assert one(seed=5) == one(seed=5)
    assert len({str(one()) for _ in range(20)}) > 1


# --- Decisions ------------------------------------------------------------------------------------------------------


def compare_decisions(
    recorded: np.ndarray,
    own: np.ndarray,
    outcomes: np.ndarray,
    *,
    nll: float = 1.0,
    recorded_outcomes: np.ndarray | None = None,
) -> _Comparison:
    """The table of levels [T, J] against log-odds [T, J] in nats of the same decisions, in windows of 16 tokens."""
    check = comparison()
    cells = (outcomes if recorded_outcomes is None else recorded_outcomes) * LEVELS + recorded + MAX_LEVEL
    tables = window_decisions(cells.astype(np.int16).reshape(-1, 16, own.shape[1]))
    losses = replace(make_losses([16] * (len(own) // 16)), tables=tables)
    for row, start in enumerate(range(0, len(own), 16)):
        cut = slice(start, start + 16)
        tokens = {"token": np.zeros(16), "nll": np.full(16, nll)}
        check._decisions(losses, row, {"log_odds": own[cut], "outcomes": outcomes[cut], **tokens})
    return check


def some_decisions(tokens: int = 1600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    odds = generator.normal(-2, 3, (tokens, 9))
    return odds, (generator.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.int64)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 3e-4])
def test_levels_that_rounding_moved_pass(noise: float) -> None:
    for seed in range(10):
        odds, outcomes = some_decisions(seed=seed)
        other = odds + np.random.default_rng(seed).normal(0, noise, odds.shape)
        compare_decisions(level_of(other), odds, outcomes).finish()


def test_a_level_that_no_rounding_leaves_is_refused() -> None:
    odds, outcomes = some_decisions(16)
    odds[:] = np.round(odds / 0.125) * 0.125  # in the middle of their levels
    levels = level_of(odds)
    levels[3, 2] += 2
    with pytest.raises(MismatchError, match=r"window 0: the levels of \d+ of \d+ recorded decisions of outcome"):
        compare_decisions(levels, odds, outcomes)


def test_levels_beside_a_boundary_that_all_fall_one_way_are_refused() -> None:
    """A forger who moves only what the tolerance leaves open is found by the sum."""
    odds, outcomes = some_decisions()
    in_favour = np.where(outcomes == 1, 1, -1) * 0.004
    with pytest.raises(MismatchError, match="recorded decisions differs from the model by -"):
        compare_decisions(level_of(odds + in_favour), odds, outcomes).finish()


def test_other_outcomes_are_refused() -> None:
    odds, outcomes = some_decisions(16)
    swapped = outcomes.copy()
    swapped[0, 0] ^= 1
    with pytest.raises(MismatchError, match=r"window 0: \d+ decisions of outcome 0 are recorded, its tokens have"):
        compare_decisions(level_of(odds), odds, outcomes, recorded_outcomes=swapped)


def test_decisions_below_the_reach_of_float32_are_not_compared() -> None:
    odds, outcomes = some_decisions(16)
    compare_decisions(np.zeros_like(outcomes), np.full(odds.shape, np.nan), outcomes, nll=np.nan).finish()
    compare_decisions(np.zeros_like(outcomes), odds, outcomes, nll=80.0).finish()
    with pytest.raises(MismatchError):
        compare_decisions(np.zeros_like(outcomes), odds, outcomes)
