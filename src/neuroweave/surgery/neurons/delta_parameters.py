"""The settings of `plan_deltas`, as a person or a recipe gives them: names, types and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuroweave.checkpoint.header import DTYPE_NAMES
from neuroweave.surgery.neurons.layer_deltas import DTYPES, SYMMETRIES
from neuroweave.surgery.neurons.plain_values import echo, is_integer, is_number

PARAMETERS = ("seed", "dtype", "gate_scale", "neurons", "layers", "symmetry")


def check_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, fit for `plan_deltas(model, bank, **settings)`; those that are missing stay missing.

    Raises ValueError for a name that is no setting, and for a value of another type or out of bounds.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"the parameters of deltas are {echo(parameters)}; expected names and values")
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ValueError(f"{echo(name)} is no parameter of deltas; known: {', '.join(PARAMETERS)}")
        _check(name, value)
    return dict(parameters)


def _check(name: str, value: Any) -> None:
    dtypes = [DTYPE_NAMES[code] for code in DTYPES]
    if name == "seed" and not is_integer(value):
        raise ValueError(f"seed {echo(value)}: expected an integer")
    if name == "dtype" and value is not None and value not in dtypes:
        raise ValueError(f"dtype {echo(value)}: expected one of {', '.join(dtypes)}")
    if name == "gate_scale" and not (is_number(value) and value > 0):
        raise ValueError(f"gate scale {echo(value)}: expected a number above 0")
    if name == "neurons" and value is not None and not (is_integer(value) and value >= 2):
        raise ValueError(f"{echo(value)} neurons: expected 2 or more, which make a pair")
    if name == "layers" and value is not None:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not all(map(is_integer, value)):
            raise ValueError(f"layers {echo(value)}: expected a list of layer numbers")
        if not value:
            raise ValueError("no layers are chosen; name one at least")
    if name == "symmetry" and value not in SYMMETRIES:
        raise ValueError(f"symmetry {echo(value)}: expected one of {', '.join(SYMMETRIES)}")
