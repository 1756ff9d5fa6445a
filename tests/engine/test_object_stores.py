"""Whole runs on an object store that fails now and then: the same certificates as on a disk, and no secret in them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from here_support import scoring_here
from store_support import SECRET, Rule, Store, faulty

from tokenbound import cli
from tokenbound.api import Certificate
from tokenbound.certificate.external import bound_losses
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.reevaluate import expand_models, reevaluate
from tokenbound.errors import InputError
from tokenbound.store import filesystem as files
from tokenbound.store.copies import local_copy
from tokenbound.store.history import read_history
from tokenbound.store.lease import LEASE
from tokenbound.store.run import ARTIFACT, RunDirectory

Build = Callable[..., dict[str, Any]]
FAULTS = ("500", "slow", "503", "drop", "cut")
CORPUS = {
    "source": "text",
    "paths": ["texts"],
    "tokenizer": "bytes",
    "tokenizer_is": "given",
    "add_bos": False,
    "add_eos": True,
}
s3_and_slowly_gs = pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
"""Google's client waits for more than a second before it says that a request failed."""
EVERY = 9
"""Of so many requests one fails: more than one hour of a bad day, on every kind of object."""


def put(store: Store, folder: str, name: str, data: bytes) -> None:
    files.write_bytes(*files.resolve(store.place(f"bucket/{folder}/{name}")), data)


def copy(folder: Path, store: Store, to: str) -> None:
    for path in folder.iterdir():
        put(store, to, path.name, path.read_bytes())


def now_and_then() -> Rule:
    kinds = itertools.cycle(FAULTS)
    return lambda number, method, path: next(kinds) if number % EVERY == 0 else None


@pytest.fixture
def failing(store: Store) -> Iterator[Store]:
    """The same store behind a proxy that lets one request of nine fail or wait."""
    with faulty(store, now_and_then()) as (failing, faults):
        yield failing
    assert set(faults.made) == set(FAULTS), f"{faults.requests} requests are too few to try every fault"


def remote(tree: dict[str, Any], store: Store, folder: str) -> dict[str, Any]:
    """The same run with corpus, artifact, cache and output on the store."""
    what = {**tree["what"], "corpus": {**tree["what"]["corpus"], "paths": [store.place(f"bucket/{folder}/corpus")]}}
    what["model"] = {"artifact": store.place(f"bucket/{folder}/{ARTIFACT}")}
    where = {"output": f"bucket/{folder}/runs/first", "cache": f"bucket/{folder}/prepared"}
    return {"what": what, "how": {name: store.place(path) for name, path in where.items()}}


def claims(certificate: Certificate) -> dict[str, Any]:
    """All of a certificate except when it was made and where things lay."""
    tree = certificate.model_dump(mode="json", exclude={"created_at"})
    del tree["model"]["source"], tree["corpus"]["paths"]
    return tree


def assert_no_secret(store: Store, folder: str, *texts: str) -> None:
    filesystem, root = files.resolve(store.place(f"bucket/{folder}"))
    paths = files.list_paths(filesystem, root, recursive=True)
    assert any(path.endswith("config.yaml") for path in paths)
    for path in paths:
        assert SECRET.encode() not in files.read_bytes(filesystem, path), path
    # Who knows the id of an upload may write the object.
    assert all(word not in text for text in texts for word in (SECRET, "upload_id"))


