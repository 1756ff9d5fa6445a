"""Files of a dataset on the hub are read one by one, by whoever needs them, through its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_support import DATASET, Hub, dataset_hub

from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_files, read_documents
from tokenbound.errors import IncompleteError, InputError
from tokenbound.store.retry import is_transient, patiently

SCRIPT = """
import json, sys
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import digest_file, find_corpus, read_documents
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.errors import InputError

def answer(task):
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    config = CorpusConfig(**{**given, **task["corpus"]})
    if "out" in task:
        corpus = prepare_corpus(config, task["out"])
        return {"documents": corpus.manifest.documents, "ids": corpus.read_ids(0, 0, corpus.manifest.tokens).tolist()}
    listing = find_corpus(config)
    if "digest" in task:
        return digest_file(config, listing.files[task["digest"]]).bytes
    return {"files": [[file.name, file.path, file.bytes] for file in listing.files], "skipped": listing.skipped}

for line in sys.stdin:
    try:
        print(json.dumps(answer(json.loads(line))), flush=True)
    except InputError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


class Asker:
    """Another process, whose hub is at an address that its environment names."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, source: str, *paths: str, task: dict[str, Any] | None = None, **keys: object) -> Any:
        """What comes of a corpus there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"corpus": {"source": source, "paths": paths, **keys}, **(task or {})}) + "\n"
        )
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def asker(hub: Hub) -> Iterator[Asker]:
    changes = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**os.environ, **changes, "TOKENBOUND_STORE_ATTEMPTS": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, env=environment, **pipes) as process:
        yield Asker(process)
        assert process.stdin is not None
        process.stdin.close()


def write(folder: Path) -> None:
    for name in ("data/a.jsonl", "data/sub/b c.jsonl", "data/test.jsonl", "data/.h.jsonl", "other/x.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"of {name}"}) + "\n")
    (folder / "data/README.md").write_text("about")
    pq.write_table(pa.table({"text": ["x" * 1000, "y"], "other": ["z" * 9, "z"]}), folder / "data/p.parquet")
    (folder / "data/t.ds").write_bytes(np.array([5, 6, 7], "<u2").tobytes())
    (folder / "data/t.ds.index").write_bytes(np.array([1, 3], "<u8").tobytes())


@pytest.mark.slow
def test_files_of_a_dataset_on_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "hub")
    base = f"hf://datasets/{DATASET}"
    with dataset_hub(tmp_path / "hub") as hub, asker(hub) as other:
        # A folder, by the rules of every folder; nothing is read to list it.
        found = other.ask("jsonl", f"{base}/data", exclude=["test.*"])
        assert [name for name, _, _ in found["files"]] == ["a.jsonl", "sub/b c.jsonl"]
        assert found["files"][1][1] == f"{base}/data/sub/b c.jsonl"
        assert found["skipped"] == {"excluded": 1, "hidden": 1, "other suffix": 4}
        assert not hub.sent

        # A task reads its own file and no other.
        size = (tmp_path / "hub/data/sub/b c.jsonl").stat().st_size
        assert other.ask("jsonl", f"{base}/data", task={"digest": 1}) == size
        assert hub.sent.keys() == {"data/sub/b c.jsonl"}

        # A glob, at a revision; a file is sent to be digested and to be read.
        hub.sent.clear()
        done = other.ask("jsonl", f"{base}@main/data/?.jsonl", task={"out": str(tmp_path / "out")})
        assert bytes(done["ids"]).decode() == "of data/a.jsonl"
        assert hub.sent.keys() == {"data/a.jsonl"}

        # Other sources: ranges of a Parquet file, the index beside a file of ids.
        done = other.ask("parquet", f"{base}/data/p.parquet", task={"out": str(tmp_path / "rows")})
        assert done["documents"] == 2
        tokens = {"vocab_size": 9, "dtype": "uint16", "tokenizer": None}
        done = other.ask("datatrove", f"{base}/data/t.ds", task={"out": str(tmp_path / "ids")}, **tokens)
        assert done == {"documents": 2, "ids": [5, 6, 7]}
        assert "other/x.jsonl" not in hub.sent

        # What is not there, and what cannot be.
        for path, problem in (
            (f"{base}/nowhere.jsonl", "does not exist; correct `corpus.paths`"),
            ("hf://datasets/org/absent/x.jsonl", "does not exist; correct `corpus.paths`"),
            ("hf://datasets/org", "Repository id must be 'namespace/name'"),
        ):
            assert problem in other.ask("jsonl", path)["error"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks."""
    from huggingface_hub import HfFileSystem

    write(tmp_path / "hub")
    with dataset_hub(tmp_path / "hub") as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
        template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield found
        HfFileSystem.clear_instance_cache()


def config(*paths: str) -> CorpusConfig:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    return CorpusConfig(source="jsonl", paths=paths, **given)


def test_a_file_is_sent_to_who_reads_it(hub: Hub) -> None:
    setting = config(f"hf://datasets/{DATASET}@main/data/**/b*.jsonl")
    [file] = find_files(setting)
    assert (file.name, file.path) == ("sub/b c.jsonl", f"hf://datasets/{DATASET}@main/data/sub/b c.jsonl")
    assert not hub.sent, "a listing reads no file"
    assert list(read_documents(setting, file)) == ["of data/sub/b c.jsonl"]
    assert hub.sent.keys() == {"data/sub/b c.jsonl"}


def test_a_hub_that_cannot_be_reached_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client has errors of its own for what the others' call errors of the system."""
    client = pytest.importorskip("httpx2")
    assert is_transient(client.ReadTimeout("slow"))
    assert not is_transient(client.InvalidURL("no"))
    monkeypatch.setenv("TOKENBOUND_STORE_ATTEMPTS", "2")
    attempts = list[int]()

    def refused() -> None:
        attempts.append(1)
        raise client.ConnectError("refused")

    with pytest.raises(IncompleteError, match="the store failed 2 times: refused"):
        patiently(refused)
    assert len(attempts) == 2


def test_offline_is_said_at_once() -> None:
    with pytest.raises(InputError, match="unset the `HF_HUB_OFFLINE` environment variable"):
        find_files(config("hf://datasets/org/other/a.jsonl"))
