"""A method of compression from another package: from the command line and from a config to the certificate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from here_support import Killed
from method_support import SIGN, install
from typer.testing import CliRunner

from tokenbound.api import Certificate
from tokenbound.certificate.verify import verify_beside
from tokenbound.cli import app
from tokenbound.compression.artifact import parse_artifact
from tokenbound.compression.artifact_file import ArtifactFile
from tokenbound.compression.methods import METHODS
from tokenbound.config.run import RunConfig, validate
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.compress.run import encode_checkpoint
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.reevaluate import expand_models, reevaluate

RECORD = {"method": "sign", "scale": 0.5, "plugin": "toy 1.0"}
DECLARED = {"tokenbound.methods": {"sign": "toy 1.0"}}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return install(tmp_path / "site", module="toy_sign", text=SIGN, methods={"sign": "SignMethod"})


@pytest.fixture
def toy(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The method `sign`, installed for this process."""
    monkeypatch.syspath_prepend(site)
    METHODS.forget()
    yield site
    METHODS.forget()
    sys.modules.pop("toy_sign", None)


def certified(tree: dict[str, Any]) -> tuple[Certificate, Path, bytes]:
    paths: list[str] = []
    certificate = evaluate(validate(RunConfig, tree, origin="test"), on_certificate=lambda _, path: paths.append(path))
    return certificate, Path(paths[0]).parent, Path(verify_beside(paths[0])[2]).read_bytes()


@pytest.mark.usefixtures("ray_session", "compressed_here", "scored_here", "toy")
def test_it_is_used_by_commands_and_configs_and_named_on_certificates(
    run_tree: Callable[..., dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sign.tokenbound"
    command = ["compress", str(tiny_checkpoint), str(out), "--method", "sign", "--set", "scale=0.5"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert parse_artifact(out.read_bytes()).settings == RECORD

    model = {"checkpoint": str(tiny_checkpoint), "compress": {"method": "sign", "scale": 0.5}}
    certificate, run, artifact = certified(run_tree(model=model))
    assert certificate.declarations["plugins"] == DECLARED
    assert certificate.claim_identity["declarations"]["plugins"] == DECLARED
    assert artifact == out.read_bytes()
    assert "toy 1.0" in (run / "report.html").read_text()
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["what"]["model"]["compress"] == {"method": "sign", "scale": 0.5}

    given, _, _ = certified(run_tree("given", model={"artifact": str(out)}))
    assert given.declarations == certificate.declarations

    (entry,) = reevaluate(expand_models(run_tree("history", model=model), origin="test"))
    again = json.loads((tmp_path / "history" / entry.certificate).read_text())
    assert again["declarations"]["plugins"] == DECLARED
    assert reevaluate(expand_models(run_tree("history", model=model), origin="test")) == []


def test_finished_tensors_of_another_version_are_not_taken(tiny_checkpoint: Path, tmp_path: Path, toy: Path) -> None:
    kind, out = METHODS.get("sign"), str(tmp_path / "a.tokenbound")

    def given(after: int) -> list[str]:
        killed = Killed(after=after)
        with use_executor(killed), suppress(KeyboardInterrupt):
            encode_checkpoint(str(tiny_checkpoint), kind(), out=out)
        return killed.given

    first = given(2)
    assert not set(given(1)) & set(first)
    metadata = next(toy.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert set(given(1 << 30)) > set(first)
    assert ArtifactFile(out).settings["plugin"] == "toy 1.1"


@pytest.mark.slow
def test_it_reaches_the_workers_of_ray(
    run_tree: Callable[..., dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path, site: Path
) -> None:
    tree = run_tree(model={"checkpoint": str(tiny_checkpoint), "compress": {"method": "sign"}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tokenbound", "evaluate", str(tmp_path / "run.yaml")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    found = Certificate.load(tmp_path / "run" / "certificate.json")
    assert found.declarations["plugins"] == DECLARED
