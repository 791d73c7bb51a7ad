"""The formulas as expressions: traced from `formulas`, differentiated by rule, printed as source code for kernels.

A formula is called once with a symbol in the place of x and a table of symbolic primitives in the place of a
framework's; what comes back is its expression. So kernels in C++ and Triton hold no second copy of a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from neuroweave.activations.formulas import FORMULAS, Primitives

FUNCTIONS = ("sigmoid", "tanh", "normal_cdf", "normal_pdf", "sin", "cos", "relu", "step")


@dataclass(frozen=True)
class Expression:
    """A number (`value`), a variable (`name`), or an operation on others: +, *, or one of `FUNCTIONS`."""

    operation: str
    parts: tuple[Expression, ...] = ()
    value: float = 0.0
    name: str = ""

    def __add__(self, other: Expression | float) -> Expression:
        return add(self, lift(other))

    def __sub__(self, other: Expression | float) -> Expression:
        return add(self, multiply(lift(-1.0), lift(other)))

    def __mul__(self, other: Expression | float) -> Expression:
        return multiply(self, lift(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Expression | float) -> Expression:
        return add(lift(other), multiply(lift(-1.0), self))

    def is_number(self, value: float) -> bool:
        return self.operation == "number" and self.value == value


def lift(value: Expression | float) -> Expression:
    return value if isinstance(value, Expression) else Expression("number", value=float(value))


def variable(name: str) -> Expression:
    return Expression("variable", name=name)


def add(left: Expression, right: Expression) -> Expression:
    if left.is_number(0.0):
        return right
    return left if right.is_number(0.0) else Expression("+", (left, right))


def multiply(left: Expression, right: Expression) -> Expression:
    if left.is_number(0.0) or right.is_number(0.0):
        return lift(0.0)
    if left.is_number(1.0):
        return right
    return left if right.is_number(1.0) else Expression("*", (left, right))


def call(function: str) -> Callable[[Expression], Expression]:
    return lambda x: Expression(function, (x,))


sigmoid, tanh, normal_cdf, normal_pdf, sin, cos, relu, step = (call(function) for function in FUNCTIONS)


class SymbolicPrimitives:
    """What `formulas` is written in, as expressions over fewer functions, so that kernels share what is equal."""

    relu = staticmethod(relu)
    tanh = staticmethod(tanh)
    sigmoid = staticmethod(sigmoid)
    sin = staticmethod(sin)

    @staticmethod
    def silu(x: Expression) -> Expression:
        return x * sigmoid(x)

    @staticmethod
    def gelu(x: Expression) -> Expression:
        return x * normal_cdf(x)

    @staticmethod
    def gelu_tanh(x: Expression) -> Expression:
        """(1 + tanh z) / 2 is sigmoid(2 z)."""
        return x * sigmoid(x * (1.0 + 0.044715 * (x * x)) * (2 * math.sqrt(2 / math.pi)))


PRIMITIVES = cast(Primitives, SymbolicPrimitives)
DERIVATIVES: dict[str, Callable[[Expression], Expression]] = {
    "sigmoid": lambda x: sigmoid(x) * (1.0 - sigmoid(x)),
    "tanh": lambda x: 1.0 - tanh(x) * tanh(x),
    "normal_cdf": normal_pdf,
    "normal_pdf": lambda x: x * normal_pdf(x) * -1.0,
    "sin": cos,
    "cos": lambda x: sin(x) * -1.0,
    "relu": step,
    "step": lambda x: lift(0.0),
}


def trace(name: str, x: Expression, beta: Expression | float | None = None) -> Expression:
    """The formula called `name` of x."""
    made: Any = FORMULAS[name](x, PRIMITIVES) if beta is None else FORMULAS[name](x, PRIMITIVES, beta=lift(beta))
    return cast(Expression, made)


def derivative(of: Expression, by: str) -> Expression:
    """d of / d by, `by` a variable's name; 0 where relu has a corner, as PyTorch has it."""
    if of.operation == "number":
        return lift(0.0)
    if of.operation == "variable":
        return lift(1.0 if of.name == by else 0.0)
    changes = [derivative(part, by) for part in of.parts]
    if of.operation == "+":
        return changes[0] + changes[1]
    if of.operation == "*":
        return changes[0] * of.parts[1] + of.parts[0] * changes[1]
    return DERIVATIVES[of.operation](of.parts[0]) * changes[0] if not changes[0].is_number(0.0) else lift(0.0)


def statements(
    results: Sequence[tuple[str, Expression]],
    *,
    number: Callable[[float], str],
    function: Callable[[str], str],
    declare: str,
    end: str,
) -> list[str]:
    """Source lines that assign each result to its name, what they share computed once.

    `number`: how a constant is written; `function`: what one of `FUNCTIONS` is called; `declare`: what stands before a
    new name; `end`: what ends a line.
    """
    lines: list[str] = []
    known: dict[Expression, str] = {}

    def name_of(expression: Expression) -> str:
        if expression.operation == "number":
            return number(expression.value)
        if expression.operation == "variable":
            return expression.name
        if expression not in known:
            names = [name_of(part) for part in expression.parts]
            text = (
                f"{function(expression.operation)}({names[0]})"
                if expression.operation in FUNCTIONS
                else f"{names[0]} {expression.operation} {names[1]}"
            )
            known[expression] = f"t{len(known)}"
            lines.append(f"{declare}{known[expression]} = {text}{end}")
        return known[expression]

    for name, expression in results:
        lines.append(f"{declare}{name} = {name_of(expression)}{end}")
    return lines


def used_functions(expressions: Iterable[Expression]) -> set[str]:
    """The `FUNCTIONS` that occur in expressions."""
    found: set[str] = set()
    waiting = list(expressions)
    while waiting:
        each = waiting.pop()
        waiting.extend(each.parts)
        if each.operation in FUNCTIONS:
            found.add(each.operation)
    return found
