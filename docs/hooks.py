"""What the pages say of the code is written by the code: config keys, commands, and files of the repository.

MkDocs calls the functions below. Pages link to files of the repository by relative paths, which work in a checkout; on
the site each file that is linked to is copied beside the pages, and a Markdown file becomes a page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=\))")
COPIED = "repository"
"""Folder of the site that holds copies of files of the repository."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages, and every file of the repository that a page links to."""
    from mkdocs.structure.files import File

    for path, text in (("reference/config.md", config_page()), ("reference/cli.md", cli_page())):
        files.append(File.generated(config, path, content=text))
    for target in sorted(
        {name for page in files.documentation_pages() for name in _outside(page.src_uri, page.content_string)}
    ):
        place = ROOT / target
        if place.is_file():
            text = place.read_text(encoding="utf-8")
            files.append(File.generated(config, f"{COPIED}/{target}", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what the code says, and point links that leave the folder of the pages at the copies.

    Links to folders become plain names.
    """
    markdown = with_generated(markdown)
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri.startswith(COPIED):
        return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", markdown)

    def moved(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[1])
        if target is None:
            return match[0]
        return posixpath.relpath(f"{COPIED}/{target}", here or ".")

    markdown = re.sub(
        r"\[([^\]]*)\]\(([^)#\s]+/?)\)", lambda m: m[1] if _is_folder(page.file.src_uri, m[2]) else m[0], markdown
    )
    return LINK.sub(moved, markdown)


def _target(page: str, link: str) -> str | None:
    """The file of the repository that a link of a page names; None where it stays among the pages."""
    found = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if found.startswith(("docs/", "..")) or not (ROOT / found).exists() else found


def _is_folder(page: str, link: str) -> bool:
    target = None if link.startswith("http") else _target(page, link)
    return target is not None and (ROOT / target).is_dir()


def _outside(page: str, text: str) -> Iterator[str]:
    for match in LINK.finditer(text):
        if target := _target(page, match[1]):
            yield target


# --- config keys ---------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of the run, training and sweep configs, from their models."""
    from tokenbound.config.run import PretrainConfig, RunConfig
    from tokenbound.config.sweep import SweepConfig

    parts = ["# Config keys", "Configs are YAML. An unknown key is an error, and `--set a.b=value` changes one key."]
    for title, model, command in (
        ("Run", RunConfig, "`evaluate`, `reevaluate` and `plan`"),
        ("Training", PretrainConfig, "`workflows.pretrain`"),
        ("Sweep", SweepConfig, "`sweep`"),
    ):
        parts += [f"## {title}", f"The config of {command}.", *_tables(model, "")]
    return "\n\n".join(parts) + "\n"


def _tables(model: Any, prefix: str) -> Iterator[str]:
    """A table for each section, the section's own fields first."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        section = _section(field.annotation)
        if section is not None:
            inner.append((path, section))
        default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        rows.append(f"| `{name}` | {_kind(field.annotation)} | {default} | {_cell(field.description or '')} |")
    heading = [f"### `{prefix}`"] if prefix else []
    text = _cell(str(model.__doc__ or "").partition("\n\n")[0])
    yield "\n\n".join([*heading, text, "| Key | Type | Default | Meaning |\n|---|---|---|---|\n" + "\n".join(rows)])
    for path, section in inner:
        yield from _tables(section, path)


def _section(annotation: Any) -> Any:
    from pydantic import BaseModel

    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
    return found[0] if len(found) == 1 else None


def _kind(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(typing|collections\.abc|pathlib|tokenbound\.[\w.]+)\.", "", str(text))
    text = re.sub(r"Annotated\[(\w+), .*\]", r"\1", text)
    return f"`{_cell(text)}`" if len(text) < 80 else "see the text"


def _shown(value: Any) -> str:
    from pydantic import BaseModel

    return "its defaults" if isinstance(value, BaseModel) else _cell(str(value))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# --- commands ------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options, from the command line itself."""
    import typer

    from tokenbound.cli import app

    group = typer.main.get_command(app)
    parts = ["# Commands", "`tokenbound COMMAND --help` prints the same."]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        rows = [
            f"| `{_name(each)}` | {_cell(getattr(each, 'help', None) or '')} | {_default(each)} |"
            for each in command.params
            if not getattr(each, "hidden", False) and each.name != "help"
        ]
        parts += [f"## tokenbound {name}", _cell(command.help or "")]
        if rows:
            parts.append("| Argument | Meaning | Default |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _name(parameter: Any) -> str:
    options = [each for each in parameter.opts if each.startswith("--")] or [str(parameter.name).upper()]
    return ", ".join(options)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, (), []) else f"`{_cell(str(parameter.default))}`"


# --- file formats --------------------------------------------------------------------------------------------------

PLACE = re.compile(r"<!-- generated: (.+?) -->")


def with_generated(markdown: str) -> str:
    """A page with its placeholders replaced by tables.

    Raises:
        KeyError: a placeholder without a table.
    """
    return PLACE.sub(lambda match: GENERATED[match[1]](), markdown)


def columns_table() -> str:
    """Every column of a losses file."""
    from tokenbound.store.losses import LIST_COLUMNS, NULL_COLUMNS, OPTIONAL_COLUMNS, TABLE_COLUMNS, Losses

    said = {
        **attribute_docs(Losses),
        "decision_cell": "Cells of the decisions of the window that occurred, ascending.",
        "decision_count": "How often each occurred.",
    }
    rows = []
    for name, kind in {**LIST_COLUMNS, **TABLE_COLUMNS}.items():
        may = [
            *(["absent"] if name in OPTIONAL_COLUMNS or name in TABLE_COLUMNS else []),
            *(["null"] if name in NULL_COLUMNS else []),
        ]
        rows.append((f"`{name}`", f"list of {kind}", said[name], " or ".join(may)))
    return _table(("Column", "Type", "Meaning", "May be"), rows)


def commit_record_table() -> str:
    """Every field of a commit record."""
    from tokenbound.store.run import CommitRecord

    return _table(("Field", "Meaning"), [(f"`{name}`", text) for name, text in attribute_docs(CommitRecord).items()])


def sections_table() -> str:
    """Every section of an artifact."""
    from tokenbound.compression.container import SECTION_IDS

    said = {
        "architecture": "the Hugging Face config, JSON",
        "settings": "the compression method and its options, JSON",
        "tokenizer": "the tokenizer, where it is counted",
        "base": "of a delta: its kind and the SHA-256 of its base, JSON",
        "index": "what each tensor is, and how long its code",
        "tensors": "the codes of all tensors, one after the other",
    }
    return _table(("Id", "Section", "Content"), [(str(n), f"`{name}`", said[name]) for name, n in SECTION_IDS.items()])


def dtypes_table() -> str:
    """Every dtype of a tensor."""
    from tokenbound.compression.dtypes import DTYPE_NAMES

    return _table(("Number", "Dtype"), [(str(number), f"`{name}`") for number, name in enumerate(DTYPE_NAMES)])


def codecs_table() -> str:
    """Every codec of a tensor, with the docstring of the module that decodes it."""
    import sys

    from tokenbound.compression.codecs import CODECS

    parts = []
    for number, codec in sorted(CODECS.items()):
        module = sys.modules[codec.decode.__module__]
        parts.append(f"### {number}: {codec.name}\n\n{_blocks(str(module.__doc__))}")
    return "\n\n".join(parts)


def attribute_docs(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by field."""
    import ast
    import inspect
    import textwrap
    from itertools import pairwise

    [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = str(text.value.value)
    return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blocks(docstring: str) -> str:
    """A docstring as Markdown: what is indented is a block of its own, set as it is."""
    import inspect

    paragraphs = re.split(r"\n{2,}", inspect.cleandoc(docstring))
    return "\n\n".join(f"```text\n{each}\n```" if each.startswith("    ") else each for each in paragraphs)


GENERATED = {
    "columns": columns_table,
    "commit record": commit_record_table,
    "sections": sections_table,
    "dtypes": dtypes_table,
    "codecs": codecs_table,
}
"""What a page may ask for, by the words of its placeholder."""
