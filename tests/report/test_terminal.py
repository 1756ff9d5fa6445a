"""The terminal table: the same words at any width, in a pipe, and in ASCII."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tokenbound.report.history_report import history_table
from tokenbound.report.terminal import LinesTable, certificate_text, certificate_view, facts, notes
from tokenbound.report.words import headline, slack_sentence


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("kind", ["full", "sampled", "vacuous", "holdout", "kl_only"])
@pytest.mark.parametrize("width", [80, 120])
def test_fits_the_width_and_loses_no_digit(cases, kind, width):
    certificate = cases[kind].certificate
    text = certificate_text(certificate, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "\x1b" not in text
    assert headline(certificate) in words(text)
    assert ("VACUOUS" in text) == (kind == "vacuous")
    for name, value in facts(certificate):
        assert f"{name} {value}" in words(text)


@pytest.mark.parametrize("name", ["top-100 error", "freedman, fixed alpha"])
def test_a_wide_table_is_set_closer_and_not_cut(cases, name):
    line = cases["sampled"].certificate.bounds[0]
    wide = {**line, "value": 123.4567, "random_guess": 10.0, "method": name}
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(LinesTable([wide], 0.05))
    text = buffer.getvalue()
    assert "…" not in text
    assert all(word in text for word in (*name.split(), "123.4567", "guessing", "10.0000"))
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_same_note_of_several_lines_is_said_once(cases):
    line = {**cases["full"].certificate.bounds[0], "method": "kl", "value": None, "note": "not computed: no ranks"}
    found = notes([{**line, "top_k": 1}, {**line, "top_k": 10}])
    assert [text.plain for text in found] == ["top-1 error, top-10 error: not computed: no ranks"]


def test_slack_is_shown_where_there_is_some(cases):
    assert "slack" in certificate_text(cases["sampled"].certificate)
    assert " slack" not in certificate_text(cases["full"].certificate)


def test_bar_is_drawn_to_scale(cases):
    certificate = cases["full"].certificate
    bar = next(line for line in certificate_text(certificate, 80).splitlines() if line.startswith("██"))
    assert len(bar) == 76
    assert bar.endswith("│")
    assert bar.count("█") == round(75 * certificate.empirical_risk_bits / certificate.random_guess_bits)
    assert bar.count("█") + bar.count("▒") == round(75 * certificate.bound_bits / certificate.random_guess_bits)


def test_a_vacuous_bar_runs_over_the_mark(cases):
    bar = next(line for line in certificate_text(cases["vacuous"].certificate, 80).splitlines() if line[:2] == "██")
    assert bar.strip("█▒") == "│"[:0] or "▒│▒" in bar
    assert bar.endswith("▒")


def test_ascii_output_is_possible(cases):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=stream, width=80).print(certificate_view(cases["sampled"].certificate))
    stream.flush()
    assert b"###" in raw.getvalue()


def test_markup_in_declarations_is_not_interpreted(cases):
    certificate = cases["holdout"].certificate.model_copy(
        update={"declarations": {"prior": "holdout", "holdout_declaration": "[bold]not[/bold] [link=x]used[/link]"}}
    )
    assert "[bold]not[/bold]" in words(certificate_text(certificate))


def test_it_says_what_more_windows_would_leave(cases):
    certificate = cases["sampled"].certificate
    terms = next(line["terms"] for line in certificate.bounds if line["value"] == certificate.bound_bits)
    sentence = slack_sentence(certificate)
    assert sentence in words(certificate_text(certificate, 120))
    for name in ("sampling_slack", "slack_at_2n", "slack_at_4n"):
        assert f"{terms[name]:.4f}" in sentence
    assert sentence.endswith("all of them none.")
    assert "twice" not in words(certificate_text(cases["full"].certificate))


def test_a_history_fits_a_terminal_and_loses_no_digit(nights):
    stream = io.StringIO()
    Console(file=stream, width=80).print(history_table(nights))
    lines = stream.getvalue().splitlines()
    assert "…" not in stream.getvalue()
    assert len([line for line in lines if "2026-01-0" in line]) == len(nights)
    assert any(line.split()[-3:] == ["1.9000", "4.3750", "-0.1250"] for line in lines)
