"""Deltas end to end: base and fine-tune on the same windows, the relative line, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tokenbound.api import Certificate
from tokenbound.bounds import document_bound, format_bound
from tokenbound.certificate.verify import verify_beside, verify_record
from tokenbound.cli import app
from tokenbound.compression.artifact import parse_artifact
from tokenbound.config.compress import AutoSettings, KfacSettings
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.compress.run import compress_checkpoint
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.models.weights import read_base
from tokenbound.report.terminal import certificate_text
from tokenbound.store.run import RunDirectory, losses_sha256

pytestmark = pytest.mark.usefixtures("ray_session")

Tree = Callable[..., dict[str, Any]]
DECLARED = "published before this text was written"


@pytest.fixture(scope="module")
def fine_tune(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix changed a little."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    torch.manual_seed(3)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data += 0.05 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny model, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint),
        LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def delta_model(source: Path, base: Path, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint": str(source),
        "compress": {"method": "rtn", "step": 0.5},
        "base": str(base),
        "base_is_independent": DECLARED,
        **more,
    }


def config_of(tree: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, tree, origin="test")


def run(tree: dict[str, Any]) -> tuple[Certificate, Path]:
    paths: list[str] = []
    certificate = evaluate(config_of(tree), on_certificate=lambda _, path: paths.append(path))
    return certificate, Path(paths[0])


def line_of(certificate: Certificate, method: str) -> dict[str, Any]:
    return next(line for line in certificate.bounds if line["method"] == method)


def test_a_fine_tune_pays_for_its_delta_alone(
    run_tree: Tree, fine_tune: Path, tiny_checkpoint: Path, text_folder: Path
) -> None:
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 2048}
    bound = {"methods": ["freedman", "document"]}
    tree = run_tree(model=delta_model(fine_tune, tiny_checkpoint), windows=windows, bound=bound)
    certificate, path = run(tree)
    assert certificate.artifact_bytes < (fine_tune / "model.safetensors").stat().st_size / 20
    assert certificate.scoring_identity["base"] == read_base(str(tiny_checkpoint)).identity
    assert certificate.declarations["base_is_independent"] == DECLARED
    relative = line_of(certificate, "relative")
    terms = relative["terms"]
    assert relative["value"] == pytest.approx(terms["excess"] + terms["base_bound"], abs=1e-8)
    assert terms["excess"] < terms["base_bound"]
    for report in ((path.parent / "report.html").read_text(), " ".join(certificate_text(certificate).split())):
        assert DECLARED in report
        assert f"excess over it at most {format_bound(terms['excess'], 4)}" in report

    directory = RunDirectory(str(path.parent))
    first = directory.losses(directory.record(0))
    for column, checkpoint, error in (("base_nll", tiny_checkpoint, 1e-5), ("nll", fine_tune, 0.05)):
        expected = first_losses(checkpoint, text_folder, 32)
        np.testing.assert_allclose(getattr(first, column)[:32], expected, atol=error, err_msg=column)

    check_document_line(certificate, directory)
    verify_beside(path)
    artifact = str(path.parent / "artifact.tokenbound")
    arguments = {"losses": str(path.parent), "artifact": artifact, "windows": 4}
    assert rescore(certificate, config_of(tree), **arguments).largest_difference_nats < 1e-4
    with pytest.raises(IncompleteError, match="--base"):
        rescore(certificate, config_of(run_tree()), **arguments)
    with pytest.raises(MismatchError, match="not the certificate's"):
        rescore(certificate, config_of(tree), base=str(fine_tune), **arguments)
    for column in ("base_entropy", "base_nll"):  # both are forged in the second round, which names the first found
        digest = forge(directory, certificate.num_shards, column)
        with pytest.raises(MismatchError):
            verify_beside(path)
        with pytest.raises(MismatchError, match=column):
            rescore(certificate.model_copy(update={"losses_sha256": digest}), config_of(tree), **arguments)


def check_document_line(certificate: Certificate, directory: RunDirectory) -> None:
    """The document line is that of the theorem over all losses, whichever shards a document lies in."""
    line = line_of(certificate, "document")
    shards = [directory.losses(directory.record(shard)) for shard in range(certificate.num_shards)]
    nll, document = (np.concatenate([getattr(shard, name) for shard in shards]) for name in ("nll", "document"))
    assert any(left.document[-1] == right.document[0] for left, right in pairwise(shards))
    expected = document_bound(
        nll,
        document,
        vocab_size=certificate.vocab_size,
        alpha=line["parameters"]["alpha"],
        code_length_bits=certificate.code_length_bits,
        tune_bits=line["tune_bits"],
        delta=certificate.delta,
    )
    assert line["value"] == pytest.approx(expected, abs=2e-9)
    assert line["vacuous"]  # eleven documents cannot say anything
    assert certificate.method != "document"
    assert certificate.corpus["scored_documents"] == len(np.unique(document)) == 11


def first_losses(checkpoint: Path, text_folder: Path, length: int) -> np.ndarray:
    """Losses of the first window of the first document, straight from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    document = next(data for path in sorted(text_folder.glob("*.txt")) if (data := path.read_bytes()))
    window = torch.tensor([[*document, 256][: length + 1]])
    logits = AutoModelForCausalLM.from_pretrained(checkpoint)(window[:, :-1]).logits.detach().log_softmax(-1)
    return -logits.gather(-1, window[:, 1:, None]).flatten().numpy()


