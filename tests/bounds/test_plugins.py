"""A bound from another package, from the claim to the verified certificate and its report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins_support import install

from tokenbound.api import Certificate
from tokenbound.bounds.lines import bound_named
from tokenbound.certificate.derived import derived_fields
from tokenbound.certificate.identity import claim_identity, fingerprint
from tokenbound.certificate.reduce import reduce_ledger
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import BoundConfig
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.report.details import run_details
from tokenbound.report.html import html_report
from tokenbound.report.terminal import certificate_text
from tokenbound.store.run import RunDirectory

GOLDEN = Path(__file__).parents[1] / "golden" / "full"
GROUP, NAME, PACKAGE = "tokenbound.bounds", "fixed-alpha", "toy-fixed_alpha 1.0"
SOURCE = """
from dataclasses import replace

from tokenbound.bounds.coded import require_member
from tokenbound.bounds.lines.azuma import Azuma


class Toy(Azuma):
    name = "fixed-alpha"
    smooths_by_head = False

    def choose(self, evidence, claim, slack, top_k):
        return replace(super().choose(evidence, claim, slack, top_k), alpha=0.25)

    def code_bits(self, tuning):
        return 0.0

    def require_coded(self, tuning, claim):
        require_member("alpha", tuning.alpha, (0.25,))

    def sentences(self, line):
        return (f"The alpha {line.parameters['alpha']} was fixed by a toy.",)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the package with the toy bound lies."""
    install(tmp_path / "site", monkeypatch, group=GROUP, name=NAME, module="fixed_alpha", source=SOURCE)
    return tmp_path / "site"


def certified(folder: Path, declared: dict[str, Any]) -> Path:
    """The golden run, certified anew with the toy among its bounds."""
    shutil.copytree(GOLDEN, folder)
    golden = Certificate.load(folder / "certificate.json")
    methods = ("freedman", NAME)
    declarations = {**golden.declarations, **declared}
    identity = claim_identity(golden.scoring_fingerprint, BoundConfig(methods=methods, top_k=(1, 10)), declarations)
    claim = replace(golden.claim(), methods=methods)
    reduction = reduce_ledger(golden.ledger(str(folder)), claim)
    changed = {
        **derived_fields(reduction, claim, golden.corpus.get("bytes_per_token")),
        "methods": list(methods),
        "declarations": declarations,
        "claim_identity": identity,
        "claim_fingerprint": fingerprint(identity),
    }
    golden.model_copy(update=changed).save(folder / "certificate.json")
    return folder / "certificate.json"


def test_its_line_is_certified_shown_and_verified(toy: Path, tmp_path: Path) -> None:
    path = certified(tmp_path / "run", {"plugins": {GROUP: {NAME: PACKAGE}}})
    certificate, run, _ = verify_beside(path)
    line = certificate.bounds[1]
    assert (line["method"], line["parameters"]["alpha"]) == (NAME, 0.25)
    assert line["value"] > line["empirical"] > certificate.bounds[0]["empirical"] - 1
    details = run_details(RunDirectory(run), certificate)
    assert NAME in [curve.label for curve in details.size_curves]
    page, table = html_report(certificate, details=details), certificate_text(certificate)
    for shown in (" ".join(table.split()), " ".join(page.split())):
        for words in (NAME, PACKAGE, "The alpha 0.25 was fixed by a toy."):
            assert words in shown, words


@pytest.mark.parametrize(
    "declared",
    [{}, {"plugins": {GROUP: {NAME: PACKAGE, "another": PACKAGE}}}, {"plugins": NAME}, {"plugins": {GROUP: [NAME]}}],
)
def test_a_certificate_declares_the_plugins_that_took_part_and_no_others(
    toy: Path, tmp_path: Path, declared: dict[str, Any]
) -> None:
    with pytest.raises(MismatchError, match="plugins"):
        verify_beside(certified(tmp_path / "run", declared))


def test_without_the_package_it_is_shown_but_not_verified(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certified(tmp_path / "run", {"plugins": {GROUP: {NAME: PACKAGE}}})
    shutil.rmtree(toy)
    bound_named.cache_clear()
    with pytest.raises(IncompleteError, match=f"`{NAME}` is not installed here; install {PACKAGE}"):
        verify_beside(path)
    for shown in (Certificate.load(path).table(), html_report(Certificate.load(path))):
        assert NAME in shown


@pytest.mark.slow
def test_a_run_names_it_in_its_config(toy: Path, text_folder: Path, tmp_path: Path) -> None:
    """The whole command: Ray's processes find the package by the path that they inherit."""
    corpus = {"source": "text", "paths": [str(text_folder)], "tokenizer": "bytes", "tokenizer_is": "given"}
    what = {
        "model": {"artifact": "demo"},
        "corpus": {**corpus, "add_bos": False, "add_eos": True},
        "bound": {"methods": ["freedman", NAME]},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"what": what, "how": {"output": str(tmp_path / "run")}}))
    subprocess.run([sys.executable, "-m", "tokenbound", "evaluate", str(config)], check=True, capture_output=True)
    certificate, _, _ = verify_beside(tmp_path / "run" / "certificate.json")
    assert [line["method"] for line in certificate.bounds] == ["freedman", NAME]
    assert certificate.declarations["plugins"] == {GROUP: {NAME: PACKAGE}}
    assert certificate.claim_identity["declarations"] == certificate.declarations
