"""The whole engine on tiny models: what it certifies, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from layouts_support import gptq
from quantized_support import save_torchao, save_with_layout

from tokenbound.api import Certificate
from tokenbound.bounds.claim import Line
from tokenbound.certificate.verify import verify_beside, verify_record
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import InputError, MismatchError, TokenboundError
from tokenbound.models.quantized.schemes import arithmetic_of
from tokenbound.report.terminal import certificate_text
from tokenbound.store.run import RunDirectory, losses_sha256

pytestmark = pytest.mark.usefixtures("ray_session")

Tree = Callable[..., dict[str, Any]]
TIMES = {"created_at"}


def run(tree: dict[str, Any], **how: Any) -> tuple[Certificate, Path]:
    config = validate(RunConfig, {**tree, "how": {**tree["how"], **how}}, origin="test")
    paths: list[str] = []
    certificate = evaluate(config, on_certificate=lambda _, path: paths.append(path))
    return certificate, Path(paths[0])


def without_times(certificate: Certificate) -> dict[str, Any]:
    return {key: value for key, value in certificate.model_dump().items() if key not in TIMES}


def float64_nll(checkpoint: Path, text_folder: Path, length: int) -> np.ndarray:
    """Losses of a packed stream from a float64 softmax, straight from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    stream = [i for path in sorted(text_folder.glob("*.txt")) for i in [*path.read_bytes(), 256]]
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double()
    found = []
    for start in range(0, len(stream) - 1, length):
        window = torch.tensor([stream[start : start + length + 1]])
        logits = model(window[:, :-1]).logits.detach().log_softmax(-1)
        found.append(-logits.gather(-1, window[:, 1:, None]).flatten())
    return torch.cat(found).numpy()


def test_a_full_run_certifies_verifies_and_resumes(run_tree: Tree, tiny_checkpoint: Path, text_folder: Path) -> None:
    tree = run_tree()
    certificate, path = run(tree, replicas=2)
    expected = float64_nll(tiny_checkpoint, text_folder, 32)
    assert certificate.num_scored_tokens == certificate.num_tokens == len(expected)
    assert certificate.mean_nll_nats == pytest.approx(expected.mean(), abs=1e-5)
    assert certificate.vacuous  # some thousand tokens cannot pay for a model
    assert [line["method"] for line in certificate.bounds] == ["freedman", "azuma", "kl", "kl", "kl", "bits"]
    assert "<svg" in (path.parent / "report.html").read_text()
    verify_beside(path)

    directory = path.parent
    kept = (directory / "shards/00000.json").stat().st_mtime_ns
    for name in ("shards/00001.json", "certificate.json"):
        (directory / name).unlink()
    again, _ = run(tree, replicas=1)
    assert without_times(again) == without_times(certificate)
    assert (directory / "shards/00000.json").stat().st_mtime_ns == kept

    found = rescore(
        certificate,
        validate(RunConfig, tree, origin="test"),
        losses=str(directory),
        artifact=str(directory / "artifact.tokenbound"),
        windows=5,
    )
    assert found.largest_difference_nats < 1e-4
    assert found.windows == 5


