"""What names a run and a claim: every field that decides the losses, the draw or the price is in a fingerprint."""

from __future__ import annotations

from typing import Any

import pytest

from tokenbound.certificate.identity import (
    DEFAULT_PROTOCOL,
    claim_identity,
    differences,
    drawing,
    fingerprint,
    scoring_identity,
)
from tokenbound.config.run import BoundConfig, SampleConfig
from tokenbound.corpus.windows import hashed_order

SAMPLE = SampleConfig(windows=600, seed=3, pilot_windows=256)
BOUND = BoundConfig(trial=2)


def scored(**changes: Any) -> dict[str, Any]:
    fields = {
        "artifact_sha256": "a" * 64,
        "corpus_sha256": "c" * 64,
        "tokens_sha256": "d" * 64,
        "protocol": DEFAULT_PROTOCOL,
        "sample": SAMPLE,
    }
    return scoring_identity(**{**fields, **changes})


def claimed(declared: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    drawn = {name: changes.pop(name) for name in ("evaluation", "control_variates") if name in changes}
    name = changes.pop("scoring_fingerprint", "e" * 64)
    return claim_identity(
        name, BOUND.model_copy(update=changes), declared or {"prior": "code"}, SAMPLE.model_copy(update=drawn)
    )


SCORED = [
    {"artifact_sha256": "b" * 64},
    {"corpus_sha256": "b" * 64},
    {"tokens_sha256": "b" * 64},
    {"base": {"sha256": "b" * 64}},
    *({"protocol": {**DEFAULT_PROTOCOL, key: "another"}} for key in DEFAULT_PROTOCOL),
    {"sample": SAMPLE.model_copy(update={"seed": 4})},
    {"sample": SAMPLE.model_copy(update={"seed": 0})},
    {"sample": SAMPLE.model_copy(update={"pilot_windows": 300})},
    {"sample": SampleConfig(seed=3)},
    {"sample": SampleConfig(seed=4)},
]
CLAIMED = [
    {"scoring_fingerprint": "f" * 64},
    {"methods": ("freedman", "azuma")},
    {"methods": ("azuma", "freedman", "kl")},
    {"top_k": (1, 10)},
    {"delta": 0.01},
    {"trial": 1},
    {"trial": 3},
    {"unscorable": "worst_case"},
    {"evaluation": 1},
    {"evaluation": 2},
    {"control_variates": "none"},
    {"declared": {"prior": "code", "declared_tokens": 5}},
]


@pytest.mark.parametrize("changes", SCORED, ids=str)
def test_what_decides_the_losses_or_the_draw_names_the_run(changes: dict[str, Any]) -> None:
    assert fingerprint(scored(**changes)) != fingerprint(scored())
    assert fingerprint(scored()) == fingerprint(scored())


@pytest.mark.parametrize("changes", CLAIMED, ids=str)
def test_what_is_claimed_names_the_claim(changes: dict[str, Any]) -> None:
    assert fingerprint(claimed(**changes)) != fingerprint(claimed())
    assert fingerprint(claimed()) == fingerprint(claimed())


def test_no_two_of_these_runs_or_claims_share_a_name() -> None:
    for identities in ([scored(**c) for c in SCORED], [claimed(**c) for c in CLAIMED]):
        assert len({fingerprint(identity) for identity in identities}) == len(identities)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_seed_of_the_draw_is_in_the_identity(seed: int) -> None:
    """Of a sample and of a full run alike; the order of the windows follows from it."""
    for sample in (SAMPLE, SampleConfig()):
        found = scored(sample=sample.model_copy(update={"seed": seed}))
        assert found["seed"] == seed
        assert drawing(sample)["sampled"] is not sample.is_full
    digests = {"artifact_sha256": "a" * 64, "corpus_sha256": "c" * 64, "fingerprint": "e" * 64}
    order, other = (hashed_order(50, seed=s, first=50, **digests).tolist() for s in (seed, seed + 1))
    assert order != other
    assert sorted(order) == sorted(other) == list(range(50))


@pytest.mark.parametrize("trial", [1, 2, 14])
def test_the_trial_is_in_the_claim(trial: int) -> None:
    identity = claimed(trial=trial)
    assert identity["trial"] == trial
    if trial != BOUND.trial:
        assert differences(claimed(), identity) == f"trial (2, now {trial})"


def test_where_a_sample_stops_is_in_neither_name() -> None:
    longer = SAMPLE.model_copy(update={"windows": 5000, "until_slack_bits": 0.1})
    assert scored(sample=longer) == scored()


def test_the_pilot_of_a_full_run_decides_nothing() -> None:
    whole = SampleConfig(pilot_windows=7)
    assert scored(sample=whole) == scored(sample=SampleConfig())
