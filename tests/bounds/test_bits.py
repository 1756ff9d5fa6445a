"""The line over binary decisions: trees, tables, closed forms, its code, and that it holds."""

import hashlib
import inspect
import itertools
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds import Claim, SamplingPlan
from tokenbound.bounds.codes import decision_tune_bits, elias_delta_bits
from tokenbound.bounds.columns import Piece, pack
from tokenbound.bounds.constants import (
    BUDGET_GRID,
    DECISION_ALPHA_GRID,
    DECISION_LAMBDA_GRID,
    DECISION_SLOPE_GRID,
)
from tokenbound.bounds.decision_bets import DecisionBet
from tokenbound.bounds.decisions import (
    BLOCK_IDS,
    CELLS,
    LEVEL_STEP,
    LEVELS,
    MAX_CODE_LENGTH,
    MAX_LEVEL,
    MAX_TREE_IDS,
    TREE_BITS,
    DecisionTable,
    TreeChoice,
    code_lengths,
    decision_tree,
    level_of,
    level_probabilities,
    tree_code_bits,
)
from tokenbound.bounds.lines.bits import Bits, BitsSums, BitsTuning, bits_path, certify_bits, choose_bits, mean_value
from tokenbound.bounds.printing import yardsticks
from tokenbound.bounds.search import SlackModel
from tokenbound.certificate.decisions import window_decisions
from tokenbound.errors import InputError, MismatchError

CLAIM = Claim(257, 257, 40_000, 0.05, num_tokens=200_000, methods=("freedman", "bits"), tree="zipf")


def table_of(right: float, log_odds: float, decisions: int, tokens: int) -> DecisionTable:
    """Decisions of one level, of which a share goes right."""
    counts = np.zeros((2, LEVELS), np.int64)
    level = int(level_of(log_odds)) + MAX_LEVEL
    counts[1, level] = round(right * decisions)
    counts[0, level] = decisions - counts[1, level]
    return DecisionTable(counts, tokens)


# Trees


def lengths_of(vocab_size: int, seed: int = 0) -> bytes:
    counts = np.random.default_rng(seed).zipf(1.3, vocab_size).clip(max=10**7)
    return code_lengths(counts)


@pytest.mark.parametrize("vocab_size", [2, 3, 16, 17, 257, 2048, 2049, 2053, 5000])
@pytest.mark.parametrize("name", ["zipf", "balanced", "counts"])
def test_a_tree_is_a_complete_prefix_code(name, vocab_size):
    tree = decision_tree(name, vocab_size, lengths_of(vocab_size) if name == "counts" else None)
    depth = tree.num_decisions(np.arange(vocab_size))
    assert math.fsum(2.0 ** -depth.astype(float)) == 1
    assert depth.max() == tree.max_decisions
    assert (tree.children < np.arange(tree.num_blocks, 2 * tree.num_blocks - 1)[:, None]).all()
    assert sorted(tree.children.reshape(-1).tolist()) == list(range(2 * tree.num_blocks - 2))  # one parent each


@pytest.mark.parametrize("name", ["zipf", "counts"])
@pytest.mark.parametrize("vocab_size", [2, 3, 257, 2049, 2053, 2063, 2064, 5001])
def test_the_outcomes_of_ids_are_the_words_of_that_code(name, vocab_size):
    """Every id has another word, none begins another, and a word has as many decisions as its id is deep."""
    tree = decision_tree(name, vocab_size, lengths_of(vocab_size) if name == "counts" else None)
    outcomes = tree.outcomes(np.arange(vocab_size))
    words = sorted("".join(str(turn) for turn in row if turn >= 0) for row in outcomes.tolist())
    assert not any(after.startswith(before) for before, after in itertools.pairwise(words))
    assert ((outcomes >= 0).sum(axis=1) == tree.depth).all()
    assert set(np.unique(outcomes)) <= {-1, 0, 1}
    pairs = np.arange(vocab_size - vocab_size % 2).reshape(2, -1)
    assert (tree.outcomes(pairs).reshape(-1, outcomes.shape[1]) == outcomes[: pairs.size]).all()


@pytest.mark.parametrize(
    ("name", "vocab_size", "digest"),
    [
        ("zipf", 257, "1ff7549e2112a80b"),
        ("zipf", 5000, "ae533cd96ad2c3a3"),
        ("balanced", 257, "a5e698165b5b1792"),
        ("balanced", 5000, "c654050d4bb5893a"),
        ("counts", 257, "833dc207b3361db5"),
        ("counts", 5000, "9972c41e8d1c2eea"),
    ],
)
def test_trees_are_constants_of_the_package(name, vocab_size, digest):
    """Certificates name a tree and not its nodes, so that they must never move."""
    counts = 10**7 // (np.arange(vocab_size) % 977 + 1) ** 2
    tree = decision_tree(name, vocab_size, code_lengths(counts) if name == "counts" else None)
    found = hashlib.sha256()
    for array, kind in ((tree.children, "<i4"), (tree.path, "<i4"), (tree.turns, "i1"), (tree.leaf, "<i4")):
        found.update(np.ascontiguousarray(array.astype(kind)).tobytes())
    assert found.hexdigest()[:16] == digest


