"""Certificates of every kind, made by the package's own reduction from synthetic losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from tokenbound.api import Certificate
from tokenbound.bounds.claim import Claim, SamplingPlan
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.certificate.derived import code_split, derived_fields
from tokenbound.certificate.identity import DEFAULT_PROTOCOL
from tokenbound.certificate.record import SamplingRecord
from tokenbound.certificate.reduce import Reduction, reduce_ledger, shard_evidence
from tokenbound.compression.inspection import ArtifactReport, TensorReport, layer_of
from tokenbound.report.details import PositionLosses, ReportDetails, report_details
from tokenbound.report.html import html_report
from tokenbound.report.sweep_report import SweepRow, sweep_row
from tokenbound.store.history import HistoryEntry
from tokenbound.store.losses import Losses

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> $\\frac{ {{ 7 * 7 }} & ]]> \x00\x1b --> é"
VOCAB, LENGTH = 257, 64
VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use"}
"""Tags that need no end."""
FIRST_KINDS = ("full", "sampled", "vacuous", "holdout", "kl_only")


class Page(HTMLParser):
    """Texts, tags and attributes of a page; complains about tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def figures(self) -> list[str]:
        """Names of the figures, in order."""
        return [value for tag, name, value in self.attributes if tag == "figure" and name == "id"]

    def network_addresses(self) -> list[str]:
        """Whatever the page would load or lead to outside itself."""
        links = [value for _, name, value in self.attributes if name in ("href", "src")]
        assert links
        return [value for value in links if not value.startswith(("#", "data:"))]


@dataclass(frozen=True)
class Case:
    """A certificate with the losses behind it."""

    certificate: Certificate
    reduction: Reduction
    losses: list[Losses]

    def details(self, artifact: ArtifactReport | None = None) -> ReportDetails:
        evidence = merge_evidence([shard_evidence(part, VOCAB, (1, 10)) for part in self.losses])
        positions = PositionLosses.of(self.losses)
        return report_details(evidence, self.certificate, artifact=artifact, positions=positions)


class MemoryLedger:
    """Shards in memory."""

    def __init__(self, shards: list[Losses]) -> None:
        self.shards = shards
        self.num_shards = len(shards)

    def evidence(self, shard: int, top_k: tuple[int, ...]) -> Evidence:
        return shard_evidence(self.shards[shard], VOCAB, top_k)

    def pieces(self, shard: int) -> Iterator[Losses]:
        yield self.shards[shard]


def synthetic_losses(first: int, windows: int, rng: np.random.Generator) -> Losses:
    tokens = windows * LENGTH
    entropy = np.minimum(rng.gamma(0.7, 1.4, tokens), 5.4)
    nll = np.minimum(rng.exponential(1.0, tokens) * entropy, 25.0)
    rank = np.minimum(rng.geometric(np.exp(-0.8 * entropy)) - 1, VOCAB - 1)
    return Losses(
        window_id=np.arange(first, first + windows),
        offsets=np.arange(windows + 1) * LENGTH,
        unscored=np.zeros(windows, bool),
        document=np.zeros(tokens, np.int64),
        position=np.tile(np.arange(LENGTH, dtype=np.int32), windows),
        nll=nll.astype(np.float32),
        entropy=entropy.astype(np.float32),
        rank=rank.astype(np.int32),
    )


def build(kind: str, text: str = "plain text") -> Case:
    """A certificate of the kind; `text` stands wherever a user's words or paths do."""
    rng = np.random.default_rng(5)
    shards = [synthetic_losses(i * 64, 64, rng) for i in range(4)]
    scored = sum(part.num_tokens for part in shards)
    sampled = kind == "sampled"
    num_windows = 1 << 14 if sampled else scored // LENGTH
    artifact_bytes = {"full": 700, "sampled": 40_000, "vacuous": 60_000}.get(kind, 20_000)
    split = code_split(artifact_bytes, dict(DEFAULT_PROTOCOL))
    claim = Claim(
        vocab_size=VOCAB,
        tokenizer_vocab_size=VOCAB,
        code_length_bits=math.fsum(split.values()),
        delta=0.05,
        num_tokens=num_windows * LENGTH,
        methods=("kl",) if kind == "kl_only" else ("freedman", "azuma", "kl"),
        top_k=(1, 10),
        prior="holdout" if kind in ("holdout", "kl_only") else "code",
        code_split=split,
    )
    plan = SamplingPlan(num_windows, LENGTH, pilot_units=32) if sampled else None
    reduction = reduce_ledger(MemoryLedger(shards), claim, plan)
    return Case(_certificate(claim, reduction, plan, artifact_bytes, text), reduction, shards)


