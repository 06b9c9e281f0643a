"""What an expression comes to for the candidates of a list, all at once, with the derivative in the interest.

Numbers carry their derivative along (forward-mode differentiation, Wengert 1964, "A simple automatic derivative
evaluation program"), so that it is exact.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from flexrec.checks import did_you_mean
from flexrec.data.lists import Catalogue, RankingList
from flexrec.task.expression_syntax import error_at, exponent, function
from flexrec.task.needs import novelty

OF_LISTS = ("interest", "trend", "novelty", "popularity")  # numbers that every list has
CATEGORIES = ("categories", "category", "genres", "genre", "topics", "topic")  # all mean the categories of an item
TITLE = "title"


@dataclass(frozen=True)
class Number:
    """Numbers by candidate and their derivatives in the interest, float64, (K,) or scalars."""

    value: Any
    slope: Any = 0.0


@dataclass(frozen=True)
class Condition:
    """True or false by candidate, bool, (K,) or a scalar."""

    value: Any


@dataclass(frozen=True)
class Texts:
    """A text by candidate, (K,) object, or a single str."""

    value: Any


@dataclass(frozen=True)
class Categories:
    """The categories of each candidate."""

    matrix: np.ndarray  # (K, topics)
    names: tuple[str, ...]

    def have(self, name: str) -> np.ndarray | None:
        """(K,) bool: whether a candidate has the category of this name, in capitals or not; None: there is no such."""
        folded = [other.casefold() for other in self.names]
        return self.matrix[:, folded.index(name.casefold())] > 0 if name.casefold() in folded else None


@dataclass(frozen=True)
class Several:
    """What stands in brackets behind ``in``."""

    members: tuple[Number | Texts, ...]


Value: TypeAlias = "Number | Condition | Texts | Categories | Several"
_KINDS = {
    Number: "a number",
    Condition: "a condition",
    Texts: "a text",
    Categories: "categories",
    Several: "several values in brackets",
}


def _chain(slope: Any, rate: Any) -> Any:
    """slope x rate, and 0 where the slope is 0, however large the rate."""
    return np.where(np.equal(slope, 0), 0.0, np.multiply(slope, rate))


def _choose(condition: Any, yes: Number, no: Number) -> Number:
    return Number(np.where(condition, yes.value, no.value), np.where(condition, yes.slope, no.slope))


def _power(x: Number, n: float) -> Number:
    # A root is infinitely steep at 0: no uncertainty is stated there.
    rate = np.where(np.equal(x.value, 0) & (n < 1), 0.0, n * np.power(x.value, n - 1))
    return Number(np.power(x.value, n), _chain(x.slope, rate))


def _furthest(beyond: Callable[[Any, Any], Any], *numbers: Number) -> Number:
    """The one that is ``beyond`` all others, of equal ones the first."""
    found = numbers[0]
    for other in numbers[1:]:
        found = _choose(beyond(found.value, other.value), found, other)
    return found


_least, _most = partial(_furthest, np.less_equal), partial(_furthest, np.greater_equal)

_OPERATORS: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: lambda a, b: Number(a.value + b.value, a.slope + b.slope),
    ast.Sub: lambda a, b: Number(a.value - b.value, a.slope - b.slope),
    ast.Mult: lambda a, b: Number(a.value * b.value, _chain(a.slope, b.value) + _chain(b.slope, a.value)),
    ast.Div: lambda a, b: Number(
        np.divide(a.value, b.value),
        _chain(a.slope, np.divide(1.0, b.value)) - _chain(b.slope, np.divide(a.value, np.square(b.value))),
    ),
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": lambda x: Number(np.abs(x.value), _chain(x.slope, np.sign(x.value))),
    "clip": lambda x, low, high: _least(_most(x, low), high),
    "exp": lambda x: Number(np.exp(x.value), _chain(x.slope, np.exp(x.value))),
    "log": lambda x: Number(np.log(x.value), _chain(x.slope, np.divide(1.0, x.value))),
    "max": _most,
    "min": _least,
    "sqrt": lambda x: _power(x, 0.5),
}
_ORDER = {ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal}


class Evaluation:
    """The values of an expression's parts for one list.

    Args:
        strict: a category that no item has is a mistake; else nobody has it.
        novelty: (K,), to be tried; None: as the list's history makes it.
    """

    def __init__(
        self,
        text: str,
        lst: RankingList,
        catalogue: Catalogue,
        interest: np.ndarray,
        *,
        strict: bool = False,
        novelty: np.ndarray | None = None,
    ) -> None:
        self.text, self.lst, self.catalogue, self.strict = text, lst, catalogue, strict
        self.novelty = novelty
        self.interest = np.asarray(interest, dtype=np.float64)

    def number(self, node: ast.expr) -> Number:
        """What a part comes to as a number: 1 where a condition holds, else 0."""
        found = self._value(node)
        if isinstance(found, Condition):
            return Number(np.asarray(found.value, dtype=np.float64))
        return self._expect(Number, found, node)

    def _condition(self, node: ast.expr) -> Any:
        return self._expect(Condition, self._value(node), node).value

    def _expect(self, kind: type, found: Value, node: ast.expr) -> Any:
        if not isinstance(found, kind):
            raise error_at(self.text, node, f"expected {_KINDS[kind]}, got {_KINDS[type(found)]}")
        return found

    def _value(self, node: ast.expr) -> Value:
        with np.errstate(all="ignore"):  # what is not finite in the end is refused then
            return getattr(self, f"_{type(node).__name__.lower()}")(node)

    def _constant(self, node: ast.Constant) -> Value:
        if isinstance(node.value, bool):
            return Condition(np.asarray(node.value))
        return Texts(node.value) if isinstance(node.value, str) else Number(float(ast.literal_eval(node)))

    def _name(self, node: ast.Name) -> Value:
        name, lst, catalogue = node.id, self.lst, self.catalogue
        if name == "interest":
            return Number(self.interest, np.ones_like(self.interest))
        if name == "novelty":
            new = novelty(lst, catalogue) if self.novelty is None else self.novelty
            return Number(new.astype(np.float64))
        if name in OF_LISTS:
            return Number(getattr(lst, name).astype(np.float64))
        if (column := find_column(name, catalogue)) is not None:
            values = catalogue.columns[column][lst.candidates]
            return Texts(values) if values.dtype.kind == "O" else Number(values.astype(np.float64))
        if name == TITLE:
            return Texts(np.array([catalogue.titles[item] for item in lst.candidates], dtype=object))
        return Categories(catalogue.topic_matrix[lst.candidates], catalogue.topic_names)

    def _binop(self, node: ast.BinOp) -> Number:
        left = self.number(node.left)
        if isinstance(node.op, ast.Pow):
            return _power(left, exponent(node))
        return _OPERATORS[type(node.op)](left, self.number(node.right))

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            return Condition(np.logical_not(self._condition(node.operand)))
        inner = self.number(node.operand)
        return Number(-inner.value, -inner.slope) if isinstance(node.op, ast.USub) else inner

    def _boolop(self, node: ast.BoolOp) -> Condition:
        join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        found = self._condition(node.values[0])
        for part in node.values[1:]:
            found = join(found, self._condition(part))
        return Condition(found)

    def _compare(self, node: ast.Compare) -> Condition:
        found: Any = True
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            found = np.logical_and(found, self._compared(left, op, right))
        return Condition(found)

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, (ast.In, ast.NotIn)):
            found = self._is_in(left, right)
            return np.logical_not(found) if isinstance(op, ast.NotIn) else found
        if isinstance(op, (ast.Eq, ast.NotEq)):
            found = self._equal(self._value(left), left, self._value(right), right)
            return np.logical_not(found) if isinstance(op, ast.NotEq) else found
        return _ORDER[type(op)](self.number(left).value, self.number(right).value)

    def _equal(self, a: Value, left: ast.expr, b: Value, right: ast.expr) -> Any:
        """Whether two are equal; categories are where the other is one of them."""
        if isinstance(b, Categories):
            a, left, b, right = b, right, a, left
        if isinstance(a, Categories):
            return self._have(a, b, right)
        if isinstance(a, Texts):
            return _folded(a.value) == _folded(self._expect(Texts, b, right).value)
        if isinstance(a, Condition):
            return np.equal(a.value, self._expect(Condition, b, right).value)
        return np.equal(self._expect(Number, a, left).value, self._expect(Number, b, right).value)

    def _is_in(self, left: ast.expr, right: ast.expr) -> Any:
        """Whether a text is among categories or a part of a text, or what comes first is one of several."""
        among, member = self._value(right), self._value(left)
        if isinstance(among, Several):
            found: Any = False
            for other in among.members:
                found = np.logical_or(found, self._equal(member, left, other, right))
            return found
        if isinstance(among, Categories):
            return self._have(among, member, left)
        texts, part = self._expect(Texts, among, right).value, self._expect(Texts, member, left).value
        if not isinstance(part, str):
            raise error_at(self.text, left, "expected a text in quotes before in")
        return np.array([part.casefold() in one for one in np.atleast_1d(_folded(texts))], dtype=bool)

    def _have(self, categories: Categories, name: Value, node: ast.expr) -> np.ndarray:
        text = self._expect(Texts, name, node).value
        if not isinstance(text, str):
            raise error_at(self.text, node, "expected the name of a category in quotes")
        found = categories.have(text)
        if found is None and self.strict:
            raise error_at(self.text, node, f"no item has the category {text!r}{did_you_mean(text, categories.names)}")
        return np.zeros(len(categories.matrix), dtype=bool) if found is None else found

    def _several(self, node: ast.Tuple | ast.List | ast.Set) -> Several:
        members: list[Number | Texts] = []
        for part in node.elts:
            found = self._value(part)
            if not isinstance(found, (Number, Texts)):
                raise error_at(self.text, part, f"expected a number or a text, got {_KINDS[type(found)]}")
            members.append(found)
        return Several(tuple(members))

    _tuple = _list = _set = _several

    def _ifexp(self, node: ast.IfExp) -> Number:
        return _choose(self._condition(node.test), self.number(node.body), self.number(node.orelse))

    def _call(self, node: ast.Call) -> Value:
        name = function(node)
        if name == "where":
            return _choose(self._condition(node.args[0]), self.number(node.args[1]), self.number(node.args[2]))
        if name == "default":
            return self._default(*node.args)
        return _FUNCTIONS[name](*(self.number(part) for part in node.args))

    def _default(self, column: ast.expr, otherwise: ast.expr) -> Value:
        found = self._value(column)
        if isinstance(found, Texts):
            text = self._expect(Texts, self._value(otherwise), otherwise).value
            return Texts(np.where(not_given(np.atleast_1d(found.value)), text, found.value))
        given = self._expect(Number, found, column)
        return _choose(np.isnan(given.value), self.number(otherwise), given)


def find_column(name: str, catalogue: Catalogue) -> str | None:
    """The column of the items that an expression names: unit_price is "unit price", too."""
    if name in catalogue.columns:
        return name
    return next((column for column in catalogue.columns if re.sub(r"\W", "_", column) == name), None)


def not_given(values: np.ndarray) -> np.ndarray:
    """(K,) bool: where a column holds nothing."""
    return np.array([not value for value in values], dtype=bool) if values.dtype.kind == "O" else np.isnan(values)


def _folded(texts: Any) -> Any:
    """Texts without regard to capitals."""
    return texts.casefold() if isinstance(texts, str) else np.array([one.casefold() for one in texts], dtype=object)