def test_paths_lead_from_the_root_to_each_block():
    tree = decision_tree("zipf", 5000)
    for block in (0, 1, 17, tree.num_blocks - 1):
        node = 2 * tree.num_blocks - 2
        for at, turn in zip(tree.path[block], tree.turns[block], strict=True):
            if turn >= 0:
                assert at == node
                node = tree.children[node - tree.num_blocks, turn]
        assert node == block


def test_nearby_weights_are_split_in_halves():
    tree = decision_tree("balanced", 4096)
    assert tree.block_ids == BLOCK_IDS
    assert set(tree.num_decisions(np.arange(4096)).tolist()) == {12}


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_tree_from_counts_is_the_huffman_tree_of_its_lengths(counts):
    lengths = code_lengths(counts)
    tree = decision_tree("counts", len(counts), lengths)
    assert tree.num_decisions(np.arange(len(counts))).tolist() == list(lengths)
    weights = np.array(counts) + 1
    mean = float(weights @ np.frombuffer(lengths, np.uint8)) / weights.sum()
    entropy = -float(weights @ np.log2(weights / weights.sum())) / weights.sum()
    assert entropy - 1e-9 <= mean < entropy + 1


def test_code_lengths_stay_within_a_byte_and_a_word():
    steep = np.array([2**k for k in range(60)])
    lengths = np.frombuffer(code_lengths(steep), np.uint8)
    assert lengths.max() == 25 <= MAX_CODE_LENGTH  # a constant of the package, as the trees are
    decision_tree("counts", 60, lengths.tobytes())


def test_the_code_of_trees_satisfies_kraft():
    pairs = itertools.product(range(1, MAX_CODE_LENGTH + 1), repeat=2)
    total = math.fsum(2 ** -tree_code_bits(bytes(pair)) for pair in pairs)
    assert total == pytest.approx(2.0**-TREE_BITS)
    assert tree_code_bits(None) == TREE_BITS


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("huffman", None),
        ("counts", None),
        ("zipf", b"\1\1"),
        ("counts", b"\1\2"),
        ("counts", b"\1"),
        ("counts", b"\0\1"),
    ],
)
def test_other_trees_are_refused(name, lengths):
    with pytest.raises(InputError, match=r"tree|code lengths"):
        decision_tree(name, 2, lengths)


@pytest.mark.parametrize(("vocab_size", "lengths"), [(3, b"\1\1"), (3, b"\1\1\51"), (2, b"\1\2\2"), (2, b"\0\51")])
def test_complete_codes_of_other_ids_are_refused(vocab_size, lengths):
    with pytest.raises(InputError, match=f"needs {vocab_size} code lengths"):
        decision_tree("counts", vocab_size, lengths)


def test_the_longest_code_words_have_the_longest_length():
    lengths = bytes([*range(1, MAX_CODE_LENGTH + 1), MAX_CODE_LENGTH])
    tree = decision_tree("counts", MAX_CODE_LENGTH + 1, lengths)
    assert tree.num_decisions(np.arange(MAX_CODE_LENGTH + 1)).tolist() == list(lengths)


def test_only_large_vocabularies_have_blocks():
    assert decision_tree("zipf", 2048).block_ids == 1
    assert decision_tree("zipf", 2049).block_ids == BLOCK_IDS


@pytest.mark.parametrize("choice", [TreeChoice("zipf"), TreeChoice("balanced"), TreeChoice("counts", b"\1\2\50\33\34")])
def test_the_name_of_a_tree_keeps_its_form(choice):
    data = choice.to_dict()
    assert set(data) == ({"name", "lengths"} if choice.lengths else {"name"})
    assert TreeChoice.from_dict(data) == choice


@pytest.mark.parametrize(
    "damage",
    [
        {"name": "huffman"},
        {"name": "counts"},
        {"name": "zipf", "lengths": "AA"},
        {"name": "huffman", "lengths": "AA"},
        {"name": "counts", "lengths": "A-"},
        {"name": "counts", "lengths": "A?"},
        {"name": "counts", "lengths": "Ap"},  # 42
        {"name": "counts", "lengths": 3},
    ],
)
def test_a_damaged_name_of_a_tree_is_refused(damage):
    with pytest.raises(MismatchError, match="tree"):
        TreeChoice.from_dict(damage)


