"""Every file under a named place is read, left out by a rule that has a name and a count, or refused."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from pydantic import TypeAdapter

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.documents import find_corpus, list_files, read_documents
from tokenbound.corpus.listing import Skipped, files_below, files_matching
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.summary import corpus_section
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import InputError
from tokenbound.report.words import corpus_sentences
from tokenbound.store.run import canonical_json
from tokenbound.store.sections import CorpusSection

LINE = b'{"text": "x"}\n'


def config(source: str, *paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source=source, paths=tuple(str(path) for path in paths), **tree)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINE)


def found(setting: CorpusConfig) -> tuple[list[str], dict[str, int]]:
    listing = find_corpus(setting)
    return [file.name for file in listing.files], listing.skipped


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".Json", ".ndjson", ".jsonl.gz", ".jsonl.GZ", ".json.bz2"])
def test_a_folder_gives_files_of_the_source_in_any_case_and_compression(tmp_path, suffix):
    make(tmp_path, f"a{suffix}")
    assert found(config("jsonl", tmp_path)) == ([f"a{suffix}"], {})


@pytest.mark.parametrize("source", ["jsonl", "parquet", "tokens"])
def test_files_of_another_kind_are_counted(tmp_path, source):
    suffix = {"jsonl": ".jsonl", "parquet": ".pq", "tokens": ".bin"}[source]
    others = ["README.md", "LICENSE", "a.md5", "_SUCCESS", "sub/notes.txt", "b.tar.gz"]
    make(tmp_path, f"a{suffix}", *others)
    fields = {"tokenizer": None, "vocab_size": 9, "dtype": "uint16"} if source == "tokens" else {}
    assert found(config(source, tmp_path, **fields)) == ([f"a{suffix}"], {"other suffix": len(others)})


def test_hidden_files_and_directories_are_counted(tmp_path):
    make(tmp_path, "a.txt", ".b.txt", ".git/x.txt", ".git/y.txt", "c/.d.txt")
    assert found(config("text", tmp_path)) == (["a.txt"], {"hidden": 3})
    assert found(config("text", tmp_path / "*.txt")) == (["a.txt"], {"hidden": 1})
    assert found(config("text", tmp_path / "**/*.txt")) == (["a.txt"], {"hidden": 3})


def test_hidden_files_are_read_where_they_are_named(tmp_path):
    make(tmp_path, "a.txt", ".b.txt", ".ipynb_checkpoints/a.txt", "c/.ipynb_checkpoints/d.txt", "c/.e.txt")
    assert found(config("text", tmp_path)) == (["a.txt"], {"hidden": 4})
    assert found(config("text", tmp_path / ".b.txt")) == ([".b.txt"], {})
    assert found(config("text", tmp_path / ".ipynb_checkpoints")) == (["a.txt"], {})
    assert found(config("text", tmp_path / ".*.txt")) == ([".b.txt"], {})
    checkpoints = [".ipynb_checkpoints/a.txt", "c/.ipynb_checkpoints/d.txt"]
    assert found(config("text", tmp_path / "**/.ipynb_checkpoints/*")) == (checkpoints, {})


@pytest.mark.parametrize(
    ("exclude", "names", "count"),
    [
        (["*.md"], ["a.txt", "drafts/c.txt", "sub/drafts/d.txt", "sub/test/e.txt"], 2),
        (["drafts"], ["a.txt", "b.md", "sub/b.md", "sub/test/e.txt"], 2),
        (["drafts/"], ["a.txt", "b.md", "sub/b.md", "sub/test/e.txt"], 2),
        (["sub/drafts", "sub/*.md"], ["a.txt", "b.md", "drafts/c.txt", "sub/test/e.txt"], 2),
        (["**/drafts/*.txt"], ["a.txt", "b.md", "sub/b.md", "sub/test/e.txt"], 2),
        (["sub"], ["a.txt", "b.md", "drafts/c.txt"], 1),
        (["[ab].*", "?ub"], ["drafts/c.txt"], 3),
    ],
)
@pytest.mark.parametrize("pattern", ["", "**"])
def test_excluded_files_and_folders_are_counted(tmp_path, exclude, names, count, pattern):
    make(tmp_path, "a.txt", "b.md", "drafts/c.txt", "sub/b.md", "sub/drafts/d.txt", "sub/test/e.txt")
    read, skipped = found(config("text", tmp_path / pattern, exclude=exclude))
    assert (read, skipped["excluded"]) == (names, count)


def test_what_is_excluded_is_not_looked_into_and_need_not_be_a_file(tmp_path):
    make(tmp_path, "a.jsonl", "drafts/b.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("/nowhere/b.jsonl")
    (tmp_path / "drafts/gone.jsonl").symlink_to("/nowhere/b.jsonl")
    setting = config("jsonl", tmp_path, exclude=("gone.jsonl", "drafts"))
    assert found(setting) == (["a.jsonl"], {"excluded": 2})


def test_a_file_that_a_path_names_is_not_excluded(tmp_path):
    make(tmp_path, "a.txt", "b.txt")
    assert found(config("text", tmp_path / "a.txt", exclude=("*.txt",))) == (["a.txt"], {})


def test_a_pattern_that_excludes_nothing_is_named(tmp_path, caplog):
    make(tmp_path, "a.txt", "b.md")
    find_corpus(config("text", tmp_path, exclude=("*.md",)))
    assert caplog.text == ""
    find_corpus(config("text", tmp_path, exclude=("*.md", "drfats")))
    assert "corpus.exclude: 'drfats' matches nothing" in caplog.text


@pytest.mark.parametrize("pattern", ["", "/", "/data/x", "../x", "./x", "s3://bucket/x"])
def test_a_pattern_must_be_a_path_below(tmp_path, pattern):
    with pytest.raises(ValueError, match=r"is not a path below an entry of `paths`; write `drafts` or"):
        config("text", tmp_path, exclude=(pattern,))


def test_exclude_applies_to_files_alone(tmp_path):
    with pytest.raises(ValueError, match=r"`exclude: .*` does not apply to source `hf`; remove it"):
        config("hf", name=str(tmp_path), exclude=("x",))


def test_exclude_is_stored_only_where_it_is_set(tmp_path):
    make(tmp_path / "text", "a.txt", "b.txt", "c.md")
    plain, some = config("text", tmp_path / "text"), config("text", tmp_path / "text", exclude=("*.md",))
    assert "exclude" not in plain.model_dump(mode="json")
    assert some.model_dump(mode="json")["exclude"] == ["*.md"]
    assert cache_name(plain) != cache_name(some)
    assert corpus_rule(plain) == corpus_rule(some), "names and digests of the files say which they are"
    corpus = prepare_corpus(some, str(tmp_path / "out"))
    plan = plan_corpus([corpus.document_offsets(0)], length=8, context="document")
    section = corpus_section(some, corpus.manifest, plan, context="document", skipped=corpus.skipped)
    assert (section["exclude"], section["skipped"]) == (["*.md"], {"excluded": 1})
    TypeAdapter(CorpusSection).validate_python(section)
    assert corpus_sentences(section) == ["Left out of the corpus: files or folders that the config excludes (1)."]
    assert "exclude" not in corpus_section(plain, corpus.manifest, plan, context="document", skipped={})


@pytest.mark.parametrize("pattern", ["", "*.txt", "**/*.txt"])
def test_links_to_listed_files_are_counted_and_others_are_read(tmp_path, pattern):
    make(tmp_path / "text", "b.txt")
    make(tmp_path, "elsewhere.txt")
    (tmp_path / "text/a.txt").symlink_to("b.txt")
    (tmp_path / "text/c.txt").symlink_to("../elsewhere.txt")
    (tmp_path / "text/d.txt").symlink_to("../elsewhere.txt")
    listed = (["b.txt", "c.txt"], {"link to a listed file": 2})
    assert found(config("text", tmp_path / "text" / pattern)) == listed


def test_linked_directories_are_read_once(tmp_path):
    make(tmp_path / "text", "b/x.txt")
    make(tmp_path / "other", "y.txt")
    (tmp_path / "text/a").symlink_to("b")
    (tmp_path / "text/b/up").symlink_to("..")
    (tmp_path / "text/c").symlink_to("../other")
    names, skipped = found(config("text", tmp_path / "text"))
    assert names == ["b/x.txt", "c/y.txt"]
    assert skipped == {"link to a listed file": 3}


@pytest.mark.parametrize("pattern", ["", "*"])
@pytest.mark.parametrize("name", ["b.jsonl", "README.md"])
def test_broken_links_are_refused(tmp_path, pattern, name):
    make(tmp_path, "a.jsonl")
    (tmp_path / name).symlink_to("/nowhere/b.jsonl")
    with pytest.raises(InputError, match=rf"{name}' is a broken link; restore it"):
        find_corpus(config("jsonl", tmp_path / pattern))
    with pytest.raises(InputError, match="is a broken link"):
        find_corpus(config("jsonl", tmp_path / name))


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for place in (tmp_path, tmp_path / "*", tmp_path / "pipe.jsonl"):
        with pytest.raises(InputError, match="is a named pipe"):
            find_corpus(config("jsonl", place))
    (tmp_path / "pipe.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        with pytest.raises(InputError, match="is a socket"):
            find_corpus(config("text", tmp_path))


def test_a_folder_matched_by_a_glob_is_counted(tmp_path):
    make(tmp_path, "a.jsonl", "sub/b.jsonl")
    assert found(config("jsonl", tmp_path / "*")) == (["a.jsonl"], {"folder matched by a glob": 1})
    assert found(config("jsonl", tmp_path / "**"))[1] == {}


def test_what_was_left_out_is_said_where_nothing_is_left(tmp_path):
    make(tmp_path, "a.csv", ".b.jsonl")
    with pytest.raises(InputError, match="left out: 1 by the rule `hidden`, 1 by the rule `other suffix`"):
        find_corpus(config("jsonl", tmp_path))


def test_empty_files_are_read_and_counted(tmp_path):
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").touch()
    corpus = prepare_corpus(config("text", tmp_path), str(tmp_path / "out"))
    assert (corpus.manifest.documents, corpus.manifest.empty_files) == (2, 1)


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"a\xff.jsonl")
    make(tmp_path / "text", name)
    setting = config("jsonl", tmp_path / "text")
    [file] = list_files(setting)
    assert (file.name, list(read_documents(setting, file))) == (name, ["x"])
    manifest = prepare_corpus(setting, str(tmp_path / "out")).manifest
    assert prepare_corpus(setting, str(tmp_path / "out")).manifest.corpus_sha256 == manifest.corpus_sha256
    assert json.loads(canonical_json([name])) == [name]


def test_paths_that_cannot_be_written_into_a_config_are_refused():
    with pytest.raises(ValueError, match="not UTF-8; name its directory, or a glob"):
        config("jsonl", os.fsdecode(b"a\xff.jsonl"))


def test_skipped_files_travel_with_the_prepared_corpus(tmp_path):
    import pickle

    make(tmp_path / "text", "a.jsonl", "README.md")
    corpus = prepare_corpus(config("jsonl", tmp_path / "text"), str(tmp_path / "out"))
    assert corpus.skipped == {"other suffix": 1}
    assert pickle.loads(pickle.dumps(corpus)).skipped == corpus.skipped


@pytest.mark.parametrize(
    ("pattern", "names", "counts"),
    [
        (None, ["a.jsonl", "sub/b.jsonl"], {"hidden": 2, "other suffix": 1}),
        ("*", ["README.md", "a.jsonl"], {"hidden": 1, "folder matched by a glob": 1}),
        ("*.jsonl", ["a.jsonl"], {}),
        ("**/*.jsonl", ["a.jsonl", "sub/b.jsonl"], {"hidden": 2}),
        ("s*/b.jsonl", ["sub/b.jsonl"], {}),
        (".git/*.jsonl", ["c.jsonl"], {}),
        (".g*/*.jsonl", [".git/c.jsonl"], {}),
    ],
)
@pytest.mark.parametrize("exclude", [(), ("drafts", "out/*")])
@pytest.mark.parametrize("remote", [False, True])
def test_the_rules_are_the_same_on_a_store(tmp_path, pattern, names, counts, exclude, remote):
    make(tmp_path / "text", "a.jsonl", "README.md", "sub/b.jsonl", ".git/c.jsonl", "sub/.d.jsonl")
    if exclude:
        make(tmp_path / "text", "out/e.jsonl", "out/f.jsonl", "sub/drafts/g.jsonl", "sub/drafts/h/i.jsonl")
        inside = pattern is None or pattern.startswith("**/*")
        counts = counts | ({"excluded": 3} if inside else {})
        if pattern == "*":
            counts = counts | {"folder matched by a glob": counts["folder matched by a glob"] + 1}
    store = SubTreeFileSystem(str(tmp_path), LocalFileSystem())  # which is not this disk, to the package
    filesystem, base = (store, "text") if remote else (LocalFileSystem(), str(tmp_path / "text"))
    skipped = Skipped()
    if pattern is None:
        ends = lambda name: name.endswith(".jsonl")  # noqa: E731
        files = files_below(filesystem, base, skipped, belongs=ends, declared="x", exclude=exclude)
    else:
        files = files_matching(filesystem, f"{base}/{pattern}", skipped, declared="x", exclude=exclude)
    assert ([file.name for file in files], dict(skipped.counts)) == (names, counts)
