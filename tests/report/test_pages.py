"""The reports of histories and sweeps: what they say, what they draw, and which directory gets which."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tokenbound import cli
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.report.history import history_html
from tokenbound.report.svg import settings
from tokenbound.report.sweep import ROWS, SweepRow, _bytes_figure, hold_together, read_rows, sweep_html
from tokenbound.report.words import assumptions, headline
from tokenbound.store.history import append_history
from tokenbound.store.run import RunDirectory


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["tokenbound", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out + shown.err


def test_a_history_says_what_its_latest_certificate_says(nights, cases, read_page):
    page = read_page(history_html(nights, cases["full"].certificate))
    assert headline(cases["full"].certificate) in page.text
    for sentence in assumptions(cases["full"].certificate):
        assert sentence in page.text
    assert page.figures() == ["time", "tokens", "composition", "errors"]
    for entry in nights:
        assert entry.claim_fingerprint[:8] in page.text
    assert f"tokenbound verify {nights[-1].certificate}" in page.text


def test_the_bound_over_time_has_a_dot_for_every_certificate(nights, cases):
    text = history_html(nights, cases["full"].certificate)
    figure = text[text.index('<figure class="card" id="time"') :]
    svg = ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    dots = [node for node in svg.iter("use") if "var(--accent)" in node.get("style", "")]
    assert len(dots) == len(nights)


def test_models_certified_again_and_again_have_a_line_each(nights, cases):
    certificate = cases["full"].certificate
    assert "bound of " not in history_html(nights, certificate), "one line through the steps of a training"
    twice = [replace(entry, model=f"/models/{'ab'[place % 2]}") for place, entry in enumerate(nights)]
    page = history_html(twice, certificate)
    assert "bound of a" in page
    assert "bound of b" in page


def test_a_sweep_has_a_row_and_a_dot_for_every_trial(trials, read_page):
    text = sweep_html(trials)
    page = read_page(text)
    assert page.figures() == ["bytes", "parts"]
    for row in trials:
        assert row.trial in page.text
        assert row.file in page.text
    best = min(trials, key=lambda row: row.bound_bits)
    assert f"of {best.trial} with {best.artifact_bytes:,} bytes" in page.text
    assert f"tokenbound verify {best.file}" in page.text


def test_a_name_is_whole_and_is_copied_as_it_is(trials, read_page):
    named = [replace(row, trial=f"markov-{place}") for place, row in enumerate(trials)]
    text = sweep_html(named)
    best = min(named, key=lambda row: row.bound_bits)
    heading = text[text.index("<h1>") : text.index("</h1>")]
    assert f'<span class="whole">{best.trial}</span> with ' in heading
    assert f"of {best.trial} with {best.artifact_bytes:,} bytes." in read_page(text).text
    assert not set(read_page(text).text) & set("\u00a0\u2011\u2060\ufeff\u00ad")


def test_certificates_of_different_claims_are_not_said_to_hold_at_once(trials, read_page):
    assert hold_together(trials)
    assert "all bounds below hold" in read_page(sweep_html(trials)).text
    protocol = {**trials[1].protocol, "length": 128}
    changes = [{"delta": 0.01}, {"prior": "holdout"}, {"sampled": True}, {"lines": {"azuma": 4.0}}]
    for change in (*changes, {"protocol": protocol}, {"base": "b" * 64}):
        mixed = [trials[0], replace(trials[1], **change)]
        text = read_page(sweep_html(mixed)).text
        assert "each certificate holds by itself" in text
        assert "all bounds below hold" not in text


def test_a_sweep_without_any_news_is_called_vacuous(trials, read_page):
    page = read_page(sweep_html([replace(row, vacuous=True) for row in trials]))
    assert "VACUOUS" in page.text


def test_trials_of_another_claim_are_named(trials, read_page):
    head = replace(trials[0], trial="with-head", lines={**trials[0].lines, "azuma, head": 3.0})
    text = read_page(sweep_html([*trials, head])).text
    assert f"{len(trials)} of them also hold at once, all but with-head" in text
    assert "No two of them" in read_page(sweep_html([trials[0], head])).text


def test_labels_of_trials_that_lie_close_do_not_cover_each_other(trials):
    bounds = {"a": 3.25, "b": 3.26, "c": 3.24, "d": 3.3}
    close = [
        replace(trials[0], trial=f"trial-{name}", bound_bits=bound, artifact_bytes=100_000 + 2_000 * place)
        for place, (name, bound) in enumerate(bounds.items())
    ]
    with settings():
        figure, _ = _bytes_figure([*close, replace(trials[0], trial="far", artifact_bytes=400, bound_bits=4.8)])
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 5
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("kind", ["history", "sweep"])
def test_hostile_names_stay_texts(kind, nights, trials, cases, read_page, hostile_text):
    if kind == "history":
        entries = [replace(entry, model=hostile_text, certificate=hostile_text) for entry in nights]
        page = read_page(history_html(entries, cases["full"].certificate))
    else:
        page = read_page(sweep_html([replace(row, trial=hostile_text, file=hostile_text) for row in trials]))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.network_addresses() == []


def test_a_night_directory_gets_both_reports(nights, cases, tmp_path, monkeypatch, capsys):
    home = RunDirectory(str(tmp_path))
    for entry in nights:
        append_history(home, entry)
    (tmp_path / "models/b").mkdir(parents=True)
    cases["full"].certificate.save(tmp_path / nights[-1].certificate)
    code, shown = call(monkeypatch, capsys, "report", str(tmp_path))
    assert code == 0
    assert "step-3" in shown
    assert "Bound over time" in (tmp_path / "history.html").read_text()
    assert (tmp_path / "models/b/report.html").exists()
    code, shown = call(monkeypatch, capsys, "report", str(tmp_path), "--json")
    assert json.loads(shown)["claim_fingerprint"] == cases["full"].certificate.claim_fingerprint


def test_a_sweep_directory_gets_its_comparison(trials, tmp_path, monkeypatch, capsys):
    home = RunDirectory(str(tmp_path))
    home.write(ROWS, json.dumps([row.to_dict() for row in trials]).encode())
    assert read_rows(home) == trials
    code, shown = call(monkeypatch, capsys, "report", str(tmp_path))
    assert code == 0
    assert all(row.trial in shown for row in trials), shown
    assert "Bound against bytes" in (tmp_path / "sweep.html").read_text()
    code, shown = call(monkeypatch, capsys, "report", str(tmp_path), "--json")
    assert [row["trial"] for row in json.loads(shown)] == [row.trial for row in trials]
    code, shown = call(monkeypatch, capsys, "report", str(tmp_path), "--format", "latex")
    assert code == 2
    assert trials[0].file in shown


@pytest.mark.parametrize(("rows", "error"), [([], IncompleteError), ([{"trial": "old"}], MismatchError)])
def test_rows_that_cannot_be_shown_are_refused(rows, error, tmp_path):
    home = RunDirectory(str(tmp_path))
    home.write(ROWS, json.dumps(rows).encode())
    with pytest.raises(error, match="run the sweep again"):
        read_rows(home)


def test_rows_survive_json(trials):
    assert [SweepRow(**json.loads(json.dumps(row.to_dict()))) for row in trials] == trials
