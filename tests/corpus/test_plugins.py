"""A source is one class: what it owns is found nowhere else, and one from another package needs nothing else."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from here_support import compressing_here, scoring_here
from plugins_support import install

import tokenbound
from tokenbound.api import Certificate
from tokenbound.certificate.identity import claim_identity, fingerprint
from tokenbound.certificate.verify import verify_beside
from tokenbound.config.run import RunConfig, dump_config, load_config, validate
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_files, read_documents
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.sources import SOURCES, base
from tokenbound.corpus.sources.fields import EVERYWHERE
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.errors import InputError, MismatchError

PACKAGE = Path(tokenbound.__file__).parent
GROUP, ORIGIN = "tokenbound.sources", "toy-fortune_source 1.0"
Tree = Callable[..., dict[str, Any]]


def dispatches(path: Path) -> list[str]:
    """Expressions of a file that tell sources apart by their names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        names = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
        asks = any(
            isinstance(each, ast.Attribute) and each.attr == "source" for side in sides for each in ast.walk(side)
        )
        if names & {*SOURCES.built_in} and (asks or names & {"python-stdlib", "jsonl", "hf"}):
            found.append(f"{path.name}: {ast.unparse(node)}")
    return found


def test_nothing_tells_sources_apart_by_their_names() -> None:
    assert [shown for path in PACKAGE.rglob("*.py") for shown in dispatches(path)] == []


def test_that_test_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("a = config.source == 'text'\nb = x in ('jsonl', 'hf')\nc = special == 'text'\n")
    assert len(dispatches(path)) == 2


def test_every_file_of_the_folder_is_a_source_of_its_name() -> None:
    files = {path.stem for path in (PACKAGE / "corpus/sources").glob("*.py")} - {"__init__", "base", "fields"}
    named = {name.removeprefix("python-") for name in SOURCES.built_in}
    assert files == named > {"hf", "jsonl", "parquet", "stdlib", "text", "tokens"}


@pytest.mark.parametrize("name", sorted(SOURCES.built_in))
def test_every_field_of_a_source_is_accounted_for(name: str) -> None:
    """Each decides what is read, or says where it is; none is in neither, and the config has them all."""
    kind = SOURCES.get(name)
    paths, named = ("x",), {"name": "x", "vocab_size": 9}
    source = kind(kind.takes.model_construct(paths=paths, tokenizer="some", **named))
    assert {*source.deciding(), *kind.located_by} == kind.takes.model_fields.keys() - EVERYWHERE
    assert kind.takes.model_fields.keys() <= CorpusConfig.model_fields.keys()


DIGESTS = [
    ({"source": "python-stdlib"}, "5a34434c0ef2"),
    ({"source": "text"}, "bf6a30334357"),
    ({"source": "text", "encoding": "latin1", "errors": "replace"}, "b322f69f05c0"),
    ({"source": "jsonl", "text_field": "body"}, "141d8afb7817"),
    ({"source": "parquet"}, "e70c820759fd"),
    ({"source": "hf", "name": "x"}, "4031b7741663"),
    ({"source": "csv"}, "79086dd6f526"),
    ({"source": "arrow"}, "a9a63b835be7"),
    ({"source": "mds"}, "8381b4497118"),
    ({"source": "megatron", "tokenizer": None, "add_eos": False, "vocab_size": 60}, "61bdebbea94e"),
    ({"source": "datatrove", "tokenizer": None, "add_eos": False, "vocab_size": 60}, "b0cd282f419e"),
    (
        {"source": "tokens", "tokenizer": None, "add_eos": False, "vocab_size": 60, "dtype": "uint16", "eos_id": 7},
        "9516cb1d8ffb",
    ),
]


