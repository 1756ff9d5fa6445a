"""The package from Python: runs and plans from a config in any of its forms, and a certificate in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from here_support import compressing_here, scoring_here

import tokenbound
from tokenbound.config.run import RunConfig, dump_config, validate
from tokenbound.demo import demo_certificate
from tokenbound.errors import InputError


@pytest.fixture
def tree(tiny_checkpoint: Path, text_folder: Path, tmp_path: Path) -> dict[str, Any]:
    corpus = {"source": "text", "paths": [str(text_folder)], "tokenizer": "bytes", "tokenizer_is": "given"}
    return {
        "what": {
            "model": {"checkpoint": str(tiny_checkpoint)},
            "corpus": {**corpus, "add_bos": False, "add_eos": True},
            "windows": {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 4096},
        },
        "how": {"output": str(tmp_path / "run"), "cache": str(tmp_path / "prepared")},
    }


@pytest.mark.usefixtures("ray_session")
def test_a_run_from_data_a_config_or_a_file_is_the_same_run(tree: dict[str, Any], tmp_path: Path) -> None:
    with scoring_here(), compressing_here():
        from_data = tokenbound.evaluate(tree)
        written = tmp_path / "run.yaml"
        written.write_text(dump_config(validate(RunConfig, tree, origin="a test")))
        from_config = tokenbound.evaluate(validate(RunConfig, tree, origin="a test"))
        from_file = tokenbound.evaluate(written, ["how.replicas=1"])
    assert isinstance(from_data, tokenbound.Certificate)
    assert from_data.bounds == from_config.bounds == from_file.bounds
    run = tree["how"]["output"]
    from_data.verify(losses=run, artifact=f"{run}/artifact.tokenbound")
    assert tokenbound.Certificate.load(f"{run}/certificate.json").bounds == from_data.bounds


@pytest.mark.usefixtures("ray_session")
def test_a_plan_scores_nothing_that_was_not_asked_for(tree: dict[str, Any]) -> None:
    with compressing_here():
        found = tokenbound.plan(tree, probe_seconds=0)
    assert found.work.num_tokens > 0
    assert found.outlook.probed_tokens == 0
    assert not Path(tree["how"]["output"], "losses").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_checkpoint_is_compressed_from_python(tree: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.tokenbound"
    with compressing_here():
        report = tokenbound.compress(tiny_checkpoint, out, {"method": "rtn", "step": 0.5})
        lossless = tokenbound.compress(str(tiny_checkpoint), tmp_path / "lossless.tokenbound")
    assert report.num_bytes == out.stat().st_size < lossless.num_bytes
    with pytest.raises(InputError, match="step"):
        tokenbound.compress(tiny_checkpoint, out, {"method": "rtn", "step": -1})


def test_what_a_config_cannot_be_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="overrides"):
        tokenbound.evaluate(tree, ["what.bound.delta=0.01"])
    with pytest.raises(InputError, match="given as data"):
        tokenbound.evaluate({"what": {}})
    with pytest.raises(InputError, match=r"missing\.yaml"):
        tokenbound.plan("missing.yaml")


def test_a_notebook_shows_the_report_in_a_frame() -> None:
    shown = demo_certificate()._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "&lt;!doctype html&gt;" in shown
    assert "<script" not in shown


def test_a_name_that_the_package_lacks_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'certify'"):
        _ = tokenbound.certify
