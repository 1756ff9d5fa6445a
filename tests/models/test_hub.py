"""A checkpoint on the hub is downloaded once per machine, however many replicas ask for it at the same time."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from tokenbound.engine.compress.run import check_encoding
from tokenbound.errors import InputError
from tokenbound.models.weights import Weights, read_base, read_delta

REVISION = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


@contextmanager
def fake_hub(folder: Path, asked: Counter[str]) -> Iterator[str]:
    """An HTTP server with one repository, `org/name`; weights come slowly, so that others ask meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/org/name/tree/"):
                self._answer(json.dumps([_entry(path) for path in sorted(folder.iterdir())]).encode())
                return
            if self.path.startswith("/api/models/org/name"):
                files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                self._answer(json.dumps({"id": "org/name", "sha": REVISION, "siblings": files}).encode())
                return
            name = self.path.rpartition("/")[2]
            if not (folder / name).is_file():
                self.send_error(404)
                return
            asked[name] += 1
            time.sleep(1.0 if name == WEIGHTS else 0.0)
            self._answer((folder / name).read_bytes(), name)

        def do_HEAD(self) -> None:
            name = self.path.rpartition("/")[2]
            self._answer((folder / name).read_bytes(), name, head=True)

        def _answer(self, body: bytes, name: str = "", *, head: bool = False) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{name.encode().hex()}"')
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def _entry(path: Path) -> dict[str, Any]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name.encode().hex()}


def replica(queue: Any) -> None:
    """What every scoring process does with a base that is on the hub."""
    weights: Weights = read_base("org/name")
    queue.put(weights.identity["sha256"])


def use_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send what asks for the hub to a server here."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_an_adapter_on_the_hub_is_fetched_beside_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "repository"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(adapter)
    (adapter / "README.md").write_text("about it")
    base, asked = read_base(str(tmp_path / "base")), Counter[str]()
    with fake_hub(adapter, asked) as address:
        use_hub(address, tmp_path / "cache", monkeypatch)
        architecture = check_encoding("org/name", None, base=str(tmp_path / "base"))
        assert set(asked) == {"adapter_config.json"}
        assert read_delta("org/name", base)[1].tensors.keys() == read_delta(str(adapter), base)[1].tensors.keys()
        assert set(asked) == {"adapter_config.json", "adapter_model.safetensors"}
        with pytest.raises(InputError, match=r"adapter without its base model; name the base"):
            check_encoding("org/name", None)
    assert architecture["model_type"] == "gpt2"


def test_an_adapter_on_the_hub_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    (tmp_path / "repository").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    (tmp_path / "repository" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "repository" / "adapter_model.bin").write_bytes(b"would run code")
    with fake_hub(tmp_path / "repository", Counter()) as address:
        use_hub(address, tmp_path / "cache", monkeypatch)
        with pytest.raises(InputError, match=r"no adapter_model\.safetensors; .*adapter_model\.bin is a pickle"):
            read_delta("org/name", read_base(str(tmp_path / "base")))


def test_replicas_of_a_machine_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "repository")
    asked: Counter[str] = Counter()
    with fake_hub(tmp_path / "repository", asked) as address:
        use_hub(address, tmp_path / "cache", monkeypatch)
        context = multiprocessing.get_context("fork")  # they inherit the address, and what is imported
        queue = context.Queue()
        processes = [context.Process(target=replica, args=(queue,)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
    assert found == [read_base(str(tmp_path / "repository")).identity["sha256"]] * 3
    assert asked[WEIGHTS] == 1
    assert set(asked) == {WEIGHTS, "config.json", "generation_config.json"}