@pytest.mark.usefixtures("scored_here")
def test_forged_losses_do_not_survive_rescoring(run_tree: Tree) -> None:
    from dataclasses import replace

    tree = run_tree()
    certificate, path = run(tree)
    directory = RunDirectory(str(path.parent))
    honest = [directory.losses(directory.record(shard)) for shard in range(certificate.num_shards)]
    artifact = str(path.parent / "artifact.tokenbound")
    config = validate(RunConfig, tree, origin="test")
    for found, forge in (
        ("nll differs from the model", lambda losses: {"nll": losses.nll * np.float32(0.9)}),
        ("entropy differs from the model", lambda losses: {"entropy": losses.entropy + np.float32(0.01)}),
        ("ranks are not the model's at top-1", lambda losses: {"rank": losses.rank * (losses.rank > 64)}),
        ("tokens are not the corpus's", lambda losses: {"token": losses.token[::-1]}),
        ("column document is not the corpus's", lambda losses: {"document": losses.document + 1}),
    ):
        records = [directory.record(shard) for shard in range(certificate.num_shards)]
        records = [
            directory.commit(
                old.shard,
                replace(losses, **forge(losses)),
                old.evidence,
                old.scoring_fingerprint,
                environment=old.environment,
            )
            for old, losses in zip(records, honest, strict=True)
        ]
        forged = certificate.model_copy(update={"losses_sha256": losses_sha256(records)})
        with pytest.raises(MismatchError, match="losses_sha256"):
            rescore(certificate, config, losses=directory.uri, artifact=artifact, windows=10)
        with pytest.raises(MismatchError, match=found):
            rescore(forged, config, losses=directory.uri, artifact=artifact, windows=10)
    for shard, losses in enumerate(honest):
        record = directory.record(shard)
        directory.commit(shard, losses, record.evidence, record.scoring_fingerprint, environment=record.environment)
    for field in ("vocab_size", "tokenizer_vocab_size", "num_tokens", "num_windows"):
        forged = certificate.model_copy(update={field: getattr(certificate, field) + 1})
        with pytest.raises(MismatchError, match=f"^{field}: the certificate says"):
            rescore(forged, config, losses=directory.uri, artifact=artifact, windows=1)


