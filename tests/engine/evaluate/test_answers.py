"""A run that scores answers alone: its certificate, verified and scored again, whole and of a sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here_support import compressing_here

from tokenbound.api import Certificate
from tokenbound.certificate.verify import verify_beside, verify_record
from tokenbound.config.run import RunConfig, load_config, validate
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import MismatchError
from tokenbound.report.html import html_report
from tokenbound.report.rows import markdown_row
from tokenbound.report.terminal import certificate_text
from tokenbound.report.words import unchecked
from tokenbound.store.run import RunDirectory

pytestmark = pytest.mark.usefixtures("ray_session", "scored_here")

Tree = Callable[..., dict[str, Any]]
ANSWERS = {"targets": "answers", "prompt_field": "question", "completion_field": "answer"}
EVERY_LINE = ["freedman", "azuma", "kl", "bits", "document"]
WINDOWS = {"length": 16, "context": "document", "batch": 4}


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    """Rows whose answers have one to three letters, and the end of the document."""
    rng, path = np.random.default_rng(0), tmp_path / "rows.jsonl"
    rows = [
        {"question": "".join(rng.choice(list("abcdef"), 20)), "answer": "xyz"[: 1 + number % 3]}
        for number in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": True, "add_eos": True}
    return {"source": "jsonl", "paths": [str(path)], **keys, **ANSWERS}


def run(tree: dict[str, Any]) -> tuple[Certificate, Path]:
    paths: list[str] = []
    with compressing_here():
        config = validate(RunConfig, tree, origin="test")
        certificate = evaluate(config, on_certificate=lambda _, path: paths.append(path))
    return certificate, Path(paths[0])


def test_a_run_is_of_its_answers(run_tree: Tree, corpus: dict[str, Any]) -> None:
    certificate, path = run(run_tree(corpus=corpus, windows=WINDOWS, bound={"methods": EVERY_LINE}))
    assert certificate.corpus["scored_documents"] == 120
    assert certificate.num_tokens == certificate.num_scored_tokens == 120 * 3, "1 to 3 letters and the end"
    assert certificate.num_windows == 120, "each prompt fills a window of its own, which is not scored"
    losses = RunDirectory(str(path.parent)).losses(
        RunDirectory(str(path.parent)).record(0), ("nll", "token", "position")
    )
    assert losses.token is not None
    assert {*losses.token.tolist()} == {ord("x"), ord("y"), ord("z"), 256}
    assert losses.position is not None
    assert losses.position.min() == 21, "behind BOS and the prompt"
    checked, folder, artifact = verify_beside(path)
    config = load_config(RunConfig, f"{folder}/config.yaml")
    found = rescore(checked, config, losses=folder, artifact=artifact, windows=3)
    assert found.tokens >= 6
    trusted = [any(point.startswith("corpus.targets") for point in unchecked(checked, each)) for each in (None, found)]
    assert trusted == [True, False], "which tokens are answers is known where the corpus was read"
    for text in (certificate_text(certificate, 100), html_report(certificate), markdown_row(certificate)):
        assert "nswers only" in text or "answers only" in text
    assert "every answer token" in certificate_text(certificate, 100)
    _another_number_is_refused(checked, config, folder, artifact)


def _another_number_is_refused(checked: Certificate, config: RunConfig, folder: str, artifact: str) -> None:
    """Who claims other targets of the same text is found when windows are scored again."""
    every = config.what.corpus.model_copy(update={"targets": "all"})
    other = config.model_copy(update={"what": config.what.model_copy(update={"corpus": every})})
    with pytest.raises(MismatchError, match="this corpus is not the certificate's"):
        rescore(checked, other, losses=folder, artifact=artifact, windows=3)
    less = checked.model_copy(update={"num_tokens": checked.num_tokens - 1})
    with pytest.raises(MismatchError, match="num_tokens"):
        verify_record(less, losses=folder, artifact=artifact)


def test_answers_and_everything_are_two_configurations(run_tree: Tree, corpus: dict[str, Any]) -> None:
    every, _ = run(run_tree("all", corpus={**corpus, "targets": "all"}, windows=WINDOWS))
    some, _ = run(run_tree("some", corpus=corpus, windows=WINDOWS))
    assert (every.trial, some.trial) == (1, 2)
    assert every.num_tokens == 120 * (20 + 3) > some.num_tokens


@pytest.mark.slow
def test_a_sample_of_the_answers_has_control_variates(run_tree: Tree, corpus: dict[str, Any]) -> None:
    tree = run_tree(corpus=corpus, windows=WINDOWS, sample={"windows": 100, "pilot_windows": 40})
    certificate, path = run(tree)
    assert certificate.sampling is not None
    assert certificate.sampling.has_controls
    assert certificate.sampling.max_window_tokens == 4
    checked, folder, artifact = verify_beside(path)
    config = load_config(RunConfig, f"{folder}/config.yaml")
    assert rescore(checked, config, losses=folder, artifact=artifact, windows=3).control_variates
