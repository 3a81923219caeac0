"""Expressions over fields: ``score < 7 and not matches("sorry", output)``.

They look like Python's and are none: a text is parsed once, every part of it must be one of those
listed here, and what is built is a tree of small functions. Nothing is ever handed to ``eval``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Values = Mapping[str, Any]
_Part = Callable[[Values], Any]

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}

_NUMERIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "float": float,
    "int": int,
    "len": len,
    "lower": lambda text: str(text).lower(),
    "matches": lambda pattern, text: re.search(pattern, str(text)) is not None,
    "max": max,
    "min": min,
    "round": round,
    "str": str,
    "strip": lambda text: str(text).strip(),
    "sum": sum,
    "upper": lambda text: str(text).upper(),
    "words": lambda text: len(str(text).split()),
}
"""What an expression may call; ``matches(pattern, text)`` searches a regular expression."""


class ExpressionError(ValueError):
    """A text that is no expression, or one that has no value for these fields."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression.

    Attributes:
        text: as it was written.
        names: the fields it uses, the first part of each: ``rate`` of ``rate.score``.
    """

    text: str
    names: frozenset[str]
    _value: _Part

    def value(self, fields: Values) -> Any:
        """Return its value.

        Args:
            fields: by name; fields within them by attribute or key.

        Raises:
            ExpressionError: naming an unknown field or what does not fit together.
        """
        try:
            return self._value(fields)
        except ExpressionError as error:
            raise ExpressionError(f"{self.text!r}: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, re.error) as error:
            raise ExpressionError(f"{self.text!r}: {error}") from error


@lru_cache(maxsize=1024)
def parsed(text: str) -> Expression:
    """Return an expression.

    Raises:
        ExpressionError: naming the part that is not allowed.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ExpressionError(f"{text!r} is not an expression: {message}") from error
    names: set[str] = set()
    try:
        part = _part(tree.body, names)
    except ExpressionError as error:
        raise ExpressionError(f"{text!r}: {error}") from error
    return Expression(text, frozenset(names), part)


def field_of(value: Any, name: str) -> Any:
    """Return a field of a value: of a mapping by its key, else one of :attr:`fields`.

    Raises:
        ExpressionError: naming the fields there are.
    """
    fields = value if isinstance(value, Mapping) else getattr(value, "fields", None)
    if not isinstance(fields, Mapping):
        raise ExpressionError(f"there is no field {name!r} in {_shown(value)}")
    if name not in fields:
        known = ", ".join(sorted(map(str, fields))) or "none"
        raise ExpressionError(f"there is no field {name!r}; fields: {known}")
    return fields[name]


def _part(node: ast.expr, names: set[str]) -> _Part:
    """Return the function that computes a part of an expression."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as constant):
            return lambda _: constant
        case ast.Name(id=name):
            names.add(name)
            return lambda values: _named(values, name)
        case ast.Attribute(value=inner, attr=name) if not name.startswith("_"):
            of = _part(inner, names)
            return lambda values: field_of(of(values), name)
        case ast.Subscript(value=inner, slice=ast.expr() as key):
            of, at = _part(inner, names), _part(key, names)
            return lambda values: _item(of(values), at(values))
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            of = _part(inner, names)
            return lambda values: not of(values)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            of = _part(inner, names)
            return lambda values: -of(values)
        case ast.BoolOp(op=op, values=inner):
            return _connected([_part(v, names) for v in inner], isinstance(op, ast.And))
        case ast.BinOp(left=left, op=op, right=right):
            return _computed(_part(left, names), op, _part(right, names))
        case ast.Compare(left=left, ops=ops, comparators=right):
            return _compared([_part(v, names) for v in (left, *right)], ops)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            asked, yes, no = (_part(v, names) for v in (test, body, orelse))
            return lambda values: yes(values) if asked(values) else no(values)
        case ast.List(elts=inner) | ast.Tuple(elts=inner):
            parts = [_part(v, names) for v in inner]
            return lambda values: [p(values) for p in parts]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            function, given = FUNCTIONS[name], [_part(a, names) for a in args]
            return lambda values: function(*(g(values) for g in given))
        case ast.Call():
            known = ", ".join(sorted(FUNCTIONS))
            raise ExpressionError(f"{ast.unparse(node)} is not allowed; functions: {known}")
    raise ExpressionError(f"{ast.unparse(node)} is not allowed in an expression")


def _connected(parts: Sequence[_Part], all_of: bool) -> _Part:
    def value(values: Values) -> Any:
        found: Any = all_of
        for part in parts:
            found = part(values)
            if bool(found) != all_of:
                break
        return found

    return value


def _computed(left: _Part, op: ast.operator, right: _Part) -> _Part:
    if isinstance(op, ast.Add):
        return lambda values: left(values) + right(values)
    function = _NUMERIC.get(type(op))
    if function is None:
        raise ExpressionError("of operators, + - * / // and % are allowed")

    def value(values: Values) -> Any:
        a, b = left(values), right(values)
        if not isinstance(a, int | float) or not isinstance(b, int | float):
            raise ExpressionError(f"{_shown(a)} and {_shown(b)} are not both numbers")
        return function(a, b)

    return value


def _compared(parts: Sequence[_Part], ops: Sequence[ast.cmpop]) -> _Part:
    functions = [_COMPARISONS[type(op)] for op in ops]

    def value(values: Values) -> Any:
        left = parts[0](values)
        for function, part in zip(functions, parts[1:], strict=True):
            right = part(values)
            if not function(left, right):
                return False
            left = right
        return True

    return value


def _named(values: Values, name: str) -> Any:
    if name not in values:
        known = ", ".join(sorted(values)) or "none"
        raise ExpressionError(f"there is no field {name!r}; fields: {known}")
    return values[name]


def _item(value: Any, key: Any) -> Any:
    if isinstance(key, str) and not isinstance(value, Mapping):
        return field_of(value, key)
    return value[key]


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
