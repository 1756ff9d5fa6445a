"""Whole runs on an object store that fails now and then: the same certificates as on a disk, and no secret in them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_support import SECRET, Fault, faulty, place

from tokenbound.certificate import Certificate, verify_beside
from tokenbound.config import RunConfig, validate
from tokenbound.engine.evaluate import evaluate
from tokenbound.engine.reevaluate import expand_models, reevaluate
from tokenbound.foreign import bound_losses
from tokenbound.store import filesystem as files
from tokenbound.store.history import read_history
from tokenbound.store.lease import LEASE
from tokenbound.store.run import ARTIFACT, RunDirectory

Build = Callable[..., dict[str, Any]]
FAULTS = ("500", "slow", "503", "drop", "cut")
EVERY = 9
"""Of so many requests one fails: more than one hour of a bad day, on every kind of object."""


def store(address: str, folder: str, name: str, data: bytes) -> None:
    files.write_bytes(*files.resolve(place(address, f"bucket/{folder}/{name}")), data)


def copy(folder: Path, address: str, to: str) -> None:
    for path in folder.iterdir():
        store(address, to, path.name, path.read_bytes())


def now_and_then() -> Callable[[int, str, str], Fault]:
    kinds = itertools.cycle(FAULTS)
    return lambda number, method, path: next(kinds) if number % EVERY == 0 else None


@pytest.fixture
def bad_address(s3_address: str) -> Iterator[str]:
    """The server behind a proxy that lets one request of nine fail or wait."""
    with faulty(s3_address, now_and_then()) as (address, faults):
        yield address
    assert set(faults.made) == set(FAULTS), f"{faults.requests} requests are too few to try every fault"


def remote(tree: dict[str, Any], address: str, folder: str) -> dict[str, Any]:
    """The same run with corpus, artifact, cache and output on the store."""
    what = {**tree["what"], "corpus": {**tree["what"]["corpus"], "paths": [place(address, f"bucket/{folder}/corpus")]}}
    what["model"] = {"artifact": place(address, f"bucket/{folder}/{ARTIFACT}")}
    where = {"output": f"bucket/{folder}/runs/first", "cache": f"bucket/{folder}/prepared"}
    return {"what": what, "how": {name: place(address, path) for name, path in where.items()}}


def claims(certificate: Certificate) -> dict[str, Any]:
    """All of a certificate except when it was made and where things lay."""
    tree = certificate.model_dump(mode="json", exclude={"created_at"})
    del tree["model"]["source"], tree["corpus"]["paths"]
    return tree


def assert_no_secret(address: str, folder: str, *texts: str) -> None:
    filesystem, root = files.resolve(place(address, f"bucket/{folder}"))
    paths = files.list_paths(filesystem, root, recursive=True)
    assert any(path.endswith("config.yaml") for path in paths)
    for path in paths:
        assert SECRET.encode() not in files.read_bytes(filesystem, path), path
    assert all(SECRET not in text for text in texts)


def test_a_run_on_a_failing_store(
    run_tree: Build,
    text_folder: Path,
    tmp_path: Path,
    s3_address: str,
    bad_address: str,
    ray_session: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    tree = run_tree()
    tree["what"]["windows"]["shard_tokens"] = 1 << 14
    local = evaluate(validate(RunConfig, tree, origin="test"))
    copy(text_folder, s3_address, "evaluate/corpus")
    store(s3_address, "evaluate", ARTIFACT, (tmp_path / "run" / ARTIFACT).read_bytes())
    paths: list[str] = []
    config = validate(RunConfig, remote(tree, bad_address, "evaluate"), origin="test")
    certificate = evaluate(config, on_certificate=lambda _, path: paths.append(path))
    assert claims(certificate) == claims(local)
    assert paths == [place(bad_address, "bucket/evaluate/runs/first/certificate.json")]
    assert claims(verify_beside(paths[0])[0]) == claims(local)
    sound = place(s3_address, "bucket/evaluate/runs/first")
    size = {"vocab_size": local.vocab_size, "tokenizer_vocab_size": local.tokenizer_vocab_size}
    options = {**size, "code_length_bits": local.code_length_bits}
    assert bound_losses(sound, **options) == bound_losses(str(tmp_path / "run"), **options)
    records = RunDirectory(sound).committed().values()
    assert all(record.file.count("/") == 2 for record in records), "losses share one prefix"
    assert_no_secret(s3_address, "evaluate", caplog.text)


@pytest.mark.slow
def test_nights_on_a_failing_store(
    run_tree: Build,
    text_folder: Path,
    tmp_path: Path,
    s3_address: str,
    bad_address: str,
    ray_session: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in text_folder.iterdir():
        (corpus / path.name).write_bytes(path.read_bytes())
    tree = run_tree()
    evaluate(validate(RunConfig, tree, origin="test"))
    artifact = tmp_path / "run" / ARTIFACT
    here = run_tree("nightly", model={"artifact": str(artifact)})
    here["what"]["corpus"]["paths"] = [str(corpus)]
    here["how"]["cache"] = str(tmp_path / "nights")
    there = remote(here, bad_address, "nights")
    there["what"]["model"]["artifact"] = place(bad_address, "bucket/nights/models/*.tokenbound")
    store(s3_address, "nights", "models/only.tokenbound", artifact.read_bytes())
    home = RunDirectory(there["how"]["output"])
    for night in range(2):
        if night:
            (corpus / "zz.txt").write_text("and then some more words " * 200)
        copy(corpus, s3_address, "nights/corpus")
        ours, theirs = (reevaluate(expand_models(tree, origin="test")) for tree in (here, there))
        (mine,), (entry,) = ours, theirs
        assert entry.claim_fingerprint == mine.claim_fingerprint
        assert entry.bound_bits == mine.bound_bits
        certificate, _, _ = verify_beside(home.place(entry.certificate))
        assert claims(certificate) == claims(Certificate.load(tmp_path / "nightly" / mine.certificate))
        assert reevaluate(expand_models(there, origin="test")) == []
    assert len(read_history(home)) == 2
    assert not home.exists(LEASE)
    assert_no_secret(s3_address, "nights", caplog.text)