def forge(directory: RunDirectory, shards: int, column: str) -> str:
    """Make a column a tenth smaller and commit it as a scorer would; returns the digest of all losses."""
    records = []
    for shard in range(shards):
        record = directory.record(shard)
        losses = directory.losses(record)
        forged = replace(losses, **{column: getattr(losses, column) * np.float32(0.9)})
        records.append(
            directory.commit(shard, forged, record.evidence, record.scoring_fingerprint, environment=record.environment)
        )
    return losses_sha256(records)


@pytest.mark.usefixtures("scored_here")
def test_a_sampled_adapter_from_the_command_line(
    run_tree: Tree, adapter: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter.tokenbound"
    command = ["compress", str(adapter), str(out), "--base", str(tiny_checkpoint), "--set", "step=0.5"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert parse_artifact(out.read_bytes()).base["kind"] == "adapter"
    shown = CliRunner().invoke(app, ["inspect", str(out)], catch_exceptions=False).stdout
    assert "a delta (adapter) on the base" in shown

    model = {"artifact": str(out), "base": str(tiny_checkpoint), "base_is_independent": DECLARED, "num_bases": 3}
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 640}
    tree = run_tree(model=model, windows=windows, sample={"windows": 60, "pilot_windows": 20})
    certificate, path = run(tree)
    assert line_of(certificate, "relative")["terms"]["sampling_slack"] > 0
    assert certificate.declarations["num_bases"] == 3
    verify_beside(path)
    hidden = certificate.model_copy(update={"declarations": {**certificate.declarations, "num_bases": 1}})
    with pytest.raises(MismatchError, match="declarations"):
        verify_record(hidden, losses=path.parent, artifact=out)


@pytest.mark.usefixtures("scored_here", "compressed_here")
def test_another_base_and_other_weights_stand_on_the_certificate(
    run_tree: Tree, adapter: Path, fine_tune: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "adapter"
    shutil.copytree(adapter, renamed)
    config = json.loads((renamed / "adapter_config.json").read_text())
    (renamed / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    (renamed / "pytorch_model.bin").write_bytes(b"another model")
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 2048}
    model = delta_model(renamed, tiny_checkpoint, compress={"method": "lossless"})
    certificate, path = run(run_tree(model=model, windows=windows))
    assert certificate.model["adapter_base"] == "org/other"
    assert certificate.model["other_weights"] == ["pytorch_model.bin"]
    words = [" ".join(certificate_text(certificate).split()), (path.parent / "report.html").read_text()]
    for text in words:
        assert "The adapter says that it was trained on org/other; it was scored on the base" in text
        assert "The checkpoint also holds pytorch_model.bin, which were not read" in text
    verify_beside(path)
    hidden = {key: value for key, value in certificate.model.items() if key != "adapter_base"}
    with pytest.raises(MismatchError, match="adapter_base"):
        verify_record(
            certificate.model_copy(update={"model": hidden}),
            losses=path.parent,
            artifact=path.parent / "artifact.tokenbound",
        )


@pytest.mark.usefixtures("compressed_here")
def test_an_adapter_that_becomes_a_difference_is_still_searched_by_step(
    run_tree: Tree, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """DoRA's factors are merged; there is no calibration of what they change."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=1, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).save_pretrained(tmp_path)
    settings = AutoSettings(low=1e-4, high=1e-2, tries=2)
    out = str(tmp_path / "a.tokenbound")
    artifact = compress_checkpoint(str(tmp_path), settings, config_of(run_tree()), str(tiny_checkpoint), out=out)
    assert artifact.base is not None
    assert artifact.base["kind"] == "difference"
    assert artifact.settings["method"] == "rtn"


TRIED = re.compile(r"(rate|step) (\S+): (\d+) bytes, predicted bound (\S+) bits/token")


@pytest.mark.usefixtures("compressed_here")
@pytest.mark.parametrize(("kind", "option", "method"), [("fine_tune", "rate", "kfac"), ("adapter", "step", "rtn")])
def test_auto_takes_the_best_of_the_deltas_that_it_tried(
    run_tree: Tree,
    tiny_checkpoint: Path,
    tmp_path: Path,
    kind: str,
    option: str,
    method: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = AutoSettings(low=1e-4, high=1e-2, tries=3)
    source, given, out = str(request.getfixturevalue(kind)), config_of(run_tree()), str(tmp_path / "a.tokenbound")
    with caplog.at_level(logging.INFO, logger="tokenbound"):
        chosen = compress_checkpoint(source, settings, given, str(tiny_checkpoint), out=out)
    tried = [found.groups() for record in caplog.records if (found := TRIED.match(record.getMessage()))]
    assert len(tried) == 3
    assert len({size for _, _, size, _ in tried}) > 1
    best = min(tried, key=lambda row: float(row[3]))
    assert best[0] == option
    assert chosen.num_bytes == int(best[2])
    assert [path.name for path in tmp_path.glob("a.tokenbound*")] == ["a.tokenbound"], "nothing is left beside it"
    assert chosen.base is not None
    assert chosen.base["kind"] == {"rate": "difference", "step": "adapter"}[option]
    assert chosen.settings["method"] == method
    assert f"{chosen.settings[option]:.3g}" == best[1]
    with pytest.raises(InputError, match="adapter's factors" if option == "step" else "--config"):
        compress_checkpoint(source, KfacSettings(), None, str(tiny_checkpoint), out=out)


def test_text_is_sampled_from_a_delta_beside_its_base(fine_tune: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A lossless difference writes what the fine-tune writes; without its base it is refused."""
    delta, whole = tmp_path / "delta.tokenbound", tmp_path / "whole.tokenbound"
    texts = []
    for out, options in ((delta, ["--base", str(tiny_checkpoint)]), (whole, [])):
        command = ["compress", str(fine_tune), str(out), "--method", "lossless", *options]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        sample = ["generate", str(out), "--prompt", "abc", "--tokens", "20", "--temperature", "0", *options]
        texts.append(CliRunner().invoke(app, sample, catch_exceptions=False).stdout)
    assert texts[0] == texts[1] != "abc\n"
    with pytest.raises(InputError, match="is a delta on base"):
        CliRunner().invoke(app, ["generate", str(delta), "--prompt", "abc"], catch_exceptions=False)


def test_bases_that_do_not_belong_are_refused(
    run_tree: Tree, fine_tune: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "delta.tokenbound"
    command = ["compress", str(fine_tune), str(out), "--base", str(tiny_checkpoint)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    declared = {"base_is_independent": DECLARED}
    for model, kind, message in (
        ({"artifact": str(out)}, InputError, "is a delta on a base"),
        ({"artifact": str(out), "base": str(tmp_path / "absent"), **declared}, InputError, "does not exist"),
        ({"artifact": str(out), "base": str(other_checkpoint), **declared}, MismatchError, "give that base"),
        ({"artifact": str(out), "base": str(tiny_checkpoint)}, InputError, "base_is_independent"),
        ({"checkpoint": str(fine_tune), **declared}, InputError, "name it"),
    ):
        with pytest.raises(kind, match=message):
            run(run_tree(model=model))
    whole = tmp_path / "whole.tokenbound"
    assert CliRunner().invoke(app, ["compress", str(fine_tune), str(whole)], catch_exceptions=False).exit_code == 0
    with pytest.raises(InputError, match="no delta"):
        run(run_tree(model={"artifact": str(whole), "base": str(tiny_checkpoint), **declared}))
