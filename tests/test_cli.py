"""The command line: exit codes, one-line errors, JSON."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from tokenbound import cli
from tokenbound.config.run import PretrainConfig, RunConfig, _keys_at
from tokenbound.config.sweep import SweepConfig
from tokenbound.engine.cluster.executor import Executor, use_executor
from tokenbound.signals import first_signal

FROZEN = {
    "bound",
    "compress",
    "demo",
    "evaluate",
    "generate",
    "history",
    "inspect",
    "plan",
    "pretrain",
    "reevaluate",
    "report",
    "sign",
    "status",
    "sweep",
    "verify",
}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenbound", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_the_commands_are_those_promised() -> None:
    assert {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    } == FROZEN


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"tokenbound {version('tokenbound')}\n"


def test_a_place_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    tree = {
        "what": {
            "model": {"artifact": "demo"},
            "corpus": {"source": "python-stdlib", "tokenizer": "bytes", "tokenizer_is": "given"}
            | {"add_bos": False, "add_eos": True},
        },
        "how": {"output": str(tmp_path / "file" / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert call(monkeypatch, "evaluate", str(tmp_path / "run.yaml")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tokenbound: how.output {tmp_path}/file/run cannot be written (Not a directory)")
    assert error.count("\n") == 1


def test_other_packages_do_not_speak_through_this_ones_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == 0
    assert call(monkeypatch) == 0
    logging.getLogger("tokenbound.engine").info("scoring")
    logging.getLogger("torchao").warning("could not load this")
    shown = capsys.readouterr().err
    assert len(re.findall(r"^\d\d:\d\d:\d\d scoring$", shown, re.MULTILINE)) == 1, (
        "one handler, however often it is called"
    )
    assert "could not load" not in shown


def test_an_artifact_that_cannot_be_placed_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, "compress", str(tiny_checkpoint), str(tmp_path / "file" / "x.tokenbound")) == 2
    assert f"out {tmp_path}/file cannot be written" in capsys.readouterr().err


def test_a_rate_alone_means_kfac(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert call(monkeypatch, "compress", str(tiny_checkpoint), str(tmp_path / "x"), "--rate", "0.01") == 2
    assert "'kfac' needs tokens to calibrate on" in capsys.readouterr().err


def test_a_generation_that_fails_shows_the_error_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b"none")
    assert call(monkeypatch, "generate", str(tmp_path / "x"), "--prompt", "Once") == 2
    assert capsys.readouterr().out == ""


def test_a_logged_certificate_is_said_to_be_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", MagicMock())
    golden = Path(__file__).parent / "golden" / "full" / "certificate.json"
    assert call(monkeypatch, "report", str(golden), "--log", "mlflow", "--format", "latex") == 0
    assert "logged to mlflow" in capsys.readouterr().err


def test_alone_it_shows_three_things(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("demo", "evaluate", "verify"))
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert shown.count("\n  tokenbound ") == 3


CONFIGS = {
    "evaluate": RunConfig,
    "plan": RunConfig,
    "pretrain": PretrainConfig,
    "reevaluate": RunConfig,
    "sweep": SweepConfig,
}


def test_every_example_of_an_override_is_a_key_of_the_commands_own_config() -> None:
    for name, command in typer.main.get_group(cli.app).commands.items():
        (option,) = [each for each in command.params if "--set" in each.opts] or [None]
        assert (option is None) == (name not in (*CONFIGS, "compress"))
        if option is None:
            continue
        (example,) = re.findall(r"e\.g\. (\S+=\S+)\.$", option.help)
        if name == "compress":
            cli._compress_settings(None, None, [example])
        else:
            *parents, leaf = example.partition("=")[0].split(".")
            assert leaf in _keys_at(CONFIGS[name], parents), (name, example)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """As a terminal leaves them; shells have SIGINT ignored in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    assert {number: signal.getsignal(number) for number in usual} == usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
