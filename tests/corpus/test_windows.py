"""The planner against a token-by-token reference, and the hashed order against its definition."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.corpus import windows
from tokenbound.corpus.windows import (
    CorpusPlan,
    auto_shard_tokens,
    gather,
    hashed_order,
    plan_corpus,
    plan_segment,
    shard_slices,
)
from tokenbound.errors import InputError

BOS, EOS = 1000, 1001


@dataclass
class MemoryCorpus:
    """A prepared corpus in memory: segments of documents of ids."""

    segments: list[list[list[int]]]
    only: int | None = None
    """Targets are the multiples of it; null where all ids are."""

    def offsets(self, segment: int) -> np.ndarray:
        return np.cumsum([0, *(len(document) for document in self.segments[segment])], dtype=np.int64)

    def read_ids(self, segment: int, start: int, stop: int) -> np.ndarray:
        stream = np.array([token for document in self.segments[segment] for token in document], dtype=np.uint16)
        assert 0 <= start <= stop <= len(stream)
        return stream[start:stop]

    def documents_between(self, segment: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        return 0, self.offsets(segment)

    def first_document(self, segment: int) -> int:
        return sum(len(documents) for documents in self.segments[:segment])

    def is_target(self, token: int) -> bool:
        return self.only is None or token % self.only == 0

    def targets_between(self, segment: int, start: int, stop: int) -> np.ndarray | None:
        ids = self.read_ids(segment, start, stop).tolist()
        return None if self.only is None else np.array([self.is_target(token) for token in ids], dtype=bool)

    def runs(self, segment: int) -> np.ndarray | None:
        wanted = self.targets_between(segment, 0, int(self.offsets(segment)[-1]))
        if wanted is None:
            return None
        return np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)

    def plan(self, **settings) -> CorpusPlan:
        numbers = range(len(self.segments))
        targets = list(map(self.runs, numbers))
        return plan_corpus([self.offsets(index) for index in numbers], targets=targets, **settings)


@st.composite
def corpora(draw) -> MemoryCorpus:
    """Up to three segments of up to six documents, empty and one-token ones among them, with any BOS/EOS rule.

    In some only a part of the ids are targets.
    """
    bos = [BOS] if draw(st.booleans()) else []
    eos = [EOS] if draw(st.booleans()) else []
    texts = st.lists(st.lists(st.integers(0, 99), max_size=14), max_size=6)
    segments = draw(st.lists(texts, min_size=1, max_size=3))
    documents = [[[*bos, *text, *eos] for text in documents] for documents in segments]
    return MemoryCorpus(documents, draw(st.sampled_from([None, None, 2, 5])))


@st.composite
def window_settings(draw) -> dict:
    length = draw(st.integers(1, 7))
    return {
        "length": length,
        "stride": draw(st.none() | st.integers(1, length)),
        "context": draw(st.sampled_from(["document", "packed"])),
    }


def reference(corpus: MemoryCorpus, *, length: int, stride: int | None, context: str) -> list[tuple]:
    """Every scored prediction, by walking the tokens: (context ids, target id, global document, position).

    A prediction belongs to the first window that reaches it.
    """
    step = length if stride is None else stride
    found = []
    first_document = 0
    for documents in corpus.segments:
        tagged = [
            [(token, first_document + number, position) for position, token in enumerate(document)]
            for number, document in enumerate(documents)
        ]
        sequences = tagged if context == "document" else [[item for document in tagged for item in document]]
        for sequence in sequences:
            for target in range(1, len(sequence)):
                if not corpus.is_target(sequence[target][0]):
                    continue
                start = 0
                while start + length < target:
                    start += step
                ids = tuple(item[0] for item in sequence[start:target])
                found.append((ids, *sequence[target]))
        first_document += len(documents)
    return found


def segment_of(corpus: MemoryCorpus, document: int) -> int:
    """Which segment a document of the whole corpus lies in."""
    ends = np.cumsum([len(documents) for documents in corpus.segments])
    return int(np.searchsorted(ends, document, side="right"))


def planned(corpus: MemoryCorpus, plan: CorpusPlan, length: int, ids=None) -> list[tuple]:
    """Every scored prediction according to the plan, in the same form."""
    batch = gather(corpus, plan.windows(np.arange(plan.num_windows) if ids is None else ids), length)
    return [
        (
            tuple(batch.inputs[row, : column + 1].tolist()),
            int(batch.targets[row, column]),
            int(batch.document[row, column]),
            int(batch.position[row, column]),
        )
        for row, column in np.argwhere(batch.mask)
    ]


@settings(max_examples=400, deadline=None)
@given(corpora(), window_settings())
def test_plan_scores_what_the_reference_scores(corpus, config):
    plan = corpus.plan(**config)
    expected = reference(corpus, **config)
    assert planned(corpus, plan, config["length"]) == expected
    assert plan.num_tokens == len(expected)


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings())
def test_each_token_with_a_context_is_predicted_exactly_once(corpus, config):
    scored = [item[2:] for item in planned(corpus, corpus.plan(**config), config["length"])]
    documents = [document for segment in corpus.segments for document in segment]
    places = {(number, position) for number, document in enumerate(documents) for position in range(len(document))}
    if config["context"] == "document":
        without = {(number, 0) for number in range(len(documents))}
    else:
        firsts = [
            next(((corpus.first_document(s) + d, 0) for d, doc in enumerate(segment) if doc), None)
            for s, segment in enumerate(corpus.segments)
        ]
        without = set(firsts) - {None}
    unwanted = {(number, position) for number, position in places if not corpus.is_target(documents[number][position])}
    assert len(scored) == len(set(scored))
    assert set(scored) == places - without - unwanted


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings())
def test_tables_are_consistent(corpus, config):
    plan = corpus.plan(**config)
    table = plan.windows(np.arange(plan.num_windows))
    assert (table.num_targets >= 1).all()
    if corpus.only is None:
        assert (table.first_target + table.num_targets == table.num_inputs).all()
    assert (table.first_target + table.num_targets <= table.num_inputs).all()
    np.testing.assert_array_equal(gather(corpus, table, config["length"]).mask.sum(axis=1), table.num_targets)
    assert plan.num_sequences == len(
        {
            item[2] if config["context"] == "document" else segment_of(corpus, item[2])
            for item in reference(corpus, **config)
        }
    )
    assert (table.num_inputs <= config["length"]).all()
    assert table.num_targets.sum() == plan.num_tokens
    assert plan.max_window_tokens == table.num_targets.max(initial=0)
    before = np.concatenate([[0], np.cumsum(table.num_targets)])
    for segment, first in zip(plan.segments, plan.first_windows, strict=False):
        for window in range(segment.num_windows):
            assert segment.targets_before(window) == before[first + window] - before[first]


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings(), st.randoms())
def test_rows_do_not_depend_on_what_else_is_asked_for(corpus, config, random):
    plan = corpus.plan(**config)
    order = list(range(plan.num_windows))
    random.shuffle(order)
    chosen = order[: random.randint(0, len(order))]
    batch = gather(corpus, plan.windows(chosen), config["length"])
    for row, window in enumerate(chosen):
        alone = gather(corpus, plan.windows([window]), config["length"])
        for column in ("inputs", "targets", "mask", "document", "position"):
            np.testing.assert_array_equal(getattr(batch, column)[row], getattr(alone, column)[0])


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings(), st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_contexts_never_depend_on_what_follows(corpus, config, more):
    """Lengthening the last document changes no context and no number of an earlier prediction."""
    if not corpus.segments[-1]:
        return
    longer = MemoryCorpus([[list(d) for d in segment] for segment in corpus.segments], corpus.only)
    longer.segments[-1][-1].extend(more)
    before = planned(corpus, corpus.plan(**config), config["length"])
    after = planned(longer, longer.plan(**config), config["length"])
    assert after[: len(before)] == before


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings(), st.integers(1, 40))
def test_plan_of_a_grown_corpus_starts_with_the_old_plan(corpus, config, shard_tokens):
    old = MemoryCorpus(corpus.segments[:-1], corpus.only)
    old_plan, plan = old.plan(**config), corpus.plan(**config)
    assert planned(corpus, plan, config["length"], range(old_plan.num_windows)) == planned(
        old, old_plan, config["length"]
    )
    shards = shard_slices(old_plan, shard_tokens)
    assert shard_slices(plan, shard_tokens)[: len(shards)] == shards


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings(), st.integers(1, 40), st.integers(2, 5))
def test_shards_take_whole_batches_where_one_fits(corpus, config, shard_tokens, batch):
    plan = corpus.plan(**config)
    table, ends = plan.windows(np.arange(plan.num_windows)), set(map(int, plan.first_windows))
    shards = shard_slices(plan, shard_tokens, batch)
    assert [window for start, stop in shards for window in range(start, stop)] == list(range(plan.num_windows))
    for start, stop in shards:
        tokens = table.num_targets[start:stop].sum()
        assert tokens <= shard_tokens or stop == start + 1
        if stop in ends or (stop - start) % batch == 0:
            continue
        assert stop - start < batch, "a batch is filled up although more windows fit"
        assert tokens + table.num_targets[stop] > shard_tokens


@settings(max_examples=200, deadline=None)
@given(corpora(), window_settings(), st.integers(1, 40))
def test_shards_are_greedy_runs_of_windows_within_segments(corpus, config, shard_tokens):
    plan = corpus.plan(**config)
    table = plan.windows(np.arange(plan.num_windows))
    expected: list[list[int]] = []
    for window in range(plan.num_windows):
        same = expected and table.segment[expected[-1][0]] == table.segment[window]
        fits = expected and table.num_targets[[*expected[-1], window]].sum() <= shard_tokens
        if same and fits:
            expected[-1].append(window)
        else:
            expected.append([window])
    assert shard_slices(plan, shard_tokens) == [(shard[0], shard[-1] + 1) for shard in expected]


def test_bos_is_no_target_and_eos_is_one_in_document_context():
    corpus = MemoryCorpus([[[BOS, 5, EOS], [BOS, EOS]]])
    targets = [item[1] for item in planned(corpus, corpus.plan(length=4, context="document"), 4)]
    assert targets == [5, EOS, EOS]


def test_packed_bos_is_a_target_except_at_the_start_of_a_segment():
    corpus = MemoryCorpus([[[BOS, 5], [BOS, 6]], [[BOS, 7]]])
    scored = planned(corpus, corpus.plan(length=4, context="packed"), 4)
    assert [item[1:] for item in scored] == [(5, 0, 1), (BOS, 1, 0), (6, 1, 1), (7, 2, 1)]


def test_padding_is_inert():
    corpus = MemoryCorpus([[[7, 8, 9]]])
    batch = gather(corpus, corpus.plan(length=4, context="document").windows([0]), 4)
    assert batch.inputs.tolist() == [[7, 8, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 0, 0]]
    assert batch.mask.tolist() == [[True, True, False, False]]
    assert batch.document.tolist() == [[0, 0, -1, -1]]
    assert batch.position.tolist() == [[1, 2, -1, -1]]


def test_windows_without_a_target_are_left_out():
    """A prompt of three ids and an answer of two, then a prompt alone."""
    corpus = MemoryCorpus([[[1, 1, 1, 4, 6], [1, 1]]], only=2)
    plan = corpus.plan(length=2, context="document")
    assert (plan.num_windows, plan.num_tokens, plan.num_sequences) == (1, 2, 1)
    batch = gather(corpus, plan.windows([0]), 2)
    assert batch.inputs.tolist() == [[1, 4]]
    assert batch.targets[batch.mask].tolist() == [4, 6]
    assert batch.position[batch.mask].tolist() == [3, 4]


def test_large_plans_need_no_table():
    offsets = np.arange(0, 10**9 + 1, 1000)
    plan = plan_corpus([offsets], length=512, context="document")
    assert plan.num_tokens == 999 * 10**6
    assert plan.num_windows == 2 * 10**6
    last = plan.windows([plan.num_windows - 1])
    assert (last.start[0], last.num_inputs[0]) == (10**9 - 1000 + 512, 487)
    assert sum(stop - start for start, stop in shard_slices(plan, 1 << 19)) == plan.num_windows


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_outside_the_window_is_refused(stride):
    with pytest.raises(InputError, match="stride"):
        plan_segment([0, 5], length=8, context="packed", stride=stride)


def test_unknown_windows_and_narrow_batches_are_refused():
    corpus = MemoryCorpus([[[1, 2, 3, 4]]])
    plan = corpus.plan(length=4, context="document")
    with pytest.raises(IndexError):
        plan.windows([1])
    with pytest.raises(IndexError):
        plan.windows([-1])
    with pytest.raises(InputError, match="length 2"):
        gather(corpus, plan.windows([0]), 2)
    with pytest.raises(InputError, match="shard_tokens"):
        shard_slices(plan, 0)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1 << 14), (1 << 22, 1 << 16), (1 << 40, 1 << 19)])
def test_auto_shard_tokens_is_clamped(tokens, expected):
    assert auto_shard_tokens(tokens) == expected


# --- hashed order ----------------------------------------------------------------------------------------------

KEYS = {"artifact_sha256": "a" * 64, "corpus_sha256": "b" * 64, "fingerprint": "f", "seed": 3}


def written_out(unit: int) -> bytes:
    """The documented encoding, spelled out."""
    parts = b"".join(len(text).to_bytes(8, "big") + text.encode() for text in ("a" * 64, "b" * 64, "f"))
    data = b"tokenbound/window-order/1\0" + parts + (3).to_bytes(8, "big") + unit.to_bytes(8, "big")
    return hashlib.sha256(data).digest()


def test_order_is_that_of_the_documented_hash():
    assert hashed_order(500, **KEYS).tolist() == sorted(range(500), key=written_out)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 320))
def test_first_windows_are_a_prefix_of_the_whole_order(num_windows, first):
    whole = hashed_order(num_windows, **KEYS)
    assert sorted(whole.tolist()) == list(range(num_windows))
    assert hashed_order(num_windows, **KEYS, first=first).tolist() == whole[:first].tolist()


@pytest.mark.parametrize(
    "change", [{"artifact_sha256": "c" * 64}, {"corpus_sha256": "c" * 64}, {"fingerprint": "g"}, {"seed": 4}]
)
def test_order_depends_on_everything_it_is_bound_to(change):
    assert hashed_order(100, **KEYS).tolist() != hashed_order(100, **(KEYS | change)).tolist()


def test_order_encoding_is_unambiguous():
    moved = KEYS | {"corpus_sha256": "b" * 64 + "f", "fingerprint": ""}
    assert hashed_order(100, **KEYS).tolist() != hashed_order(100, **moved).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30), st.integers(0, 30), st.integers(1, 9))
def test_ties_of_the_first_bytes_are_resolved_by_the_rest_and_then_by_unit(halves, first, batch):
    digests = [bytes([head]) * 8 + bytes([tail]) * 24 for head, tail in halves]
    expected = sorted(range(len(digests)), key=lambda unit: (digests[unit], unit))
    order = windows._smallest(
        len(digests), lambda units: [digests[unit] for unit in units], min(first, len(digests)), batch=batch
    )
    assert order.tolist() == expected[:first]


def test_seed_must_fit():
    with pytest.raises(InputError, match="seed"):
        hashed_order(3, **(KEYS | {"seed": 1 << 64}))
