"""Artifacts by the names that configs give them: a path, a URI, or `demo`."""

from __future__ import annotations

from functools import lru_cache

from tokenbound.compression.artifact_file import ArtifactFile, open_artifact
from tokenbound.errors import InputError, MismatchError
from tokenbound.shipped import demo_artifact
from tokenbound.store.filesystem import anchored, resolve
from tokenbound.store.remote import file_infos

DEMO = "demo"


def named_artifact(
    name: str, *, sha256: str | None = None, folder: str | None = None, field: str = "what.model.artifact"
) -> ArtifactFile:
    """Open the artifact that a name stands for.

    Args:
        name: A path or URI, or `demo`.
        sha256: The digest that it must have, where that is known.
        folder: `how.local_folder`.
        field: Where the name was given, for messages.

    Raises:
        InputError: there is none, it cannot be read, or this machine has no place for a copy.
        MismatchError: it has another digest.
    """
    if name == DEMO:
        found = ArtifactFile(demo_artifact())
        if sha256 not in (None, found.sha256):
            raise MismatchError(f"{field}: the demo's artifact has the digest {found.sha256}, not {sha256}")
        return found
    try:
        filesystem, path = resolve(name)
        info = file_infos(filesystem, path)
        return _opened(name, sha256, folder, info.size, info.mtime_ns)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{field}: {name} does not exist; make it with `tokenbound compress`") from None
    except OSError as error:
        raise InputError(f"{field}: {name} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=4)
def _opened(name: str, sha256: str | None, folder: str | None, size: int | None, mtime_ns: int | None) -> ArtifactFile:
    """An artifact that this process may ask for again: it is hashed, and fetched, once while it stays as it is."""
    return open_artifact(name, sha256=sha256, folder=folder)


def everywhere(name: str) -> str:
    """The name of an artifact for processes that run in another directory."""
    return name if name == DEMO else anchored(name)
