"""Files that attack their reader: each is refused in one line, before it costs memory or time."""

from __future__ import annotations

import gzip
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tokenbound.config.run import CorpusConfig, RunConfig, load_config
from tokenbound.corpus.documents import find_files, read_documents
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.tokenizers import load_tokenizer
from tokenbound.errors import InputError
from tokenbound.limits import MAX_DOCUMENT_BYTES, require_regular


def corpus(source: str, *paths: Path, **keys: Any) -> CorpusConfig:
    chosen = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": True, **keys}
    return CorpusConfig(source=source, paths=tuple(map(str, paths)), **chosen)


def documents(config: CorpusConfig) -> list[bytes | str]:
    return [text for file in find_files(config) for text in read_documents(config, file)]


@contextmanager
def frugal(*, megabytes: int, seconds: float) -> Iterator[None]:
    """What happens inside takes no more than that beyond what the process had taken before."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= megabytes * 1024
    assert time.monotonic() - started < seconds


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_line_that_fills_the_memory_is_refused_while_it_is_read(source: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(16):
            stream.write(b" " * (1 << 24))  # 256 MiB without an end of line
    assert path.stat().st_size < 1 << 22
    says = r"bomb\.jsonl\.gz' holds a document of more than 134,217,728 bytes \(corpus\.max_document_bytes\)"
    with frugal(megabytes=400, seconds=60), pytest.raises(InputError, match=says):
        documents(corpus(source, path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "wide.jsonl", "a.parquet"])
def test_the_limit_is_the_users_and_changes_nothing_else(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "x" * 1000
    source = {"a.txt": "text", "a.parquet": "parquet"}.get(name, "jsonl")
    keys: dict[str, Any] = {}
    if source == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [text]}), path)
    elif source == "text":
        path.write_text(text)
    else:
        keys = {"encoding": "utf-16-le"} if name.startswith("wide") else {}
        path.write_text(json.dumps({"text": text}) + "\n", encoding=keys.get("encoding", "utf-8"))
    size = 1000 if source != "jsonl" else len(json.dumps({"text": text}))
    usual = corpus(source, path, **keys)
    allowed = corpus(source, path, max_document_bytes=size, **keys)
    assert documents(allowed) == documents(usual) == [text]
    assert cache_name(allowed) == cache_name(usual)
    assert corpus_rule(allowed) == corpus_rule(usual)
    with pytest.raises(InputError, match=r"max_document_bytes"):
        documents(corpus(source, path, max_document_bytes=999, **keys))
    assert usual.max_document_bytes == MAX_DOCUMENT_BYTES


def test_an_empty_compressed_file_is_named_and_holds_no_document(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    for name in ("c.txt.gz", "d.txt.zst"):
        (tmp_path / name).touch()
    config = corpus("text", tmp_path)
    with caplog.at_level("WARNING"):
        prepared = prepare_corpus(config, str(tmp_path / "prepared"))
    assert prepared.manifest.documents == 2, "an empty file of plain text is an empty document"
    assert "2 compressed files are empty and hold no document, such as" in caplog.text
    assert "c.txt.gz" in caplog.text
    (tmp_path / "e.jsonl.gz").touch()
    assert documents(corpus("jsonl", tmp_path / "e.jsonl.gz")) == []


def llama(**changes: Any) -> dict[str, Any]:
    shape = {"model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 32}
    return {**shape, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, **changes}


def test_an_architecture_without_end_is_refused_before_it_is_built() -> None:
    from tokenbound.models.hf_model import blank_model

    blank_model(llama())
    with frugal(megabytes=200, seconds=20):
        with pytest.raises(InputError, match=r"num_hidden_layers: 100,000, more than the 4,096 that are taken"):
            blank_model(llama(num_hidden_layers=100_000, hidden_size=1_000_000))
        with pytest.raises(InputError, match=r"num_(local_)?experts: 1,000,000, more than"):
            blank_model(llama(num_local_experts=1_000_000))


def test_a_header_of_endless_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    from tokenbound.models.checkpoint import read_safetensors

    header = b'{"tensor": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'.ljust(1 << 25)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with frugal(megabytes=100, seconds=5), pytest.raises(InputError, match=r"bytes of its header: 33,554,432, more"):
        read_safetensors(path)


PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
MODEL = {"type": "BPE", "vocab": {"a": 0, "u": 1}, "merges": [], "unk_token": "u"}


def test_a_pattern_that_tries_for_ever_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": PATTERN, "model": MODEL, "added_tokens": []}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer.encode_batch(["aaa"])[0]) == 3
    with pytest.raises(InputError, match=r"the tokenizer gave up on a document .*retry-limit"):
        tokenizer.encode_batch(["a" * 100])


def test_a_sentencepiece_model_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>" * 9)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(InputError, match=r"is a sentencepiece model \(tokenizer\.model\).*save_pretrained") as raised:
        load_tokenizer(str(tmp_path))
    assert "tiktoken" not in str(raised.value)


def references(merge: bool) -> str:
    """A few lines of YAML that stand for 9^9 values."""
    lines = ["a0: &a0 {k: 1}" if merge else "a0: &a0 [x, x, x]"]
    for i in range(1, 10):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{many}]}}" if merge else f"a{i}: &a{i} [{many}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [references(merge=False), references(merge=True), "[" * 50_000 + "]" * 50_000, "{a: " * 50_000 + "}" * 50_000],
    ids=["references", "merges", "lists", "mappings"],
)
def test_a_config_that_grows_or_nests_without_end_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with frugal(megabytes=300, seconds=20), pytest.raises(InputError, match=r"is not readable YAML") as raised:
        load_config(RunConfig, path)
    assert len(str(raised.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_opened(make: Callable[[Path], object], tmp_path: Path) -> None:
    from tokenbound.models.checkpoint import read_safetensors

    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(InputError, match=r"model\.safetensors is a (named pipe|device), not a file"):
        read_safetensors(path)
    require_regular(tmp_path)
    require_regular(tmp_path / "absent")


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path: Path) -> None:
    from tokenbound.models.checkpoint import read_safetensors

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(pointer)
    says = r"is a git-lfs pointer, not the file itself; run `git lfs pull`"
    with pytest.raises(InputError, match=rf"model\.safetensors {says}"):
        read_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"tokenizer\.json {says}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("$DATA/a.txt", r"variables such as \$DATA are not replaced here"),
        ("${DATA}/*.txt", r"variables such as \$\{DATA\} are not replaced here"),
        ("{a,b}.txt", r"alternatives in braces are not expanded here; list them"),
        ("{a,b}/*.txt", r"alternatives in braces are not expanded here; list them"),
        ("absent.txt", r"does not exist; correct `corpus.paths`"),
    ],
)
def test_what_a_shell_would_replace_is_said_not_to_be(path: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_files(corpus("text", Path(path)))
