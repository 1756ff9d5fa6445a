"""Implementations are found by name: built-in ones by their file, others by the entry points of their packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plugins_support import install

from tokenbound.bounds.lines import LINES, find_bound, require_method
from tokenbound.bounds.lines.base import Bound
from tokenbound.errors import InputError
from tokenbound.plugins import Registry, plugins_used

GROUP = "tokenbound.bounds"
TOY = """
from tokenbound.bounds.lines.azuma import Azuma

class Toy(Azuma):
    name = "{name}"
"""


def registry() -> Registry[Bound]:
    """One that has loaded nothing yet."""
    return Registry(
        "bound", group=GROUP, package="tokenbound.bounds.lines", contract="tokenbound.bounds.lines.base:Bound"
    )


def test_every_file_of_the_folder_is_a_bound_and_base_classes_are_none() -> None:
    assert set(registry().built_in) == {"azuma", "bits", "document", "freedman", "kl", "relative"}
    assert registry().names() == tuple(registry().built_in)
    assert registry().origin("kl") is None


def test_a_plugin_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, group=GROUP, name="found", module="toy_found", source=TOY.format(name="found"))
    own = registry()
    assert own.names()[-1] == "found"
    assert own.origin("found") == "toy-toy_found 1.0"
    assert own.get("found").__module__ == "toy_found"
    assert plugins_used((own, ("kl", "found"))) == {GROUP: {"found": "toy-toy_found 1.0"}}
    assert plugins_used((own, ("kl",))) == {}


def test_what_is_listed_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, group=GROUP, name="broken", module="toy_broken", source="1 / 0\n")
    assert "broken" in registry().names()
    assert registry().get("azuma").name == "azuma"
    with pytest.raises(InputError, match=r"'broken' of toy-toy_broken 1.0 .*cannot be imported: ZeroDivisionError"):
        registry().get("broken")


@pytest.mark.parametrize("source", ["class Toy: name = 'wrong'\n", "Toy = 3\n", TOY.format(name="other")])
def test_what_does_not_keep_the_contract_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    install(tmp_path, monkeypatch, group=GROUP, name="wrong", module="toy_wrong", source=source)
    monkeypatch.delitem(sys.modules, "toy_wrong", raising=False)
    with pytest.raises(InputError, match=r"concrete subclass of .*Bound whose `name` is 'wrong'"):
        registry().get("wrong")


def test_a_name_that_is_taken_is_refused_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TOY.format(name="azuma")
    install(tmp_path / "a", monkeypatch, group=GROUP, name="azuma", module="toy_clash", source=source)
    with pytest.raises(InputError, match=r"'azuma' is offered by tokenbound and by toy-toy_clash 1.0"):
        registry().get("azuma")
    assert registry().get("kl").name == "kl"
    for place in ("b", "c"):
        install(tmp_path / place, monkeypatch, group=GROUP, name="twice", module=f"toy_{place}", source="")
    with pytest.raises(InputError, match=r"offered by toy-toy_b 1.0 and by toy-toy_c 1.0; uninstall"):
        registry().get("twice")


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no bound 'hope'; choose one of azuma, .*kl, or install"):
        registry().get("hope")
    with pytest.raises(InputError, match="choose among azuma, bits, document, freedman, kl, or install"):
        require_method("relative")
    assert find_bound("hope") is None
    assert LINES.origin("azuma") is None
