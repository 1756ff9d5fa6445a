"""A bound is one class: what it owns is found nowhere else, and one from another package needs nothing else."""

from __future__ import annotations

import ast
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plugins_support import install

import tokenbound
from tokenbound.bounds import Claim, Evidence, certify, choose_tunings, line_sums, paper_error_bound
from tokenbound.bounds.lines import LINES, base, bound_named, method_names
from tokenbound.bounds.lines.base import Setting, TokenBound
from tokenbound.certificate.external import bound_losses
from tokenbound.config.run import BoundConfig, validate
from tokenbound.errors import InputError

PACKAGE = Path(tokenbound.__file__).parent
NAMES = set(LINES.built_in)
OTHER_MEANINGS = ("context", "objective", "in data", "settings.get")
"""`windows.context` may be `document`, the training of a smoothing head has the objectives freedman and azuma,
evidence has a key `relative`, and a quantizer's settings have `bits`."""
PAID = {"vocab_size": 257, "tokenizer_vocab_size": 257, "code_length_bits": 1e3}


def constants(node: ast.expr) -> set[object]:
    """Strings that are compared with: alone, or as members of a literal."""
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}


def dispatches(path: Path) -> list[str]:
    """Expressions of a file that tell bounds apart by their names."""
    text = path.read_text()
    found = []
    for node in ast.walk(ast.parse(text)):
        by_comparison = isinstance(node, ast.Compare) and NAMES & constants(node)
        by_table = isinstance(node, ast.Dict) and {"freedman", "azuma"} & set().union(
            *map(constants, filter(None, node.keys))
        )
        shown = ast.unparse(node)
        if (by_comparison or by_table) and not any(word in shown for word in OTHER_MEANINGS):
            found.append(f"{path.relative_to(PACKAGE)}: {shown}")
    return found


def test_nothing_tells_bounds_apart_by_their_names() -> None:
    assert [shown for path in PACKAGE.rglob("*.py") for shown in dispatches(path)] == []


def test_that_test_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / "x.py"
    path.write_text("a = method == 'kl'\nb = {'freedman', 'azuma'} & c\nd = m in ('azuma', 'x')\ne = {'azuma': f}[m]\n")
    assert len(dispatches(path)) == 3


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_file_says_what_it_proves(name: str) -> None:
    """Someone who opens a bound's file reads the theorem and its proof first."""
    module = __import__(LINES.get(name).__module__, fromlist=["__doc__"])
    assert "Theorem." in module.__doc__
    assert "Proof." in module.__doc__


def test_a_bound_that_is_not_there_is_answered_with_those_that_are() -> None:
    names = ", ".join(method_names())
    with pytest.raises(InputError, match=rf"methods.0: there is no bound 'freedmann'; choose among {names}"):
        validate(BoundConfig, {"methods": ["freedmann"]}, origin="x")
    with pytest.raises(InputError, match=r"methods.1: there is no bound 'relative'"):
        validate(BoundConfig, {"methods": ["kl", "relative"]}, origin="x")


def test_a_bound_says_in_which_setting_it_cannot_be_used() -> None:
    document = bound_named("document")
    assert document.objection(Setting("document", sampled=False)) is None
    for setting in (Setting("packed", False), Setting("document", True), Setting("document", False, times_grown=1)):
        assert document.objection(setting)
        assert bound_named("freedman").objection(setting) is None


@pytest.fixture
def hoeffding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bound in the docstring that explains how to add one, in a package of its own."""
    text = str(base.__doc__)
    code = text[text.index("    import math") : text.index("Three rules make")]
    source = textwrap.dedent(code).replace("class Hoeffding", "class Toy")
    install(
        tmp_path / "site", monkeypatch, group="tokenbound.bounds", name="hoeffding", module="hoeffding", source=source
    )
    return "hoeffding"


def write_losses(folder: Path) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(0)
    nll = rng.gamma(1.0, 0.4, 50_000).astype(np.float32)
    rank = np.floor(nll).astype(np.int32)
    pq.write_table(pa.table({"nll": nll, "rank": rank}), folder / "losses.parquet")
    return str(folder / "losses.parquet"), rank


def test_a_bound_of_another_package_is_the_theorem_that_it_says(tmp_path: Path, hoeffding: str) -> None:
    path, rank = write_losses(tmp_path)
    (line,) = bound_losses(path, **PAID, method=hoeffding)
    error = float(np.mean(rank >= 1))
    paid = {"code_length_bits": 1e3, "tune_bits": 1.0, "delta": 0.05, "num_tokens": rank.size}
    assert line["empirical"] == pytest.approx(error)
    assert line["value"] == pytest.approx(paper_error_bound(error, **paid), abs=2e-9)
    assert line["terms"]["variance"] + line["terms"]["complexity"] == pytest.approx(line["value"] - error, abs=2e-9)
    assert not line["vacuous"]


def test_it_is_a_line_among_the_others_and_counts_in_k(hoeffding: str) -> None:
    nll, rank = np.tile([0.1, 2.0], 5_000), np.tile([0, 3], 5_000)
    claim = Claim(257, 257, 10.0, 0.05, nll.size, methods=(hoeffding, "kl", "azuma"), top_k=(1, 10), has_entropy=False)
    assert claim.lines == (("azuma", None), (hoeffding, 1), ("kl", 1), ("kl", 10))
    tunings = choose_tunings(Evidence.from_losses(nll, rank=rank, vocab_size=257, top_k=(1, 10)), claim)
    lines = certify(tunings, line_sums(tunings, nll, rank=rank), claim)
    assert tunings[1].tune_bits == pytest.approx(math.log2(4) + 1)
    assert [line.bounds_risk for line in lines] == [True, False, False, False]


def test_a_broken_package_does_not_stop_what_does_not_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, source = "tokenbound.bounds", "raise OSError('no library')"
    install(tmp_path / "site", monkeypatch, group=group, name="broken", module="broken_bound", source=source)
    path, _ = write_losses(tmp_path)
    assert len(bound_losses(path, **PAID)) == 5
    with pytest.raises(InputError, match="must be one of azuma, freedman, kl, broken or all"):
        bound_losses(path, **PAID, method="document")
    with pytest.raises(InputError, match="cannot be imported: OSError: no library"):
        bound_losses(path, **PAID, method="broken")


def test_it_is_printed_without_a_value_where_its_column_is_missing(hoeffding: str) -> None:
    claim = Claim(257, 257, 10.0, 0.05, 2, methods=(hoeffding,), has_entropy=False, has_rank=False)
    tunings = choose_tunings(Evidence.from_losses([0.1, 2.0], vocab_size=257), claim)
    (line,) = certify(tunings, line_sums(tunings, [0.1, 2.0]), claim)
    assert line.value is None
    assert "`rank`" in line.note


def test_the_command_line_prints_it_and_names_its_package(
    tmp_path: Path, hoeffding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenbound import cli

    path, _ = write_losses(tmp_path)
    asked = ["tokenbound", "bound", path, "--vocab-size", "257", "--code-length-bits", "1000", "--method", hoeffding]
    shown = []
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", [*asked, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        shown.append(capsys.readouterr().out)
    assert "hoeffding, top-1 error" in shown[0]
    assert "hoeffding (toy-hoeffding 1.0)" in " ".join(shown[0].split())
    assert json.loads(shown[1])["plugins"] == {"tokenbound.bounds": {"hoeffding": "toy-hoeffding 1.0"}}
    assert issubclass(LINES.get(hoeffding), TokenBound)