def test_no_tree_can_see_a_prediction():
    """The trap: along a tree of the predictions themselves, each decision is a fair coin and the line says nothing."""
    assert list(inspect.signature(decision_tree.__wrapped__).parameters) == ["name", "vocab_size", "lengths"]
    fair = table_of(0.5, 0.0, 3 * 200_000, 200_000)
    line = certify_bits(choose_bits(fair, CLAIM), BitsSums(fair), CLAIM)
    assert line.value == pytest.approx(3, abs=0.02)  # as measured, whatever the code costs
    assert line.vacuous


# Tables


def test_levels_are_rounded_log_odds():
    assert level_of(np.log(0.25 / 0.75)) == round(math.log(1 / 3) / LEVEL_STEP)
    assert level_of([math.inf, -math.inf, math.nan, 100, -100]).tolist() == [127, -127, 0, 127, -127]
    chance = level_probabilities()
    assert chance[MAX_LEVEL] == 0.5
    assert chance + chance[::-1] == pytest.approx(np.ones(LEVELS))


def test_rounding_to_levels_moves_the_loss_by_less_than_a_thousandth():
    rng = np.random.default_rng(0)
    chance = rng.beta(0.2, 0.2, 200_000)  # of decisions, most of them nearly certain
    with np.errstate(divide="ignore"):
        rounded = level_probabilities()[level_of(np.log(chance) - np.log1p(-chance)) + MAX_LEVEL]
    right = rng.random(chance.size) < chance
    loss = -np.log2(np.where(right, chance, 1 - chance))
    moved = -np.log2(np.where(right, rounded, 1 - rounded))
    assert abs(float((moved - loss).mean())) * 8 < 1e-3  # of eight decisions a token


def test_tables_merge_exactly_and_keep_their_form():
    rng = np.random.default_rng(1)
    cells = rng.integers(-1, CELLS, (50, 7))
    whole = DecisionTable.of_cells(cells, 50)
    parts = DecisionTable.of_cells(cells[:20], 20) + DecisionTable.of_cells(cells[20:], 30)
    assert whole == parts == DecisionTable.from_dict(whole.to_dict())
    assert whole.num_decisions == np.count_nonzero(cells >= 0)
    assert whole != replace(whole, num_tokens=51)
    distinct, counts = np.unique(cells[cells >= 0], return_counts=True)
    assert DecisionTable.of_cells(distinct, 50, counts) == whole


def test_a_table_is_also_that_of_one_window():
    table = DecisionTable.of_cells([7, 300, 7, 9], 2, weights=[1, 4, 2, 0])
    window = table.as_window()
    assert (window.cell.tolist(), window.count.tolist(), window.offsets.tolist()) == ([7, 300], [3, 4], [0, 2])
    assert DecisionTable.of_cells(window.cell, 2, window.count) == table


@pytest.mark.parametrize("cells", [[CELLS], [-2]])
def test_cells_outside_the_table_are_refused(cells):
    with pytest.raises(MismatchError, match="cells"):
        DecisionTable.of_cells(cells, 1)
    with pytest.raises(MismatchError, match="negative"):
        DecisionTable.of_cells([0], 1, [-1])


@pytest.mark.parametrize("damage", [{"tokens": -1}, {"tokens": 1.0}, {"tokens": True}, {"counts": "eJwDAAAAAAE="}])
def test_damaged_tables_are_refused(damage):
    with pytest.raises(ValueError, match=r"."):
        DecisionTable.from_dict({**DecisionTable.of_cells([3], 1).to_dict(), **damage})


# Closed forms


BETS = st.builds(
    DecisionBet,
    st.sampled_from(DECISION_LAMBDA_GRID),
    st.sampled_from(DECISION_SLOPE_GRID),
    st.sampled_from(DECISION_ALPHA_GRID),
)


@given(BETS)
@settings(max_examples=200, deadline=None)
def test_every_grid_point_is_a_fair_game(bet):
    q = bet.smoothed
    assert ((q > 0) & (q <= 0.5)).all()
    assert (bet.factor > 0).all()  # lambda (B - Y) < 1
    right = np.concatenate([q[:0:-1], q[:1], 1 - q[1:]])
    assert right * bet.factor[1] + (1 - right) * bet.factor[0] == pytest.approx(np.ones(LEVELS), rel=1e-12)
    assert 2 ** -bet.loss[0] + 2 ** -bet.loss[1] == pytest.approx(np.ones(LEVELS), rel=1e-12)
    assert (bet.value - bet.loss > -1e-12 / bet.lam).all()  # v >= 0


