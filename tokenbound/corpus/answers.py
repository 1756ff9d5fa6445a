"""Documents of which a part is the answer: a prompt with its completion, or a conversation.

Under `targets: answers` the tokens of answers alone are scored. Whether a position is scored is predictable, as a bound
for a martingale needs it: it is known before the token is. A token belongs to an answer when it begins inside it, and
where it begins follows from the tokens before it. So it is part of what the risk is conditioned on that the prompt is
over, as it is that the document goes on; the value of the token is not. Where a token lies across the edge of an answer
there is no right side for it, and the document is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenbound.errors import InputError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answered:
    """A text and the places of its answers."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """First character and end of each answer, in order, apart from each other."""

    @classmethod
    def of(cls, prompt: str, completion: str) -> Answered:
        """A prompt with the completion right behind it.

        >>> Answered.of("2 + 2 =", " 4").answers
        ((7, 9),)
        """
        text = prompt + completion
        return cls(text, ((len(prompt), len(text)),))

    def __len__(self) -> int:
        """Characters."""
        return len(self.text)


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template turns into one text."""

    messages: tuple[Mapping[str, Any], ...]
    """Each with a `role`, most with a `content`, some with what only templates know."""

    @classmethod
    def of(cls, value: object, field: str) -> Conversation:
        """The messages of a row.

        A key whose value is null is left out: in columnar files every message has the keys of all.

        Args:
            value: of the column.
            field: its name.

        Raises:
            InputError: it is no list of messages, or a content is not text.
        """
        if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
            kind = "an empty list" if value == [] else type(value).__name__
            raise InputError(
                f"field {field!r} must be a list of messages with `role` and `content`, got {kind}; set "
                "`corpus.messages_field` or fix the row"
            )
        messages = tuple({key: part for key, part in item.items() if part is not None} for item in value)
        for number, message in enumerate(messages, start=1):
            role, content = message.get("role"), message.get("content", "")
            if not isinstance(role, str):
                raise InputError(f"message {number} of field {field!r} has no `role`; give each `role` and `content`")
            if not isinstance(content, str):
                raise InputError(
                    f"`content` of message {number} of field {field!r} is {type(content).__name__}, not text; write "
                    "the text itself"
                )
        return cls(messages)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that the messages hold, however deep."""
        return tuple(_texts(self.messages))

    def __len__(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))


Document = bytes | str | Answered | Conversation
"""What a source of texts yields."""


def document_bytes(document: Document) -> bytes:
    """All that a document is, for digests of rows; of a plain text its UTF-8.

    >>> document_bytes(Answered.of("a", "b"))
    b'["ab",[[1,2]]]'
    """
    if isinstance(document, Answered):
        return _canonical([document.text, document.answers])
    if isinstance(document, Conversation):
        return _canonical(document.messages)
    return document if isinstance(document, bytes) else document.encode()


def plain_text(document: bytes | str | Answered) -> bytes | str:
    """The text of a document."""
    return document.text if isinstance(document, Answered) else document


def answer_runs(document: Answered, spans: Int64) -> Int64:
    """The tokens of the answers of a text.

    >>> answer_runs(Answered.of("2+2=", "4!"), np.array([[0, 3], [3, 4], [4, 5], [5, 6]])).tolist()
    [[2, 4]]

    Args:
        document: the text.
        spans: int64 [T, 2], first character and end of each of its tokens.

    Returns:
        int64 [runs, 2], first token and end of each run.

    Raises:
        InputError: a token lies across the edge of an answer.
    """
    begins, ends = spans[:, 0], spans[:, 1]
    inside = np.zeros(len(spans), np.bool_)
    for start, stop in document.answers:
        for edge in (start, stop):
            across = np.flatnonzero((begins < edge) & (edge < ends))
            if len(across):
                low, high = map(int, spans[across[0]])
                raise InputError(
                    f"the token {document.text[low:high]!r} lies across the edge of an answer, at character {edge}; "
                    "begin the completion with the space before it, or end the prompt where a token ends"
                )
        inside |= (start <= begins) & (begins < stop)
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return edges.reshape(-1, 2).astype(np.int64)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """In no particular order; without recursion, since messages may be nested as deep as a parser lets them."""
    left: list[object] = [*messages]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


def _canonical(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode()
