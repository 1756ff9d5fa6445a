"""A schedule: only what is new is scored, histories survive, alerts go off, two launches do no harm."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from here_support import Here

from tokenbound import cli
from tokenbound.certificate.verify import verify_beside
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.engine.reevaluate import expand_models, reevaluate
from tokenbound.errors import IncompleteError, InputError, MismatchError, WorseError
from tokenbound.store.history import read_history
from tokenbound.store.lease import LEASE
from tokenbound.store.run import RunDirectory

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def nightly(tmp_path: Path, text_folder: Path, tiny_checkpoint: Path, run_tree: Build) -> dict[str, Any]:
    """A config whose corpus and models lie where a test may change them."""
    shutil.copytree(text_folder, tmp_path / "corpus")
    shutil.copytree(tiny_checkpoint, tmp_path / "models" / "step-1")
    tree = run_tree("nightly")
    tree["what"]["windows"]["shard_tokens"] = 1 << 14  # few shards: what is tested is what is scored at all
    tree["what"]["corpus"]["paths"] = [str(tmp_path / "corpus")]
    tree["what"]["model"] = {"checkpoint": str(tmp_path / "models" / "*")}
    tree["what"]["bound"] = {"methods": ["freedman", "azuma"]}
    return tree


def launch(tree: dict[str, Any], **options: Any) -> list[Any]:
    return reevaluate(expand_models(tree, origin="test"), **options)


class NoRay(Executor):
    def session(self, *_: Any) -> AbstractContextManager[None]:
        raise AssertionError("Ray was started")


@pytest.mark.usefixtures("scored_here")
def test_nights(
    nightly: dict[str, Any],
    tmp_path: Path,
    other_checkpoint: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (first,) = launch(nightly)
    home = tmp_path / "nightly"
    with use_executor(NoRay()):
        assert launch(nightly) == [], "nothing is new"
        shutil.rmtree(home / "history")
        assert launch(nightly) == [first], "a crash before the entry was written is made good"
        pages = [home / "history.html", (home / first.certificate).with_name("report.html")]
        for page in pages:
            page.unlink()
        abandoned = home / f".plan.json.{'0' * 32}.tmp"
        abandoned.touch()
        os.utime(abandoned, (0, 0))
        assert launch(nightly) == []
        assert all(page.exists() for page in pages), "a crash before the pages were written is made good"
        assert not abandoned.exists()
    (tmp_path / "corpus/zz.txt").write_text("and then some more words " * 200)
    (second,) = launch(nightly)
    assert second.artifact_sha256 == first.artifact_sha256
    assert (first.segments, second.segments) == (1, 2)
    assert second.num_tokens > first.num_tokens
    shutil.copytree(other_checkpoint, tmp_path / "models" / "step-2")
    (third,) = launch(nightly)
    assert third.artifact_sha256 != second.artifact_sha256
    assert {first.trial, second.trial, third.trial} == {1}, "every model pays its own code"
    assert read_history(RunDirectory(str(home))) == [first, second, third]
    for entry in (second, third):
        assert verify_beside(home / entry.certificate)[0].claim_fingerprint == entry.claim_fingerprint
    monkeypatch.setattr("sys.argv", ["tokenbound", "history", str(home), "--svg", str(tmp_path / "bounds.svg")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert shown.count("step-") == 3
    assert "bound  " in shown
    assert (tmp_path / "bounds.svg").read_text().startswith("<svg ")
    assert third.claim_fingerprint[:8] in (home / "history.html").read_text()
    (tmp_path / "corpus/zz.txt").write_text("other words")
    with pytest.raises(MismatchError, match=r"zz\.txt' changed"):
        launch(nightly)


@pytest.mark.usefixtures("scored_here")
def test_an_alert_comes_after_everything_is_written(
    nightly: dict[str, Any],
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch(nightly)
    (tmp_path / "corpus/zz.txt").write_text("".join(chr(33 + (i * i) % 90) for i in range(4000)))
    path = tmp_path / "nightly.yaml"
    path.write_text(yaml.safe_dump(nightly))
    monkeypatch.setattr("sys.argv", ["tokenbound", "reevaluate", str(path), "--fail-if-worse", "-100"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == WorseError.exit_code == 5
    assert f"history      {tmp_path}/nightly/history.html" in capsys.readouterr().out
    assert len(read_history(RunDirectory(str(tmp_path / "nightly")))) == 2
    assert launch(nightly, fail_if_worse=-100) == [], "the alert is of the night that brought it"


@pytest.mark.slow
def test_samples_pay_for_draws_and_models(
    nightly: dict[str, Any], tmp_path: Path, other_checkpoint: Path, ray_session: None
) -> None:
    nightly["what"]["sample"] = {"windows": 24, "pilot_windows": 8}
    shutil.copytree(other_checkpoint, tmp_path / "models" / "step-2")
    first, second = launch(nightly)
    assert (first.trial, second.trial, first.evaluation) == (1, 2, 1)
    (tmp_path / "corpus/zz.txt").write_text("and then some more words " * 200)
    again, _ = launch(nightly)
    assert (again.trial, again.evaluation) == (1, 2)
    certificate, _, _ = verify_beside(tmp_path / "nightly" / again.certificate)
    assert certificate.sampling is not None
    assert certificate.sampling.evaluation == 2
    assert launch(nightly) == []


def test_only_one_launch_is_at_work(nightly: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "nightly"
    home.mkdir()
    (home / LEASE).write_text(json.dumps({"holder": "another", "expires": time.time() + 60}))
    with pytest.raises(IncompleteError, match="another is at work"):
        launch(nightly)
    assert json.loads((home / LEASE).read_text())["holder"] == "another"


@pytest.mark.usefixtures("scored_here")
def test_two_launches_that_both_believe_to_hold_the_lease(
    nightly: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    """The second runs from beginning to end while the first has a shard committed and others in hand."""
    nightly["what"]["windows"]["shard_tokens"] = 1024
    overtaken = list[Any]()

    class Overtaken(Here):
        def stream(self, rows: Any, **stages: Any) -> Iterator[Any]:
            for number, row in enumerate(super().stream(rows, **stages)):
                if number == 0 and len(rows) > 1 and not overtaken:
                    overtaken.append(None)
                    (tmp_path / "nightly" / LEASE).unlink()  # as a lease that could not be renewed
                    overtaken[:] = launch(nightly)
                yield row

    with use_executor(Overtaken(scoring=True)):
        (entry,) = launch(nightly)
    (other,) = overtaken
    assert other.claim_fingerprint == entry.claim_fingerprint
    assert other.bound_bits == entry.bound_bits
    home = RunDirectory(str(tmp_path / "nightly"))
    assert read_history(home) == [entry]
    assert verify_beside(home.place(entry.certificate))[0].created_at == entry.created_at
    assert launch(nightly) == []


def test_a_lease_that_ended_is_taken_over(anywhere: str) -> None:
    from tokenbound.store.lease import lease

    home = RunDirectory(anywhere)
    home.write_json(LEASE, {"holder": "dead", "expires": time.time() - 1})
    with lease(home, seconds=0.3):
        first = home.read_json(LEASE)
        assert first["holder"] != "dead"
        time.sleep(0.5)
        assert home.read_json(LEASE)["expires"] > first["expires"], "it was not renewed"
    assert not home.exists(LEASE)


def test_a_glob_that_matches_nothing_is_named(nightly: dict[str, Any], tmp_path: Path) -> None:
    nightly["what"]["model"]["checkpoint"] = str(tmp_path / "nowhere" / "*")
    with pytest.raises(InputError, match=r"what\.model\.checkpoint: .* matches nothing"):
        launch(nightly)
