"""The decisions of the head against masses of a float64 softmax."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenbound.bounds.decisions import LEVELS, MAX_LEVEL, TREES, TreeChoice, code_lengths, decision_tree, level_of
from tokenbound.errors import InputError
from tokenbound.models.chunks import logits_statistics, require_compiler
from tokenbound.models.head import Head, token_statistics
from tokenbound.models.probe import probe_causality
from tokenbound.models.replica import Replica

CPU = torch.device("cpu")


def masses_of(tree, p, target):
    """The (left, right, outcome) masses of each decision of a target, by walking down ranges of leaves."""
    size, blocks, width = len(p), tree.num_blocks, tree.block_ids
    if tree.order is not None:
        target, p = tree.order.tolist().index(target), p[tree.order]
    spans = {block: (width * block, min(width * block + width, size)) for block in range(blocks)}
    for number, (left, right) in enumerate(tree.children, blocks):
        spans[number] = (spans[left][0], spans[right][1])
    node = 2 * blocks - 2
    while node >= blocks:
        left, right = (spans[child] for child in tree.children[node - blocks])
        outcome = int(target >= right[0])
        yield p[slice(*left)].sum(), p[slice(*right)].sum(), outcome
        node = tree.children[node - blocks][outcome]
    low, half = width * (target // width), width // 2
    while half:
        if low + half < size:
            outcome = int(target >= low + half)
            yield p[low : low + half].sum(), p[low + half : min(low + 2 * half, size)].sum(), outcome
        low += half if target >= low + half else 0
        half //= 2


def check_cells(cells, logits, targets, tree, tolerance=1e-3):
    """Every cell is that of the log-odds of a float64 softmax, up to their rounding."""
    p = torch.exp(logits.double() - logits.double().amax(1, keepdim=True)).numpy()
    for row, target in enumerate(targets.tolist()):
        with np.errstate(divide="ignore", invalid="ignore"):
            found = [(np.log(right / left), outcome) for left, right, outcome in masses_of(tree, p[row], target)]
        recorded = cells[row][cells[row] >= 0].astype(int)
        assert len(recorded) == len(found) == tree.num_decisions(target)
        log_odds, outcomes = np.array(found).reshape(-1, 2).T
        assert recorded // LEVELS == pytest.approx(outcomes)
        levels = recorded % LEVELS - MAX_LEVEL
        assert (level_of(log_odds - tolerance) <= levels).all()
        assert (levels <= level_of(log_odds + tolerance)).all()


def tree_of(name, vocab):
    counts = np.random.default_rng(vocab).zipf(1.3, vocab) % 1000
    return decision_tree(name, vocab, code_lengths(counts) if name == "counts" else None)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("vocab", [2, 16, 257, 2064, 2071])
def test_cells_are_levels_of_a_full_softmax(name, vocab):
    generator = torch.Generator().manual_seed(vocab)
    tokens = 40
    logits = torch.randn(tokens, vocab, generator=generator) * 3
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    tree = tree_of(name, vocab)
    found = logits_statistics(logits, targets, tree=tree, chunk_tokens=32)
    assert found.cells.dtype == torch.int16
    check_cells(found.cells.numpy(), logits, targets, tree)


def test_other_columns_keep_their_bits():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(50, 8, generator=generator), torch.randn(300, 8, generator=generator)
    targets = torch.randint(300, (50,), generator=generator)
    plain = token_statistics(hidden, weight, None, targets)
    beside = token_statistics(hidden, weight, None, targets, tree=decision_tree("zipf", 300))
    assert plain.cells is None
    for name in ("nll", "entropy", "rank"):
        assert torch.equal(getattr(plain, name), getattr(beside, name))


def test_cells_depend_neither_on_the_chunk_nor_on_other_tokens():
    generator = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(70, 1000, generator=generator), torch.randint(1000, (70,), generator=generator)
    tree = decision_tree("zipf", 1000)
    cells = logits_statistics(logits, targets, tree=tree).cells
    order = torch.randperm(70, generator=generator)
    assert torch.equal(logits_statistics(logits[order], targets[order], tree=tree).cells, cells[order])
    for chunk in (1, 8, 33):
        assert torch.equal(logits_statistics(logits, targets, tree=tree, chunk_tokens=chunk).cells, cells)
    hidden, weight = torch.randn(70, 16, generator=generator), torch.randn(1000, 16, generator=generator)
    scored = torch.rand(70, generator=generator) < 0.5
    every = token_statistics(hidden, weight, None, targets, tree=tree, chunk_tokens=16).cells
    some = token_statistics(hidden, weight, None, targets, tree=tree, chunk_tokens=16, scored=scored).cells
    assert torch.equal(some[scored], every[scored])
    assert bool((some[~scored] == -1).all())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ids_without_mass_give_outermost_levels_and_nothing_gives_a_fair_coin(compile):
    if compile:
        _require_compiler()
    logits = torch.zeros(4, 64)
    logits[0, 16:] = -torch.inf  # all mass in the first quarter
    logits[1, :48] = -torch.inf  # all in the last
    logits[2] = torch.nan
    logits[3] = -torch.inf
    tree, targets = decision_tree("balanced", 64), torch.zeros(4, dtype=torch.int64)
    cells = logits_statistics(logits, targets, tree=tree, compile=compile).cells.numpy()
    levels = cells % LEVELS - MAX_LEVEL
    assert levels[0].tolist() == [-MAX_LEVEL, -MAX_LEVEL, 0, 0, 0, 0]  # sixteen equal ids
    assert levels[1].tolist() == [MAX_LEVEL, 0, 0, 0, 0, 0]  # 0 / 0
    assert levels[2:].tolist() == [[0] * 6] * 2


def test_a_tree_over_other_ids_is_refused():
    with pytest.raises(ValueError, match="over 32 ids does not fit 48"):
        logits_statistics(torch.zeros(1, 48), torch.zeros(1, dtype=torch.int64), tree=decision_tree("zipf", 32))


def _require_compiler():
    try:
        require_compiler(CPU)
    except InputError:
        pytest.skip("no C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocab"), [("zipf", 257), ("zipf", 50_257), ("counts", 2071)])
def test_compiled_cells_are_levels_of_a_full_softmax(name, vocab):
    _require_compiler()
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(60, 24, generator=generator), torch.randn(vocab, 24, generator=generator)
    targets = torch.randint(vocab, (60,), generator=generator)
    targets[0] = vocab - 1
    tree = tree_of(name, vocab)
    found = token_statistics(hidden, weight, None, targets, compile=True, tree=tree)
    check_cells(found.cells.numpy(), Head(weight).logits(hidden), targets, tree)
    plain = token_statistics(hidden, weight, None, targets, compile=True)
    torch.testing.assert_close(found.nll, plain.nll, atol=1e-6, rtol=0)


# --- A replica ------------------------------------------------------------------------------------------------------


def small_replica(kind=Replica, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    return kind(model, batch=4, length=12, **{"tree": TreeChoice("zipf"), **options})


def windows(replica, count, seed=0):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, replica.vocab_size, (count, replica.length + 1))
    mask = np.arange(replica.length) < generator.integers(1, replica.length + 1, count)[:, None]
    return ids[:, :-1], ids[:, 1:], mask


def test_a_replica_returns_cells_of_scored_tokens():
    replica = small_replica()
    inputs, targets, mask = windows(replica, 10)
    found = replica.score(inputs, targets, mask)
    tree = decision_tree("zipf", 97)
    counts = (found.cells >= 0).sum(-1)
    assert found.cells.dtype == np.int16
    assert (counts == np.where(mask, tree.num_decisions(targets), 0)).all()
    for row in range(10):
        logits = replica.model(torch.from_numpy(inputs[row : row + 1])).logits[0].detach()
        scored = mask[row]
        check_cells(found.cells[row][scored], logits[scored], torch.from_numpy(targets[row][scored]), tree)
    assert small_replica(tree=None).score(inputs, targets, mask).cells is None


def test_cells_of_logits_that_the_model_makes_itself():
    replica = small_replica()
    inputs, targets, mask = windows(replica, 7)
    expected = replica.score(inputs, targets, mask).cells
    replica.head, replica.gather = None, False
    assert (replica.score(inputs, targets, mask).cells == expected).mean() > 0.999


class LeakingCells(Replica):
    """Only its cells know the last token of a window."""

    def score_and_hidden(self, inputs, targets, mask):
        found, hidden = super().score_and_hidden(inputs, targets, mask)
        cells = found.cells.copy()
        cells[:, 0, 0] ^= inputs[:, -1].astype(np.int16) & 1
        return dataclasses.replace(found, cells=cells), hidden


def test_the_causality_probe_watches_cells():
    probe_causality(small_replica())
    with pytest.raises(InputError, match="depends on later tokens"):
        probe_causality(small_replica(LeakingCells))
