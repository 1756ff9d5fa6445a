"""Finished parts of a piece of work that may be killed: bytes by name, in a folder until all is done."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tokenbound.store import filesystem as files
from tokenbound.store.run import RunDirectory, canonical_json

_DIGEST_BYTES = 32


class Parts:
    """Parts of the work that an identity names; those of another identity are not seen.

    Each is a file named by a digest of the identity and the part's name, with a digest of its bytes in front: a part
    that was damaged, or that a crash of the machine left half written, counts as missing.

    Args:
        folder: Where they are kept, a path or URI.
        identity: Everything that decides the parts, as JSON data.
    """

    def __init__(self, folder: str, identity: object) -> None:
        """Nothing is written yet."""
        self._directory = RunDirectory(folder)
        self._identity = canonical_json(identity)

    def get(self, name: str) -> memoryview | None:
        """A part's bytes; None where it is not done."""
        file = self._file(name)
        data = memoryview(self._directory.read(file) if self._directory.exists(file) else b"")
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return content if len(digest) == _DIGEST_BYTES and hashlib.sha256(content).digest() == digest else None

    def put(self, name: str, *pieces: bytes | memoryview) -> None:
        """Keep a finished part, given in pieces."""
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        everything, file = (digest.digest(), *pieces), self._file(name)
        if not files.is_local(self._directory.filesystem):
            self._directory.write(file, b"".join(everything))
            return
        path = Path(self._directory.path(file))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as stream:  # not synced: the digest tells what is whole
                stream.writelines(everything)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Give up a part that is not needed any more; one that is not there is none."""
        file = self._file(name)
        if self._directory.exists(file):
            files.delete(self._directory.filesystem, self._directory.path(file))

    def _file(self, name: str) -> str:
        return hashlib.sha256(self._identity + b"\n" + name.encode()).hexdigest()
