"""Every form of a certificate says how it was selected, and which shards other versions scored."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from tokenbound import cli
from tokenbound.certificate import Certificate, SelectionRecord
from tokenbound.report.history import history_html, history_table, selection_lines
from tokenbound.report.html import html_report
from tokenbound.report.rows import EXPORTS
from tokenbound.report.sweep import comparison_csv, comparison_markdown, sweep_html, sweep_row
from tokenbound.report.terminal import certificate_text
from tokenbound.report.tracking import labels
from tokenbound.report.words import selection_sentence
from tokenbound.store.history import HistoryEntry, append_history
from tokenbound.store.run import RunDirectory

SENTENCE = (
    "the 3rd configuration tried on a sample of this corpus (counted on this machine; declared), drawn with seed 0; "
    "its lines were named before scoring"
)
MIXED = [{"shards": 3, "torch": "2.13.0", "python": "3.11"}, {"shards": 1, "torch": "2.12.1", "python": "3.11"}]
VERSIONS = "Not all shards were scored in the same environment: 3 by torch 2.13.0; 1 by torch 2.12.1."


@pytest.fixture(scope="module")
def third(cases) -> Certificate:
    """A sampled certificate, the third that was tried, scored by two versions of torch."""
    fields = {
        "trial": 3,
        "selection": SelectionRecord(counted_by="register", shipped=0),
        "environment": {"python": "3.11", "scored_by": MIXED},
    }
    return cases["sampled"].certificate.model_copy(update=fields)


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("kind", ["terminal", "page", "markdown", "latex", "bibtex", "model-card", "tracker"])
def test_every_form_says_how_it_was_selected_and_scored(third: Certificate, kind: str) -> None:
    forms = {
        "terminal": lambda: certificate_text(third, 80),
        "page": lambda: html_report(third),
        "tracker": lambda: labels(third)["selection"],
    }
    text = flat(forms[kind]() if kind in forms else EXPORTS[kind](third))
    assert SENTENCE in text.replace("\\", "")
    assert VERSIONS in text.replace("\\", "")


def test_a_model_card_holds_it_as_data(third: Certificate) -> None:
    bound = yaml.safe_load(EXPORTS["model-card"](third))["model-index"][0]["results"][0]["metrics"][0]
    assert bound["args"]["trial"] == 3
    assert SENTENCE in bound["args"]["selection"]


def test_histories_say_it(third: Certificate, cases, nights, tmp_path, monkeypatch, capsys) -> None:
    entry = replace(nights[-1], trial=3, selection=selection_sentence(third))
    assert any(SENTENCE in line for line in selection_lines([*nights[:-1], entry]))
    assert SENTENCE in history_html([*nights[:-1], entry], cases["full"].certificate)
    assert "trial" in [column.header for column in history_table([*nights[:-1], entry]).columns]
    assert "trial" not in [column.header for column in history_table(nights).columns]
    append_history(RunDirectory(str(tmp_path)), entry)
    monkeypatch.setattr("sys.argv", ["tokenbound", "history", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert SENTENCE in flat(capsys.readouterr().out)


def test_an_entry_of_a_history_keeps_the_sentence(third: Certificate) -> None:
    tree = {**third.model_dump(mode="json"), "corpus": {"segments": 1}}
    assert HistoryEntry.of(tree, "certificate.json", selection_sentence(third)).selection == selection_sentence(third)


def test_sweeps_say_it_of_every_row(third: Certificate, cases) -> None:
    rows = [
        sweep_row("first", "given", None, cases["sampled"].certificate, "first/certificate.json"),
        sweep_row("third", "given", None, third, "third/certificate.json"),
    ]
    assert [row.ordinal for row in rows] == [1, 3]
    for text in (comparison_markdown(rows), sweep_html(rows)):
        assert f"third: This is {SENTENCE}" in text.replace("\\", "")
    assert comparison_csv(rows).splitlines()[2].startswith("third,given,3,")


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("full", {}, "the 1st configuration tried on this corpus (numbered by its config; declared), with every token"),
        (
            "full",
            {"trial": 2},
            "where other models and protocols do not count because each pays its own code; its lines",
        ),
        (
            "holdout",
            {"trial": 11},
            "the 11th configuration tried on this holdout (numbered by its config; declared), with",
        ),
        (
            "sampled",
            {"selection": SelectionRecord(counted_by="register", shipped=13), "trial": 14},
            "the 14th configuration tried on a sample of this corpus (counted on this machine; declared), drawn with "
            "seed 0; its lines were named before scoring. The first 13 are those of this package's authors.",
        ),
    ],
)
def test_the_sentence_fits_the_kind_of_claim(cases, kind: str, fields, words: str) -> None:
    certificate = cases[kind].certificate.model_copy(update=fields)
    assert words in selection_sentence(certificate)


def test_a_draw_of_a_growing_corpus_is_named(third: Certificate) -> None:
    assert third.sampling is not None
    drawn = third.model_copy(update={"sampling": third.sampling.model_copy(update={"evaluation": 2})})
    assert "drawn with seed 0 as draw 2 of a growing corpus; its lines" in selection_sentence(drawn)
