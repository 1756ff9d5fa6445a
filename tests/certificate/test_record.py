"""Certificates from synthetic losses: what verifies, and what does not after any change."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from losses_support import make_losses

from tokenbound.api import Certificate
from tokenbound.bounds.claim import DEFAULT_METHODS, Claim, SamplingPlan
from tokenbound.certificate.derived import code_split, derived_fields
from tokenbound.certificate.identity import (
    DEFAULT_PROTOCOL,
    SOFTWARE_DECLARATIONS,
    claim_identity,
    fingerprint,
    scoring_identity,
)
from tokenbound.certificate.record import SamplingRecord, possible_tokens
from tokenbound.certificate.reduce import RunLedger, reduce_ledger, shard_evidence
from tokenbound.certificate.verify import verify_beside
from tokenbound.compression.artifact import encode_artifact
from tokenbound.config.compress import LosslessSettings
from tokenbound.config.run import BoundConfig, SampleConfig
from tokenbound.corpus.windows import hashed_order
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store.losses import Losses
from tokenbound.store.run import ARTIFACT, RunDirectory, losses_sha256, sha256_hex

V = 257
FULL = SampleConfig()
ARTIFACT_BYTES = encode_artifact(
    {"vocab_size": V, "model_type": "llama"}, {"w": torch.arange(64.0)}, LosslessSettings()
)


def build(
    folder: Path,
    *,
    unscored: tuple[int, ...] = (),
    unscorable: str = "refuse",
    prior: str = "code",
    sample: SampleConfig = FULL,
) -> Path:
    """A finished run of three shards of eight windows, and its certificate; or of a sample so long of 40 windows."""
    run = RunDirectory(str(folder))
    run.write(ARTIFACT, ARTIFACT_BYTES)
    identity = scoring_identity(
        artifact_sha256=sha256_hex(ARTIFACT_BYTES),
        corpus_sha256="c" * 64,
        tokens_sha256="d" * 64,
        protocol=DEFAULT_PROTOCOL,
        sample=sample,
    )
    name = fingerprint(identity)
    records, order = [], np.arange(24)
    if not sample.is_full:
        order = drawn(identity, name)
    for shard in range(3):
        losses = replace(_shard(shard, unscored if shard == 0 else ()), window_id=order[8 * shard : 8 * shard + 8])
        evidence = json.loads(shard_evidence(losses, V, (1, 10)).to_json())
        records.append(run.commit(shard, losses, evidence, name))
    bound = BoundConfig(
        methods=DEFAULT_METHODS, top_k=(1, 10), unscorable=unscorable, prior=prior, holdout_declaration="a test"
    )
    declared: dict[str, Any] = {"tokenizer_is": "given", "prior": prior, SOFTWARE_DECLARATIONS[0]: True}
    declared |= {"holdout_declaration": "a test"} if prior == "holdout" else {}
    drawing = None if sample.is_full else sampling_record(sample)
    claimed = claim_identity(name, bound, declared, drawing)
    split = code_split(len(ARTIFACT_BYTES), DEFAULT_PROTOCOL)
    scored = sum(record.tokens for record in records)
    tokens = scored if sample.is_full else 40 * 16
    claim = Claim(
        V, V, math.fsum(split.values()), bound.delta, tokens, bound.methods, bound.top_k, prior=prior, code_split=split
    )
    plan = None if sample.is_full else SamplingPlan(40, 16, sample.pilot_windows, evaluation=sample.evaluation)
    reduction = reduce_ledger(RunLedger(run.uri, 3, name, V), claim, plan)
    certificate = Certificate(
        **derived_fields(reduction, claim, None),
        random_guess_bits=math.log2(V),
        delta=bound.delta,
        num_tokens=tokens,
        num_scored_tokens=scored,
        num_windows=24 if sample.is_full else 40,
        vocab_size=V,
        tokenizer_vocab_size=V,
        code_length_bits=claim.paid_code_bits,
        code_split=split,
        artifact_bytes=len(ARTIFACT_BYTES),
        num_worst_case_tokens=reduction.sums.worst_case_tokens,
        prior=prior,
        trial=1,
        methods=list(bound.methods),
        top_k=list(bound.top_k),
        declared_tokens=None,
        unscorable=unscorable,
        protocol=DEFAULT_PROTOCOL,
        sampling=drawing,
        declarations=declared,
        corpus={"source": "text", "documents": 3, "bytes_per_token": None},
        model={"architecture": "llama"},
        environment={},
        scoring_identity=identity,
        claim_identity=claimed,
        scoring_fingerprint=name,
        claim_fingerprint=fingerprint(claimed),
        artifact_sha256=sha256_hex(ARTIFACT_BYTES),
        corpus_sha256="c" * 64,
        tokens_sha256="d" * 64,
        losses_sha256=losses_sha256(records),
        num_shards=3,
        tokenbound_version="0",
        created_at="2026-01-01T00:00:00+00:00",
    )
    path = folder / "certificate.json"
    certificate.save(path)
    return path


def _shard(shard: int, unscored: tuple[int, ...]) -> Losses:
    return make_losses([16] * 8, unscored=unscored, seed=shard)


def drawn(identity: dict[str, Any], name: str) -> Any:
    digests = {key: identity[key] for key in ("artifact_sha256", "corpus_sha256", "seed")}
    return hashed_order(40, fingerprint=name, first=24, **digests)


def sampling_record(sample: SampleConfig) -> SamplingRecord:
    return SamplingRecord(
        seed=sample.seed,
        num_windows=40,
        max_window_tokens=16,
        scored_windows=24,
        pilot_windows=sample.pilot_windows,
        until_slack_bits=None,
        evaluation=sample.evaluation,
        window_budgets=sample.has_budgets,
    )


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run; tests work on copies."""
    return build(tmp_path_factory.mktemp("pristine")).parent