@given(st.sampled_from(DECISION_LAMBDA_GRID[40:]), st.floats(0.001, 0.5))
@settings(max_examples=40, deadline=None)
def test_no_other_smoothing_or_forecast_is_better(lam, share):
    def expected(q: np.ndarray, forecast: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            up = np.log(1 + lam * (forecast + np.log2(q)))
            down = np.log(1 + lam * (forecast + np.log2(1 - q)))
            return np.nan_to_num(forecast - (share * up + (1 - share) * down) / lam, nan=np.inf)

    log_odds = math.log((1 - share) / share)
    bet = DecisionBet(lam, log_odds / (LEVEL_STEP * MAX_LEVEL), 0.0)  # so that the last level expects this share
    q = float(bet.smoothed[-1])
    best = float(expected(np.array(q), np.array(bet.forecast[0, 0])))
    others = np.linspace(0.0005, 0.9995, 800)[:, None], np.linspace(0, 12, 800)[None]
    assert best <= expected(*others).min() + 1e-9
    near = q * np.exp(np.linspace(-0.05, 0.05, 101))[:, None], bet.forecast[0, 0] + np.linspace(-0.05, 0.05, 101)
    assert best <= expected(*near).min() + 1e-12


@given(BETS, st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_line_agrees_with_fifty_digits(bet, seed):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, CELLS, (40, 3))
    claim = replace(CLAIM, num_tokens=40, code_length_bits=100.0)
    paid = decision_tune_bits(TREE_BITS) + claim.shared_bits
    line = certify_bits(
        BitsTuning(bet.lam, bet.slope, bet.alpha, paid), BitsSums(DecisionTable.of_cells(cells, 40)), claim
    )
    with mpmath.workdps(50):
        lam = mpmath.mpf(bet.lam)
        total = mpmath.mpf(0)
        for cell in cells.reshape(-1).tolist():
            right, level = divmod(cell, LEVELS)
            place = abs(level - MAX_LEVEL)
            unlikely = mpmath.mpf(float(bet.smoothed[place]))
            q = unlikely if (level < MAX_LEVEL) == bool(right) or place == 0 else 1 - unlikely
            loss = -mpmath.log(q, 2)
            forecast = -(q * mpmath.log(q, 2) + (1 - q) * mpmath.log(1 - q, 2))
            distance = lam * (forecast - loss)
            total += loss + (distance - mpmath.log(1 + distance)) / lam
        kappa = mpmath.log(2) * (100 + mpmath.mpf(paid)) + mpmath.log(1 / mpmath.mpf(claim.delta))
        exact = (total + kappa / lam) / 40
    allowed = 2e-9 + 1e-9 * abs(exact) + float(bet.rounding.reshape(-1)[cells].sum()) / 40
    assert exact <= line.value <= exact + allowed


# The code


def test_the_tuning_is_paid_for_to_the_bit():
    table = table_of(0.03, -3.4, 200_000, 200_000)
    points = len(DECISION_LAMBDA_GRID) * len(DECISION_SLOPE_GRID) * len(DECISION_ALPHA_GRID)
    tuning = choose_bits(table, CLAIM)
    shared = math.log2(CLAIM.num_lines) + elias_delta_bits(1)
    assert tuning.tune_bits == pytest.approx(TREE_BITS + math.log2(points) + shared)
    lengths = lengths_of(257)
    dearer = choose_bits(table, replace(CLAIM, tree="counts", tree_lengths=lengths, trial=5))
    extra = tree_code_bits(lengths) - TREE_BITS + elias_delta_bits(5) - elias_delta_bits(1)
    assert dearer.tune_bits == pytest.approx(tuning.tune_bits + extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": 0.12345}, "lambda"),
        ({"slope": 1.01}, "slope"),
        ({"alpha": 0.3}, "alpha"),
        ({"tune_bits": 3.0}, "pays"),
    ],
)
def test_a_tuning_outside_its_code_is_refused(change, message):
    table = table_of(0.03, -3.4, 200_000, 200_000)
    with pytest.raises(MismatchError, match=message):
        certify_bits(replace(choose_bits(table, CLAIM), **change), BitsSums(table), CLAIM)


def test_tokens_must_be_counted_once_and_trees_named():
    table = table_of(0.03, -3.4, 200_000, 200_000)
    tuning = choose_bits(table, CLAIM)
    with pytest.raises(MismatchError, match="199999 tokens"):
        certify_bits(tuning, BitsSums(replace(table, num_tokens=199_999)), CLAIM)
    with pytest.raises(MismatchError, match="no tree"):
        certify_bits(tuning, BitsSums(table), replace(CLAIM, tree=None))
    with pytest.raises(MismatchError, match="no token"):
        choose_bits(DecisionTable.of_cells([], 0), CLAIM)
    with pytest.raises(InputError, match="name freedman or azuma beside it"):
        replace(CLAIM, methods=("bits",))


# The choice


