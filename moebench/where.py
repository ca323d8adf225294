"""`where`: a condition over the axes of a suite, read without ever running text. No torch.

The text is parsed, its syntax tree is held against a short list of allowed
forms, and what is left becomes closures. Allowed: axis names, numbers, quoted
text, lists, parentheses; + - * / // %; == != < <= > >= (chained as in
mathematics); in, not in; and, or, not.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moebench.axes import AXES, CUSTOM, comparable, shown
from moebench.catalogue.names import nearest

MAX_LENGTH = 1000
MAX_DEPTH = 20

Row = Mapping[str, Any]
Evaluate = Callable[[Row], Any]

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)
EQUALITY: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ALLOWED = "axis names, numbers, quoted text, lists, + - * / // %, comparisons, in, and, or, not"


@dataclass(frozen=True)
class Clause:
    """One condition of a `where`; all clauses have to hold.

    Attributes:
        names: axes whose values it needs.
        holds: row of axis values -> bool; ZeroDivisionError and OverflowError pass through.
    """

    names: frozenset[str]
    holds: Evaluate


@dataclass(frozen=True)
class _Term:
    kind: str  # "number", "text" or "truth"
    evaluate: Evaluate
    names: frozenset[str] = frozenset()
    divides: bool = False


def parse_where(text: str) -> list[Clause]:
    """Split a condition at its outermost `and` into clauses, in order.

    Raises:
        ValueError: one line that says what is not allowed.
    """
    tree = _syntax(text)
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    clauses: list[Clause] = []
    earlier: frozenset[str] = frozenset()
    for part in parts:
        term = _truth(part)
        # A clause that divides may rely on an earlier one as its guard: it is not to be evaluated before it.
        names = term.names | earlier if term.divides else term.names
        clauses.append(Clause(names, term.evaluate))
        earlier |= term.names
    return clauses


def _syntax(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"found {len(text)} characters; at most {MAX_LENGTH} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(" ".join(text.split("\n")).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else "too deeply nested"
        raise ValueError(f"found {shown(text)}, which is no condition: {what}") from None
    _check_depth(tree)
    return tree


def _check_depth(tree: ast.expr) -> None:
    """Breadth first, so that a deep tree is refused before anything recurses into it."""
    layer: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        layer = [child for node in layer for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if not layer:
            return
    raise ValueError(f"is nested more than {MAX_DEPTH} deep")


def _truth(node: ast.expr) -> _Term:
    return _expect(_term(node), "truth", node)


def _number(node: ast.expr) -> _Term:
    return _expect(_term(node), "number", node)


def _expect(term: _Term, kind: str, node: ast.expr) -> _Term:
    if term.kind != kind:
        wanted = {"truth": "a condition such as top_k <= experts", "number": "a number"}[kind]
        raise ValueError(f"{_quoted(node)} is {_article(term.kind)}, where {wanted} is needed")
    return term


def _term(node: ast.expr) -> _Term:
    match node:
        case ast.BoolOp():
            return _boolean(node)
        case ast.UnaryOp(op=ast.Not()):
            inner = _truth(node.operand)
            evaluate = inner.evaluate
            return _Term("truth", lambda row: not evaluate(row), inner.names, inner.divides)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return _signed(node)
        case ast.BinOp():
            return _arithmetic(node)
        case ast.Compare():
            return _comparison(node)
        case ast.Name():
            return _name(node.id)
        case ast.Constant():
            return _constant(node.value)
    raise ValueError(f"{_quoted(node)} is not allowed (allowed: {ALLOWED})")


def _boolean(node: ast.BoolOp) -> _Term:
    terms = [_truth(value) for value in node.values]
    tests = [term.evaluate for term in terms]
    stop: bool = isinstance(node.op, ast.Or)

    def holds(row: Row) -> bool:
        for test in tests:  # a generator in any() costs several times more, a million times
            if bool(test(row)) is stop:
                return stop
        return not stop

    return _joined("truth", holds, terms)


def _signed(node: ast.UnaryOp) -> _Term:
    inner = _number(node.operand)
    apply = operator.neg if isinstance(node.op, ast.USub) else operator.pos
    evaluate = inner.evaluate
    return _Term("number", lambda row: apply(evaluate(row)), inner.names, inner.divides)


def _arithmetic(node: ast.BinOp) -> _Term:
    apply = ARITHMETIC.get(type(node.op))
    if apply is None:
        raise ValueError(f"{_quoted(node)}: this operator is not allowed (allowed: + - * / // %)")
    terms = [_number(node.left), _number(node.right)]
    left, right = (term.evaluate for term in terms)
    return _joined("number", lambda row: apply(left(row), right(row)), terms, isinstance(node.op, DIVISIONS))


def _comparison(node: ast.Compare) -> _Term:
    operands = [node.left, *node.comparators]
    links = [_link(*link) for link in zip(operands, node.ops, operands[1:], strict=False)]
    if len(links) == 1:
        return links[0]
    tests = [link.evaluate for link in links]
    return _joined("truth", lambda row: all(test(row) for test in tests), links)


def _link(left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Term:
    if isinstance(op, ast.In | ast.NotIn):
        return _membership(left, right, inside=isinstance(op, ast.In))
    compare = EQUALITY.get(type(op)) or ORDER.get(type(op))
    if compare is None:
        raise ValueError("`is` is not allowed; write == or !=")
    terms = _pair(left, right)
    if terms[0].kind == "truth" or (terms[0].kind == "text" and type(op) in ORDER):
        raise ValueError(f"{_quoted(left)} is {_article(terms[0].kind)} and has no such comparison")
    first, second = (term.evaluate for term in terms)
    return _joined("truth", lambda row: compare(first(row), second(row)), terms)


def _membership(left: ast.expr, right: ast.expr, *, inside: bool) -> _Term:
    if not isinstance(right, ast.List | ast.Tuple):
        raise ValueError(f"{_quoted(right)} is no list; `in` takes one, such as tokens in [1, 16]")
    term = _term(left)
    if term.kind == "truth":
        raise ValueError(f"{_quoted(left)} is a condition and is in no list")
    pairs = [_pair(left, item) for item in right.elts]
    items = [pair[1].evaluate for pair in pairs]
    value = term.evaluate

    def holds(row: Row) -> bool:
        return (value(row) in [item(row) for item in items]) is inside

    return _joined("truth", holds, [term, *(pair[1] for pair in pairs)])


def _pair(left: ast.expr, right: ast.expr) -> list[_Term]:
    """Both sides of a comparison; quoted text beside an axis is read as a value of that axis."""
    terms = [_beside(left, right), _beside(right, left)]
    if terms[0].kind != terms[1].kind:
        kinds = [_article(term.kind) for term in terms]
        raise ValueError(f"{_quoted(left)} is {kinds[0]} and {_quoted(right)} is {kinds[1]}: they cannot be compared")
    return terms


def _beside(node: ast.expr, other: ast.expr) -> _Term:
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    if not quoted or not isinstance(other, ast.Name) or other.id not in AXES:
        return _term(node)
    text = node.value  # type: ignore[attr-defined]  # narrowed by `quoted`
    if other.id == "model" and text == CUSTOM:
        return _constant(text)
    try:
        return _constant(comparable(other.id, AXES[other.id].read(text)), finite=False)
    except ValueError as error:
        raise ValueError(f"{other.id} is never {shown(text)}: {error}") from None


def _name(name: str) -> _Term:
    if name not in AXES:
        raise ValueError(f"unknown name {shown(name)}{nearest(name, AXES)} (axes: {', '.join(AXES)})")
    return _Term("number" if AXES[name].number else "text", operator.itemgetter(name), frozenset((name,)))


def _constant(value: object, *, finite: bool = True) -> _Term:
    if isinstance(value, str):
        return _Term("text", lambda _row: value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not allowed (allowed: {ALLOWED})")
    if finite and not math.isfinite(value):
        raise ValueError("a number in it is too large")
    return _Term("number", lambda _row: value)


def _joined(kind: str, evaluate: Evaluate, terms: list[_Term], divides: bool = False) -> _Term:
    names = frozenset().union(*(term.names for term in terms))
    return _Term(kind, evaluate, names, divides or any(term.divides for term in terms))


def _quoted(node: ast.expr) -> str:
    return shown(ast.unparse(node))


def _article(kind: str) -> str:
    return {"number": "a number", "text": "text", "truth": "a condition"}[kind]
