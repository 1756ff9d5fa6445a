"""The commands of the README and of the documentation, run as they stand there.

Fences are run in order, in one folder that holds what the text takes for granted: a checkpoint `my-model` with its
tokenizer, a fine-tune of it, the model quantized by another tool, a corpus of JSON lines, questions with answers,
losses of another tool. A YAML fence that begins with `# NAME.yaml` is that file. A comment before a fence says why it
is not run (`<!-- not run: it needs a cloud -->`), that it belongs to the long suite (`<!-- slow -->`), where with
options that make it shorter
(`<!-- slow, with: --set a.b=c -->`), which other test here runs it (`<!-- elsewhere: test_x -->`), or names a package
for which a stand-in is put (`<!-- stand-in: vllm -->`): of those the text's own lines are tested, not the package.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from layouts_support import gptq
from quantized_support import save_with_layout
from readme_support import README, Fence, fences, pages

from tokenbound import Certificate, cli
from tokenbound.bounds import format_bound
from tokenbound.compression.codecs import CODECS
from tokenbound.compression.container import SECTION_IDS
from tokenbound.config.run import RunConfig, validate
from tokenbound.report.terminal import certificate_text
from tokenbound.store.losses import ALL_COLUMNS
from tokenbound.store.run import CommitRecord

ROOT = Path(__file__).parents[1]
NOT_RUN = {"it needs the hub", "it needs a GGUF file", "it needs a cloud", "it needs a GPU"}
LANGUAGES = {"sh", "yaml", "python", "text", "bibtex"}


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
    (tmp_path / "answers").mkdir()
    pairs = [{"question": f"word{i % 17} and", "answer": f" {i % 5}"} for i in range(300)]
    (tmp_path / "answers" / "0.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
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
    settings = {"quant_method": "gptq", "bits": 4}
    save_with_layout(tmp_path / "my-model", tmp_path / "my-quantized", settings, lambda weights: gptq(weights, 4, 16))
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


class OpenModel:
    """Logits [257] after each token, from a fixed table: what the stand-ins compute with."""

    vocab_size = 257
    table = np.random.default_rng(1).normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)

    @classmethod
    def logits(cls, ids: list[int]) -> np.ndarray:
        return cls.table[ids]

    @classmethod
    def log_p(cls, ids: list[int]) -> np.ndarray:
        logits = cls.logits(ids).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def vllm_stand_in() -> ModuleType:
    """As vLLM documents it: for each prompt token but the first a dict that holds it, ranks from 1, ties against it."""

    class LLM:
        def __init__(self, model: str, *, max_model_len: int) -> None:
            self.room = max_model_len

        def generate(self, prompts: list[dict[str, list[int]]], params: SimpleNamespace) -> list[SimpleNamespace]:
            assert (params.prompt_logprobs, params.max_tokens) == (0, 1)
            assert all(len(prompt["prompt_token_ids"]) + params.max_tokens <= self.room for prompt in prompts)
            return [SimpleNamespace(prompt_logprobs=self._scored(prompt["prompt_token_ids"])) for prompt in prompts]

        def _scored(self, ids: list[int]) -> list[dict[int, SimpleNamespace] | None]:
            rows = zip(ids[1:], OpenModel.log_p(ids[:-1]), strict=True)
            found = [
                {token: SimpleNamespace(logprob=float(row[token]), rank=int((row >= row[token]).sum()))}
                for token, row in rows
            ]
            return [None, *found]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    return module


def llama_cpp_stand_in() -> ModuleType:
    """As its Python binding has it: `scores` [n_ctx, V] holds the logits of what was evaluated since `reset`."""

    class Llama:
        def __init__(self, model_path: str, *, n_ctx: int, logits_all: bool) -> None:
            assert logits_all, "without it only the last logits are kept"
            self.scores, self.n_tokens = np.full((n_ctx, OpenModel.vocab_size), np.nan, np.float32), 0

        def reset(self) -> None:
            self.n_tokens = 0

        def eval(self, tokens: list[int]) -> None:
            self.scores[self.n_tokens : self.n_tokens + len(tokens)] = OpenModel.logits(tokens)
            self.n_tokens += len(tokens)

    module = ModuleType("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    return module


STAND_INS = {"vllm": vllm_stand_in, "llama_cpp": llama_cpp_stand_in}


def execute(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a config, run commands or Python; other languages are only shown."""
    name = re.match(r"# (\S+\.yaml)\n", fence.text)
    if fence.language == "yaml":
        assert name, f"a YAML fence needs its file name in the first line:\n{fence.text}"
        Path(name[1]).write_text(fence.text)
    elif fence.language == "python":
        exec(compile(fence.text, fence.page, "exec"), {})
    elif fence.language == "sh":
        for command in fence.commands:
            run(command, monkeypatch)


