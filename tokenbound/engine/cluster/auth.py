"""The token that lets a process join a local Ray session: whoever reads it can run code as its owner."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tokenbound.errors import InputError

OTHERS_READ = 0o044
"""Mode bits of a file that its group, or everyone, may read."""
OTHERS_ENTER = 0o011
"""Mode bits of a folder that its group, or everyone, may pass through."""


def secure_token(*, starts_session: bool) -> None:
    """Write the token that Ray would write readable for all; refuse one that others can read.

    Args:
        starts_session: whether a missing token may be made, as Ray does for a session of its own.

    Raises:
        InputError: other users of the machine can read the token.
    """
    if os.name != "posix" or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not path.exists() and starts_session and not named:
        _write_token(path)
    if path.exists() and _others_read(path):
        raise InputError(
            f"{path} can be read by other users of this machine, who could then run code as you; delete it (a new one "
            "is written) and restart your Ray clusters"
        )


def _write_token(path: Path) -> None:
    """Write a new token whole or not at all; of two starts at once the first decides."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o700)
        path.parent.chmod(0o700)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def _others_read(path: Path) -> bool:
    """Whether the modes of a file and of every folder above it let others than its owner read it."""
    path = path.resolve()
    return bool(path.stat().st_mode & OTHERS_READ) and all(
        folder.stat().st_mode & OTHERS_ENTER for folder in path.parents
    )