def test_what_a_signal_ends_is_one_line_and_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever Ray makes of KeyboardInterrupt on its way."""

    def interrupted(number: int) -> Any:
        def run(*_: Any, **__: Any) -> None:
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None

        return run

    for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):
        interrupted_session = type("Interrupted", (Executor,), {"session": interrupted(number)})()
        with use_executor(interrupted_session):
            assert call(monkeypatch, "demo", "--output", str(tmp_path / name)) == 128 + number
        error = capsys.readouterr().err
        assert error == f"tokenbound: stopped by {name}; what is done is kept: run the same command again to resume\n"
        with monkeypatch.context() as patch:
            patch.setattr("hashlib.sha256", interrupted(number))
            assert call(monkeypatch, "inspect", "demo") == 128 + number
        assert capsys.readouterr().err == f"tokenbound: stopped by {name}\n"


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with first_signal() as received:
        signal.raise_signal(signal.SIGINT)
    assert received == []
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_commands_that_report_progress_go_on_where_they_were() -> None:
    commands = typer.main.get_group(cli.app).commands
    assert {name for name in commands if any(each.name == "quiet" for each in commands[name].params)} == cli.RESUMABLE


def test_no_bars_of_other_packages_in_a_log() -> None:
    code = (
        "import sys; from tokenbound import cli; sys.argv = ['tokenbound', '--version']\n"
        "try: cli._root(type('C', (), {'invoked_subcommand': 'demo'}))\n"
        "finally: from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"


def test_every_command_speaks_json() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert "as_json" in inspect.signature(command.callback).parameters, command.callback.__name__


@pytest.mark.parametrize("arguments", [["--quiet", "evaluate"], ["evaluate", "--quiet"], ["evaluate", "-q"]])
def test_quiet_is_understood_before_and_after_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    assert call(monkeypatch, *arguments, str(tmp_path / "none.yaml")) == 2
    assert logging.getLogger("tokenbound").level == logging.WARNING
    assert call(monkeypatch, "evaluate", str(tmp_path / "none.yaml")) == 2
    assert logging.getLogger("tokenbound").level == logging.INFO


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "tokenbound", "inspect", "demo", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown)["code_length_bits"] > 0


def test_the_shell_completes_commands() -> None:
    asked = {"_TOKENBOUND_COMPLETE": "complete_bash", "COMP_WORDS": "tokenbound ver", "COMP_CWORD": "1"}
    environment = {**os.environ, **asked}
    code = "from tokenbound.cli import app; app(prog_name='tokenbound')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert shown.stdout.split() == ["verify"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"what": {"surprise": 1}}, "what.surprise"),
        ({"what": {"bound": {"delta": 2}}}, "what.bound.delta"),
        ({"what": {"corpus": {"add_bos": None}}}, "what.corpus.add_bos"),
        ({"how": {"output": None}}, "how.output"),
        ({"what": {"bound": {"prior": "holdout"}}}, "holdout_declaration"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(
    change: dict[str, Any],
    words: str,
    tmp_path: Path,
    run_tree: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = run_tree()
    for half, sections in change.items():
        for section, value in sections.items():
            if isinstance(value, dict):
                tree[half].setdefault(section, {})
                tree[half][section] = {k: v for k, v in {**tree[half][section], **value}.items() if v is not None}
            elif value is None:
                del tree[half][section]
            else:
                tree[half][section] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert call(monkeypatch, "evaluate", str(path)) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_overrides_are_applied_and_checked(
    tmp_path: Path,
    run_tree: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree()))
    assert call(monkeypatch, "evaluate", str(path), "--set", "what.bound.delta=7") == 2
    assert "what.bound.delta" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", str(path), "--set", "nonsense") == 2


def test_missing_things_have_their_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "evaluate", str(tmp_path / "no.yaml")) == 2
    assert call(monkeypatch, "verify", str(tmp_path / "certificate.json")) == 3
    assert call(monkeypatch, "verify", str(tmp_path)) == 3
    assert call(monkeypatch, "inspect", str(tmp_path / "no.tokenbound")) == 2
    assert call(monkeypatch, "status", str(tmp_path)) == 3
    assert call(monkeypatch, "compress", str(tmp_path), str(tmp_path / "x"), "--method", "magic") == 2
    capsys.readouterr()


def test_bound_prints_json_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "losses.parquet"
    pq.write_table(pa.table({"nll": np.random.default_rng(0).gamma(1.0, 1.2, 50_000)}), path)
    options = ("--vocab-size", "257", "--code-length-bits", "1000")
    assert call(monkeypatch, "bound", str(path), *options, "--json") == 0
    lines = json.loads(capsys.readouterr().out)["bounds"]
    assert {line["method"] for line in lines} == {"freedman", "azuma", "kl"}
    assert call(monkeypatch, "bound", str(path), *options) == 0
    assert "not computed" in capsys.readouterr().out


def test_inspect_accounts_for_every_byte(
    tmp_path: Path,
    tiny_checkpoint: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "m.tokenbound"
    assert call(monkeypatch, "compress", str(tiny_checkpoint), str(out), "--method", "rtn", "--set", "step=0.5") == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert call(monkeypatch, "inspect", str(out), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["sections"].values()) == out.stat().st_size
    assert report["code_length_bits"] > 8 * out.stat().st_size
    assert call(monkeypatch, "generate", str(out), "--prompt", "abc", "--tokens", "5") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("abc")
    assert call(monkeypatch, "generate", str(out), "--prompt", "abc", "--tokens", "5", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["prompt"] + made["text"]).startswith(shown.removesuffix("\n"))  # half a letter waits for its end
    assert 0 < len(made["tokens"]) <= 5


def test_verify_lists_what_it_did_not_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path(__file__).parent / "golden"
    assert call(monkeypatch, "verify", str(golden / "sampled")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    _, _, listed = shown.partition("Not checked:")
    for name in ("losses", "corpus_sha256", "num_tokens", "trial 1", "seed 0", "tokenizer_is", "methods", "software"):
        assert f"- {name}" in listed or f", {name}" in listed, name
    assert "24,026" not in listed
    assert "its windows could hold 15,134 to 24,206 tokens" in listed
    assert call(monkeypatch, "verify", str(golden / "full"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]
    assert found["rescored_windows"] == 0
    names = [point.partition(":")[0] for point in found["not_checked"]]
    assert "losses" in names
    assert not any(name.startswith(("seed", "num_tokens")) for name in names)
