"""The bounds that a certificate can print: one class per bound, one file per class.

:mod:`~tokenbound.bounds.lines.base` says what a bound is and how to add one. Everywhere else a bound is found here by
its name, whether it is built in or comes from an installed package.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from tokenbound.errors import InputError
from tokenbound.plugins import Registry

if TYPE_CHECKING:
    from tokenbound.bounds.lines.base import Bound

LINES: Registry[Bound] = Registry(
    "bound",
    group="tokenbound.bounds",
    package="tokenbound.bounds.lines",
    contract="tokenbound.bounds.lines.base:Bound",
)
"""Every bound by its name."""


@cache
def bound_named(name: str) -> Bound:
    """The bound of this name.

    Raises:
        InputError: there is none, or its package cannot be imported.

    >>> bound_named("azuma").bounds_risk
    True
    """
    return LINES.get(name)()


def find_bound(name: str) -> Bound | None:
    """The bound of this name; None where the package that provides it is not installed.

    >>> find_bound("of a package that is not installed") is None
    True
    """
    return bound_named(name) if name in LINES.built_in or name in LINES.names() else None


@cache
def automatic_bounds() -> tuple[Bound, ...]:
    """The bounds that nobody asks for by name: a claim that they apply to always prints them.

    >>> [bound.name for bound in automatic_bounds()]
    ['relative']
    """
    return tuple(bound_named(name) for name, kind in LINES.built_in.items() if not kind.is_method)


def method_names() -> tuple[str, ...]:
    """The names that `bound.methods` accepts; no plugin is imported.

    >>> method_names()[:5]
    ('azuma', 'bits', 'document', 'freedman', 'kl')
    """
    automatic = {bound.name for bound in automatic_bounds()}
    return tuple(name for name in LINES.names() if name not in automatic)


def counts_documents(methods: Iterable[str]) -> bool:
    """Whether a claim with these methods needs the number of documents that have a scored token.

    >>> counts_documents(("freedman", "document")), counts_documents(("freedman", "kl"))
    (True, False)
    """
    return any(bound_named(name).counts_documents for name in methods)


def scores_decisions(methods: Iterable[str]) -> bool:
    """Whether a claim with these methods needs the decisions of every token.

    >>> scores_decisions(("freedman", "bits")), scores_decisions(("freedman", "kl"))
    (True, False)
    """
    return any("decision_cell" in bound_named(name).columns for name in methods)


def require_method(name: str) -> str:
    """The name itself, if a bound that can be asked for has it.

    Raises:
        InputError: none has it, or its package cannot be imported.

    >>> require_method("kl")
    'kl'
    """
    found = find_bound(name)
    if found is None or not found.is_method:
        known = ", ".join(method_names())
        raise InputError(f"there is no bound {name!r}; choose among {known}, or install the package that provides it")
    return name
