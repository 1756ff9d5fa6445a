"""A smoothing head from its training to a verified certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from here_support import scoring_here
from training_support import artifact_with_head

from tokenbound.api import Certificate
from tokenbound.bounds.claim import Claim
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.certificate.reduce import shard_evidence
from tokenbound.certificate.verify import verify_beside, verify_record
from tokenbound.compression.artifact import decode_artifact, parse_artifact
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.corpus import Text
from tokenbound.engine.evaluate.preparation import prepare
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.train.smoothing import add_smoothing_head
from tokenbound.errors import InputError, MismatchError
from tokenbound.models.generate import generate_ids
from tokenbound.models.replica import Replica
from tokenbound.models.smoothing_head import SMOOTHING, WEIGHT, SmoothingHead, take_head
from tokenbound.report.terminal import certificate_text
from tokenbound.report.words import line_name
from tokenbound.store.run import RunDirectory

Tree = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def certified(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text_folder: Path, ray_session: None
) -> tuple[Certificate, Path]:
    """A certificate of a model with a head, and its path."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "head.tokenbound").write_bytes(artifact_with_head(tiny_checkpoint))
    corpus = {"source": "text", "paths": [str(text_folder)], "tokenizer": "bytes", "tokenizer_is": "given"}
    what = {
        "model": {"artifact": str(folder / "head.tokenbound")},
        "corpus": {**corpus, "add_bos": False, "add_eos": True},
        "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 4096},
    }
    tree = {"what": what, "how": {"output": str(folder / "run")}}
    paths: list[str] = []
    with scoring_here():
        evaluate(validate(RunConfig, tree, origin="test"), on_certificate=lambda _, path: paths.append(path))
    return Certificate.load(paths[0]), Path(paths[0])


def test_alphas_are_bounded_whatever_the_weights() -> None:
    head = SmoothingHead(torch.full((1, 3), 1e4), torch.zeros(1), 2.0**-14)
    alphas = head(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]))
    assert alphas.tolist() == [0.5, 2.0**-14, pytest.approx(2.0**-7.5)]


def test_heads_that_are_no_heads_are_refused(tiny_checkpoint: Path) -> None:
    artifact = decode_artifact(artifact_with_head(tiny_checkpoint))
    assert take_head(artifact.architecture, artifact.tensors)[2] is not None
    with pytest.raises(InputError, match="not in the grid"):
        take_head({SMOOTHING: {"alpha_min": 0.3}}, {})
    with pytest.raises(InputError, match="are not there"):
        take_head(artifact.architecture, {WEIGHT: artifact.tensors[WEIGHT]})


def test_a_replica_gives_the_heads_alphas(tiny_checkpoint: Path) -> None:
    data = artifact_with_head(tiny_checkpoint)
    replica = Replica.from_artifact(data, dtype=torch.float32, batch=2, length=8)
    ids = np.arange(24).reshape(3, 8)
    mask = np.ones(ids.shape, bool)
    scored, hidden = replica.score_and_hidden(ids, ids, mask)
    assert hidden is not None
    artifact = decode_artifact(data)
    share = torch.sigmoid(hidden @ artifact.tensors[WEIGHT][0])
    np.testing.assert_allclose(scored.alpha, 2.0**-6 * 32 ** share.numpy(), rtol=1e-5)
    assert scored.alpha is not None
    assert np.ptp(scored.alpha) > 0.01
    assert len(list(generate_ids(data, [65], max_new_tokens=3))) == 3


def test_both_claims_pay_for_all_lines() -> None:
    claim = Claim(257, 257, 1e4, 0.05, 10_000, top_k=(1,), head_alpha_min=2.0**-8)
    *compared, head = claim.companions
    assert [each.alphas for each in compared] == ["constant", "entropy"]
    assert head.lines == (("freedman", None), ("azuma", None))
    printed = [line for each in (claim, *claim.companions) for line in each.lines]
    assert {each.num_lines for each in (claim, *claim.companions)} == {len(printed)} == {7}
    assert {each.shared_bits for each in claim.companions} == {claim.shared_bits}
    errors = replace(claim, methods=("kl",))
    assert errors.head_lines == 0
    with pytest.raises(InputError, match="delta on a base"):
        replace(claim, num_bases=1)


