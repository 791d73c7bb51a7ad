"""The formulas on NumPy arrays: floating-point arrays in, the same shape and dtype out. No SciPy.

`FORMULAS[name](x, PRIMITIVES)` is the way to call one.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from neuroweave.activations.formulas import Primitives

_erf: Any = np.frompyfunc(math.erf, 1, 1)  # NumPy has none; exact to the last digit or so, about 0.1 us a number


def _relu(x: Any) -> Any:
    return np.maximum(x, 0)


def _sigmoid(x: Any) -> Any:
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, np.ones_like(small), small) / (1 + small)


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


def _gelu(x: Any) -> Any:
    return x * (0.5 + 0.5 * np.asarray(_erf(x / math.sqrt(2)), x.dtype))


def _gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


class NumpyPrimitives:
    """What `formulas` is written in, for NumPy."""

    relu = staticmethod(_relu)
    silu = staticmethod(_silu)
    gelu = staticmethod(_gelu)
    gelu_tanh = staticmethod(_gelu_tanh)
    tanh: Any = staticmethod(np.tanh)
    sigmoid = staticmethod(_sigmoid)
    sin: Any = staticmethod(np.sin)


PRIMITIVES = cast(Primitives, NumpyPrimitives)