def walk(monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    for fence in fences():
        if fence.mark == "" or (fence.is_slow and slow):
            execute(fence, monkeypatch)


def test_every_fence_says_what_it_is() -> None:
    assert len(fences()) == sum(page.read_text().count("\n```") // 2 for page in pages())
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for fence in fences():
        assert fence.language in LANGUAGES, fence
        known = fence.mark == "" or fence.is_slow or fence.mark in (f"stand-in: {name}" for name in STAND_INS)
        elsewhere = f"def {fence.mark.removeprefix('elsewhere: ')}(" in tests
        assert known or elsewhere or fence.mark.removeprefix("not run: ") in NOT_RUN, fence.mark


def test_configs_that_are_not_run_are_valid() -> None:
    marked = [fence for fence in fences() if fence.language == "yaml" and fence.mark]
    assert marked
    for fence in marked:
        validate(RunConfig, yaml.safe_load(fence.text), origin=fence.page)


def test_the_output_shown_is_that_of_the_certificate_kept() -> None:
    """`tokenbound/data/demo.certificate.json` has every token scored, on the Python named first in the table."""
    certificate = Certificate.load(ROOT / "tokenbound/data/demo.certificate.json")
    (shown,) = (fence.text for fence in fences() if "risk certificate" in fence.text)
    assert shown.startswith(certificate_text(certificate, 80))
    row = f"| {certificate.corpus['files']:,} | {certificate.corpus['text_bytes']:,} | all | "
    assert (
        f"{row}{format_bound(certificate.bound_bits, 3)} | {certificate.empirical_risk_bits:.3f} |"
        in (ROOT / "docs/get-started.md").read_text()
    )


def test_the_picture_shows_the_numbers_of_the_text() -> None:
    (place,) = re.findall(r"^!\[[^\]]+\]\((\S+\.svg)\)$", README.read_text(), re.MULTILINE)
    words = list(ElementTree.parse(ROOT / place).getroot().itertext())
    text = (ROOT / "docs/benchmarks.md").read_text()
    (row,) = re.findall(r"^\| [\d,]+ \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|.*$", text, re.MULTILINE)
    assert set(row) <= {word.strip() for word in words}


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


FORMATS = ("run-directory", "artifact")
GENERATED = {"reference/config.md", "reference/cli.md"}
"""Pages that the code writes when the documentation is built."""


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if target.startswith("http") or str(place).endswith(tuple(GENERATED)):
            continue
        assert place.exists(), target
        assert not anchor or anchor in headings(place), target


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


def test_every_config_key_and_command_is_on_a_page() -> None:
    path = ROOT / "docs/hooks.py"
    hooks = runpy.run_path(str(path))
    config, commands = hooks["config_page"](), hooks["cli_page"]()
    for key in ("checkpoint", "tokenizer_is", "until_slack_bits", "declared_tokens", "ray_address", "smoothing_head"):
        assert f"| `{key}` |" in config
    for name in ("evaluate", "verify", "reevaluate", "report"):
        assert f"## tokenbound {name}\n" in commands
    described = re.findall(r"^\| `\w+` \|.*\| (.*) \|$", config, re.MULTILINE)
    assert described.count("") < 25  # sections, whose own text is below


def test_every_file_format_is_on_a_page() -> None:
    hooks = runpy.run_path(str(ROOT / "docs/hooks.py"))
    run, artifact = (hooks["with_generated"]((ROOT / f"docs/reference/{n}.md").read_text()) for n in FORMATS)
    for name in (*ALL_COLUMNS, *(field.name for field in dataclasses.fields(CommitRecord))):
        assert re.search(rf"^\| `{name}` \|.*\w", run, re.MULTILINE), name
    for name in SECTION_IDS:
        assert f"| `{name}` | " in artifact
    for number, codec in CODECS.items():
        assert f"### {number}: {codec.name}\n" in artifact


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    assert "until_slack_bits" in (tmp_path / "reference/config/index.html").read_text()


@pytest.mark.usefixtures("scored_here", "compressed_here")
def test_its_commands_run(folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, slow=False)
    assert (folder / "runs/mine/report.html").exists()
    assert (folder / "runs/nightly/history.html").exists()


@pytest.mark.parametrize(("package", "file", "columns"), [("vllm", "vllm", 2), ("llama_cpp", "llama", 3)])
def test_losses_of_other_tools_become_what_bound_reads(
    package: str, file: str, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(2).integers(0, OpenModel.vocab_size, 2_500)
    np.save(tmp_path / "tokens.npy", ids)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, STAND_INS[package]())
    (fence,) = (fence for fence in fences() if fence.mark == f"stand-in: {package}")
    execute(fence, monkeypatch)
    table = pq.read_table(tmp_path / f"{file}.parquet")
    assert table.num_columns == columns
    log_p = OpenModel.log_p(ids[:-1].tolist())
    target = np.arange(len(ids) - 1), ids[1:]
    np.testing.assert_allclose(table["nll"].combine_chunks().flatten().to_numpy(), -log_p[target], rtol=1e-6)
    ranks = (log_p >= log_p[target][:, None]).sum(axis=1) - 1
    assert table["rank"].combine_chunks().flatten().to_pylist() == ranks.tolist()
    run(["tokenbound", "bound", f"{file}.parquet", "--vocab-size", "257", "--code-length-bits", "9e3"], monkeypatch)


@pytest.mark.slow
def test_make_demo_runs(tmp_path: Path) -> None:
    """From a clone, but for the installation, which asks the network: this Python and its packages stand in."""
    (fence,) = (fence for fence in fences() if "test_make_demo_runs" in fence.mark)
    stands_in = f"mkdir .venv && ln -s {Path(sys.executable).parent} .venv/bin && touch .venv/installed"
    script = fence.text.replace("<this repository>", f"{ROOT} tokenbound")
    script = script.replace("cd tokenbound", f"cd tokenbound && {stands_in}")
    shown = subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "risk certificate" in shown
    assert (tmp_path / "tokenbound/runs/demo/report.html").exists()


@pytest.mark.slow
def test_its_long_commands_run_too(folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, slow=True)