@pytest.fixture
def finished(pristine: Path, tmp_path: Path) -> Path:
    """The certificate of a fresh copy of a finished run in `tmp_path`."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "certificate.json"


def test_an_untouched_certificate_verifies(finished: Path, tmp_path: Path) -> None:
    checked, run, artifact = verify_beside(finished)
    assert checked.num_scored_tokens == 3 * 8 * 16
    assert (run, artifact) == (str(tmp_path), str(tmp_path / ARTIFACT))


def test_holdout_and_worst_case_certificates_verify(tmp_path: Path) -> None:
    verify_beside(build(tmp_path / "holdout", prior="holdout"))
    checked, _, _ = verify_beside(build(tmp_path / "worst", unscored=(2, 5), unscorable="worst_case"))
    assert checked.num_worst_case_tokens == 32


def test_worst_case_windows_raise_the_risk(tmp_path: Path) -> None:
    sound = Certificate.load(build(tmp_path / "a"))
    failed = Certificate.load(build(tmp_path / "b", unscored=(2,), unscorable="worst_case"))
    assert failed.empirical_risk_bits > sound.empirical_risk_bits
    assert failed.bound_bits > sound.bound_bits


def test_unscored_windows_do_not_verify_without_the_worst_case_rule(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no finite loss"):
        verify_beside(build(tmp_path, unscored=(2,)))


def test_a_byte_of_losses_or_artifact_changed(finished: Path, tmp_path: Path) -> None:
    for name in ("losses/00001.parquet", ARTIFACT):
        file = tmp_path / name
        original = file.read_bytes()
        for at in (0, len(original) // 2, len(original) - 1):
            file.write_bytes(original[:at] + bytes([original[at] ^ 128]) + original[at + 1 :])
            with pytest.raises(MismatchError):
                verify_beside(finished)
        file.write_bytes(original)
    verify_beside(finished)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bound_bits", 1.0),
        ("empirical_risk_bits", 0.5),
        ("mean_nll_nats", 0.1),
        ("vacuous", False),
        ("delta", 0.5),
        ("num_tokens", 10**9),
        ("num_scored_tokens", 10),
        ("num_windows", 23),
        ("artifact_bytes", 1),
        ("code_length_bits", 8.0),
        ("tokenizer_vocab_size", 200),
        ("vocab_size", 1000),
        ("trial", 2),
        ("losses_sha256", "0" * 64),
        ("artifact_sha256", "0" * 64),
        ("corpus_sha256", "0" * 64),
        ("scoring_fingerprint", "0" * 64),
        ("claim_fingerprint", "0" * 64),
        ("prior", "holdout"),
        ("methods", ["freedman"]),
        ("top_k", [1]),
    ],
)
def test_no_forged_field_verifies(finished: Path, tmp_path: Path, field: str, value: Any) -> None:
    tree = json.loads(finished.read_text())
    assert tree[field] != value
    finished.write_text(json.dumps({**tree, field: value}))
    with pytest.raises(MismatchError):
        verify_beside(finished)


def test_a_forged_line_does_not_verify(finished: Path, tmp_path: Path) -> None:
    tree = json.loads(finished.read_text())
    tree["bounds"][-1]["value"] *= 0.99
    finished.write_text(json.dumps(tree))
    with pytest.raises(MismatchError, match="bounds"):
        verify_beside(finished)


def reforged(path: Path, **fields: Any) -> Certificate:
    """A certificate with forged fields, and every number recomputed as they would have it."""
    forged = Certificate.load(path).model_copy(update=fields)
    reduction = reduce_ledger(forged.ledger(str(path.parent)), forged.claim(), forged.sampling_plan())
    return forged.model_copy(update=derived_fields(reduction, forged.claim(), None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pilot_windows", 12),
        ("pilot_windows", 20),
        ("evaluation", 1),
        ("evaluation", None),
        ("max_window_tokens", 15),
        ("seed", 1),
    ],
)
def test_a_draw_is_decided_before_it(tmp_path: Path, field: str, value: int | None) -> None:
    """A pilot chosen afterwards, or a cheaper ordinal, does not verify although all numbers follow from it."""
    path = build(tmp_path, sample=SampleConfig(windows=24, pilot_windows=8, evaluation=3))
    sound = Certificate.load(path)
    sound.verify(losses=tmp_path, artifact=ARTIFACT_BYTES)
    assert sound.sampling is not None
    record = sound.sampling.model_copy(update={field: value})
    with pytest.raises((MismatchError, InputError), match=field.replace("max_window_tokens", "at most 15")):
        reforged(path, sampling=record).verify(losses=tmp_path, artifact=ARTIFACT_BYTES)


def test_a_draw_with_another_seed_than_the_runs_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows are those that the printed seed draws, and every number follows; but the run was named for seed 0."""
    monkeypatch.setitem(globals(), "drawn", lambda identity, name, draw=drawn: draw({**identity, "seed": 7}, name))
    path = build(tmp_path, sample=SampleConfig(windows=24, pilot_windows=8))
    drawn_by_seven = Certificate.load(path).sampling
    assert drawn_by_seven is not None
    forged = reforged(path, sampling=drawn_by_seven.model_copy(update={"seed": 7}))
    with pytest.raises(MismatchError, match=r"^seed: the certificate says 7"):
        forged.verify(losses=tmp_path, artifact=ARTIFACT_BYTES)
    identity = {**forged.scoring_identity, "seed": 7}  # renamed as well: the shards were then committed by another run
    renamed = forged.model_copy(update={"scoring_identity": identity, "scoring_fingerprint": fingerprint(identity)})
    with pytest.raises(MismatchError):
        renamed.verify(losses=tmp_path, artifact=ARTIFACT_BYTES)


