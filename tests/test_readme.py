"""The README's commands, run as they stand there.

Fences are run in order, in one folder that holds what the text takes for granted: a checkpoint `my-model` with its
tokenizer, a fine-tune of it, a corpus of JSON lines, losses of another tool. A YAML fence that begins with
`# NAME.yaml` is that file. A comment before a fence says why it is not run (`<!-- not run: it needs a cloud -->`) or
that it belongs to the long suite (`<!-- slow -->`).
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenbound import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LANGUAGES = {"sh", "yaml", "python", "text", "bibtex"}


@dataclass(frozen=True)
class Fence:
    mark: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def fences() -> list[Fence]:
    found = FENCE.finditer(README.read_text())
    return [Fence(match["mark"] or "", match["language"], match["text"]) for match in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README takes for granted."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [" ".join(f"word{(i * j) % 17} and {j}" for j in range(40 + i)) for i in range(60)]
    (tmp_path / "corpus").mkdir()
    for part in range(2):
        lines = "\n".join(json.dumps({"text": text}) for text in texts[part::2])
        (tmp_path / "corpus" / f"{part}.jsonl").write_text(lines + "\n")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path / "my-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "my-model")
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "my-finetune")
    nll = np.random.default_rng(0).exponential(1.5, 50_000).astype(np.float32)
    pq.write_table(pa.table({"nll": nll}), tmp_path / "losses.parquet")
    (tmp_path / "workflows").symlink_to(ROOT / "workflows")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command line in this process, with the shared Ray session."""
    monkeypatch.setattr(sys, "argv", command[2:] if command[:2] == ["python", "-m"] else command)
    try:
        if command[0] == "tokenbound":
            cli.main()
        elif command[:2] == ["python", "-m"]:
            runpy.run_module(command[2], run_name="__main__")
        else:
            pytest.fail(f"no way to run {command}: mark its fence as not run and say why")
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{shlex.join(command)} ended with exit code {stop.code}")


def walk(monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    for fence in fences():
        if fence.mark.startswith("not run: ") or (fence.mark == "slow" and not slow):
            continue
        name = re.match(r"# (\S+\.yaml)\n", fence.text)
        if fence.language == "yaml":
            assert name, f"a YAML fence needs its file name in the first line:\n{fence.text}"
            Path(name[1]).write_text(fence.text)
        elif fence.language == "python":
            exec(compile(fence.text, "README.md", "exec"), {})
        elif fence.language == "sh":
            for command in fence.commands:
                run(command, monkeypatch)


def test_every_fence_says_what_it_is() -> None:
    assert len(fences()) == README.read_text().count("\n```") // 2
    for fence in fences():
        assert fence.language in LANGUAGES, fence
        assert fence.mark in ("", "slow") or re.fullmatch(r"not run: \S.*", fence.mark), fence.mark


def test_its_commands_run(folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, slow=False)
    assert (folder / "runs/mine/report.html").exists()


@pytest.mark.slow
def test_its_long_commands_run_too(folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, slow=True)
