"""Gains written as expressions: ``interest * exp(-price / 20) if "Comedy" in category else 0``.

What may stand in one is said by :mod:`flexrec.task.expression_syntax`; what it comes to is computed for all candidates
of a list at once by :mod:`flexrec.task.expression_values`, g(interest), with the derivative g'. Of an interest known as
mean and variance,

    gain = g(mean),    Var[gain] = g'(mean)^2 variance,

to first order, and exactly where g is interest times a factor, which the expression's form tells.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from flexrec.checks import did_you_mean
from flexrec.data.lists import Catalogue, RankingList
from flexrec.task.expression_syntax import ExpressionError, error_at, form, function, parse, walk
from flexrec.task.expression_values import CATEGORIES, OF_LISTS, TITLE, Evaluation, find_column, not_given
from flexrec.task.needs import check_interest


@dataclass(frozen=True)
class Expression:
    """The gains of a need as an expression says them: what its ``gains`` are.

    A candidate that lacks a column that the expression names has gain 0, but for columns in ``default``.

    Attributes:
        text: the expression.

    Raises:
        ExpressionError: it is none, or something in it is not allowed.

    Example:
        >>> from flexrec.task.expressions import Expression
        >>> Expression("interest * (price < 20)").columns
        ('price',)
        >>> Expression("interest * price.real")
        Traceback (most recent call last):
            ...
        flexrec.task.expression_syntax.ExpressionError: at character 12, 'price.real': an attribute is not allowed
    """

    text: str

    def __post_init__(self) -> None:
        parse(self.text)

    @cached_property
    def tree(self) -> ast.expr:
        return parse(self.text)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What it names, sorted."""
        return tuple(sorted({node.id for node in walk(self.tree) if isinstance(node, ast.Name)}))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that are neither of lists nor of every item: columns."""
        return tuple(name for name in self.names if name not in (*OF_LISTS, *CATEGORIES, TITLE))

    @cached_property
    def form(self) -> str:
        """How the gain depends on the interest: "constant", "proportional" or "other"."""
        return form(self.tree)

    @property
    def factor(self) -> Callable[[RankingList, Catalogue], np.ndarray] | None:
        """What interest is multiplied by, where the gain is of that form."""
        return self._at_one if self.form == "proportional" else None

    def _at_one(self, lst: RankingList, catalogue: Catalogue) -> np.ndarray:
        one = np.ones(len(lst.candidates), dtype=np.float32)
        return self(lst, catalogue, one, np.zeros_like(one))[0]

    def __call__(
        self,
        lst: RankingList,
        catalogue: Catalogue,
        interest: np.ndarray,
        variance: np.ndarray,
        novelty: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        check_interest(lst, interest, variance)
        columns = {name: self._column(name, catalogue)[lst.candidates] for name in self.columns}
        found = Evaluation(self.text, lst, catalogue, interest, novelty=novelty).number(self.tree)
        lacking = self.lacking(lst.candidates, catalogue)
        gains = np.where(lacking, 0.0, found.value)
        slopes = np.where(lacking, 0.0, found.slope)
        with np.errstate(over="ignore"):
            gains, gain_variance = gains.astype(np.float32), (slopes**2 * variance).astype(np.float32)
        for name, values in (("gain", gains), ("variance", gain_variance)):
            for k in np.flatnonzero(~(np.isfinite(values) & (values >= 0)))[:1]:
                known = "".join(f", {column} {of_items[k]}" for column, of_items in columns.items())
                raise ExpressionError(
                    f"in {self.text!r} the {name} of item {catalogue.ids[lst.candidates[k]]!r} is {values[k]:g} "
                    f"(interest {interest[k]:g}{known}); expected a finite number that is not negative: max(.., 0) or "
                    f"clip(.., 0, 1) keep it there"
                )
        return gains, gain_variance

    def lacking(self, items: np.ndarray, catalogue: Catalogue) -> np.ndarray:
        """(K,) bool: which items (K,) have nothing in a column that is named outside of ``default``."""
        found = np.zeros(len(items), dtype=bool)
        for name in self.needed:
            found |= not_given(self._column(name, catalogue)[items])
        return found

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The columns without which a candidate has gain 0: those outside of ``default``."""
        nodes = walk(self.tree)
        replaced = {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and function(node) == "default"}
        needed = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in replaced}
        return tuple(name for name in self.columns if name in needed)

    def check(self, catalogue: Catalogue) -> None:
        """Raise an ExpressionError where it names what these items do not have, or is no gain for one of them."""
        items = np.arange(len(catalogue))
        zeros = np.zeros(len(items), dtype=np.float32)
        for rise, popularity, new, interest in product((0.0, 1.0), (0.0, 1e4), (0.0, 1.0), (0.0, 0.5, 1.0)):
            of_list = {"popularity": zeros + np.float32(popularity), "trend": zeros + np.float32(rise)}
            lst = RankingList(-1, 0.0, items[:0], items, zeros, **of_list)
            self(lst, catalogue, zeros + np.float32(interest), zeros + 1, zeros + np.float32(new))
        Evaluation(self.text, lst, catalogue, zeros, strict=True).number(self.tree)

    def _column(self, name: str, catalogue: Catalogue) -> np.ndarray:
        """(items,); an ExpressionError that says where it is named if the items have no such column."""
        column = find_column(name, catalogue)
        if column is None:
            known = (*OF_LISTS, TITLE, CATEGORIES[0], *catalogue.columns)
            node = next(node for node in walk(self.tree) if isinstance(node, ast.Name) and node.id == name)
            raise error_at(
                self.text,
                node,
                f"unknown name{did_you_mean(name, (*known, *CATEGORIES))}; known are {', '.join(known[:6])} and the "
                f"columns of the items: {', '.join(catalogue.columns) or 'none'}",
            )
        return catalogue.columns[column]