def with_declared_tokens(path: Path, declared: int, earlier: list[str]) -> Certificate:
    """The certificate with m declared beforehand; identities and every number say so throughout."""
    certificate = Certificate.load(path)
    declarations = {**certificate.declarations, "declared_tokens": declared}
    claimed = {**certificate.claim_identity, "declarations": declarations}
    return reforged(
        path,
        declared_tokens=declared,
        declarations=declarations,
        claim_identity=claimed,
        claim_fingerprint=fingerprint(claimed),
        earlier_fingerprints=earlier,
    )


def test_a_declared_m_of_a_grown_corpus_does_not_verify(finished: Path) -> None:
    """Azuma at m fixed is tighter; a corpus that grew was looked at before, so its m was not fixed."""
    m = Certificate.load(finished).num_tokens
    sound = with_declared_tokens(finished, m, [])
    sound.verify(losses=finished.parent, artifact=ARTIFACT_BYTES)
    azuma = next(line for line in sound.bounds if line["method"] == "azuma")
    assert azuma["parameters"]["form"] == "fixed m"
    grown = with_declared_tokens(finished, m, ["0" * 64])
    with pytest.raises(MismatchError, match="declared beforehand, of a corpus that has grown"):
        grown.verify(losses=finished.parent, artifact=ARTIFACT_BYTES)
    silent = sound.model_copy(update={"declarations": Certificate.load(finished).declarations})
    with pytest.raises(MismatchError, match="declar"):
        silent.verify(losses=finished.parent, artifact=ARTIFACT_BYTES)


