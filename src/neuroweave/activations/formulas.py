"""What a neuron does to its pre-activation: every formula once, over the primitives `f` of any array framework.

A binding (see `torch.py`) supplies `f`; NumPy and SciPy judge all bindings in the tests. To add an activation, add a
function here and its name to the table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Primitives(Protocol):
    """The elementwise functions that a framework has to supply, each array -> array of the same shape."""

    relu: Callable[[Any], Any]
    silu: Callable[[Any], Any]
    gelu: Callable[[Any], Any]
    gelu_tanh: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    sin: Callable[[Any], Any]


def identity(x: Any, f: Primitives) -> Any:
    """x"""
    return x


def relu(x: Any, f: Primitives) -> Any:
    """max(x, 0)"""
    return f.relu(x)


def relu2(x: Any, f: Primitives) -> Any:
    """max(x, 0)^2 (So et al., Primer, arXiv:2109.08668)"""
    positive = f.relu(x)
    return positive * positive


def silu(x: Any, f: Primitives) -> Any:
    """x * sigmoid(x) (Elfwing et al., arXiv:1702.03118)"""
    return f.silu(x)


def gelu(x: Any, f: Primitives) -> Any:
    """x * Phi(x), Phi the standard normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)"""
    return f.gelu(x)


def gelu_tanh(x: Any, f: Primitives) -> Any:
    """0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))) (the same paper's approximation)"""
    return f.gelu_tanh(x)


def tanh(x: Any, f: Primitives) -> Any:
    """tanh(x)"""
    return f.tanh(x)


def sigmoid(x: Any, f: Primitives) -> Any:
    """1 / (1 + exp(-x))"""
    return f.sigmoid(x)


def silu_tanh(x: Any, f: Primitives) -> Any:
    """silu(x) + 0.1 * tanh(x) (Neuroweave, AutoMixedActivation, second form)"""
    return f.silu(x) + 0.1 * f.tanh(x)


def phantom(x: Any, f: Primitives) -> Any:
    """0.9 * tanh(x) + 0.1 * sin(x) (Neuroweave, PhantomAct)"""
    return 0.9 * f.tanh(x) + 0.1 * f.sin(x)


def swish_beta(x: Any, f: Primitives, beta: Any = 1.0) -> Any:
    """x * sigmoid(beta * x), beta a number or one per neuron (Ramachandran et al., arXiv:1710.05941)"""
    return x * f.sigmoid(beta * x)


FORMULAS: dict[str, Callable[..., Any]] = {
    "identity": identity,
    "relu": relu,
    "relu2": relu2,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "silu_tanh": silu_tanh,
    "phantom": phantom,
    "swish_beta": swish_beta,
}


def swish_member(members: Sequence[Any]) -> int | None:
    """Which member of a learned mixture, as a recipe names them, is `swish_beta` and learns a beta for every neuron."""
    kinds = [member if isinstance(member, str) else next(iter(member)) for member in members]
    return kinds.index("swish_beta") if "swish_beta" in kinds else None