@pytest.mark.parametrize(("keys", "digest"), DIGESTS)
def test_the_rule_of_a_source_never_changes(keys: dict[str, Any], digest: str) -> None:
    """It is in every corpus digest: another one would make a run that was scored before another run."""
    given = {"paths": ("x",), "tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
    assert corpus_rule(CorpusConfig(**{**given, **keys})).digest[:12] == digest


OLD_KEYS = (
    "add_bos add_eos dtype encoding eos_id errors max_document_bytes name part paths revision source special_tokens "
    "split subset text_field tokenizer tokenizer_is vocab_size"
)
"""Keys that configs had when the first identities of sweeps and trainings were made from them."""


def test_later_keys_are_in_no_stored_config_that_does_not_set_them() -> None:
    """Identities of sweeps and trainings, and names of prepared corpora, are made from what is stored."""
    given = {"source": "jsonl", "paths": ("s3://bucket/x",), "tokenizer": "bytes", "tokenizer_is": "given"}
    config = CorpusConfig(**given, add_bos=False, add_eos=False)
    assert sorted(config.model_dump(mode="json")) == OLD_KEYS.split()
    assert cache_name(config) == "3e77579540be433f40b924d27ba57880"
    assert config.model_copy(update={"missing": "skip"}).model_dump()["missing"] == "skip"
    asked = {"prompt_field": "q", "completion_field": "a", "targets": "answers"}
    assert config.model_copy(update=asked).model_dump().items() >= asked.items()


def test_a_source_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="there is no corpus source 'jsonlines'; choose one of arrow, csv, "):
        CorpusConfig(source="jsonlines", paths=("x",), tokenizer="bytes", tokenizer_is="given", add_bos=0, add_eos=1)


# --- one from another package ----------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source in the docstring that explains how to add one, in a package of its own."""
    text = str(base.__doc__)
    code = textwrap.dedent(text[text.index("    import re") : text.index("A run then says")])
    source = code.replace("class Fortune(", "class Toy(")
    install(tmp_path / "site", monkeypatch, group=GROUP, name="fortune", module="fortune_source", source=source)