@pytest.mark.parametrize("code_bits", [100.0, 40_000.0, 10_000_000.0])
def test_the_choice_is_the_best_grid_point(code_bits):
    rng = np.random.default_rng(3)
    levels = rng.normal(0, 30, 300_000).clip(-127, 127).astype(int)
    right = rng.random(levels.size) < 1 / (1 + np.exp(-0.8 * LEVEL_STEP * levels))
    table = DecisionTable.of_cells(right * LEVELS + levels + MAX_LEVEL, 100_000)
    claim = replace(CLAIM, num_tokens=100_000, code_length_bits=code_bits)
    tuning = choose_bits(table, claim)
    line = certify_bits(tuning, BitsSums(table), claim)
    values = [
        mean_value(table, DecisionBet(lam, slope, alpha)) + line.kappa_nats / lam / 100_000
        for lam in DECISION_LAMBDA_GRID[60::8]
        for slope in DECISION_SLOPE_GRID
        for alpha in DECISION_ALPHA_GRID[::5]
    ]
    assert line.value <= min(values) + 1e-3 * (min(values) - line.empirical)
    assert tuning.slope in (0.75, 0.8125) or code_bits > 1e6


def test_a_memoriser_stays_vacuous():
    """Every decision right with certainty, at one bit of code for each bit of the corpus."""
    table = table_of(0.0, -15.0, 8 * 200_000, 200_000)
    claim = replace(CLAIM, code_length_bits=8.0 * 200_000)
    line = certify_bits(choose_bits(table, claim), BitsSums(table), claim)
    assert line.empirical < 8
    assert line.vacuous


# Samples


