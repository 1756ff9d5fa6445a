"""Texts from files never control a terminal, and markup in them is text."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tokenbound import cli
from tokenbound.certificate import Certificate
from tokenbound.demo import demo_certificate
from tokenbound.report.html import html_report
from tokenbound.report.rows import EXPORTS
from tokenbound.visible import VisibleFormatter, console, visible, visible_json

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mverified\x9b0m\u202egnp\u2066\r\x08 [red]x[/red] :smile: <script>alert(1)</script>"
)
FORBIDDEN = "\x1b\x07\x9b\u202e\u2066\r\x08"


def is_clean(text: str) -> bool:
    return not any(letter in text for letter in FORBIDDEN)


def hostile_certificate() -> Certificate:
    honest = demo_certificate()
    return honest.model_copy(
        update={
            "corpus": {**honest.corpus, "source": HOSTILE, "tokenizer": HOSTILE, "paths": [HOSTILE]},
            "model": {**honest.model, "architecture": HOSTILE, "source": HOSTILE},
            "declarations": {**honest.declarations, "holdout_declaration": HOSTILE},
            "environment": {"torch": HOSTILE},
            "prior": "holdout",
        }
    )


def test_every_control_is_spelled_out_and_other_text_is_not() -> None:
    controls = [chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))] + list("\u200e\u202a\u202e\u2066\u2069")
    for letter in controls:
        assert visible(f"a{letter}b") not in (f"a{letter}b", "ab")
        assert json.loads(visible_json(json.dumps(f"a{letter}b", ensure_ascii=False))) == f"a{letter}b"
        assert letter not in visible_json(json.dumps(letter, ensure_ascii=False))
    assert visible("naïve 模型 🙂\t\n") == "naïve 模型 🙂\t\n"
    assert json.loads(visible_json(json.dumps("\U000e0041", ensure_ascii=False))) == "\U000e0041"


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_panels_and_lines_are_visible(terminal: bool) -> None:
    buffer = io.StringIO()
    screen = console(file=buffer, force_terminal=terminal, width=200, color_system=None)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for part in (HOSTILE, Text(HOSTILE), table, Panel(HOSTILE, title=HOSTILE)):
        screen.print(part)
    assert is_clean(buffer.getvalue())
    assert "[red]x[/red] :smile:" in buffer.getvalue()


def test_a_hostile_certificate_is_shown_and_not_obeyed() -> None:
    assert is_clean(hostile_certificate().table())
    assert "\\x1b[31mverified" in hostile_certificate().table()


@pytest.mark.parametrize("kind", [None, *EXPORTS, "json"])
def test_no_report_of_it_controls_the_terminal(
    kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(hostile_certificate().model_dump(mode="json")))
    command = ["tokenbound", "report", str(path), *([] if kind is None else ["--format", kind])]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    shown = capfd.readouterr()
    assert is_clean(shown.out)
    assert is_clean(shown.err)


def test_an_error_about_it_is_one_visible_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = demo_certificate().model_dump(mode="json")
    path = tmp_path / "certificate.json"
    for change in ({"method": [HOSTILE]}, {"\x1b[2J\nverified": 1}, {"scoring_fingerprint": HOSTILE + "\nverified"}):
        path.write_text(json.dumps({**tree, **change}))
        monkeypatch.setattr("sys.argv", ["tokenbound", "verify", str(path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capfd.readouterr().err
        assert caught.value.code == 4
        assert is_clean(shown)
        assert shown.count("\n") == 1


def test_log_lines_are_visible() -> None:
    record = logging.LogRecord("tokenbound", logging.INFO, "x.py", 1, "file %s\nverified", (HOSTILE,), None)
    line = VisibleFormatter("%(message)s").format(record)
    assert is_clean(line)
    assert "\n" not in line


def test_pages_escape_it() -> None:
    page = html_report(hostile_certificate())
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
