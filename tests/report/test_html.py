"""The HTML report: what must be on the page, and what must never run on it."""

from __future__ import annotations

import json
import re

import pytest

from tokenbound import cli
from tokenbound.report.html import UNITS, html_report, write_report
from tokenbound.report.words import assumptions, headline, slack_sentence, verdict
from tokenbound.store.run import RunDirectory

KINDS = ("full", "sampled", "vacuous", "holdout", "kl_only")
ALL_PLOTS = ["composition", "errors", "size", "alpha", "stake", "distribution", "entropy", "position", "artifact"]


@pytest.fixture(scope="module")
def pages(cases, artifact_rows):
    """One page per kind; the plots of details are drawn for three of them, since drawing is what takes the time."""
    detailed = ("full", "vacuous", "kl_only")
    details = {kind: cases[kind].details(artifact_rows) if kind in detailed else None for kind in KINDS}
    return {kind: html_report(cases[kind].certificate, details=details[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def artifact_rows(make_artifact_report):
    return make_artifact_report()


@pytest.mark.parametrize("kind", KINDS)
def test_page_says_what_the_certificate_says(cases, pages, kind, read_page):
    certificate, page = cases[kind].certificate, read_page(pages[kind])
    assert headline(certificate) in page.text
    assert verdict(certificate) in page.text
    for sentence in assumptions(certificate):
        assert sentence in page.text
    for digest in (certificate.losses_sha256, certificate.claim_fingerprint, certificate.artifact_sha256):
        assert digest in page.text
    assert "tokenbound verify certificate.json" in page.text


def test_every_plot_is_an_svg_of_its_own(pages, read_page):
    page = read_page(pages["full"])
    assert page.figures() == ALL_PLOTS
    assert page.tags.count("svg") == len(ALL_PLOTS)
    assert len(page.ids) == len(set(page.ids)), "ids of different plots collide"


def test_plots_follow_what_is_known(pages, read_page):
    assert read_page(pages["sampled"]).figures() == ["composition", "errors"]
    assert read_page(pages["kl_only"]).figures() == [
        "errors",
        "size",
        "distribution",
        "entropy",
        "position",
        "artifact",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_page_needs_no_network_and_no_script(pages, kind, read_page):
    text, page = pages[kind], read_page(pages[kind])
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "iframe", "img", "object"} & set(page.tags)
    assert page.network_addresses() == []
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_colours_of_plots_come_from_the_page(pages):
    svg = "".join(re.findall(r"<svg.*?</svg>", pages["full"], re.DOTALL))
    assert "var(--variance)" in svg
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg), "a colour that cannot follow the dark theme"
    used = set(re.findall(r"var\((--[a-z]+)\)", pages["full"]))
    themes = re.findall(r":root \{(.*?)\}", pages["full"], re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        assert used - {"--c"} <= set(re.findall(r"(--[a-z]+):", theme))


def test_hostile_texts_stay_texts(hostile_page, hostile_text, read_page):
    page = read_page(hostile_page)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("svg") == len(ALL_PLOTS)
    assert hostile_text.replace("\x00", "") in page.text.replace("\x00", "").replace("\ufffd", "")
    assert "{{ 7 * 7 }}" in page.text


def test_every_number_has_unit_and_meaning(cases, pages, read_page):
    certificate, page = cases["sampled"].certificate, read_page(pages["sampled"])
    for name, info in type(certificate).model_fields.items():
        if info.annotation in (int, float, int | None, float | None):
            assert name in UNITS
            assert (name in page.text) == (getattr(certificate, name) is not None)
    assert f"{certificate.bounds[0]['terms']['sampling_slack']:.9g}" in page.text
    assert slack_sentence(certificate) in page.text
    assert "slack expected at twice the windows" in page.text


def test_holdout_shows_its_declaration(cases, pages, read_page):
    assert cases["holdout"].certificate.declarations["holdout_declaration"] in read_page(pages["holdout"]).text


def test_size_plot_is_labelled_a_what_if(pages):
    assert "What-if: the same losses, another m." in pages["full"]
    assert "With the same losses and a larger m of" in pages["vacuous"]


def test_same_input_same_bytes(cases, pages):
    assert html_report(cases["sampled"].certificate) == pages["sampled"]


def test_a_second_claim_has_its_own_report(cases, tmp_path):
    run, certificate = RunDirectory(str(tmp_path)), cases["full"].certificate
    assert write_report(run, certificate, None) == f"{tmp_path}/report.html"
    (tmp_path / "certificate.json").write_text(json.dumps({"claim_fingerprint": "9" * 64}))
    assert write_report(run, certificate, None) == f"{tmp_path}/report-22222222.html"
    assert "tokenbound verify certificate-22222222.json" in (tmp_path / "report-22222222.html").read_text()


def test_a_certificate_alone_is_still_reported(cases, tmp_path, monkeypatch, capsys):
    path = tmp_path / "certificate.json"
    cases["full"].certificate.save(path)
    monkeypatch.setattr("sys.argv", ["tokenbound", "report", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "without the plots" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000