def _certificate(
    claim: Claim, reduction: Reduction, plan: SamplingPlan | None, artifact_bytes: int, text: str
) -> Certificate:
    scored = reduction.sums.num_tokens
    declared: dict[str, Any] = {"tokenizer_is": "given", "prior": claim.prior}
    if claim.prior == "holdout":
        declared["holdout_declaration"] = text
    record = plan and SamplingRecord(
        seed=0,
        num_windows=plan.num_units,
        max_window_tokens=LENGTH,
        scored_windows=scored // LENGTH,
        pilot_windows=plan.pilot_units,
        until_slack_bits=None,
    )
    return Certificate(
        **derived_fields(reduction, claim, 1.0),
        random_guess_bits=math.log2(VOCAB),
        delta=claim.delta,
        num_tokens=claim.num_tokens,
        num_scored_tokens=scored,
        num_windows=claim.num_tokens // LENGTH,
        vocab_size=VOCAB,
        tokenizer_vocab_size=VOCAB,
        code_length_bits=claim.paid_code_bits,
        code_split=dict(claim.code_split),
        artifact_bytes=artifact_bytes,
        num_worst_case_tokens=0,
        prior=claim.prior,
        trial=1,
        methods=list(claim.methods),
        top_k=list(claim.top_k),
        declared_tokens=None,
        unscorable="refuse",
        protocol=dict(DEFAULT_PROTOCOL),
        sampling=record,
        declarations=declared,
        corpus={"source": "jsonl", "paths": [text], "tokenizer": text, "documents": 12, "tokens": scored},
        model={"architecture": "llama", "source": text},
        environment={"python": "3.13.0", "torch": text},
        scoring_identity={},
        claim_identity={},
        scoring_fingerprint="1" * 64,
        claim_fingerprint="2" * 64,
        artifact_sha256="3" * 64,
        corpus_sha256="4" * 64,
        tokens_sha256="5" * 64,
        losses_sha256="6" * 64,
        num_shards=4,
        tokenbound_version="0.1.0",
        created_at="2026-01-02T03:04:05+00:00",
    )


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """One of each kind, with harmless texts."""
    return {kind: build(kind) for kind in FIRST_KINDS}


@pytest.fixture(scope="session")
def hostile_case() -> Case:
    """A holdout certificate whose every free text attacks the page."""
    return build("holdout", HOSTILE)


@pytest.fixture(scope="session")
def hostile_page(hostile_case: Case) -> str:
    """Its report with every plot."""
    return html_report(hostile_case.certificate, details=hostile_case.details(_artifact_report()))


@pytest.fixture(scope="session")
def hostile_text() -> str:
    """What stands in those texts."""
    return HOSTILE


@pytest.fixture(scope="session")
def make_artifact_report() -> Callable[[], ArtifactReport]:
    """Makes the report of an artifact with thirty layers and a tensor with a hostile name."""
    return _artifact_report


def _artifact_report() -> ArtifactReport:
    names = [f"model.layers.{i}.{kind}" for i in range(30) for kind in ("self_attn.q_proj", "mlp.up_proj", "norm")]
    rows = tuple(_tensor(name, 900 + i) for i, name in enumerate([*names, f"{HOSTILE}.weight", "lm_head.weight"]))
    total = sum(row.num_bytes for row in rows) + 77
    known = {"num_bytes": total, "elements": 1000 * len(rows), "tensors": rows}
    return ArtifactReport(**{field.name: known.get(field.name) for field in fields(ArtifactReport)})  # type: ignore[arg-type]


def _tensor(name: str, num_bytes: int) -> TensorReport:
    known = {"name": name, "layer": layer_of(name), "elements": 1000, "num_bytes": num_bytes}
    return TensorReport(**{field.name: known.get(field.name) for field in fields(TensorReport)})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Reads an HTML page."""
    return Page


@pytest.fixture(scope="session")
def nights(cases: dict[str, Case]) -> list[HistoryEntry]:
    """Four nights of a growing corpus and two steps of a training."""
    certificate = cases["full"].certificate
    first = HistoryEntry(
        created_at="2026-01-02T03:04:05+00:00",
        model="/models/step-1",
        certificate="models/a/certificate.json",
        claim_fingerprint="0" * 64,
        artifact_sha256="3" * 64,
        artifact_bytes=700,
        num_tokens=16_384,
        num_scored_tokens=16_384,
        segments=1,
        bound_bits=4.5,
        method="freedman",
        empirical_risk_bits=2.0,
        mean_nll_bits=1.9,
        vacuous=False,
        trial=1,
        evaluation=None,
    )
    changes: list[dict[str, Any]] = [
        {},
        {"num_tokens": 20_000, "num_scored_tokens": 20_000, "bound_bits": 4.375, "segments": 2},
        {"num_tokens": 24_000, "num_scored_tokens": 24_000, "bound_bits": 4.125, "model": "/models/step-2"},
        {"bound_bits": certificate.bound_bits, "model": "/models/step-3", "certificate": "models/b/certificate.json"},
    ]
    return [
        replace(first, created_at=f"2026-01-0{2 + day}T03:04:05+00:00", claim_fingerprint=f"{day}" * 64, **change)
        for day, change in enumerate(changes)
    ]


@pytest.fixture(scope="session")
def trials(cases: dict[str, Case]) -> list[SweepRow]:
    """Three trials of one sweep: the shortest, the best, and one that neither is."""
    row = sweep_row("short", "lora", {"trained_parameters": 4096}, cases["full"].certificate, "short/certificate.json")
    assert row.bound_bits is not None
    best = replace(row, trial="best", artifact_bytes=7_000, bound_bits=row.bound_bits - 1, file="best/c.json")
    worse = replace(row, trial="neither", artifact_bytes=9_000, bound_bits=row.bound_bits + 1, file="neither/c.json")
    return [row, best, worse]