def test_a_sample_cannot_be_shortened_to_its_luckiest_windows(tmp_path: Path) -> None:
    """Every prefix of the draw may be certified; other windows may not."""
    path = build(tmp_path, sample=SampleConfig(windows=24, pilot_windows=8))
    sound, run = Certificate.load(path), RunDirectory(str(tmp_path))
    assert sound.sampling is not None
    shorter = reforged(path, sampling=sound.sampling.model_copy(update={"scored_windows": 20}), num_scored_tokens=320)
    shorter.verify(losses=tmp_path, artifact=ARTIFACT_BYTES)
    record = run.record(2)
    losses = run.losses(record)
    swapped = replace(losses, window_id=losses.window_id[[1, 0, *range(2, 8)]])
    run.commit(2, swapped, record.evidence, record.scoring_fingerprint)
    records = [run.record(shard) for shard in range(3)]
    with pytest.raises(MismatchError, match="other windows than planned"):
        reforged(path, losses_sha256=losses_sha256(records)).verify(losses=tmp_path, artifact=ARTIFACT_BYTES)


def test_a_narrower_vocabulary_than_the_models_does_not_verify(finished: Path) -> None:
    """It would lower B; that all numbers follow from it does not help."""
    forged = Certificate.load(finished).model_copy(update={"vocab_size": V - 1, "tokenizer_vocab_size": V - 1})
    forged = forged.model_copy(update={"random_guess_bits": math.log2(V - 1)})
    with pytest.raises(MismatchError, match="vocab_size: the certificate says 256, the model predicts 257"):
        forged.verify(losses=finished.parent, artifact=ARTIFACT_BYTES)


def test_lines_of_a_head_that_the_model_does_not_have_do_not_verify(finished: Path) -> None:
    forged = Certificate.load(finished).model_copy(update={"head_alpha_min": 0.25})
    with pytest.raises(MismatchError, match="head_alpha_min"):
        forged.verify(losses=finished.parent, artifact=ARTIFACT_BYTES)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("t", 1.0), ("alpha", 0.1), ("forecast_floor_bits", 20.0), ("forecast_coefficients", [0.1] * 5), ("lambda", 9.0)],
)
def test_a_forged_grid_point_does_not_verify(finished: Path, parameter: str, value: Any) -> None:
    """Verification chooses the grid point again; the printed one must be that."""
    tree = json.loads(finished.read_text())
    line = next(line for line in tree["bounds"] if line["method"] == "freedman")
    assert line["parameters"][parameter] != value
    line["parameters"][parameter] = value
    finished.write_text(json.dumps(tree))
    with pytest.raises(MismatchError, match="bounds"):
        verify_beside(finished)


