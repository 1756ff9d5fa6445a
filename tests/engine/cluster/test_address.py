"""Which cluster is joined, and what is said where none answers."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenbound.engine.cluster.address import Address, check_folder, find_address, wait_for
from tokenbound.engine.cluster.auth import secure_token
from tokenbound.engine.cluster.session import ray_session
from tokenbound.errors import IncompleteError, InputError


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, None, None),
        ("local", "10.0.0.7:6379", None),
        (None, "local", None),
        (None, "", None),
        ("10.0.0.7:6379", "10.0.0.8:6379", Address("10.0.0.7:6379", "how.ray_address")),
        (None, "10.0.0.8:6379", Address("10.0.0.8:6379", "RAY_ADDRESS")),
        ("auto", "10.0.0.8:6379", Address("10.0.0.8:6379", "RAY_ADDRESS")),
        (None, "[::1]:6379", Address("[::1]:6379", "RAY_ADDRESS")),
    ],
)
def test_the_config_goes_before_the_environment(
    configured: str | None, environment: str | None, expected: Address | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert find_address(configured) == expected


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_running_session_is_found_in_its_file(asked: str | None, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    found = find_address(asked)
    assert found is not None
    assert found.text == "127.0.0.1:6379"
    assert str(tmp_path / "ray" / "ray_current_cluster") in str(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://10.0.0.7:8265", r"dashboard.*HOST:PORT"),
        ("ray://10.0.0.7:10001", r"ray:// addresses are not supported.*HOST:PORT"),
        ("redis://10.0.0.7:1", r"redis:// addresses are not supported"),
        ("10.0.0.7", "is not a Ray address; give HOST:PORT"),
        ("10.0.0.7:port", "is not a Ray address"),
        ("10.0.0.7:70000", "is not a Ray address"),
        ("auto", "no Ray session runs on this machine; start one with `ray start --head`"),
    ],
)
@pytest.mark.parametrize("origin", ["how.ray_address", "RAY_ADDRESS"])
def test_an_address_that_no_driver_can_join_is_one_line(
    origin: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if origin == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", text)
    with pytest.raises(InputError, match=f"^{origin} '{re.escape(text)}'.*{says}") as raised:
        find_address(text if origin == "how.ray_address" else None)
    assert "\n" not in str(raised.value)


def test_credentials_in_an_address_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:hunter2@10.0.0.7:10001")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS is a URI") as raised:
        find_address()
    assert "hunter2" not in str(raised.value)


def test_a_folder_too_long_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(InputError, match=r"^RAY_TMPDIR '/tmp/x+' has 65 bytes.*set RAY_TMPDIR to a shorter folder$"):
        check_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 30)
    check_folder()


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_never_answers_is_given_up(
    silent: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a handler of an earlier test may write to what is closed
    started = time.monotonic()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    says = rf"^how.ray_address '{silent}': no Ray cluster answered within 2 s \(how.ray_timeout_s\)"
    with pytest.raises(IncompleteError, match=says), ray_session(silent, timeout_s=2):
        pass
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == "", "what Ray's client writes stays out of the way"


def test_a_refused_token_is_told_at_once() -> None:
    import ray

    with pytest.raises(ray.exceptions.AuthenticationError, match="wrong token"):
        wait_for(Address("127.0.0.1:1", "RAY_ADDRESS"), 60, ask="import sys; sys.exit('wrong token')")
    wait_for(Address("127.0.0.1:1", "RAY_ADDRESS"), 60, ask="")


posix = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home below a folder that everyone may enter, under a umask that lets everyone read."""
    before = os.umask(0)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("HOME", f"{folder}/home")
        yield Path(folder, "home").resolve()
    os.umask(before)


@posix
def test_the_token_is_its_owners_alone_whatever_the_umask(home: Path) -> None:
    secure_token(starts_session=True)
    token = home / ".ray" / "auth_token"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    kept = token.read_bytes()
    secure_token(starts_session=True)
    assert token.read_bytes() == kept


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
@pytest.mark.parametrize("starts_session", [True, False])
def test_a_token_that_others_can_read_is_refused(home: Path, mode: int, starts_session: bool) -> None:
    secure_token(starts_session=True)
    token = home / ".ray" / "auth_token"
    token.chmod(mode)
    secure_token(starts_session=starts_session)  # its folder keeps the others out
    token.parent.chmod(0o755)
    with pytest.raises(InputError, match=rf"^{token} can be read by other users.*delete it \(a new one is written\)"):
        secure_token(starts_session=starts_session)


@posix
def test_a_token_of_another_place_or_none_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secure_token(starts_session=False)
    assert not home.exists(), "who joins a cluster makes no token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    secure_token(starts_session=True)
    assert not home.exists()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    secure_token(starts_session=True)
    assert not home.exists()


@posix
def test_a_closed_folder_above_protects_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "closed" / "token"
    token.parent.mkdir(mode=0o700)
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    secure_token(starts_session=False)
