"""Finished parts of a piece of work that may be killed: bytes by name, in a folder until all is done."""

from __future__ import annotations

import hashlib

from tokenbound.store.run import RunDirectory, canonical_json


class Parts:
    """Parts of the work that an identity names; those of another identity are not seen.

    Each is a file named by a digest of the identity and the part's name, written whole or not at all, with a digest of
    its bytes in front: a part that was damaged counts as missing.

    Args:
        folder: Where they are kept; None keeps them in memory.
        identity: Everything that decides the parts, as JSON data.
    """

    def __init__(self, folder: str | None, identity: object) -> None:
        """Nothing is written yet."""
        self._directory = None if folder is None else RunDirectory(folder)
        self._identity = canonical_json(identity)
        self._memory: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        """A part's bytes; None where it is not done."""
        if self._directory is None:
            return self._memory.get(name)
        file = self._file(name)
        data = self._directory.read(file) if self._directory.exists(file) else b""
        return data[32:] if len(data) >= 32 and hashlib.sha256(data[32:]).digest() == data[:32] else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a finished part."""
        if self._directory is None:
            self._memory[name] = data
        else:
            self._directory.write(self._file(name), hashlib.sha256(data).digest() + data)

    def _file(self, name: str) -> str:
        return hashlib.sha256(self._identity + b"\n" + name.encode()).hexdigest()
