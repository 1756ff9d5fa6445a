"""Mutants of a Python module: small changes that a good test suite should notice.

A mutant is named by the function it changes, the text of the changed expression before and after, and an ordinal among
equal changes of that function. The name says nothing about files or line numbers, so that it survives a function's move
to another file.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CALLS = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "log1p": "log",
    "expm1": "exp",
}
_UNWRAPPED = frozenset(
    {"abs", "as_float16", "ceil", "clip", "cumsum", "exp", "expm1", "float16", "floor", "log", "log1p", "log2", "max"}
    | {"maximum", "min", "minimum", "round_up", "sorted", "sqrt", "where"}
)
MODULE_LEVEL = "<module>"


_Path = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    """Dotted name."""
    function: str
    """Qualified name of the outermost function or method, or `<module>` for constants and defaults of fields."""
    name: str
    """Stable name; see the module."""
    line: int
    """Where the change was found, for a reader; no part of the name."""
    path: _Path
    """From the module's syntax tree to the changed node."""
    variant: int
    """Which of the node's changes."""

    def tree(self, source: str) -> ast.Module:
        """The whole changed module."""
        tree = ast.parse(source)
        _replace(tree, self.path, _variants(_descend(tree, self.path), self.path)[self.variant]())
        return ast.fix_missing_locations(tree)


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of one module, in the order of its source; their names are unique within it."""
    original = ast.parse(source)
    names: Counter[str] = Counter()
    found = []
    for site in _sites(original):
        for index, variant in enumerate(site.variants):
            change = _change(original, site, variant)
            if change is None:
                continue
            name = f"{site.function}: {change}"
            names[name] += 1
            if names[name] > 1:
                name += f" [{names[name]}]"
            found.append(Mutant(module, site.outer, name, site.node.lineno, site.path, index))
    return found


def _change(tree: ast.Module, site: _Site, variant: Callable[[], ast.AST]) -> str | None:
    """Text before and after; of a constant that of the expression around it, which tells more."""
    shown = site.path
    while isinstance(_descend(tree, shown), ast.Constant | ast.Slice | ast.UnaryOp):
        around = _descend(tree, shown[:-1])
        if not isinstance(around, ast.expr | ast.keyword | ast.Assign | ast.AnnAssign | ast.Return):
            break
        shown = shown[:-1]
    before = _text(_descend(tree, shown))
    _replace(tree, site.path, variant())
    after = _text(_descend(tree, shown))
    _replace(tree, site.path, site.node)
    return None if before == after else f"{before} -> {after}"


def _text(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node)))
    return " ".join((text.partition("\n")[0] if isinstance(node, ast.If) else text).split())


@dataclass(frozen=True)
class _Site:
    function: str
    outer: str
    path: _Path
    node: ast.expr | ast.stmt
    variants: list[Callable[[], ast.AST]]


def _sites(tree: ast.Module) -> Iterator[_Site]:
    yield from _walk(tree, (), (), None)


def _walk(node: ast.AST, path: _Path, scope: tuple[str, ...], outer: str | None) -> Iterator[_Site]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        scope = (*scope, node.name)
        if isinstance(node, ast.FunctionDef) and outer is None:
            outer = ".".join(scope)
    variants = _variants(node, path)
    if variants and isinstance(node, ast.expr | ast.stmt):
        yield _Site(".".join(scope) or MODULE_LEVEL, outer or MODULE_LEVEL, path, node, variants)
    for field, value in ast.iter_fields(node):
        if _is_text_for_readers(node, field):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                inner = MODULE_LEVEL if field == "args" and isinstance(node, ast.FunctionDef) else outer
                yield from _walk(child, (*path, (field, index)), scope, inner)


def _is_text_for_readers(node: ast.AST, field: str) -> bool:
    """Annotations, decorators, messages of errors, formatted text, and assertions (`zip(strict=True)` is one)."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True
    return field in ("annotation", "returns", "decorator_list", "type_params")