@s3_and_slowly_gs
def test_a_run_on_a_failing_store(
    run_tree: Build,
    text_folder: Path,
    tmp_path: Path,
    store: Store,
    failing: Store,
    ray_session: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    tree = run_tree()
    tree["what"]["windows"]["shard_tokens"] = 1 << 14
    with scoring_here():
        local = evaluate(validate(RunConfig, tree, origin="test"))
    copy(text_folder, store, "evaluate/corpus")
    put(store, "evaluate", ARTIFACT, (tmp_path / "run" / ARTIFACT).read_bytes())
    paths: list[str] = []
    config = validate(RunConfig, remote(tree, failing, "evaluate"), origin="test")
    certificate = evaluate(config, on_certificate=lambda _, path: paths.append(path))
    assert claims(certificate) == claims(local)
    assert paths == [failing.place("bucket/evaluate/runs/first/certificate.json")]
    assert claims(verify_beside(paths[0])[0]) == claims(local)
    sound = store.place("bucket/evaluate/runs/first")
    size = {"vocab_size": local.vocab_size, "tokenizer_vocab_size": local.tokenizer_vocab_size}
    options = {**size, "code_length_bits": local.code_length_bits}
    assert bound_losses(sound, **options) == bound_losses(str(tmp_path / "run"), **options)
    records = RunDirectory(sound).committed().values()
    assert all(record.file.count("/") == 2 for record in records), "losses share one prefix"
    assert_no_secret(store, "evaluate", caplog.text)


@s3_and_slowly_gs
def test_a_checkpoint_and_its_artifact_on_a_failing_store(
    tiny_checkpoint: Path,
    tmp_path: Path,
    store: Store,
    failing: Store,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`compress` reads and writes URIs; a glob names the checkpoints of a store; what is no model stays there."""
    copy(tiny_checkpoint, store, "checkpoints/step-1")
    put(store, "checkpoints/step-1", "optimizer.pt", b"a pickle")
    pattern = failing.place("bucket/checkpoints/step-*")
    tree = {"what": {"model": {"checkpoint": pattern}, "corpus": CORPUS}, "how": {"output": str(tmp_path / "nights")}}
    (run,) = expand_models(tree, origin="test")
    checkpoint = failing.place("bucket/checkpoints/step-1")
    assert run.what.model.checkpoint == checkpoint
    fetched = Path(local_copy(checkpoint))
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()
    }
    found = []
    for source, out in (
        (checkpoint, failing.place("bucket/artifacts/there.tokenbound")),
        (str(tiny_checkpoint), str(tmp_path / "here.tokenbound")),
    ):
        monkeypatch.setattr("sys.argv", ["tokenbound", "compress", source, out, "--method", "rtn"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        found.append(files.read_bytes(*files.resolve(out)))
    assert found[0] == found[1]
    left = files.list_paths(*files.resolve(store.place("bucket/artifacts")), recursive=True)
    assert left == ["bucket/artifacts/there.tokenbound"], "finished parts were left"


def test_a_place_without_a_model_is_named(store: Store) -> None:
    put(store, "nothing", "notes.md", b"none")
    with pytest.raises(InputError, match="holds no file of a model"):
        local_copy(store.place("bucket/nothing"))


@pytest.mark.slow
def test_nights_on_a_failing_store(
    run_tree: Build,
    text_folder: Path,
    tmp_path: Path,
    store: Store,
    failing: Store,
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
    there = remote(here, failing, "nights")
    there["what"]["model"]["artifact"] = failing.place("bucket/nights/models/*.tokenbound")
    put(store, "nights", "models/only.tokenbound", artifact.read_bytes())
    home = RunDirectory(there["how"]["output"])
    for night in range(2):
        if night:
            (corpus / "zz.txt").write_text("and then some more words " * 200)
        copy(corpus, store, "nights/corpus")
        ours, theirs = (reevaluate(expand_models(tree, origin="test")) for tree in (here, there))
        (mine,), (entry,) = ours, theirs
        assert entry.claim_fingerprint == mine.claim_fingerprint
        assert entry.bound_bits == mine.bound_bits
        certificate, _, _ = verify_beside(home.place(entry.certificate))
        assert claims(certificate) == claims(Certificate.load(tmp_path / "nightly" / mine.certificate))
        assert reevaluate(expand_models(there, origin="test")) == []
    assert len(read_history(home)) == 2
    assert not home.exists(LEASE)
    assert_no_secret(store, "nights", caplog.text)
