"""Faults of one expression or statement each, by module: the kinds of slips that tests must notice."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_CALLS = {
    "min": "max",
    "max": "min",
    "ceil": "floor",
    "floor": "ceil",
    "any": "all",
    "all": "any",
    "bisect_right": "bisect_left",
    "insort": "insort_left",
    "partition": "rpartition",
    "startswith": "endswith",
    "fullmatch": "match",
}
_NEGATED = ast.Compare | ast.BoolOp | ast.UnaryOp
"""Conditions whose own parts are changed, so that their negation adds nothing."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: where it is (line, and the qualified name of the function or class), and the module's text with it."""

    line: int
    scope: str
    change: str
    """`before → after`, with a number from the second equal change of the scope on. With `scope` it names the fault."""
    source: str


def mutants(source: str) -> list[Mutant]:
    """Return all faults of a module, in the order of their lines."""
    found: list[Mutant] = []
    names: Counter[tuple[str, str]] = Counter()
    edits = sorted(_Walk(source).edits(), key=lambda edit: (edit.node.lineno, edit.node.col_offset, edit.after))
    for edit in edits:
        before, text = edit.applied(source)
        change = f"{_short(before)} → {_short(edit.after)}"
        names[edit.scope, change] += 1
        if (number := names[edit.scope, change]) > 1:
            change += f" ({number})"
        found.append(Mutant(edit.node.lineno, edit.scope, change, text))
    return found


def _short(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True, slots=True)
class _Edit:
    node: ast.expr | ast.stmt
    scope: str
    after: str

    def applied(self, source: str) -> tuple[str, str]:
        """Return the replaced text, and the source with the replacement."""
        lines = source.encode().splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        assert self.node.end_lineno is not None
        assert self.node.end_col_offset is not None
        begin = starts[self.node.lineno - 1] + self.node.col_offset
        end = starts[self.node.end_lineno - 1] + self.node.end_col_offset
        data = source.encode()
        text = data[:begin] + self.after.encode() + data[end:]
        return data[begin:end].decode(), text.decode()


class _Walk:
    """A walk over a module that leaves out annotations, docstrings, decorators, logging and type checking."""

    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)

    def edits(self) -> Iterator[_Edit]:
        """Yield all edits."""
        yield from self._of(self._tree, ())

    def _of(self, node: ast.AST, scope: tuple[str, ...]) -> Iterator[_Edit]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        if isinstance(node, ast.expr | ast.stmt):
            yield from (_Edit(place, ".".join(scope), after) for place, after in _changes(node))
        for child in _children(node):
            yield from self._of(child, scope)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts that are executed and that a test could notice."""
    left_out = {"annotation", "returns", "decorator_list", "type_params", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in left_out or (isinstance(node, ast.arg)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_out(child):
                yield child


def _is_left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(ast.Constant()) | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("log")))):
            return True
        case ast.If(ast.Name("TYPE_CHECKING")):
            return True
        case ast.Assign([ast.Name("log" | "T" | "Q" | "__all__")]):
            return True
    return False


def _changes(node: ast.expr | ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:  # noqa: C901, PLR0912 - a table
    """Yield faults of this node alone: what is replaced, and the text that replaces it."""
    match node:
        case ast.Compare(left, [operator], [right]) if type(operator) in _COMPARE:
            yield node, _expression(ast.Compare(left, [_COMPARE[type(operator)]()], [right]))
        case ast.Compare(left, operators, rights):
            for index, operator in enumerate(operators):
                if type(operator) in _COMPARE:
                    changed = [*operators[:index], _COMPARE[type(operator)](), *operators[index + 1 :]]
                    yield node, _expression(ast.Compare(left, changed, rights))
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
            yield node, _expression(ast.BinOp(left, _ARITHMETIC[type(operator)](), right))
        case ast.BoolOp(operator, values):
            yield node, _expression(ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values))
            for index in range(len(values)):
                rest = [*values[:index], *values[index + 1 :]]
                yield node, _expression(rest[0] if len(rest) == 1 else ast.BoolOp(operator, rest))
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, _expression(operand)
        case ast.Constant(value):
            yield from ((node, text) for text in _constants(value))
        case ast.Call(function, arguments, keywords):
            yield from _calls(node, function, arguments, keywords)
        case ast.IfExp(test, body, other):
            yield node, _expression(body)
            yield node, _expression(other)
        case ast.If(test) | ast.While(test) if not isinstance(test, _NEGATED):
            yield test, f"(not {_expression(test)})"
        case ast.AugAssign(target, operator, value) if type(operator) in _ARITHMETIC:
            yield node, ast.unparse(ast.AugAssign(target, _ARITHMETIC[type(operator)](), value))
        case ast.Return(ast.expr() as value) if ast.unparse(value) not in {"None", "False", "True"}:
            yield value, "None"
        case ast.Expr() | ast.Raise() | ast.Delete():
            yield node, "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"


def _constants(value: object) -> Iterator[str]:
    match value:
        case bool():
            yield str(not value)
        case int() | float():
            yield repr(value + 1)
        case str() | bytes() if value:
            yield repr(value + (b"X" if isinstance(value, bytes) else "X"))  # type: ignore[operator]


def _calls(
    node: ast.Call, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]
) -> Iterator[tuple[ast.expr, str]]:
    name = (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )
    if name in _CALLS:
        changed = ast.Name(_CALLS[name]) if isinstance(function, ast.Name) else None
        if isinstance(function, ast.Attribute):
            changed = ast.Attribute(function.value, _CALLS[name])  # type: ignore[assignment]
        assert changed is not None
        yield node, _expression(ast.Call(changed, arguments, keywords))
    for index, keyword in enumerate(keywords):
        if keyword.arg is not None:
            yield node, _expression(ast.Call(function, arguments, [*keywords[:index], *keywords[index + 1 :]]))


def _expression(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"
