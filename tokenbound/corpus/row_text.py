"""The text of a row: where in the row it stands, and what becomes of a row that has none.

One rule for every source of rows:

* `text_field` names a field, or with dots a field inside another (`a.b`). A name that has the dots itself comes first.
* A text is one document. A list of texts is one document too: its items, each on a line of its own.
* A row has no text where the field is null or absent, or lies inside one that is. `missing` says whether such a row is
  refused or left out; a text without a character is a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class RowText:
    """Which field of a row is the document."""

    field: str
    """`corpus.text_field`."""
    missing: str = "refuse"
    """`corpus.missing`."""

    def of(self, row: Mapping[str, object]) -> str | None:
        r"""The text of a row; None where it has none and such rows are left out.

        Raises:
            InputError: it has none, or something else than text.

        >>> RowText("a.b").of({"a": {"b": ["one", "two"]}})
        'one\ntwo'
        """
        if isinstance(value := row.get(self.field), str):
            return value  # nearly every row
        step = first_step(row, self.field)
        if step is None:
            names = ", ".join(sorted(row)) or "none"
            self._require_skipped(f"no field {self.field!r} (there are: {names}); set `corpus.text_field`")
            return None
        return self.inside(row[step.key], step.rest)

    def inside(self, value: object, rest: str) -> str | None:
        """The text inside a field.

        Args:
            value: of the field.
            rest: path inside it; empty where the field is the text.

        Raises:
            InputError: there is none, or something else than text.
        """
        while rest and isinstance(value, Mapping):
            step = first_step(value, rest)
            if step is None:
                names = ", ".join(sorted(value)) or "none"
                self._require_skipped(f"no field {self.field!r} (in it there are: {names}); set `corpus.text_field`")
                return None
            value, rest = value[step.key], step.rest
        if isinstance(value, str) and not rest:
            return value
        if value is None:
            self._require_skipped(f"field {self.field!r} is null; fix the row")
            return None
        if rest:
            raise InputError(
                f"field {self.field!r}: {rest!r} would be inside a {_kind(value)}; set `corpus.text_field` to a field "
                "that holds text"
            )
        return "\n".join(self._items(value)) if isinstance(value, list | tuple) else self._text(value)

    def _items(self, values: Iterable[object]) -> Iterator[str]:
        for number, item in enumerate(values, start=1):
            if not isinstance(item, str | bytes):
                raise InputError(
                    f"field {self.field!r}: item {number} of the list is {_kind(item)}, not text; set "
                    "`corpus.text_field` to a text or a list of texts, or fix the row"
                )
            yield self._text(item)

    def _text(self, value: object) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, bytes):
            raise InputError(
                f"field {self.field!r} is {_kind(value)}, not text; set `corpus.text_field` or fix the row"
            )
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"field {self.field!r} is not UTF-8 (byte 0x{value[error.start]:02x} at {error.start}); convert it to "
                "UTF-8, or set `corpus.text_field`"
            ) from None

    def _require_skipped(self, problem: str) -> None:
        """Refuse a row without a text where such rows are not left out."""
        if self.missing == "refuse":
            raise InputError(f"{problem}, or `corpus.missing: skip` to leave such rows out")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
