"""Back-off n-grams: what is fitted, coded and decoded, against sums written out in Python."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenbound.compression.artifact import decode_artifact, parse_artifact
from tokenbound.compression.codecs import NGRAMS
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.ngram_codec import (
    Candidates,
    NgramTree,
    TensorSource,
    decode_ngrams,
    encode_ngrams,
    read_tree,
)
from tokenbound.errors import InputError
from tokenbound.models.structured.ngram_lm import MarkovModel
from tokenbound.training.ngram_fit import (
    Fitted,
    build_grams,
    check_order,
    count_ngrams,
    fit_tree,
    merge_counts,
    tree_numbers,
)

GOLDEN = Path(__file__).parent / "golden/ngrams.tokenbound"
GOLDEN_DIGEST = "b3d34a4286e8b5401930ca5bfca2c28813fb217cc5b485d61a12fccdbef44045"
"""Of the numbers in the golden artifact; it never changes."""


def text(length: int, seed: int, vocab_size: int = 7) -> np.ndarray:
    """A stream with structure: each id depends on the two before it."""
    generator = np.random.default_rng(seed)
    table = generator.dirichlet(np.full(vocab_size, 0.2), size=(vocab_size, vocab_size))
    ids = [0, 1]
    for _ in range(length - 2):
        ids.append(int(generator.choice(vocab_size, p=table[ids[-2], ids[-1]])))
    return np.array(ids)


def fitted(length: int = 3000, order: int = 3, rate: float = 0.2, seed: int = 0, vocab_size: int = 7) -> Fitted:
    counts = count_ngrams(text(length, seed, vocab_size), order, vocab_size)
    return fit_tree(build_grams(counts, order, vocab_size), vocab_size, rate)


def probability(tree: NgramTree, context: tuple[int, ...], symbol: int) -> float:
    """P(symbol | context) from the definition, by walking dictionaries."""
    places, found = 0, 1 / tree.vocab_size
    for length, order in enumerate(tree.orders):
        if length:
            if length > len(context):
                break
            keys = order.keys(tree.vocab_size).tolist()
            wanted = places * tree.vocab_size + context[-length]
            if wanted not in keys:
                break
            places = keys.index(wanted)
        cut = slice(int(order.starts[places]), int(order.starts[places + 1]))
        weights = dict(zip(order.entry[cut].tolist(), (2.0 ** (order.level[cut] / 2)).tolist(), strict=True))
        escape = 2.0 ** (int(order.escape[places]) / 2)
        found = (weights.get(symbol, 0.0) + escape * found) / (sum(weights.values()) + escape)
    return found


def test_counting_in_pieces_is_counting() -> None:
    ids = text(500, 1)
    whole = count_ngrams(ids, 2, 7)
    parts = merge_counts([count_ngrams(ids[:200], 2, 7), count_ngrams(ids[198:], 2, 7)])
    assert np.array_equal(whole.keys, parts.keys)
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() == 498
    assert count_ngrams(ids[:2], 2, 7).keys.size == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.sampled_from([0.0, 0.1, 1.0, 100.0]), st.integers(0, 99), st.integers(2, 9))
@example(order=1, rate=0.0, seed=16, vocab_size=3)  # the first symbol of the text stands nowhere else
@example(order=2, rate=0.0, seed=19, vocab_size=4)  # its first pair neither
def test_what_is_fitted_is_coded_and_decoded(order: int, rate: float, seed: int, vocab_size: int) -> None:
    numbers = tree_numbers(fitted(400, order, rate, seed, vocab_size))
    payload = encode_ngrams(numbers)
    assert np.array_equal(decode_ngrams(memoryview(payload), len(numbers)), numbers)
    assert len(payload) < len(numbers) + 32
    for wrong in (len(numbers) - 1, len(numbers) + 1):
        with pytest.raises(ArtifactError):
            decode_ngrams(memoryview(payload), wrong)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_model_is_the_definition(order: int) -> None:
    tree = fitted(order=order).tree
    ids = text(60, 5)
    logits = MarkovModel(tree)(torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(60), rtol=1e-5, atol=1e-5)
    for place in (0, 1, 2, 30, 59):
        for symbol in range(7):
            expected = probability(tree, tuple(ids[: place + 1].tolist()), symbol)
            assert logits[place, symbol].item() == pytest.approx(math.log(expected), abs=1e-4)


def test_the_loss_that_fitting_reports_is_the_models() -> None:
    found, ids = fitted(), text(3000, 0)
    logits = MarkovModel(found.tree)(torch.from_numpy(ids[:-1])[None]).logits[0]
    losses = -logits.gather(1, torch.from_numpy(ids[1:])[:, None]).squeeze(1)[2:]
    assert losses.mean().item() / math.log(2) == pytest.approx(found.loss_bits, abs=1e-4)


def test_order_and_pruning_do_what_they_promise() -> None:
    losses = [fitted(order=order, rate=0.0).loss_bits for order in (0, 1, 2)]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2
    sizes = [len(encode_ngrams(tree_numbers(fitted(rate=rate)))) for rate in (0.0, 1.0, 30.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 3 * sizes[2]


def test_ngrams_that_do_not_fit_are_refused() -> None:
    check_order(257, 6)
    with pytest.raises(InputError, match="with 50257 ids it is 3 at most"):
        check_order(50257, 4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_forged_payloads_never_do_more_than_fail(data: st.DataObject) -> None:
    item = parse_artifact(GOLDEN.read_bytes()).coded[0]
    payload = bytearray(item.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    count = data.draw(st.sampled_from([item.shape[0], 3, 10, 10**6]))
    with suppress(ArtifactError):
        numbers = decode_ngrams(memoryview(bytes(payload)), count)
        assert len(numbers) == count
        read_tree(TensorSource(numbers))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_candidates_come_in_order_whatever_the_parts(counts: list[int], data: st.DataObject) -> None:
    """In parts of any sizes, and with rows looked up three at a time."""
    first = np.array(data.draw(st.permutations(range(0, 10 * len(counts), 10))))
    sizes, total = [], sum(counts)
    while sum(sizes) < total:
        sizes.append(data.draw(st.integers(1, total - sum(sizes))))
    every = Candidates(
        total,
        len(counts),
        lambda rows: (first[rows], np.array(counts)[rows]),
        lambda rows, places: (places, rows),
    )
    expected = [(row, place) for row, n in enumerate(counts) for place in range(first[row], first[row] + n)]
    parts = list(every.parts(sizes, lookup_rows=3))
    assert [len(owners) for owners, _, _ in parts] == sizes
    assert [pair for owners, places, _ in parts for pair in zip(owners, places, strict=True)] == expected


def test_more_candidates_than_a_block_holds_are_decoded() -> None:
    found = fitted(40_000, order=2, rate=0.1, vocab_size=240)
    numbers = tree_numbers(found)
    assert len(numbers) > 3 * 2 * 2**15, "one of three orders has several blocks"
    assert np.array_equal(decode_ngrams(memoryview(encode_ngrams(numbers)), len(numbers)), numbers)
    again = read_tree(TensorSource(numbers))
    for one, other in zip(again.orders, found.tree.orders, strict=True):
        for name in vars(one):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_context_without_entries_is_refused() -> None:
    """V = 2, order 2: both symbols are entries, the context 0 is kept, and has no entry."""
    forged = np.array([2, 2, 10, 3, 9, 9, 9, 0, 3, 0, 0])
    with pytest.raises(ArtifactError, match="no entries"):
        read_tree(TensorSource(forged))
    with pytest.raises(ArtifactError, match="no entries"):
        encode_ngrams(forged)


def test_the_golden_artifact_decodes_to_the_same_numbers_for_ever() -> None:
    data = GOLDEN.read_bytes()
    assert [item.codec for item in parse_artifact(data).coded] == [NGRAMS]
    numbers = decode_artifact(data).tensors["ngrams"].numpy()
    assert hashlib.sha256(numbers.astype("<i4").tobytes()).hexdigest() == GOLDEN_DIGEST
