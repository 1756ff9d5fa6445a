"""Evidence: exact merging, honest bins, a JSON form that refuses damage."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds.evidence import (
    ENTROPY_OCTAVES,
    NLL_OCTAVES,
    Evidence,
    bin_centres,
    merge_evidence,
    window_sums,
)
from tokenbound.errors import InputError, MismatchError


def losses(seed: int, size: int):
    rng = np.random.default_rng(seed)
    entropy = rng.gamma(1.0, 1.5, size).astype(np.float32)
    nll = rng.gamma(0.7, entropy / 0.7 + 0.02).astype(np.float32)
    return nll, entropy, np.floor(nll * 3).astype(np.int32)


def evidence_of(seed: int, size: int, **extra):
    nll, entropy, rank = losses(seed, size)
    return Evidence.from_losses(nll, entropy, rank, vocab_size=512, top_k=(1, 10), **extra)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), min_size=2, max_size=5), cut=st.integers(1, 4), data=st.data())
def test_merging_is_associative_and_commutative_to_the_last_bit(sizes, cut, data):
    parts = [evidence_of(seed, size) for seed, size in enumerate(sizes)]
    whole = merge_evidence(parts).to_json()
    cut = min(cut, len(parts) - 1)
    assert merge_evidence([merge_evidence(parts[:cut]), merge_evidence(parts[cut:])]).to_json() == whole
    assert merge_evidence(data.draw(st.permutations(parts))).to_json() == whole


def test_merging_shards_is_the_evidence_of_all_tokens():
    nll, entropy, rank = losses(0, 100_000)
    whole = Evidence.from_losses(nll, entropy, rank, vocab_size=512, top_k=(1, 10))
    cuts = [0, 1, 40_000, 99_999, 100_000]
    merged = merge_evidence(
        [
            Evidence.from_losses(nll[a:b], entropy[a:b], rank[a:b], vocab_size=512, top_k=(1, 10))
            for a, b in itertools.pairwise(cuts)
        ]
    )
    assert np.array_equal(merged.histogram, whole.histogram)
    assert merged.errors == whole.errors == {k: int((rank >= k).sum()) for k in (1, 10)}
    assert merged.mean_nll_nats == pytest.approx(nll.mean(dtype=np.float64), abs=1e-9)


@given(st.floats(2.0**-12, 127.5, width=32))
def test_a_bin_holds_its_value_within_an_eighth_of_an_octave(value):
    evidence = Evidence.from_losses(np.array([value], np.float32), vocab_size=512)
    _, centre, _ = evidence.cells()
    assert abs(centre[0] / value - 1) <= 1 / 16 + 1e-6


def test_extreme_values_go_to_the_end_bins():
    nll = np.array([0.0, -1e-6, 1e-7, 80.0, 128.0, 1e30], np.float32)
    centres = bin_centres(NLL_OCTAVES)
    rows = np.flatnonzero(Evidence.from_losses(nll, vocab_size=512).histogram.sum(axis=1))
    assert rows.tolist() == [0, np.abs(centres - 84).argmin(), centres.size - 1]
    entropy = np.array([0.0, -1e-8, 20.0, 1.0, 1.0, 1.0], np.float32)
    columns = np.flatnonzero(Evidence.from_losses(nll, entropy, vocab_size=512).histogram.sum(axis=0))
    assert columns[0] == 0
    assert columns[-1] == bin_centres(ENTROPY_OCTAVES).size - 1


def test_json_round_trip_and_size():
    evidence = evidence_of(3, 200_000, window_lengths=np.full(400, 500))
    text = evidence.to_json()
    again = Evidence.from_json(text)
    assert again.to_json() == text
    assert np.array_equal(again.histogram, evidence.histogram)
    assert again.errors == evidence.errors
    assert len(text) < 40_000


@pytest.mark.parametrize("damage", ["truncate", "count", "histogram", "missing", "list"])
def test_damaged_evidence_is_refused(damage):
    data = json.loads(evidence_of(1, 50).to_json())
    if damage == "count":
        data["num_tokens"] += 1
    elif damage == "histogram":
        data["histogram"] = data["histogram"][:-8]
    elif damage == "missing":
        del data["sums"]
    text = json.dumps(data)
    if damage == "truncate":
        text = text[:-5]
    if damage == "list":
        text = "[]"
    with pytest.raises(MismatchError, match="evidence"):
        Evidence.from_json(text)


def test_parts_that_disagree_are_not_merged():
    nll, entropy, rank = losses(0, 10)
    one = Evidence.from_losses(nll, entropy, rank, vocab_size=512, top_k=(1,))
    for other in (
        Evidence.from_losses(nll, entropy, rank, vocab_size=513, top_k=(1,)),
        Evidence.from_losses(nll, None, rank, vocab_size=512, top_k=(1,)),
        Evidence.from_losses(nll, entropy, rank, vocab_size=512, top_k=(2,)),
        Evidence.from_losses(nll, entropy, None, vocab_size=512),
    ):
        with pytest.raises(MismatchError):
            merge_evidence([one, other])
    with pytest.raises(InputError):
        merge_evidence([])


def test_window_moments_give_the_deviation_of_windows():
    nll, entropy, _ = losses(5, 4000)
    lengths = np.random.default_rng(0).integers(0, 40, 1000)
    lengths = lengths[np.cumsum(lengths) <= 4000]
    size = int(lengths.sum())
    evidence = Evidence.from_losses(nll[:size], entropy[:size], vocab_size=512, window_lengths=lengths)
    sums = window_sums(nll[:size].astype(float), lengths)
    mean = sums.sum() / size
    expected = math.sqrt(np.mean((sums - mean * lengths) ** 2))
    assert evidence.window_deviation_nats() == pytest.approx(expected, rel=1e-6)


def test_windows_failed_for_good_have_no_losses():
    nll, entropy, _ = losses(5, 30)
    evidence = Evidence.from_losses(
        nll, entropy, vocab_size=512, window_lengths=[10, 7, 20], worst_case=[False, True, False]
    )
    assert (evidence.num_tokens, evidence.worst_case_tokens) == (30, 7)
    with pytest.raises(InputError, match="add up"):
        Evidence.from_losses(nll, entropy, vocab_size=512, window_lengths=[10, 7, 20])
    with pytest.raises(InputError, match="worst_case"):
        Evidence.from_losses(nll, entropy, vocab_size=512, worst_case=[True])


@pytest.mark.parametrize("column", ["entropy", "rank", "alpha"])
def test_columns_must_have_one_value_per_token(column):
    with pytest.raises(InputError, match=column):
        Evidence.from_losses(np.ones(4), **{column: np.full(3, 0.5)}, vocab_size=512)


def test_entropies_must_be_finite():
    with pytest.raises(InputError, match="entropy"):
        Evidence.from_losses(np.ones(2), np.array([1.0, math.nan]), vocab_size=512)


def test_smoothing_head_is_histogrammed_after_smoothing():
    nll, entropy, _ = losses(2, 5000)
    alpha = np.full(nll.size, 0.25, np.float32)
    evidence = Evidence.from_losses(nll, entropy, None, alpha, vocab_size=512)
    counts, smoothed, _ = evidence.cells()
    expected = -np.log(0.75 * np.exp(-nll.astype(float)) + 0.25 / 512)
    assert (counts * smoothed).sum() / nll.size == pytest.approx(expected.mean(), rel=0.01)
    assert evidence.alpha_min == 0.25