def test_a_certificate_prints_the_head_beside_fixed_alpha_and_alpha_of_entropy(
    certified: tuple[Certificate, Path],
) -> None:
    certificate, path = certified
    names = [line_name(line) for line in certificate.bounds]
    assert names == [
        "freedman", "azuma", "top-1 error", "top-10 error", "top-100 error",
        "freedman, fixed alpha", "freedman, alpha(H)", "freedman, head", "azuma, head", "bits",
    ]  # fmt: skip
    lines = dict(zip(names, certificate.bounds, strict=True))
    assert lines["freedman, fixed alpha"]["parameters"]["alpha_slope"] == 0
    assert lines["freedman, alpha(H)"]["parameters"]["alpha_slope"] != 0
    best = min(lines["freedman, fixed alpha"]["value"], lines["freedman, alpha(H)"]["value"])
    assert lines["freedman"]["value"] == pytest.approx(best, abs=1e-6)
    assert certificate.head_alpha_min == 2.0**-6
    checked, run, place = verify_beside(path)
    assert rescore(checked, validate_config(run), losses=run, artifact=place, windows=3).largest_difference_nats < 1e-4
    for shown in (certificate_text(certificate), (path.parent / "report.html").read_text()):
        assert all(name in shown for name in names)


def validate_config(run: str) -> RunConfig:
    from tokenbound.config.run import load_config

    return load_config(RunConfig, f"{run}/config.yaml")


def test_the_heads_line_is_the_theorem_over_the_recorded_alphas(certified: tuple[Certificate, Path]) -> None:
    certificate, path = certified
    run = RunDirectory(str(path.parent))
    shards = [run.losses(run.record(shard)) for shard in range(certificate.num_shards)]
    nll, entropy, alpha = (
        np.concatenate([getattr(s, n) for s in shards]).astype(float) for n in ("nll", "entropy", "alpha")
    )
    size, line = certificate.vocab_size, certificate.bounds[7]
    loss = -np.log2((1 - alpha) * np.exp(-nll) + alpha / size)
    assert line["empirical"] == pytest.approx(loss.mean(), abs=1e-9)
    known = line["parameters"]
    guess = np.polynomial.polynomial.polyval(entropy / math.log(2), known["forecast_coefficients"])
    low = np.maximum(-np.log2(1 - alpha + alpha / size), known["forecast_floor_bits"])
    forecast = np.clip(guess, low, np.log2(size / alpha))
    lam = known["lambda"]
    value = (forecast - np.log1p(lam * (forecast - loss)) / lam).mean() + line["kappa_nats"] / (lam * len(loss))
    assert line["value"] == pytest.approx(value, rel=1e-6)


def test_evidence_of_a_head_merges_and_survives_json(certified: tuple[Certificate, Path]) -> None:
    path = certified[1]
    run = RunDirectory(str(path.parent))
    losses = run.losses(run.record(0))
    evidence = shard_evidence(losses, 257, (1,))
    assert evidence.head is not None
    assert evidence.alpha_min is None
    twice = merge_evidence([evidence, Evidence.from_json(evidence.to_json())])
    assert twice.head is not None
    assert twice.head.num_tokens == 2 * losses.num_tokens
    with pytest.raises(MismatchError, match="smoothing head"):
        merge_evidence([evidence, replace(evidence, head=None)])


def test_another_lower_limit_does_not_verify(certified: tuple[Certificate, Path]) -> None:
    certificate, path = certified
    for forged in (2.0**-5, None):  # without the head's lines, the others would share delta among fewer
        with pytest.raises(MismatchError, match="head_alpha_min"):
            verify_record(
                certificate.model_copy(update={"head_alpha_min": forged}),
                losses=str(path.parent),
                artifact=str(path.parent / "artifact.tokenbound"),
            )


@pytest.mark.usefixtures("ray_session")
def test_a_head_is_trained_on_the_bound_and_put_into_the_artifact(run_tree: Tree, tiny_checkpoint: Path) -> None:
    prepared = prepare(validate(RunConfig, run_tree(), origin="test"))
    text = Text(prepared.corpus.root, prepared.spec)
    data = add_smoothing_head(prepared.artifact.read(), text, "azuma")
    assert 0 < len(data) - prepared.artifact.num_bytes < 300
    assert parse_artifact(data).architecture[SMOOTHING]["alpha_min"] > 0
    assert len(parse_artifact(data).coded) == len(prepared.artifact.names) + 2
    with pytest.raises(InputError, match="already"):
        add_smoothing_head(data, text, "azuma")