def sampled(rng: np.random.Generator, units: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Cells [units, 32 * 4] of the windows of a corpus, and which are hard."""
    hard = rng.random(units) < 0.3
    levels = np.where(hard[:, None], -8, -24) + rng.integers(-4, 5, (units, 128))
    right = rng.random(levels.shape) < 1 / (1 + np.exp(-LEVEL_STEP * levels))
    return right * LEVELS + levels + MAX_LEVEL, hard


def window_sums(tuning: BitsTuning, cells: np.ndarray) -> BitsSums:
    values = tuning.bet.value.reshape(-1)[cells].sum(axis=1)
    table = DecisionTable.of_cells(cells, 32 * len(cells))
    return BitsSums(table, values, np.full(len(cells), 32), np.full(len(cells), cells.shape[1]))


def test_a_sample_bounds_the_mean_of_all_windows():
    rng = np.random.default_rng(4)
    cells, _ = sampled(rng)
    claim = replace(CLAIM, num_tokens=32 * len(cells))
    plan = SamplingPlan(len(cells), 32, pilot_units=40, max_unit_decisions=128, num_decisions=cells.size)
    tuning = choose_bits(DecisionTable.of_cells(cells[:40], 32 * 40), claim, plan)
    line = certify_bits(tuning, window_sums(tuning, cells[:600]), claim, plan)
    path = bits_path(tuning, window_sums(tuning, cells[:600]), claim, plan)
    whole = float(tuning.bet.value.reshape(-1)[cells].sum()) / claim.num_tokens
    assert (path.upper >= whole).all()
    assert line.terms["sampling_slack"] == pytest.approx(path.upper[-1] - path.sample_mean[-1])
    assert line.value >= whole + line.terms["complexity"]
    assert {name for name in line.terms if name.startswith("slack_at")} == {"slack_at_2n", "slack_at_4n"}
    everything = bits_path(tuning, window_sums(tuning, cells), claim, plan)
    assert everything.upper[-1] == pytest.approx(whole, rel=1e-12)


def test_a_sample_needs_the_number_of_decisions_of_its_largest_window():
    cells, _ = sampled(np.random.default_rng(5), 100)
    claim = replace(CLAIM, num_tokens=3200)
    plan = SamplingPlan(100, 32, pilot_units=10, max_unit_decisions=128, num_decisions=cells.size)
    tuning = choose_bits(DecisionTable.of_cells(cells[:10], 320), claim, plan)
    for unknown in ({"num_decisions": None}, {"max_unit_decisions": None}):
        with pytest.raises(MismatchError, match="how many decisions"):
            bits_path(tuning, window_sums(tuning, cells[:50]), claim, replace(plan, **unknown))
    with pytest.raises(MismatchError, match="sums of its windows"):
        certify_bits(tuning, BitsSums(DecisionTable.of_cells(cells[:50], 1600)), claim, plan)
    for change in ({"budget": None}, {"budget": 100.5}):
        with pytest.raises(MismatchError, match="budget"):
            certify_bits(replace(tuning, **change), window_sums(tuning, cells[:50]), claim, plan)
    with pytest.raises(MismatchError, match="budget of a window"):
        bits_path(replace(tuning, budget=None), window_sums(tuning, cells[:50]), claim, plan)
    whole = DecisionTable.of_cells(cells, 3200)
    with pytest.raises(MismatchError, match="lines of a sample alone"):
        certify_bits(replace(choose_bits(whole, claim), budget=64.0), BitsSums(whole), claim)


# The budget of a window


def with_fair_coins(values: np.ndarray, budget: float) -> float:
    """What a window costs whose decisions behind the budget are fair coins, decision by decision."""
    total = 0.0
    for value in values.tolist():
        total += 1.0 if total > budget else value
    return total


def test_a_fair_coin_costs_a_bit_whatever_the_stake():
    """And no z is below 0, so that a window within its budget was within it all along."""
    for lam in DECISION_LAMBDA_GRID[::16]:
        bet = DecisionBet(lam, 1.0, 0.125)
        assert bet.value[:, MAX_LEVEL] == pytest.approx([1, 1])
        assert bet.value.min() >= 0


def rare(rng: np.random.Generator, units: int) -> np.ndarray:
    """Cells [units, 128] of windows of which one in two hundred is wrong with certainty, again and again."""
    cells, _ = sampled(rng, units)
    surprised = LEVELS + MAX_LEVEL - 120  # right, at odds of e^-15
    cells[rng.random(units) < 0.005] = surprised
    return cells


def test_a_budget_leaves_a_sample_less_slack():
    rng = np.random.default_rng(9)
    cells = rare(rng, 4000)
    claim = replace(CLAIM, num_tokens=32 * len(cells))
    plan = SamplingPlan(len(cells), 32, pilot_units=40, max_unit_decisions=128, num_decisions=cells.size)
    table = DecisionTable.of_cells(cells[:40], 32 * 40)
    tuning = choose_bits(table, claim, plan, slack=SlackModel(6.0, 160, 12.0, 12.0, True, 32, 32.0))
    assert tuning.budget < 1000
    line = certify_bits(tuning, window_sums(tuning, cells[:600]), claim, plan)
    free = replace(tuning, budget=BUDGET_GRID[-1])
    without = certify_bits(free, window_sums(tuning, cells[:600]), claim, plan)
    assert line.terms["sampling_slack"] < 0.2 * without.terms["sampling_slack"]
    values = tuning.bet.value.reshape(-1)[cells[:600]].sum(axis=1)
    over = (values > tuning.budget).sum()
    assert line.parameters["windows_over_budget"] == over > 0
    counted = np.where(values > tuning.budget, tuning.budget + tuning.bet.highest_value + 128, values)
    path = bits_path(tuning, window_sums(tuning, cells[:600]), claim, plan)
    assert path.sample_mean[-1] == pytest.approx(counted.mean() / 32)
    assert not Bits.bounds_risk, "it is never the bound quoted"
    [_, said] = Bits().sentences(line)
    assert f"{over} windows drawn exceeded" in said


def budget_misses(trials: int) -> float:
    """How often a path lies below the mean of all windows as the hypothesis has them, at any size of the sample."""
    failed = 0
    for trial in range(trials):
        rng = np.random.default_rng([10, trial])
        cells = rare(rng, 200)
        claim = replace(CLAIM, num_tokens=32 * 200, delta=0.4)
        plan = SamplingPlan(200, 32, pilot_units=10, max_unit_decisions=128, num_decisions=cells.size)
        tuning = choose_bits(DecisionTable.of_cells(cells[:10], 320), claim, plan)
        tuning = replace(tuning, budget=BUDGET_GRID[6])
        values = tuning.bet.value.reshape(-1)[cells]
        path = bits_path(tuning, window_sums(tuning, cells[:120]), claim, plan)
        whole = sum(with_fair_coins(row, tuning.budget) for row in values) / claim.num_tokens
        failed += bool((path.upper < whole).any())
    return failed / trials


def test_samples_of_windows_with_budgets_hold():
    assert budget_misses(12) <= 0.4 * 0.5


@pytest.mark.slow
def test_samples_of_windows_with_budgets_hold_long():
    assert budget_misses(300) <= 0.4 * 0.5


# That it holds


def misses(rng: np.random.Generator, *, trials: int, tokens: int, decisions: int, models: int) -> float:
    """Share of certificates that lie below the risk: the best of several models is chosen after seeing the tokens.

    The process is a martingale that adapts: after a surprising decision the next is more surprising, and a rare jackpot
    makes unlikely outcomes likelier than every model says. Each model distorts the true log-odds in its own way.
    """
    failed = 0
    bits = math.log2(models)
    claim = replace(CLAIM, num_tokens=tokens, code_length_bits=bits, code_split={})
    for _ in range(trials):
        steps = tokens * decisions
        surprise = rng.random(steps) < 0.05
        truth = np.where(np.roll(surprise, 1), -0.5, -3.0) + rng.normal(0, 0.7, steps)
        chance = 1 / (1 + np.exp(-truth))
        right = rng.random(steps) < chance
        tried = []
        for model in range(models):
            tilt = np.random.default_rng(model).normal(0, 1.5, steps)
            levels = level_of(truth + tilt)
            table = DecisionTable.of_cells(right * LEVELS + levels + MAX_LEVEL, tokens)
            tuning = choose_bits(table, claim)
            line = certify_bits(tuning, BitsSums(table), claim)
            loss = tuning.bet.loss[:, levels + MAX_LEVEL]
            risk = float(((1 - chance) * loss[0] + chance * loss[1]).sum()) / tokens
            tried.append((line.value, risk))
        failed += min(tried)[0] < min(tried)[1]
    return failed / trials


def test_the_best_of_several_models_holds():
    assert misses(np.random.default_rng(6), trials=25, tokens=30, decisions=3, models=3) <= 0.05


@pytest.mark.slow
def test_the_best_of_many_models_holds():
    assert misses(np.random.default_rng(7), trials=400, tokens=60, decisions=3, models=5) <= 0.05


@pytest.mark.slow
def test_samples_hold():
    """Windows drawn without replacement, hard ones rare: the path lies above the mean of all at every size at once."""
    rng, failed, trials = np.random.default_rng(8), 0, 300
    for _ in range(trials):
        cells, _ = sampled(rng, 300)
        claim = replace(CLAIM, num_tokens=32 * 300, delta=0.2)
        plan = SamplingPlan(300, 32, pilot_units=10, max_unit_decisions=128, num_decisions=cells.size)
        tuning = choose_bits(DecisionTable.of_cells(cells[:10], 320), claim, plan)
        path = bits_path(tuning, window_sums(tuning, cells[:150]), claim, plan)
        whole = float(tuning.bet.value.reshape(-1)[cells].sum()) / claim.num_tokens
        failed += bool((path.upper < whole).any())
    assert failed / trials <= 0.2 * 0.5


# What takes longest


@pytest.mark.parametrize(
    ("vocab_size", "words"), [(1, "at least 2"), (2.5, "an integer"), (MAX_TREE_IDS + 1, "at most")]
)
def test_a_vocabulary_that_no_tree_has_is_refused(vocab_size, words):
    with pytest.raises(InputError, match=words):
        decision_tree("balanced", vocab_size)
    assert decision_tree("balanced", MAX_TREE_IDS).num_blocks == MAX_TREE_IDS // BLOCK_IDS


# What the line is computed from


def piece_of(cells: np.ndarray, *, by_window: bool) -> Piece:
    """Windows of four decisions a token, given as cells [W, 4 T]."""
    tables = window_decisions(cells.astype(np.int16))
    tokens = cells.size // 4
    lengths = np.full(len(cells), cells.shape[1] // 4) if by_window else None
    return Piece({"nll": np.zeros(tokens, np.float32)}, None, lengths, 0, tables)


def test_sums_are_those_of_the_windows_and_merge_in_order():
    cells, _ = sampled(np.random.default_rng(12), 30)
    cells[:, :40] = cells[:, :1]  # cells that occur more than once
    tuning = BitsTuning(0.25, 1.0, 2.0**-9, 40.0, BUDGET_GRID[0])
    bound, whole = Bits(), piece_of(cells, by_window=True)
    sums = bound.sums(tuning, whole)
    assert sums.table == DecisionTable.of_cells(cells, 30 * 32)
    assert sums.windows == pytest.approx(tuning.bet.value.reshape(-1)[cells].sum(axis=1))
    assert sums.window_lengths.tolist() == [32] * 30
    assert sums.window_decisions.tolist() == [128] * 30
    parts = [bound.sums(tuning, piece_of(part, by_window=True)) for part in (cells[:9], cells[9:])]
    merged = bound.merge(parts)
    assert merged.table == sums.table
    for name in ("windows", "window_lengths", "window_decisions"):
        assert getattr(merged, name).tolist() == getattr(sums, name).tolist()
    plain = bound.merge(
        [bound.sums(tuning, piece_of(cells[part], by_window=False)) for part in (slice(0, 9), slice(9, 30))]
    )
    assert plain.table == sums.table
    assert (plain.windows, plain.window_lengths, plain.window_decisions) == (None, None, None)


def test_a_bet_expects_the_recalibrated_probability():
    bet = DecisionBet(0.25, 1.25, 2.0**-4)
    levels = np.arange(MAX_LEVEL + 1)
    sigmoid = 1 / (1 + np.exp(1.25 * LEVEL_STEP * levels))
    assert bet.expected == pytest.approx((1 - 2.0**-4) * sigmoid + 2.0**-5)
    assert bet.rounding == pytest.approx(2.0**-51 * (64 + 4) / np.minimum(bet.factor, 1), rel=1e-12, abs=0)
    assert bet.factor.min() < 0.5


def test_a_pilot_that_is_the_whole_corpus_leaves_nothing_open():
    cells, _ = sampled(np.random.default_rng(13), 60)
    claim = replace(CLAIM, num_tokens=60 * 32)
    plan = SamplingPlan(60, 32, pilot_units=60, max_unit_decisions=128, num_decisions=cells.size)
    tuning = choose_bits(DecisionTable.of_cells(cells, 60 * 32), claim, plan)
    sums = window_sums(tuning, cells)
    line = certify_bits(tuning, sums, claim, plan)
    assert line.terms["sampling_slack"] == 0
    bet = tuning.bet
    assert line.parameters["windows_over_budget"] == 0
    loss = float((sums.table.counts * bet.loss).sum()) / claim.num_tokens
    assert line.empirical == pytest.approx(loss)
    assert line.terms["variance"] == pytest.approx(mean_value(sums.table, bet) - loss)
    square = float((sums.table.counts * (bet.forecast - bet.loss) ** 2).sum()) / claim.num_tokens
    found = yardsticks(line.terms["variance"] + line.terms["complexity"], square, line.kappa_nats, claim.num_tokens)
    assert {name: line.terms[name] for name in found} == pytest.approx(dict(found))
    with pytest.raises(MismatchError, match="the table of decisions holds"):
        certify_bits(tuning, sums, replace(claim, num_tokens=60 * 32 + 1), plan)
    larger = replace(claim, num_tokens=10 * 60 * 32, what_if=True)
    whole = choose_bits(sums.table, larger)
    assert certify_bits(whole, BitsSums(sums.table), larger).terms["complexity"] > 0


def test_the_printed_line_allows_for_rounding():
    """At a tiny lambda both allowances show in the ninth decimal: for the value, and for the z of each decision."""
    table = table_of(0.03, -3.4, 200_000, 100)
    claim = replace(CLAIM, num_tokens=100, code_length_bits=10.0, code_split={})
    tuning = replace(choose_bits(table, claim), lam=DECISION_LAMBDA_GRID[0])
    line = certify_bits(tuning, BitsSums(table), claim)
    value = mean_value(table, tuning.bet) + line.kappa_nats / (tuning.lam * 100)
    rounding = float((table.counts * tuning.bet.rounding).sum()) / 100
    assert min(1e-12 * value, rounding) > 1e-8
    guarded = value + 1e-12 * value + rounding
    assert guarded * (1 - 1e-15) <= line.value <= guarded + 2e-9


def test_no_more_is_asked_than_that_a_line_beats_a_model_of_no_bits():
    for decisions, guess in ((3, 3.0), (10, math.log2(257))):
        table = table_of(0.5, 0.0, decisions * 1000, 1000)
        claim = replace(CLAIM, num_tokens=1000)
        assert certify_bits(choose_bits(table, claim), BitsSums(table), claim).random_guess == pytest.approx(guess)


@pytest.mark.parametrize("missing", ["windows", "window_lengths", "window_decisions"])
def test_a_sample_needs_every_sum_of_its_windows(missing):
    cells, _ = sampled(np.random.default_rng(5), 100)
    plan = SamplingPlan(100, 32, pilot_units=10, max_unit_decisions=128, num_decisions=cells.size)
    claim = replace(CLAIM, num_tokens=3200)
    tuning = choose_bits(DecisionTable.of_cells(cells[:10], 320), claim, plan)
    with pytest.raises(MismatchError, match="sums of its windows"):
        bits_path(tuning, replace(window_sums(tuning, cells[:50]), **{missing: None}), claim, plan)


@pytest.mark.parametrize(("cells", "weights"), [([5, CELLS], None), ([-2, 5], None), ([5, 6], [1, -1])])
def test_one_cell_outside_the_table_is_enough(cells, weights):
    with pytest.raises(MismatchError, match="decisions must be cells"):
        DecisionTable.of_cells(cells, 2, weights)


def test_tables_are_equal_where_all_counts_are():
    table = DecisionTable.of_cells([5, 6], 2)
    assert table == DecisionTable.of_cells([6, 5], 2)
    assert table != DecisionTable.of_cells([5, 7], 2)
    assert table != DecisionTable.of_cells([5, 6], 3)
    assert table != "a table"


def counts_as_data(counts: np.ndarray) -> dict[str, object]:
    return {"tokens": 1, "counts": pack(counts.astype("<i8").tobytes())}


def test_stored_tables_have_every_count_and_none_below_zero():
    counts = np.zeros(CELLS, np.int64)
    counts[7] = 3
    assert DecisionTable.from_dict(counts_as_data(counts)).num_decisions == 3
    assert DecisionTable.from_dict({**counts_as_data(0 * counts), "tokens": 0}).num_tokens == 0
    negative = counts.copy()
    negative[8] = -1
    for damaged in (negative, counts[:-2], np.zeros(CELLS + 2, np.int64), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match=r"its counts|too long"):
            DecisionTable.from_dict(counts_as_data(damaged))
