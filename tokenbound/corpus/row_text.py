"""The document of a row: in which fields it stands, and what becomes of a row that has none.

One rule for every source of rows:

* A document is the text of `text_field`, or what `prompt_field` and `completion_field`, or `messages_field`, make.
* A key names a field, or with dots a field inside another (`a.b`). A name that has the dots itself comes first.
* A text is one document. A list of texts is one document too: its items, each on a line of its own.
* A row has no text where a field that makes its document is null or absent, or lies inside one that is. `missing` says
  whether such a row is refused or left out; a text without a character is a text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from tokenbound.corpus.answers import Answered, Conversation
from tokenbound.errors import InputError


class Step(NamedTuple):
    """One step into a row."""

    key: str
    """A field that the row has."""
    rest: str
    """Path inside it; empty where it is the field that was asked for."""


def first_step(names: Collection[str], path: str) -> Step | None:
    """The longest beginning of a dotted path that is one of some names, and what follows it; None for none.

    >>> first_step(["a", "a.b"], "a.b.c"), first_step(["a"], "a.b.c"), first_step(["b"], "a.b")
    (Step(key='a.b', rest='c'), Step(key='a', rest='b.c'), None)
    """
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        key = ".".join(parts[:count])
        if key in names:
            return Step(key, ".".join(parts[count:]))
    return None


Value = str | Conversation
"""What a field of a row holds."""


@dataclass(frozen=True)
class RowField(ABC):
    """A field of a row of which the document is made.

    Attributes:
        holds: what its values are, for messages.
    """

    name: str
    """As the config names it."""
    missing: str = "refuse"
    """`corpus.missing`."""
    key: str = "text_field"
    """The key of `what.corpus` that names it."""

    holds: ClassVar[str]

    @abstractmethod
    def read(self, value: object) -> Value:
        """What a value that is there says.

        Raises:
            InputError: it is something else than the field holds.
        """

    def of(self, row: Mapping[str, object]) -> Value | None:
        """What the field of a row holds; None where there is nothing and such rows are left out.

        Raises:
            InputError: there is nothing, or something else than the field holds.
        """
        if isinstance(value := row.get(self.name), str):
            return self.read(value)  # nearly every row
        step = first_step(row, self.name)
        if step is None:
            names = ", ".join(sorted(row)) or "none"
            self._require_skipped(f"no field {self.name!r} (there are: {names}); set `corpus.{self.key}`")
            return None
        return self.inside(row[step.key], step.rest)

    def inside(self, value: object, rest: str) -> Value | None:
        """The same, inside a field.

        Args:
            value: of the outer field.
            rest: path inside it; empty where it is the field itself.

        Raises:
            InputError: there is nothing, or something else than the field holds.
        """
        while rest and isinstance(value, Mapping):
            step = first_step(value, rest)
            if step is None:
                names = ", ".join(sorted(value)) or "none"
                self._require_skipped(f"no field {self.name!r} (in it there are: {names}); set `corpus.{self.key}`")
                return None
            value, rest = value[step.key], step.rest
        if value is None:
            self._require_skipped(f"field {self.name!r} is null; fix the row")
            return None
        if rest:
            raise InputError(
                f"field {self.name!r}: {rest!r} would be inside a {_kind(value)}; set `corpus.{self.key}` to a field "
                f"that holds {self.holds}"
            )
        return self.read(value)

    def _require_skipped(self, problem: str) -> None:
        """Refuse a row without a text where such rows are not left out."""
        if self.missing == "refuse":
            raise InputError(f"{problem}, or `corpus.missing: skip` to leave such rows out")


class RowText(RowField):
    r"""A field that holds text, or a list of texts.

    >>> RowText("a.b").of({"a": {"b": ["one", "two"]}})
    'one\ntwo'
    """

    holds = "text"

    def read(self, value: object) -> str:
        """The text.

        Raises:
            InputError: it is neither text, nor bytes that hold UTF-8, nor a list of these.
        """
        if isinstance(value, str):
            return value
        return "\n".join(self._items(value)) if isinstance(value, list | tuple) else self._text(value)

    def _items(self, values: Iterable[object]) -> Iterator[str]:
        for number, item in enumerate(values, start=1):
            if not isinstance(item, str | bytes):
                raise InputError(
                    f"field {self.name!r}: item {number} of the list is {_kind(item)}, not text; set "
                    f"`corpus.{self.key}` to a text or a list of texts, or fix the row"
                )
            yield self._text(item)

    def _text(self, value: object) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, bytes):
            raise InputError(f"field {self.name!r} is {_kind(value)}, not text; set `corpus.{self.key}` or fix the row")
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"field {self.name!r} is not UTF-8 (byte 0x{value[error.start]:02x} at {error.start}); convert it to "
                f"UTF-8, or set `corpus.{self.key}`"
            ) from None


class RowMessages(RowField):
    """A field that holds a conversation.

    >>> RowMessages("chat").of({"chat": [{"role": "user", "content": "Hi"}]}).texts
    ('Hi', 'user')
    """

    holds = "a list of messages"

    def read(self, value: object) -> Conversation:
        """The messages.

        Raises:
            InputError: it is no list of messages, or a content is not text.
        """
        return Conversation.of(value, self.name)


def row_document(values: Sequence[Value | None]) -> str | Answered | Conversation | None:
    """The document that the values of a row's fields make; None for a row that is left out.

    Args:
        values: of the field of a text or a conversation, or of a prompt and its completion.

    >>> row_document(["2 + 2 =", " 4"]), row_document(["2 + 2 =", None])
    (Answered(text='2 + 2 = 4', answers=((7, 9),)), None)
    """
    if None in values:
        return None
    if len(values) == 1:
        return values[0]
    prompt, completion = values
    assert isinstance(prompt, str), "conversations have no completion beside them"
    assert isinstance(completion, str), "conversations have no prompt beside them"
    return Answered.of(prompt, completion)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
