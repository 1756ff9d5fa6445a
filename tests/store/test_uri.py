"""Paths are joined before a URI's options, and no URI brings credentials in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenbound import cli
from tokenbound.config.run import RunConfig, load_config
from tokenbound.errors import InputError
from tokenbound.store import filesystem as files
from tokenbound.store.run import RunDirectory
from tokenbound.store.uri import join, refuse_credentials, reroot, split

PLACE = "s3://bucket/runs/a?endpoint_override=http://127.0.0.1:9&scheme=http"
SECRET = "wJalrXUtnFEMI7MDENG"
REFUSED = [
    f"s3://AKIA:{SECRET}@bucket/run",
    f"s3://AKIA:{SECRET}/half%2F@bucket/run",
    f"s3://{SECRET}@bucket/run",
    f"s3a://AKIA:{SECRET}@bucket",
    f"gs://user:{SECRET}@bucket/run",
    f"gs://{SECRET}@bucket/run",
    f"gs://bucket/run?access_token={SECRET}",
    f"abfss://:{SECRET}@account.dfs.core.windows.net/run",
    f"hdfs://user:{SECRET}@host:8020/run",
    f"s3://bucket/run?secret_key={SECRET}",
    f"abfs://container@account/run?client_secret={SECRET}",
    f"https://bucket.s3.amazonaws.com/a.parquet?X-Amz-Signature={SECRET}",
    f"s3://bucket/run?endpoint_override=http://user:{SECRET}@127.0.0.1:9000",
]


@pytest.mark.parametrize("name", ["plan.json", "a b#c%.json", "step=3?.json"])
def test_what_is_joined_lies_below_the_place(name: str) -> None:
    filesystem, path = files.resolve(join(PLACE, "models", name))
    assert path == f"bucket/runs/a/models/{name}"
    assert not files.is_local(filesystem)
    assert split(join(PLACE, name)) == (PLACE, name)
    assert files.resolve(reroot(PLACE, path))[1] == path


def test_names_in_a_run_and_their_places(tmp_path: Path) -> None:
    for run in (RunDirectory(PLACE), RunDirectory(str(tmp_path))):
        assert run.relative(run.place("models/ab/certificate.json")) == "models/ab/certificate.json"
    assert RunDirectory(PLACE).place("plan.json").startswith("s3://bucket/runs/a/plan.json?endpoint_override=")


@pytest.mark.parametrize("path", ["s3://bucket", "s3://bucket/", "/", ""])
def test_a_place_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="names no file"):
        split(path)


@pytest.mark.parametrize("uri", REFUSED)
def test_credentials_in_a_uri_are_refused_without_being_repeated(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("what: {corpus: {source: text}}\n")
    with pytest.raises(InputError, match="credentials") as resolved:
        files.resolve(uri)
    with pytest.raises(InputError, match=r"how\.output is a URI") as validated:
        load_config(RunConfig, config, [f"how.output={uri}"])
    with pytest.raises(InputError, match=r"what\.corpus\.paths\[1\]") as listed:
        load_config(RunConfig, _listing(tmp_path, uri))
    monkeypatch.setattr("sys.argv", ["tokenbound", "status", uri])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert stop.value.code == InputError.exit_code
    for text in (*map(str, (resolved.value, validated.value, listed.value)), shown.err, shown.out):
        assert SECRET not in text
        assert "AKIA" not in text


def _listing(folder: Path, uri: str) -> Path:
    path = folder / "listing.yaml"
    path.write_text(f"what: {{corpus: {{source: text, paths: [a.txt, '{uri}']}}}}\n")
    return path


@pytest.mark.parametrize(
    "text",
    [
        PLACE,
        "s3://bucket/mail@host:80/run?region=eu-west-1",
        "gs://anonymous@bucket/run?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=5",
        "hdfs://user@host:8020/run",
        "abfs://container@account.dfs.core.windows.net/run",
        "a:b@c.txt",
        "see https://example.org/key@v1: the declaration",
    ],
)
def test_what_is_no_credential_is_let_through(text: str) -> None:
    refuse_credentials(text)