@pytest.mark.parametrize("method", ["gptq", "torchao"])
def test_a_quantized_checkpoint_as_deployed(
    method: str, run_tree: Tree, tiny_checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "quantized"
    if method == "torchao":  # its classes of tensors are shared by actors
        config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        save_torchao(tiny_checkpoint, folder, config)
    else:
        request.getfixturevalue("scored_here")
        save_with_layout(tiny_checkpoint, folder, {"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, 4, 16))
    model = {"checkpoint": str(folder), "dtype": "bfloat16" if method == "torchao" else "float32"}
    tree = run_tree(model=model)
    certificate, path = run(tree)
    assert certificate.artifact_bytes < (folder / "model.safetensors").stat().st_size
    assert certificate.model["arithmetic"] == arithmetic_of({"quantization_config": {"quant_method": method}})
    assert ("torchao" in certificate.environment) == (method == "torchao")
    assert f"scored by {certificate.model['arithmetic']}, in {model['dtype']}" in " ".join(
        certificate_text(certificate).split()
    )
    verify_beside(path)
    artifact = str(path.parent / "artifact.tokenbound")
    config = validate(RunConfig, tree, origin="test")
    found = rescore(certificate, config, losses=str(path.parent), artifact=artifact, windows=3)
    assert found.largest_difference_nats < 1e-4

    forged = certificate.model_copy(update={"model": {**certificate.model, "arithmetic": "kernels"}})
    with pytest.raises(MismatchError, match=r"model\.arithmetic"):
        verify_record(forged, losses=path.parent, artifact=artifact)
    with pytest.raises(InputError, match=r"compress\.method 'rtn' would change what .* made of"):
        run(run_tree("other", model={**model, "compress": {"method": "rtn"}}))


@pytest.mark.usefixtures("scored_here")
def test_a_sample_is_a_prefix_that_can_be_continued(run_tree: Tree) -> None:
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 640}
    sample = {"windows": 60, "pilot_windows": 20}
    first, path = run(run_tree(windows=windows, sample=sample))
    assert first.sampling is not None
    assert first.sampling.scored_windows == 60
    assert first.num_scored_tokens < first.num_tokens
    verify_beside(path)
    more, path = run(run_tree(windows=windows, sample={**sample, "windows": 130}))
    assert more.scoring_fingerprint == first.scoring_fingerprint
    assert more.sampling is not None
    assert more.sampling.scored_windows == 130
    slack = [
        next(line["terms"]["sampling_slack"] for line in c.bounds if line["method"] == "azuma") for c in (first, more)
    ]
    assert slack[1] < slack[0]
    verify_beside(path)


@pytest.mark.usefixtures("scored_here")
def test_scoring_stops_at_the_first_prefix_with_little_slack(run_tree: Tree) -> None:
    windows = {"length": 16, "context": "packed", "batch": 8, "shard_tokens": 320}
    stopped = []
    for target in (1.6, 0.8):
        certificate, path = run(run_tree(windows=windows, sample={"until_slack_bits": target, "pilot_windows": 20}))
        verify_beside(path)
        assert certificate.sampling is not None
        assert 20 < certificate.sampling.scored_windows <= certificate.num_windows
        losses = [line for line in certificate.bounds if Line.from_dict(line).bounds_risk]
        assert max(line["terms"]["sampling_slack"] for line in losses) <= target
        stopped.append((certificate.scoring_fingerprint, certificate.claim_fingerprint))
        sizes = [path.stat().st_mtime_ns for path in (path.parent / "losses").iterdir()]
        stopped[-1] += (certificate.sampling.scored_windows, losses[1]["value"], min(sizes))
    first, second = stopped
    assert first[:2] == second[:2], "going on is the same claim"
    assert first[2] <= second[2]
    assert second[3] <= first[3], "and no looser one"
    assert first[4] == second[4], "what was scored is not scored again"


@pytest.mark.usefixtures("scored_here")
def test_another_model_or_window_is_refused_in_the_same_directory(run_tree: Tree, other_checkpoint: Path) -> None:
    _, path = run(run_tree())
    before = path.read_bytes()
    with pytest.raises(MismatchError, match="artifact_sha256"):
        run(run_tree(model={"checkpoint": str(other_checkpoint)}))
    with pytest.raises(MismatchError, match="protocol"):
        run(run_tree(windows={"length": 16, "context": "packed", "batch": 4}))
    assert path.read_bytes() == before


@pytest.mark.usefixtures("scored_here")
def test_a_new_claim_stands_beside_the_old_one_without_scoring(run_tree: Tree) -> None:
    certificate, path = run(run_tree())
    losses = {p.name: p.stat().st_mtime_ns for p in path.parent.glob("losses/*")}
    other, beside = run(run_tree(bound={"delta": 0.01, "top_k": [5], "trial": 2}))
    assert beside != path
    assert path.exists()
    assert other.losses_sha256 == certificate.losses_sha256
    assert {p.name: p.stat().st_mtime_ns for p in path.parent.glob("losses/*")} == losses
    verify_beside(path)
    verify_beside(beside)


def refused(tree: dict[str, Any], kind: type[TokenboundError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        run(tree)
    assert "\n" not in str(caught.value)
    assert not list(Path(tree["how"]["output"]).glob("certificate*"))


def test_bad_input_is_refused_with_a_cure(run_tree: Tree, tmp_path: Path, tiny_checkpoint: Path) -> None:
    corpus = run_tree()["what"]["corpus"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    refused(run_tree(corpus={**corpus, "paths": [str(empty)], "add_eos": False}), InputError, "corpus")
    refused(run_tree(corpus={**corpus, "paths": [str(tmp_path / "absent")]}), InputError, "absent")
    refused(run_tree(model={"checkpoint": str(tmp_path / "nowhere")}), InputError, "nowhere")
    too_long = {"length": 65, "context": "packed"}
    refused(run_tree(windows=too_long), InputError, "64 positions")
    calibrated = {"checkpoint": str(tiny_checkpoint), "compress": {"method": "auto"}}
    refused(run_tree(windows=too_long, model=calibrated), InputError, "64 positions")
    tokens = tmp_path / "ids.bin"
    np.arange(300, dtype="<u2").tofile(tokens)
    stored = {"source": "tokens", "paths": [str(tokens)], "dtype": "uint16", "vocab_size": 300, "tokenizer_is": "given"}
    refused(run_tree(corpus={**stored, "add_bos": False, "add_eos": False}), InputError, "vocabulary has 257")
    refused(
        run_tree(
            corpus={**corpus, "tokenizer_is": "counted"}, model=_artifact_without_tokenizer(tmp_path, tiny_checkpoint)
        ),
        InputError,
        "counted",
    )


def test_a_model_that_fails_in_an_actor_is_refused_with_a_cure(run_tree: Tree, overflowing_checkpoint: Path) -> None:
    tree = run_tree(model={"checkpoint": str(overflowing_checkpoint)})
    tree["how"]["replicas"] = 1
    refused(tree, InputError, "canary")
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "the failed run's actor keeps its processors from the next run"
        time.sleep(0.1)


def _artifact_without_tokenizer(folder: Path, checkpoint: Path) -> dict[str, str]:
    from tokenbound.compression.artifact import encode_artifact
    from tokenbound.config.compress import LosslessSettings
    from tokenbound.models.checkpoint import read_checkpoint

    loaded = read_checkpoint(checkpoint)
    path = folder / "plain.tokenbound"
    path.write_bytes(encode_artifact(loaded.architecture, loaded.tensors, LosslessSettings()))
    return {"artifact": str(path)}


@pytest.mark.usefixtures("scored_here")
def test_a_counted_tokenizer_is_inside_the_artifact(run_tree: Tree) -> None:
    corpus = run_tree()["what"]["corpus"]
    given, _ = run(run_tree("given"))
    counted, path = run(run_tree("counted", corpus={**corpus, "tokenizer_is": "counted"}))
    assert counted.artifact_bytes > given.artifact_bytes
    verify_beside(path)


@pytest.mark.usefixtures("scored_here")
def test_changed_losses_stop_a_resumed_run(run_tree: Tree) -> None:
    tree = run_tree()
    _, path = run(tree)
    file = path.parent / "losses/00000.parquet"
    file.write_bytes(file.read_bytes()[:-4] + b"XXXX")
    with pytest.raises(MismatchError, match="changed after it was committed"):
        run(tree)


@pytest.mark.usefixtures("scored_here")
def test_progress_is_recorded(run_tree: Tree) -> None:
    _, path = run(run_tree())
    events = [json.loads(line) for line in (path.parent / "progress.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["done_tokens"] == events[-1]["total_tokens"]


def test_a_certificate_says_what_of_the_corpus_was_read_and_how(run_tree: Tree, tmp_path: Path) -> None:
    """In a run directory whose name is not ASCII, over several shards."""
    folder = tmp_path / "d\u00e9j\u00e0"
    folder.mkdir()
    for number in range(4):
        text = " ".join(f"caf\u00e9 {number * index}" for index in range(200))
        (folder / f"{number}.txt").write_bytes(text.encode("latin-1"))
    (folder / ".hidden.txt").write_text("x")
    (folder / "same.txt").symlink_to("0.txt")
    corpus = run_tree()["what"]["corpus"] | {"paths": [str(folder)], "encoding": "latin-1"}
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 2048}
    tree = run_tree("run-\u00e9", corpus=corpus, windows=windows)
    certificate, path = run(tree, replicas=2)
    assert certificate.num_shards > 1
    section = certificate.corpus
    assert section["skipped"] == {"hidden": 1, "link to a listed file": 1}
    assert section["encoding"] == "iso8859-1"
    # Four first bytes are never predicted; the ends of the documents are, and spell nothing.
    assert section["scored_text_bytes"] == section["text_bytes"] - 4
    assert section["bytes_per_token"] == section["scored_text_bytes"] / certificate.num_tokens
    assert certificate.bound_bits_per_byte == pytest.approx(
        certificate.bound_bits * certificate.num_tokens / section["scored_text_bytes"], rel=1e-12
    )
    for text in (certificate_text(certificate), path.with_name("report.html").read_text()):
        flat = " ".join(text.split())
        assert "hidden files or folders (1), links to files that are listed anyway (1)" in flat
        assert "Text was decoded as" in flat
        assert "iso8859-1" in flat
    verify_beside(path)