def _variants(node: ast.AST, path: _Path) -> list[Callable[[], ast.AST]]:
    """Ways to change one node, each as a function that builds the changed node."""
    if isinstance(node, ast.BinOp):
        return _of_arithmetic(node)
    if isinstance(node, ast.AugAssign):
        swapped = _ARITHMETIC.get(type(node.op))
        return [] if swapped is None else [lambda: ast.AugAssign(node.target, swapped(), node.value)]
    if isinstance(node, ast.Compare):
        return _of_comparison(node, is_condition=path[-1][0] == "test")
    if isinstance(node, ast.BoolOp):
        return [lambda i=i: _without(node, i) for i in range(len(node.values))]  # type: ignore[misc]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        return [] if path[-1][0] == "test" else [lambda: node.operand]
    if isinstance(node, ast.Constant):
        return _of_constant(node)
    if isinstance(node, ast.IfExp):
        return [lambda: node.body, lambda: node.orelse]
    if isinstance(node, ast.If):
        return _of_condition(node)
    if isinstance(node, ast.Call):
        return _of_call(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [ast.Pass]
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) >= 2:
        first, second, *rest = node.value.elts
        return [lambda: ast.Return(ast.Tuple([second, first, *rest], ast.Load()))]
    if isinstance(node, ast.Slice):
        return _of_slice(node)
    return []


def _of_arithmetic(node: ast.BinOp) -> list[Callable[[], ast.AST]]:
    found: list[Callable[[], ast.AST]] = []
    swapped = _ARITHMETIC.get(type(node.op))
    if swapped is not None:
        found.append(lambda: ast.BinOp(node.left, swapped(), node.right))
    if isinstance(node.op, ast.Add):
        found += [lambda: node.left, lambda: node.right]
    elif isinstance(node.op, ast.Sub | ast.Mult | ast.Div):
        found.append(lambda: node.left)
    return found


def _of_comparison(node: ast.Compare, *, is_condition: bool) -> list[Callable[[], ast.AST]]:
    found: list[Callable[[], ast.AST]] = []
    for table in (_BOUNDARIES,) if is_condition else (_BOUNDARIES, _OPPOSITES):  # conditions are replaced whole
        for index, operator in enumerate(node.ops):
            swapped = table.get(type(operator))
            if swapped is not None:
                operators = [*node.ops[:index], swapped(), *node.ops[index + 1 :]]
                found.append(lambda operators=operators: ast.Compare(node.left, operators, node.comparators))  # type: ignore[misc]
    return found


def _of_constant(node: ast.Constant) -> list[Callable[[], ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        return [lambda: ast.Constant(not value)]
    if isinstance(value, int):
        return [lambda: ast.Constant(value + 1)]
    if isinstance(value, float):
        return [lambda: ast.Constant(value * 2 if value else 1.0)]
    return []


def _of_condition(node: ast.If) -> list[Callable[[], ast.AST]]:
    """The condition never holds; where nothing but an error hangs on it, that is all (always raising is noticed)."""
    never = lambda: ast.If(ast.Constant(False), node.body, node.orelse)  # noqa: E731
    if isinstance(node.body[0], ast.Raise):
        return [never]
    return [never, lambda: ast.If(ast.Constant(True), node.body, node.orelse)]


def _of_call(node: ast.Call) -> list[Callable[[], ast.AST]]:
    name = _called(node)
    found: list[Callable[[], ast.AST]] = []
    if name in _CALLS:
        found.append(lambda: ast.Call(_renamed(node.func, _CALLS[name]), node.args, node.keywords))
    if name in _UNWRAPPED:
        for argument in node.args[:2] if name in ("max", "maximum", "min", "minimum") else node.args[:1]:
            if not isinstance(argument, ast.GeneratorExp | ast.Starred) and len(node.args) <= 3:
                found.append(lambda argument=argument: argument)  # type: ignore[misc]
    return found


def _of_slice(node: ast.Slice) -> list[Callable[[], ast.AST]]:
    found: list[Callable[[], ast.AST]] = []
    if node.lower is not None:
        found.append(lambda: ast.Slice(None, node.upper, node.step))
    if node.upper is not None:
        found.append(lambda: ast.Slice(node.lower, None, node.step))
    return found


def _without(node: ast.BoolOp, index: int) -> ast.expr:
    left = [value for i, value in enumerate(node.values) if i != index]
    return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _renamed(function: ast.expr, name: str) -> ast.expr:
    if isinstance(function, ast.Attribute):
        return ast.Attribute(function.value, name, ast.Load())
    return ast.Name(name, ast.Load())


def _descend(tree: ast.AST, path: _Path) -> ast.AST:
    for field, index in path:
        value = getattr(tree, field)
        tree = value if index is None else value[index]
    return tree


def _replace(tree: ast.AST, path: _Path, node: ast.AST) -> None:
    parent = _descend(tree, path[:-1])
    field, index = path[-1]
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node