def test_recommitted_better_losses_do_not_verify(finished: Path, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    record, losses = run.record(1), run.losses(run.record(1))
    better = replace(losses, nll=losses.nll * np.float32(0.5))
    run.commit(1, better, record.evidence, record.scoring_fingerprint)
    with pytest.raises(MismatchError, match="losses_sha256"):
        verify_beside(finished)


@pytest.mark.parametrize("order", [[0, 0, 2], [1, 0, 2]])
def test_duplicate_or_reordered_shards_are_found(finished: Path, tmp_path: Path, order: list[int]) -> None:
    run = RunDirectory(str(tmp_path))
    shards = [run.losses(run.record(shard)) for shard in range(3)]
    tree = json.loads(finished.read_text())
    records = [
        run.commit(i, shards[source], run.record(i).evidence, tree["scoring_fingerprint"])
        for i, source in enumerate(order)
    ]
    finished.write_text(json.dumps({**tree, "losses_sha256": losses_sha256(records)}))
    with pytest.raises(MismatchError, match="other windows than planned"):
        verify_beside(finished)


def test_missing_pieces_are_incomplete(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "shards/00002.json").unlink()
    with pytest.raises(IncompleteError):
        verify_beside(finished)
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    (alone / "certificate.json").write_bytes(finished.read_bytes())
    with pytest.raises(IncompleteError, match="--losses"):
        verify_beside(alone / "certificate.json")


def test_a_damaged_certificate_names_the_field(finished: Path, tmp_path: Path) -> None:
    tree = json.loads(finished.read_text())
    del tree["alpha"]
    finished.write_text(json.dumps(tree))
    with pytest.raises(MismatchError, match="alpha"):
        Certificate.load(finished)


def test_table_says_the_essential(finished: Path) -> None:
    text = Certificate.load(finished).table()
    for word in ("95 %", "random guessing", "freedman", "azuma", "top-10", "declared chosen independently"):
        assert word in text


def test_the_published_schema_is_this_code() -> None:
    published = resources.files("tokenbound").joinpath("data/certificate.schema.json").read_text()
    assert json.loads(published) == Certificate.model_json_schema(), "run `make schema` and note the change"


def test_certificates_meet_the_published_schema(tmp_path: Path) -> None:
    schema = Certificate.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    tree = Certificate.load(build(tmp_path)).model_dump(mode="json")
    jsonschema.validate(tree, schema)
    del tree["bounds"][0]["kappa_nats"]
    with pytest.raises(jsonschema.ValidationError, match="kappa_nats"):
        jsonschema.validate(tree, schema)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("delta", "0.05", "'delta': Input should be a valid number"),
        ("num_tokens", True, "'num_tokens': Input should be a valid integer"),
        ("num_tokens", 384.0, "'num_tokens': Input should be a valid integer"),
        ("vacuous", 1, "'vacuous': Input should be a valid boolean"),
        ("schema_version", True, "no field 'schema_version' with a number"),
        ("schema_version", 3, "'schema_version'"),
        ("scoring_fingerprint", "A" * 64, "'scoring_fingerprint'"),
        ("created_at", "yesterday", "'created_at'"),
        ("tokenbound_version", "\x1b[2J", "'tokenbound_version'"),
        ("note", 7, "'note': unknown key"),
        ("trial", 2**63, "'trial'"),
        ("methods", "freedman", "'methods'"),
        ("environment", {"torch": 2}, "'environment.torch'"),
        ("model", {"architecture": "llama", "source": ["x"]}, "'model.source'"),
        ("corpus", {"source": "text", "documents": "3"}, "'corpus.documents'"),
        ("corpus", {"source": "text"}, "'corpus.documents': missing"),
    ],
)
def test_a_field_of_another_type_is_named(finished: Path, field: str, value: Any, reason: str) -> None:
    finished.write_text(json.dumps({**json.loads(finished.read_text()), field: value}))
    with pytest.raises(MismatchError, match=reason) as caught:
        Certificate.load(finished)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"delta": 0.05', '"delta": 0.05, "delta": 0.5', "the key 'delta' is given twice"),
        ('"delta": 0.05', '"delta": NaN', "delta': NaN is not a number"),
        ('"num_shards": 3', '"num_shards": 36893488147419103232', "does not fit into 64 bits"),
        ('"num_shards": 3', '"num_shards": ' + "[" * 50 + "]" * 50, "levels deep"),
    ],
)
def test_a_certificate_is_read_in_one_way(finished: Path, old: str, new: str, reason: str) -> None:
    text = finished.read_text()
    assert old in text
    finished.write_text(text.replace(old, new))
    with pytest.raises(MismatchError, match=reason):
        Certificate.load(finished)


def test_a_line_with_an_unknown_key_is_named(finished: Path) -> None:
    tree = json.loads(finished.read_text())
    tree["bounds"][0]["note2"] = ""
    finished.write_text(json.dumps(tree))
    with pytest.raises(MismatchError, match=r"bounds\.0\.note2"):
        Certificate.load(finished)


def test_a_packed_stream_leaves_little_room_for_its_size() -> None:
    """Every window of one stream is full but the last, so the number of tokens is known but for one window."""
    from tokenbound.demo import demo_certificate

    certificate = demo_certificate()
    low, high = possible_tokens(certificate)
    assert low <= certificate.num_tokens <= high
    assert high - low < 512
    assert low > (certificate.num_windows - 2) * 512
