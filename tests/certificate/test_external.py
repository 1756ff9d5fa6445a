"""Bounds from losses that another tool wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from losses_support import make_losses

from tokenbound import cli
from tokenbound.bounds import azuma_anytime_bound
from tokenbound.certificate.external import bound_losses, given_protocol, open_ledger
from tokenbound.certificate.identity import DEFAULT_PROTOCOL, protocol_bits
from tokenbound.certificate.reduce import shard_evidence
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.run import RunDirectory

NLL = np.random.default_rng(0).gamma(1.0, 1.2, 60_000).astype(np.float32)
ENTROPY = np.random.default_rng(1).gamma(2.0, 0.6, 60_000).astype(np.float32)
PAID: dict[str, Any] = {"vocab_size": 257, "tokenizer_vocab_size": 257, "code_length_bits": 500.0}


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=25_000)
    return str(path)


def test_flat_and_nested_columns_give_the_same_lines(tmp_path: Path) -> None:
    flat = write(tmp_path / "flat.parquet", nll=NLL, entropy=ENTROPY)
    rows = pa.ListArray.from_arrays(pa.array(range(0, 60_001, 600)), pa.array(NLL))
    entropy = pa.ListArray.from_arrays(pa.array(range(0, 60_001, 600)), pa.array(ENTROPY))
    nested = write(tmp_path / "nested.parquet", nll=rows, entropy=entropy)
    left, right = bound_losses(flat, **PAID), bound_losses(nested, **PAID)
    assert [line["value"] for line in left] == [line["value"] for line in right]


def test_the_azuma_line_is_the_theorem(tmp_path: Path) -> None:
    line = bound_losses(write(tmp_path / "a.parquet", nll=NLL), **PAID, method="azuma")[0]
    again = azuma_anytime_bound(
        NLL,
        vocab_size=257,
        alpha=line["parameters"]["alpha"],
        code_length_bits=500.0,
        tune_bits=line["tune_bits"],
        delta=0.05,
        m0_index=line["parameters"]["m0_index"],
    )
    assert line["value"] == pytest.approx(again, rel=1e-9)
    assert line["value"] >= again


def test_what_cannot_be_computed_says_why(tmp_path: Path) -> None:
    lines = bound_losses(write(tmp_path / "a.parquet", nll=NLL), **PAID)
    errors = [line for line in lines if line["method"] == "kl"]
    assert all(line["value"] is None and "rank" in line["note"] for line in errors)
    assert lines[0]["parameters"]["forecast_degree"] == 0
    assert "no `entropy` column" in lines[0]["note"]


def test_a_directory_of_files_is_one_ledger(tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder in (parts, whole):
        folder.mkdir()
    write(parts / "b.parquet", nll=NLL[30_000:])
    write(parts / "a.parquet", nll=NLL[:30_000])
    write(whole / "x.parquet", nll=NLL)
    both, one = (bound_losses(str(folder), **PAID, method="freedman")[0] for folder in (parts, whole))
    assert both["empirical"] == pytest.approx(one["empirical"], abs=1e-12)
    assert both["value"] == pytest.approx(one["value"], abs=1e-8)


@pytest.mark.parametrize(
    ("columns", "kind", "match"),
    [
        ({"loss": NLL}, InputError, "nll"),
        ({"nll": np.where(np.arange(len(NLL)) == 7, np.nan, NLL)}, MismatchError, "NaN"),
        ({"nll": np.where(np.arange(len(NLL)) == 7, np.inf, NLL)}, MismatchError, "infinite"),
        ({"nll": NLL - 0.1}, MismatchError, "negative"),
        ({"nll": ["a", "b"]}, InputError, "numbers"),
        ({"nll": pa.array([1.0, None])}, InputError, "nulls"),
        ({"nll": NLL, "rank": np.full(len(NLL), 257)}, MismatchError, "vocabulary"),
        ({"nll": NLL, "token": np.full(len(NLL), 257)}, MismatchError, "token id 257 outside the vocabulary"),
        ({"nll": NLL, "window_id": np.arange(len(NLL)) % 59_999}, MismatchError, "window_id 0 stands twice"),
        (
            {"nll": NLL, "window_id": np.arange(len(NLL)) + (np.arange(len(NLL)) > 8)},
            MismatchError,
            "window_id 9 is missing",
        ),
        ({"nll": NLL, "window_id": np.arange(len(NLL)) + 7}, MismatchError, "window_id 1 is missing, though 7 is"),
        ({"nll": NLL, "rank": NLL}, InputError, "column `rank` must hold integers"),
        ({"nll": np.append(NLL[1:].astype(np.float64), 1e200)}, MismatchError, r"nll 1e\+200 is no float32"),
        ({"nll": NLL, "entropy": np.append(ENTROPY[1:].astype(np.float64), 1e300)}, MismatchError, "entropy 1e"),
        ({"nll": NLL, "entropy": -NLL}, MismatchError, "negative entropy"),
    ],
)
def test_bad_columns_are_refused_by_name(tmp_path: Path, columns: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        bound_losses(write(tmp_path / "a.parquet", **columns), **PAID)


@pytest.mark.parametrize("kind", [pa.float64(), pa.float16(), pa.float32()])
def test_any_width_of_float_in_lists_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(NLL.astype(kind.to_pandas_dtype()))
    offsets = range(0, 60_001, 600)
    lists = {
        "list": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values),
        "large": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values),
        "fixed": pa.FixedSizeListArray.from_arrays(values, 600),
        "flat": values,
    }
    found = {
        name: bound_losses(write(tmp_path / f"{name}.parquet", nll=column), **PAID, method="azuma")[0]["value"]
        for name, column in lists.items()
    }
    assert len(set(found.values())) == 1


def test_files_with_other_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", nll=NLL, entropy=ENTROPY)
    write(tmp_path / "b.parquet", nll=NLL)
    with pytest.raises(InputError, match=r"b\.parquet has the columns nll, but .*a\.parquet has nll, entropy"):
        bound_losses(str(tmp_path), **PAID)


def test_windows_may_be_counted_from_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", nll=NLL, window_id=np.arange(len(NLL)) + 1)
    assert bound_losses(path, **PAID, method="azuma")[0]["value"] > 0


def test_a_later_trial_pays_for_the_earlier_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", nll=NLL)
    first, ninth = (bound_losses(path, **PAID, method="azuma", trial=trial)[0] for trial in (1, 9))
    assert ninth["tune_bits"] == pytest.approx(first["tune_bits"] + 7)
    assert ninth["value"] > first["value"]


def test_the_protocol_is_paid_for_where_it_is_given(tmp_path: Path) -> None:
    """The package's own costs a bit; another is spelled out. What is left out is the package's own."""
    path = write(tmp_path / "a.parquet", nll=NLL)
    (tmp_path / "protocol.json").write_text('{"length": 2048, "dtype": "bfloat16"}')
    free, usual, other = (
        bound_losses(path, **PAID, method="azuma", protocol=protocol)[0]["kappa_nats"]
        for protocol in (None, given_protocol("default"), given_protocol(str(tmp_path / "protocol.json")))
    )
    bits = protocol_bits({**DEFAULT_PROTOCOL, "length": 2048, "stride": 2048, "dtype": "bfloat16"})
    assert bits > 500
    assert usual - free == pytest.approx(math.log(2))
    assert other - free == pytest.approx(bits * math.log(2), rel=0.02)  # azuma's j may move


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.json", "give `default`, a JSON object, or a file"),
        ("{length: 1}", "not JSON"),
        ('{"lenght": 64}', "unknown key 'lenght'; the keys are"),
        ('{"length": "64"}', "length is '64'; give a value such as 512"),
        ('{"length": true}', "length is True"),
        ('{"batch": 0}', "batch is 0"),
    ],
)
def test_a_protocol_that_is_not_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=f"--protocol.*{words}") as refused:
        given_protocol(text)
    assert "\n" not in str(refused.value)


def test_bound_says_whether_a_protocol_was_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "a.parquet", nll=NLL))
    asked = ["tokenbound", "bound", path, "--vocab-size", "257", "--code-length-bits", "1000"]
    for more, words in (
        ([], "No protocol was paid for beyond --code-length-bits"),
        (["--protocol", "default"], "The protocol's 1 bits are paid for besides"),
    ):
        monkeypatch.setattr("sys.argv", [*asked, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert words in " ".join(capsys.readouterr().out.split())


def test_losses_of_a_training_run_pay_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", nll=NLL, entropy=ENTROPY)
    lines, free = bound_losses(path, **PAID, online=True), bound_losses(path, **{**PAID, "code_length_bits": 0.0})
    assert [line["value"] for line in lines] == [line["value"] for line in free]
    later = bound_losses(path, **PAID, online=True, trial=3)
    assert later[0]["value"] > lines[0]["value"], "the best of several runs pays for the others"
    declared = "one pass, each batch is scored before its step"
    monkeypatch.setattr("sys.argv", ["tokenbound", "bound", path, "--vocab-size", "257", "--online", declared])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code
    assert "They say nothing about the last model" in shown
    assert f"Declared: {declared}." in shown
    assert "No protocol was paid for" not in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--code-length-bits is missing"),
        (["--online", " "], "--online is empty"),
        (["--online", "one pass", "--code-length-bits", "9"], "--online pays no code"),
        (["--online", "one pass", "--protocol", "default"], "--online pays no code"),
    ],
)
def test_a_code_or_a_training_run_is_asked_for(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "a.parquet", nll=NLL)
    monkeypatch.setattr("sys.argv", ["tokenbound", "bound", path, "--vocab-size", "257", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("value", [0.0, 1e-7, 80.0])
def test_losses_that_are_all_alike_have_a_bound(tmp_path: Path, value: float) -> None:
    path = write(tmp_path / "a.parquet", nll=np.full(5000, value, np.float32), entropy=np.zeros(5000))
    for line in bound_losses(path, **PAID):
        assert line["value"] is None or line["value"] >= line["empirical"]


def test_a_run_whose_last_shard_is_missing_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    losses = make_losses([64, 64, 64])
    run.commit(0, losses, json.loads(shard_evidence(losses, 257, (1, 10, 100)).to_json()), "f")
    run.write_json("plan.json", {"num_windows": 3})
    assert bound_losses(str(tmp_path), **PAID)[0]["value"] > 0
    run.write_json("plan.json", {"num_windows": 4})
    with pytest.raises(InputError, match=r"shards are missing \(3 of 4 windows"):
        bound_losses(str(tmp_path), **PAID)


def test_tokens_as_text_are_not_taken_for_ids(tmp_path: Path) -> None:
    assert bound_losses(write(tmp_path / "a.parquet", nll=NLL, token=["a"] * len(NLL)), **PAID)[0]["value"] > 0


def test_a_window_in_two_files_is_refused(tmp_path: Path) -> None:
    rows = pa.ListArray.from_arrays(pa.array(range(0, 60_001, 600)), pa.array(NLL))
    for name, first in (("a", 0), ("b", 99)):
        write(tmp_path / f"{name}.parquet", nll=rows, window_id=np.arange(first, first + 100))
    with pytest.raises(MismatchError, match=r"window_id 99 stands twice \(in .*a\.parquet, .*b\.parquet\)"):
        bound_losses(str(tmp_path), **PAID)


@pytest.mark.parametrize(("shift", "verdict"), [(3, None), (2, "window_id 2 stands twice")])
def test_a_run_that_counts_a_window_twice_is_refused(tmp_path: Path, shift: int, verdict: str | None) -> None:
    run = RunDirectory(str(tmp_path))
    for shard, first in enumerate((0, shift)):
        losses = make_losses([64, 64, 64], seed=shard)
        losses = replace(losses, window_id=losses.window_id + first)
        run.commit(shard, losses, json.loads(shard_evidence(losses, 257, (1, 10, 100)).to_json()), "f")
    if verdict is None:
        assert bound_losses(str(tmp_path), **PAID)[0]["value"] > 0
    else:
        with pytest.raises(MismatchError, match=verdict):
            bound_losses(str(tmp_path), **PAID)


def test_missing_files_and_unknown_methods(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not exist"):
        bound_losses(str(tmp_path / "nothing.parquet"), **PAID)
    with pytest.raises(InputError, match="--method"):
        bound_losses(write(tmp_path / "a.parquet", nll=NLL), **PAID, method="magic")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"b\.parquet"):
        bound_losses(str(tmp_path / "b.parquet"), **PAID)


def test_files_without_rows_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", nll=NLL[:0])
    with pytest.raises(InputError, match="no rows"):
        bound_losses(str(tmp_path), **PAID)
    write(tmp_path / "b.parquet", nll=NLL)
    assert bound_losses(str(tmp_path), **PAID, method="azuma")[0]["value"] > 0


def test_a_sampled_run_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_json("plan.json", {"scoring_identity": {"sampled": True}})
    run.write("shards/00000.json", b"{}")
    with pytest.raises(InputError, match="holds a sample"):
        open_ledger(str(tmp_path), 257)
