"""What an expression may be: a small part of Python's, read by Python's parser and looked through before it is used.

Nothing is ever executed. There are no attributes, no subscripts, no calls but those of ``FUNCTIONS``; length, number of
parts, depth, numbers and exponents are bounded.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from flexrec.checks import did_you_mean

MAX_LENGTH, MAX_PARTS, MAX_DEPTH, MAX_NUMBER, MAX_EXPONENT = 1000, 200, 30, 1e15, 8

FUNCTIONS = {  # name: how many arguments it takes, at least and at most
    "abs": (1, 1),
    "clip": (3, 3),  # clip(number, low, high)
    "default": (2, 2),  # default(column, what counts where an item has no value in it)
    "exp": (1, 1),
    "log": (1, 1),
    "max": (2, 20),
    "min": (2, 20),
    "sqrt": (1, 1),
    "where": (3, 3),  # where(condition, if it holds, if not)
}

_ALLOWED = (
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.Tuple, ast.List, ast.Set),
)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
_REFUSED = {
    ast.Attribute: "an attribute",
    ast.Subscript: "a subscript",
    ast.Lambda: "a function of one's own",
    ast.ListComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.NamedExpr: "an assignment",
    ast.JoinedStr: "a formatted text",
    ast.Starred: "a star",
    ast.Dict: "a dictionary",
}


class ExpressionError(ValueError):
    """What is wrong with an expression, and where in it."""


def error_at(text: str, node: ast.AST, what: str) -> ExpressionError:
    """An error that says at which character of an expression's text a part of it begins, and how it reads."""
    line = one_line(text).encode()
    start, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", len(line))
    place = len(line[:start].decode()) + 1
    return ExpressionError(f"at character {place}, {_cut(line[start:end].decode())!r}: {what}")


def parse(text: str) -> ast.expr:
    """The tree of an expression in which all is allowed.

    Raises:
        ExpressionError: it is no expression, or something in it is not allowed.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression has at most {MAX_LENGTH} characters, got {len(text)}")
    line = one_line(text)
    try:
        tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        at = max(0, min((error.offset or 1) - 1, len(line) - 1))
        raise ExpressionError(f"at character {at + 1}, {_cut(line[at:])!r}: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ExpressionError(f"is no expression: {error or 'it is nested too deeply'}") from None
    waiting: list[tuple[ast.expr, int]] = [(tree, 1)]
    for count, (node, depth) in enumerate(waiting, start=1):  # which grows while it is walked
        if count > MAX_PARTS:
            raise ExpressionError(f"an expression has at most {MAX_PARTS} parts")
        if depth > MAX_DEPTH:
            raise ExpressionError(f"an expression is nested at most {MAX_DEPTH} deep")
        _check(text, node)
        waiting += [(child, depth + 1) for child in parts(node)]
    return tree


def parts(node: ast.AST) -> list[ast.expr]:
    """The expressions that a part is made of; the name of a function is none."""
    if isinstance(node, ast.Call):
        return list(node.args)
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def walk(node: ast.expr) -> list[ast.expr]:
    """A part and all that it is made of."""
    found = [node]
    for one in found:
        found += parts(one)
    return found


def function(node: ast.AST) -> str:
    """The name of the function that a part calls, or nothing."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def exponent(node: ast.BinOp) -> float:
    return float(ast.literal_eval(node.right))


def one_line(text: str) -> str:
    """The text with blanks for line breaks, as characters are counted in it."""
    return text.replace("\r", " ").replace("\n", " ").strip()


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:38] + ".."


def _check(text: str, node: ast.expr) -> None:
    if not isinstance(node, _ALLOWED):
        raise error_at(text, node, f"{_REFUSED.get(type(node), type(node).__name__)} is not allowed")
    if isinstance(node, ast.Call):
        _check_call(text, node)
    elif isinstance(node, ast.BinOp):
        if not isinstance(node.op, _ARITHMETIC):
            raise error_at(text, node, "expected one of + - * / **")
        if isinstance(node.op, ast.Pow):
            _check_exponent(text, node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        raise error_at(text, node, "~ is not allowed: write not")
    elif isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        raise error_at(text, node, "is is not allowed: write ==")
    elif isinstance(node, ast.Constant) and not _is_constant(node.value):
        raise error_at(text, node, f"expected a number of at most {MAX_NUMBER:g} or a text")


def _is_constant(value: Any) -> bool:
    return isinstance(value, (str, bool)) or (isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER)


def _check_call(text: str, node: ast.Call) -> None:
    name = function(node)
    if name not in FUNCTIONS:
        known = ", ".join(FUNCTIONS)
        raise error_at(text, node.func, f"unknown function{did_you_mean(name, FUNCTIONS)}; known functions: {known}")
    if node.keywords:
        raise error_at(text, node, f"{name} takes no arguments by name")
    least, most = FUNCTIONS[name]
    if not least <= len(node.args) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise error_at(text, node, f"{name} takes {wanted} arguments, got {len(node.args)}")
    if name == "default" and not isinstance(node.args[0], ast.Name):
        raise error_at(text, node, "default takes a column, and what counts where an item has no value in it")


def _check_exponent(text: str, node: ast.BinOp) -> None:
    try:
        value = ast.literal_eval(node.right)
    except (ValueError, TypeError, RecursionError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > MAX_EXPONENT:
        raise error_at(text, node.right, f"an exponent must be a number from -{MAX_EXPONENT} to {MAX_EXPONENT}")


def form(node: ast.expr) -> str:
    """How a part depends on the interest, which is not negative: "constant", "proportional" (interest times what is
    constant) or "other"; "zero" is of the first two kinds."""
    if isinstance(node, ast.Name):
        return "proportional" if node.id == "interest" else "constant"
    if isinstance(node, ast.Constant):
        return "zero" if node.value == 0 and isinstance(node.value, (int, float)) else "constant"
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
        return form(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = form(node.left), form(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            return _shared([node.left, node.right])
        if isinstance(node.op, ast.Mult):
            return right if left == "constant" or right == "zero" else left if _fixed([node.right]) else _or(left)
        if isinstance(node.op, ast.Div) and right == "constant":
            return left
        return left if isinstance(node.op, ast.Pow) and exponent(node) == 1 else _all_fixed(node)
    if isinstance(node, ast.IfExp):
        return _shared([node.body, node.orelse]) if _fixed([node.test]) else "other"
    if function(node) == "where":
        condition, *either = parts(node)
        return _shared(either) if _fixed([condition]) else "other"
    if function(node) in ("min", "max", "abs", "clip"):  # twice the arguments give twice the result
        return _shared(parts(node))
    return _all_fixed(node)


def _fixed(nodes: Sequence[ast.expr]) -> bool:
    return all(form(node) in ("constant", "zero") for node in nodes)


def _all_fixed(node: ast.expr) -> str:
    return "constant" if _fixed(parts(node)) else "other"


def _or(left: str) -> str:
    """The form of a product whose right side depends on the interest and whose left side is not plainly constant."""
    return "zero" if left == "zero" else "other"


def _shared(nodes: Sequence[ast.expr]) -> str:
    """The form that all have, where they have one."""
    found = {form(node) for node in nodes} - {"zero"}
    return "zero" if not found else found.pop() if len(found) == 1 else "other"
