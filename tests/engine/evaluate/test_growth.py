"""A corpus that grows: what was scored stands, the certificate is extended, the old one still verifies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from here_support import scoring_here

from tokenbound.api import Certificate
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, WhatConfig
from tokenbound.engine.evaluate.preparation import check_growth
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import InputError, MismatchError

ADDED = "and then some more words " * 200


@pytest.fixture(scope="module")
def grown(
    tiny_checkpoint: Path, text_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig]:
    """A run whose corpus has grown by one file, both parts scored; tests leave it as it is."""
    place = tmp_path_factory.mktemp("growth")
    shutil.copytree(text_folder, place / "corpus")
    corpus = {"source": "text", "paths": [str(place / "corpus")], "tokenizer": "bytes", "tokenizer_is": "given"}
    windows = {"length": 32, "context": "packed", "batch": 4, "shard_tokens": 4096}
    what = {
        "model": {"checkpoint": str(tiny_checkpoint)},
        "corpus": {**corpus, "add_bos": False, "add_eos": True},
        "windows": windows,
    }
    how = {"output": str(place / "run"), "cache": str(place / "prepared")}
    config = RunConfig.model_validate({"what": what, "how": how})
    with scoring_here():
        evaluate(config)
    before = {path.name: path.stat().st_mtime_ns for path in (place / "run/losses").iterdir()}
    (place / "corpus/zz.txt").write_text(ADDED)
    with scoring_here():
        evaluate(config)
    after = {path.name: path.stat().st_mtime_ns for path in (place / "run/losses").iterdir()}
    assert before.items() < after.items(), "what was scored was scored again"
    return place, config


@pytest.mark.usefixtures("scored_here")
def test_a_grown_corpus_extends_the_certificate(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    run, config = grown[0] / "run", grown[1]
    newest, _, artifact = verify_beside(run / "certificate.json")
    (kept,) = run.glob("certificate-*.json")
    oldest, _, _ = verify_beside(kept)
    assert newest.extends(oldest)
    assert not oldest.extends(newest)
    assert newest.num_tokens > oldest.num_tokens
    assert newest.earlier_fingerprints == [oldest.scoring_fingerprint]
    for certificate in (oldest, newest):
        found = rescore(certificate, config, losses=str(run), artifact=artifact, windows=3)
        assert found.largest_difference_nats < 1e-3
    how = config.how.model_copy(update={"output": str(tmp_path / "afresh")})
    afresh = evaluate(config.model_copy(update={"how": how}))
    assert afresh.bounds == newest.bounds
    assert afresh.losses_sha256 == newest.losses_sha256


def test_a_certificate_without_its_earlier_names_does_not_verify(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    shutil.copytree(grown[0] / "run", tmp_path / "run")
    path = tmp_path / "run" / "certificate.json"
    Certificate.load(path).model_copy(update={"earlier_fingerprints": []}).save(path)
    with pytest.raises(MismatchError, match="scored for another"):
        verify_beside(path)


def test_a_file_that_changed_is_no_growth(grown: tuple[Path, RunConfig]) -> None:
    place, config = grown
    (place / "corpus/zz.txt").write_text("something else")
    try:
        with pytest.raises(MismatchError, match=r"zz\.txt' changed after it was prepared"):
            evaluate(config)
    finally:
        (place / "corpus/zz.txt").write_text(ADDED)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("bound", {"declared_tokens": 100}, "declared_tokens: the corpus grew 2 times"),
        ("bound", {"methods": ["freedman", "document"]}, "number of documents for fixed"),
    ],
)
def test_what_takes_the_corpus_for_fixed_is_refused_of_a_grown_one(
    grown: tuple[Path, RunConfig], section: str, fields: dict[str, Any], words: str
) -> None:
    what = grown[1].what.model_dump()
    what["windows"]["context"] = "document"
    what[section] = {**what[section], **fields}
    asked = WhatConfig.model_validate(what)
    check_growth(asked, 0)
    with pytest.raises(InputError, match=words):
        check_growth(asked, 2)
    check_growth(grown[1].what, 2)


def test_a_shorter_corpus_is_another_run(grown: tuple[Path, RunConfig], tmp_path: Path) -> None:
    place, config = grown
    how = config.how.model_copy(update={"cache": str(tmp_path / "another")})
    (place / "corpus/zz.txt").unlink()
    try:
        with pytest.raises(MismatchError, match="holds another run"):
            evaluate(config.model_copy(update={"how": how}))
    finally:
        (place / "corpus/zz.txt").write_text(ADDED)
    assert verify_beside(place / "run/certificate.json")
