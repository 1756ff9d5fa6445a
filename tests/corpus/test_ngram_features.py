"""Features of windows: what they are, computed by hand; and the same however the work is divided."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.ngram_features import (
    BACK_OFF,
    UNITS_PER_BIT,
    FeatureRule,
    Features,
    compute_features,
    corpus_features,
)
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import MismatchError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """Two segments of a few documents, some of them empty."""
    folder, cache = tmp_path_factory.mktemp("text"), str(tmp_path_factory.mktemp("cache"))
    rng = np.random.default_rng(0)
    for names in (("a", "b", "c"), ("d", "e")):
        for name in names:
            words = rng.choice(["alpha ", "beta ", "gamma ", "x"], 200 if name != "b" else 0)
            (folder / f"{name}.txt").write_text("".join(words))
        rule = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
        found = prepare_corpus(CorpusConfig(source="text", paths=(str(folder),), **rule), cache)
    assert len(found.manifest.segments) == 2
    return found


def by_hand(corpus: PreparedCorpus, rule: FeatureRule) -> list[list[list[float]]]:
    """For each segment and order, the code length in bits of every id."""
    streams = [
        corpus.read_ids(index, 0, segment.tokens).tolist() for index, segment in enumerate(corpus.manifest.segments)
    ]
    counts: Counter[tuple[int, ...]] = Counter()
    for ids in streams:
        counts.update(tuple(ids[i - n + 1 : i + 1]) for n in range(1, 5) for i in range(n - 1, len(ids)))
    total = sum(map(len, streams))
    found = []
    for ids in streams:
        rows: list[list[float]] = [[] for _ in rule.orders]
        for i in range(len(ids)):
            p = 1 / corpus.manifest.vocab_size
            for order in range(1, rule.orders[-1] + 1):
                if i >= order - 1:
                    gram = tuple(ids[i - order + 1 : i + 1])
                    context = counts[gram[:-1]] if order > 1 else total
                    p = (counts[gram] - 1 + BACK_OFF * p) / (max(context - 1, 0) + BACK_OFF)
                if order in rule.orders:
                    rows[rule.orders.index(order)].append(-math.log2(min(p, 1.0)))
        found.append(rows)
    return found


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(16, "packed", None), (16, "document", None), (20, "document", 8), (7, "packed", 3)],
)
def test_code_lengths_are_those_counted_by_hand(
    corpus: PreparedCorpus, length: int, context: str, stride: int | None
) -> None:
    rule = FeatureRule.of(corpus.manifest, length=length, context=context, stride=stride)
    rule = replace(rule, table_bits=22)  # so that no two n-grams fall into one cell
    assert rule.orders == (2, 3, 4)
    offsets = [corpus.document_offsets(index) for index in range(2)]
    plan = plan_corpus(offsets, length=length, context=context, stride=stride)  # type: ignore[arg-type]
    windows, bits = plan.windows(np.arange(plan.num_windows)), by_hand(corpus, rule)
    found = compute_features(corpus.root, rule)
    assert found.lengths.tolist() == windows.num_targets.tolist()
    for row in range(plan.num_windows):
        first = int(windows.start[row] + windows.first_target[row] + 1)
        targets = slice(first, first + int(windows.num_targets[row]))
        expected = [sum(column[targets]) for column in bits[int(windows.segment[row])]]
        assert found.table[row, 1:] / UNITS_PER_BIT == pytest.approx(expected, rel=2e-3, abs=0.05)


def test_they_are_the_same_however_the_work_is_divided(corpus: PreparedCorpus) -> None:
    rule = FeatureRule.of(corpus.manifest, length=16, context="document", stride=None)
    whole = compute_features(corpus.root, rule)
    assert compute_features(corpus.root, rule, block_tokens=37, part_tokens=100).sha256 == whole.sha256


def test_they_are_kept_beside_the_corpus_and_made_again_when_damaged(corpus: PreparedCorpus) -> None:
    rule = FeatureRule.of(corpus.manifest, length=24, context="packed", stride=None)
    calls = []

    def counted(function, items):
        calls.append(function)
        return map(function, items)

    first = corpus_features(corpus.root, rule, counted)
    assert corpus_features(corpus.root, rule, counted).sha256 == first.sha256
    assert len(calls) == 2, "one map over orders, one over parts, and only once"
    (kept,) = Path(corpus.root, "features").glob(f"{rule.digest[:32]}.npy")
    kept.write_bytes(first.data[:-8])
    assert corpus_features(corpus.root, rule, counted).sha256 == first.sha256
    assert len(calls) == 4


def test_a_corpus_that_cannot_be_written_has_features_too(
    corpus: PreparedCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(corpus.root, shared)
    shutil.rmtree(shared / "features", ignore_errors=True)
    (shared / "features").write_text("in the way")
    rule = FeatureRule.of(corpus.manifest, length=24, context="packed", stride=None)
    assert corpus_features(str(shared), rule).sha256 == compute_features(corpus.root, rule).sha256
    assert "not kept beside the corpus" in caplog.text


def test_other_windows_have_other_features(corpus: PreparedCorpus) -> None:
    rules = [FeatureRule.of(corpus.manifest, length=n, context="packed", stride=None) for n in (16, 17)]
    assert rules[0].digest != rules[1].digest
    with pytest.raises(MismatchError, match="not a table of features"):
        Features.parse(b"\x93NUMPY", "features.npy")