def test_the_guide_for_contributors_shows_the_same_source() -> None:
    text = str(base.__doc__)
    code = textwrap.dedent(text[text.index("    import re") : text.index("A run then says")]).rstrip()
    assert f"```python\n{code}\n```" in (PACKAGE.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sayings between lines of two percent signs."""
    sayings = "\n%%\n".join(f'row {index} says "ab"\nand {index * 7919} more' for index in range(60))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.fortune").write_text(sayings)
    (tmp_path / "rows/notes.md").write_text("no sayings")
    return tmp_path / "rows"


def section(table: Path, **keys: object) -> dict[str, Any]:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True}
    return {"source": "fortune", "paths": [str(table)], "separator": "%%", **given, **keys}


def corpus(table: Path, **keys: object) -> CorpusConfig:
    return validate(CorpusConfig, section(table, **keys), origin="test")


def refusal(table: Path, **keys: object) -> str:
    with pytest.raises(InputError) as caught:
        validate(RunConfig, {"what": what(table, **keys), "how": {"output": "x"}}, origin="run.yaml")
    return str(caught.value)


def what(table: Path, **keys: object) -> dict[str, Any]:
    return {"model": {"artifact": "demo"}, "corpus": section(table, **keys)}


@pytest.mark.usefixtures("toy")
def test_its_documents_are_read(table: Path) -> None:
    setting = corpus(table)
    (file,) = find_files(setting)
    texts = list(read_documents(setting, file))
    assert file.name == "train.fortune"
    assert len(texts) == 60
    assert texts[3] == 'row 3 says "ab"\nand 23757 more'
    with pytest.raises(InputError, match=r"train.fortune': no line '%'; correct `corpus.separator`"):
        list(read_documents(corpus(table, separator="%"), file))


@pytest.mark.usefixtures("toy")
def test_its_keys_are_as_strict_as_the_packages_own(table: Path) -> None:
    assert "what.corpus.seperator: unknown key (got 'x'); did you mean `separator`?" in refusal(table, seperator="x")
    assert "what.corpus.separator: Input should be a valid string (got 3)" in refusal(table, separator=3)
    message = refusal(table, text_field="x")
    assert "`text_field: x` does not apply to source `fortune`; remove it (it applies to arrow, csv, " in message
    assert "source `fortune` needs `paths`" in refusal(table, paths=[])
    assert "source `fortune` needs `tokenizer`" in refusal(table, tokenizer=None)
    assert "'no-such' is not a text encoding" in refusal(table, encoding="no-such")
    assert "what.corpus.separator: unknown key" in refusal(table, source="text")


@pytest.mark.usefixtures("toy")
def test_a_resolved_config_with_it_is_valid_again(table: Path, tmp_path: Path) -> None:
    tree = section(table)
    del tree["separator"]
    run = validate(RunConfig, {"what": {**what(table), "corpus": tree}, "how": {"output": "x"}}, origin="test")
    assert "separator: '%'" in dump_config(run)
    (tmp_path / "run.yaml").write_text(dump_config(run))
    assert load_config(RunConfig, tmp_path / "run.yaml") == run


@pytest.mark.usefixtures("toy")
def test_its_keys_and_its_version_are_in_the_corpus_digest(table: Path, tmp_path: Path) -> None:
    rule = corpus_rule(corpus(table)).to_dict()
    assert (rule["options"], rule["plugin"]) == ({"separator": "%%"}, ORIGIN)
    others = [
        corpus(table, **keys) for keys in ({}, {"separator": "+"}, {"encoding": "latin-1"}, {"errors": "replace"})
    ]
    assert len({corpus_rule(other).digest for other in others}) == len({cache_name(other) for other in others}) == 4
    root = str(tmp_path / "prepared")
    prepare_corpus(corpus(table), root)
    assert prepare_corpus(corpus(table), root).manifest.documents == 60
    with pytest.raises(MismatchError, match=r"another rule.*options"):
        prepare_corpus(corpus(table, separator="+"), root)


IDS = """
from tokenbound.corpus.sources.base import FileSource, IdSource
from tokenbound.corpus.sources.fields import PathFields

class IdFields(PathFields):
    ids: int = 10

class Toy(FileSource[IdFields], IdSource[IdFields]):
    name = "numbers"
    takes = IdFields
    eos_id = 0

    @property
    def vocab_size(self):
        return self.fields.ids

    def ids(self, file, block_bytes):
        import numpy as np
        yield np.loadtxt(file.path, dtype=np.int64, ndmin=1)
"""


def test_a_source_of_ids_has_no_tokenizer_and_its_ids_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch, group=GROUP, name="numbers", module="numbers_source", source=IDS)
    (tmp_path / "a.txt").write_text("5 6 0 7 0")
    keys = {"source": "numbers", "paths": [str(tmp_path / "a.txt")], "tokenizer_is": "given", "add_bos": False}

    def prepared(**more: object) -> Any:
        setting = validate(CorpusConfig, {**keys, "add_eos": False, **more}, origin="test")
        return prepare_corpus(setting, str(tmp_path / "out" / cache_name(setting)))

    assert prepared().document_offsets(0).tolist() == [0, 3, 5]
    assert prepared().manifest.rule.to_dict()["options"] == {"ids": 10}
    with pytest.raises(InputError, match=r"holds id 7 at index 3, outside `corpus.vocab_size` 7"):
        prepared(ids=7)
    with pytest.raises(InputError, match="source `numbers` holds ids already; remove `tokenizer`"):
        prepared(tokenizer="bytes")
    with pytest.raises(InputError, match="`special_tokens: parse` does not apply to source `numbers`"):
        prepared(special_tokens="parse")
    with pytest.raises(InputError, match="ids: Input should be a valid integer"):
        prepared(ids="7")


def test_a_shared_key_keeps_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    """The config would fill in the default that everyone knows, and the source would never see its own."""
    source = IDS.replace("ids: int = 10", 'text_field: str = "body"').replace('"numbers"', '"bodies"')
    install(tmp_path / "site", monkeypatch, group=GROUP, name="bodies", module="bodies_source", source=source)
    tree = section(table, source="bodies", tokenizer=None, add_eos=False)
    del tree["separator"]
    with pytest.raises(InputError, match="gives `text_field` another default"):
        validate(CorpusConfig, tree, origin="test")


def test_a_broken_package_stops_only_what_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path
) -> None:
    source = "raise OSError('no library')"
    install(tmp_path / "site", monkeypatch, group=GROUP, name="broken", module="broken_source", source=source)
    setting = section(table, source="text")
    del setting["separator"]
    assert validate(CorpusConfig, setting, origin="test").source == "text"
    with pytest.raises(InputError, match=r"toy-broken_source 1.0.*cannot be imported: OSError: no library"):
        validate(CorpusConfig, {**setting, "source": "broken"}, origin="test")


def certified(run_tree: Tree, table: Path, name: str) -> tuple[Certificate, Path]:
    paths: list[str] = []
    tree = run_tree(name, corpus=section(table))
    config = validate(RunConfig, tree, origin="test")
    return evaluate(config, on_certificate=lambda _, path: paths.append(path)), Path(paths[0])


def require_named(certificate: Certificate, path: Path) -> None:
    assert certificate.declarations["plugins"] == {GROUP: {"fortune": ORIGIN}}
    assert certificate.corpus["source"] == "fortune"
    assert certificate.corpus["options"] == {"separator": "%%"}
    assert certificate.corpus["documents"] == 60
    assert certificate.corpus["skipped"] == {"other suffix": 1}
    verify_beside(str(path))


@pytest.mark.usefixtures("toy", "ray_session")
def test_a_run_names_it_on_its_certificate(run_tree: Tree, table: Path) -> None:
    with compressing_here(), scoring_here():
        certificate, path = certified(run_tree, table, "fortune")
    require_named(certificate, path)
    for plugins in ({}, {GROUP: {"other": "x 1"}}, {GROUP: {"fortune": ORIGIN, "other": "x 1"}}):
        with pytest.raises(MismatchError, match=r"declarations\.plugins\.tokenbound\.sources"):
            verify_beside(forged(path, plugins))
    shutil.rmtree(table.parent / "site")
    verify_beside(str(path))  # whoever checks the claim need not have the package
    with pytest.raises(MismatchError, match=r"there is no group 'tokenbound\.other'"):
        verify_beside(forged(path, {GROUP: {"fortune": ORIGIN}, "tokenbound.other": {"x": "x 1"}}))


def forged(path: Path, plugins: dict[str, Any]) -> str:
    """The certificate with other plugins among its declarations, and the claim made again from them."""
    tree = json.loads(path.read_text())
    tree["declarations"]["plugins"] = plugins
    if not plugins:
        del tree["declarations"]["plugins"]
    claimed = Certificate.model_validate(tree)
    identity = claim_identity(claimed.scoring_fingerprint, claimed, tree["declarations"])
    tree |= {"claim_identity": identity, "claim_fingerprint": fingerprint(identity)}
    path.with_name("forged.json").write_text(json.dumps(tree))
    return str(path.with_name("forged.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_workers_of_ray_read_it(run_tree: Tree, table: Path, tmp_path: Path) -> None:
    """The whole command: Ray's processes find the package by the path that they inherit."""
    tree, config = run_tree("fortune", corpus=section(table)), tmp_path / "run.json"
    config.write_text(json.dumps(tree))
    subprocess.run([sys.executable, "-m", "tokenbound", "evaluate", str(config)], check=True, capture_output=True)
    path = Path(tree["how"]["output"]) / "certificate.json"
    require_named(Certificate.load(path), path)
