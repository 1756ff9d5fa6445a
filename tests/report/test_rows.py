"""One-line forms: readable back by their own parsers, whatever the names contain."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

from tokenbound import cli
from tokenbound.report.html import html_report
from tokenbound.report.rows import (
    LATEX_HEADER,
    MARKDOWN_HEADER,
    bibtex,
    corpus_name,
    eval_results,
    latex_row,
    markdown_row,
    model_card_yaml,
    model_index,
    model_name,
)

COLUMNS = 9


def test_markdown_row_has_the_headers_columns(cases):
    row = markdown_row(cases["full"].certificate, "my-model")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == COLUMNS == MARKDOWN_HEADER.splitlines()[1].count("--")
    assert cells[0] == "my-model"
    assert float(cells[5]) >= cases["full"].certificate.bound_bits


@pytest.mark.parametrize("kind", ["vacuous", "holdout", "sampled", "kl_only"])
def test_rows_say_what_must_not_be_hidden(cases, kind):
    row = markdown_row(cases[kind].certificate)
    words = {"vacuous": "(vacuous)", "holdout": "(not paid)", "sampled": "scored)", "kl_only": "errors only"}
    assert words[kind] in row


def test_hostile_names_keep_rows_whole(hostile_case):
    certificate = hostile_case.certificate
    row = markdown_row(certificate, "a|b\nc`<script>")
    assert "\n" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == COLUMNS + 1
    assert "<script" not in re.sub(r"\\.", "", row)
    latex = latex_row(certificate, "50 % of a_b & {x} \\input{/etc/passwd}")
    assert len(re.findall(r"(?<!\\)&", latex)) == COLUMNS - 1 == LATEX_HEADER.count("&")
    assert r"\input" not in latex
    assert latex.endswith(r" \\")


def test_bibtex_names_the_claim_and_balances(cases, hostile_case):
    for certificate in (cases["full"].certificate, hostile_case.certificate):
        entry = bibtex(certificate)
        bare = re.sub(r"\\.", "", entry.replace(r"\textbackslash{}", ""))
        assert bare.count("{") == bare.count("}")
        assert certificate.claim_fingerprint[:16] in entry
        assert entry.startswith("@misc{tokenbound-22222222,")


def test_model_card_reads_back(cases, hostile_case):
    for certificate in (cases["full"].certificate, hostile_case.certificate):
        tree = yaml.safe_load(model_card_yaml(certificate))
        assert tree == {"model-index": model_index(certificate)}
    metrics = {m["type"]: m["value"] for m in model_index(cases["full"].certificate)[0]["results"][0]["metrics"]}
    assert metrics["risk-bound-bits-per-token"] == cases["full"].certificate.bound_bits
    assert {"top-1-error-bound", "top-10-error-bound"} <= set(metrics)


def test_a_certificate_without_loss_line_promises_none(cases):
    metrics = [m["type"] for m in model_index(cases["kl_only"].certificate)[0]["results"][0]["metrics"]]
    assert "risk-bound-bits-per-token" not in metrics
    assert "top-1-error-bound" in metrics


def test_names_come_from_paths(cases):
    certificate = cases["full"].certificate
    moved = certificate.model_copy(
        update={
            "model": {"source": "org/tiny-llama", "architecture": "llama"},
            "corpus": {**certificate.corpus, "paths": ["/data/a.jsonl", "/data/b.jsonl"]},
        }
    )
    assert model_name(moved) == "tiny-llama"
    assert corpus_name(moved) == "a.jsonl and 1 more"


def test_the_hub_reads_the_metadata_as_it_was_meant(cases):
    from huggingface_hub import ModelCardData

    certificate = cases["sampled"].certificate
    index = model_index(certificate, "mine")
    card = ModelCardData(**{"model-index": index})
    assert card.to_dict()["model-index"] == index
    found = {result.metric_type: result for result in card.eval_results}
    assert found["risk-bound-bits-per-token"].metric_value == certificate.bound_bits
    assert found["risk-bound-bits-per-token"].metric_args["claim_fingerprint"] == certificate.claim_fingerprint


@pytest.mark.parametrize(
    ("kind", "mark"),
    [
        ("json", '"claim_fingerprint"'),
        ("markdown", "|:--|"),
        ("latex", r" \\"),
        ("bibtex", "@misc{tokenbound-"),
        ("model-card", "model-index:"),
        ("svg", "code of the artifact"),
    ],
)
def test_the_command_prints_every_form_from_the_certificate_alone(cases, tmp_path, monkeypatch, capsys, kind, mark):
    path = tmp_path / "certificate.json"
    cases["full"].certificate.save(path)
    monkeypatch.setattr(sys, "argv", ["tokenbound", "report", str(path), "--format", kind])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert mark in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["certificate.json"]
    monkeypatch.setattr(sys, "argv", ["tokenbound", "report", str(path), "--format", "magic"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_all_of_a_dataset_is_named(cases):
    from huggingface_hub import parse_eval_result_entries

    corpus = {"source": "hf", "name": "you/data", "subset": "en", "split": "train[:1]", "revision": "v1", "paths": []}
    certificate = cases["full"].certificate.model_copy(
        update={"corpus": {**cases["full"].certificate.corpus, **corpus}}
    )
    assert corpus_name(certificate) == "you/data (en, train[:1])"
    [model] = model_index(certificate)
    dataset = model["results"][0]["dataset"]
    assert {"type": "you/data", "config": "en", "split": "train[:1]", "revision": "v1"}.items() <= dataset.items()
    assert "hf you/data (subset en, split train[:1], revision v1)" in " ".join(certificate.table().split())
    entries = parse_eval_result_entries(yaml.safe_load(eval_results(certificate)))
    assert {entry.task_id: entry.value for entry in entries} == {
        "risk-bound-bits-per-token": certificate.bound_bits,
        "loss-bits-per-token": certificate.mean_nll_bits,
    }
    assert {(entry.dataset_id, entry.dataset_revision) for entry in entries} == {("you/data", "v1")}
    assert all("subset en, split train[:1]" in entry.notes for entry in entries)
    page = html_report(certificate)
    assert all(f">{value}<" in page for value in ("you/data", "en", "train[:1]", "v1"))
