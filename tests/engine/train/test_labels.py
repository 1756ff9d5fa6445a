"""The walk of `docs/how-to/answers.md`: an adapter trained on labels, and a certificate of its accuracy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from here_support import here
from readme_support import fences

from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import PretrainConfig, RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.train.run import pretrain


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_adapter_of_labels_has_a_useful_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = [fence for fence in fences() if fence.page == "answers.md"]
    (made,) = (fence.text for fence in page if fence.language == "python")
    exec(compile(made, "answers.md", "exec"), {})
    configs = {}
    for text in (fence.text for fence in page if fence.language == "yaml"):
        configs[re.findall(r"# (\S+)\.yaml", text)[0]] = yaml.safe_load(text)
    paths: list[str] = []
    with here(scoring=True, compressing=True, training=True):
        trained = pretrain(validate(PretrainConfig, configs["labels-train"], origin="labels-train.yaml"))
        config = validate(RunConfig, configs["labels"], origin="labels.yaml")
        certificate = evaluate(config, on_certificate=lambda _, path: paths.append(path))
    verify_beside(paths[0])
    assert trained.artifact_bytes < 400
    assert certificate.num_tokens == 8000
    (line,) = (line for line in certificate.bounds if line["method"] == "kl")
    assert line["empirical"] < 0.01
    assert line["value"] < 0.3, "half of what choosing between two labels errs"
