"""Implementations of one contract, found by name: the package's own and those of installed distributions.

A registry reads a folder of this package, so that adding an implementation is adding a file. A distribution brings
its own through an entry point of the registry's group, whose name is the implementation's name:

    [project.entry-points."tokenbound.bounds"]
    hoeffding = "my_package.hoeffding:Hoeffding"

Entry points are listed without importing anything; a plugin is imported when its name is asked for, so that a broken
one stops only the runs that use it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tokenbound.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes that fulfil the contract `T`, found by the `name` that each of them has."""

    def __init__(self, kind: str, *, group: str, package: str, contract: str) -> None:
        """Describe a registry; nothing is imported before a name is asked for.

        Args:
            kind: what an implementation is called in messages, such as `bound`.
            group: the entry-point group in which distributions offer their own.
            package: the folder of the built-in ones, as a package.
            contract: the base class that each derives from, as `module:Class`; it may be abstract.
        """
        self.kind, self.group = kind, group
        self._package, self._contract = package, contract
        self._found: dict[str, type[T]] = {}

    def get(self, name: str) -> type[T]:
        """The implementation of this name.

        Raises:
            InputError: there is none, or more than one, or it cannot be imported.
        """
        if name not in self._found:
            plugin = self._entry_point(name)
            self._found[name] = self.built_in[name] if plugin is None else self._load(plugin)
        return self._found[name]

    def forget(self) -> None:
        """Look every name up again: packages were installed or removed while this process ran."""
        self._found.clear()

    def names(self) -> tuple[str, ...]:
        """Every name that is offered, the built-in ones first; no plugin is imported."""
        offered = {entry_point.name for entry_point in entry_points(group=self.group)}
        return (*self.built_in, *sorted(offered - set(self.built_in)))

    def origin(self, name: str) -> str | None:
        """The distribution and version that a plugin comes from; None for a built-in implementation.

        Raises:
            InputError: there is none of this name, or more than one.
        """
        plugin = self._entry_point(name)
        return None if plugin is None else _distribution(plugin)

    @cached_property
    def built_in(self) -> Mapping[str, type[T]]:
        """The implementations of this package, by name, in the order of their files."""
        package = import_module(self._package)
        modules = [import_module(f"{self._package}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
        return {
            found.name: found
            for module in modules
            for found in vars(module).values()
            if self._fulfils(found) and found.__module__ == module.__name__
        }

    def _fulfils(self, found: object) -> bool:
        """Whether an object is a concrete class of the contract that has a name."""
        module, _, base = self._contract.partition(":")
        contract = getattr(import_module(module), base)
        concrete = inspect.isclass(found) and issubclass(found, contract) and not inspect.isabstract(found)
        return concrete and isinstance(getattr(found, "name", None), str)

    def _entry_point(self, name: str) -> EntryPoint | None:
        """The plugin of a name; None where it is built in."""
        offered = list(dict.fromkeys(entry_points(group=self.group, name=name)))
        owners = ["tokenbound"] * (name in self.built_in) + sorted(map(_distribution, offered))
        if len(owners) > 1:
            raise InputError(f"the {self.kind} {name!r} is offered by {' and by '.join(owners)}; uninstall one of them")
        if not owners:
            raise InputError(
                f"there is no {self.kind} {name!r}; choose one of {', '.join(self.names())}, or install the package "
                "that provides it"
            )
        return offered[0] if offered else None

    def _load(self, plugin: EntryPoint) -> type[T]:
        where = f"the {self.kind} {plugin.name!r} of {_distribution(plugin)} ({plugin.value})"
        try:
            found = plugin.load()
        except Exception as error:  # whatever a stranger's module raises while it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{where} cannot be imported: {reason}; fix or uninstall it") from error
        if not self._fulfils(found) or found.name != plugin.name:
            raise InputError(
                f"{where} must be a concrete subclass of {self._contract} whose `name` is {plugin.name!r}; fix or "
                "uninstall it"
            )
        loaded: type[T] = found
        return loaded


def plugins_used(*used: tuple[Registry[Any], Iterable[str]]) -> dict[str, dict[str, str]]:
    """Which of the named implementations are plugins, as a certificate records them.

    Args:
        used: registries, each with the names that a run uses.

    Returns:
        {group: {name: "distribution version"}}; empty where everything is built in.

    >>> plugins_used()
    {}
    """
    found = {registry.group: {name: registry.origin(name) for name in sorted(set(names))} for registry, names in used}
    plugins = {group: {name: origin for name, origin in names.items() if origin} for group, names in found.items()}
    return {group: names for group, names in plugins.items() if names}


def _distribution(entry_point: EntryPoint) -> str:
    """Name and version of the distribution that declares an entry point.

    >>> _distribution(EntryPoint("toy", "toy:Toy", "tokenbound.bounds"))
    'an unknown distribution'
    """
    found = entry_point.dist
    return "an unknown distribution" if found is None else f"{found.name} {found.version}"
