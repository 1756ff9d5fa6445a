"""Parts of a corpus by the hash of each document's text, for training on one part and certifying another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

_DOMAIN = b"tokenbound/document-part/1\0"
"""Starts every hash, so that no other use of SHA-256 collides with it."""


@dataclass(frozen=True)
class DocumentPart:
    """The documents whose hash, as a number in [0, 1), lies in a range."""

    low: int
    """First hash of the part, of 2^64."""
    high: int
    """First hash behind it."""
    salt: str

    @classmethod
    def of(cls, part: Mapping[str, float | str]) -> Self:
        """From `corpus.part`, as it was validated.

        >>> first, second = (DocumentPart.of({"from": a, "to": a + 0.5, "salt": ""}) for a in (0.0, 0.5))
        >>> [first.holds(text) for text in ("a", "b", b"b", "c")], [second.holds(text) for text in ("a", "b", "c")]
        ([False, True, True, False], [True, False, True])
        """
        low, high = (int(Fraction(part[name]) * (1 << 64)) for name in ("from", "to"))
        return cls(low, high, str(part["salt"]))

    def holds(self, text: str | bytes) -> bool:
        """Whether a document is in the part: a function of its UTF-8 bytes and the salt alone."""
        salt, data = self.salt.encode(), text if isinstance(text, bytes) else text.encode()
        digest = hashlib.sha256(_DOMAIN + len(salt).to_bytes(8, "big") + salt + data).digest()
        return self.low <= int.from_bytes(digest[:8], "big") < self.high
