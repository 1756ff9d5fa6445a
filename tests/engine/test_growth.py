"""A corpus that grows: what was scored stands, the certificate is extended, the old one still verifies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenbound.certificate import Certificate, verify_beside
from tokenbound.config import RunConfig
from tokenbound.engine.evaluate import evaluate
from tokenbound.engine.rescore import rescore
from tokenbound.errors import MismatchError

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def grown(tmp_path: Path, text_folder: Path, run_tree: Build, ray_session: None) -> tuple[Path, RunConfig]:
    """A run whose corpus has grown by one file, both parts scored."""
    folder = tmp_path / "corpus"
    shutil.copytree(text_folder, folder)
    tree = run_tree()
    tree["what"]["corpus"]["paths"] = [str(folder)]
    config = RunConfig.model_validate(tree)
    evaluate(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/losses").iterdir()}
    (folder / "zz.txt").write_text("and then some more words " * 200)
    evaluate(config)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/losses").iterdir()}
    assert before.items() < after.items(), "what was scored was scored again"
    return tmp_path / "run", config


def test_a_grown_corpus_extends_the_certificate(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    run, config = grown
    newest, _, artifact = verify_beside(run / "certificate.json")
    (kept,) = run.glob("certificate-*.json")
    oldest, _, _ = verify_beside(kept)
    assert newest.extends(oldest)
    assert not oldest.extends(newest)
    assert newest.num_tokens > oldest.num_tokens
    assert newest.earlier_fingerprints == [oldest.scoring_fingerprint]
    for certificate in (oldest, newest):
        assert rescore(certificate, config, losses=str(run), artifact=artifact, windows=3) < 1e-3
    how = config.how.model_copy(update={"output": str(tmp_path / "afresh")})
    afresh = evaluate(config.model_copy(update={"how": how}))
    assert afresh.bounds == newest.bounds
    assert afresh.losses_sha256 == newest.losses_sha256


def test_a_certificate_without_its_earlier_names_does_not_verify(grown: tuple[Path, RunConfig]) -> None:
    run, _ = grown
    path = run / "certificate.json"
    Certificate.load(path).model_copy(update={"earlier_fingerprints": []}).save(path)
    with pytest.raises(MismatchError, match="scored for another"):
        verify_beside(path)


def test_a_file_that_changed_is_no_growth(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    _, config = grown
    (tmp_path / "corpus/zz.txt").write_text("something else")
    with pytest.raises(MismatchError, match=r"zz\.txt' changed after it was prepared"):
        evaluate(config)


def test_a_shorter_corpus_is_another_run(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    run, config = grown
    how = config.how.model_copy(update={"cache": str(tmp_path / "another")})
    (tmp_path / "corpus/zz.txt").unlink()
    with pytest.raises(MismatchError, match="holds another run"):
        evaluate(config.model_copy(update={"how": how}))
    assert verify_beside(run / "certificate.json")
