"""What a bank's file may say of a neuron: names and types, checked once, so that all who read a bank can rely on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from neuroweave.surgery.neurons.pair_fit import PiecewiseLinear
from neuroweave.surgery.neurons.plain_values import echo, is_integer, is_number

_KINDS = ("source", "derivative")
_OPTIONAL_CURVES = ("deviation", "count")
_OF_A_MOMENT = ("token", "text", "value")  # the others may be missing
_SMALLEST, _LARGEST = (float(size) for size in (np.finfo("f4").tiny, np.finfo("f4").max))


def check_record(record: object, number: int) -> None:
    """Raise ValueError, with the neuron's name or number, for a record that does not describe a neuron."""
    if not isinstance(record, dict):
        raise ValueError(f"neuron {number} is {echo(record)}; expected an object")
    name = record.get("name")
    known = isinstance(name, str) and name
    try:
        if not known:
            raise ValueError(f"its name is {echo(name)}; expected a text")
        if record.get("kind") not in _KINDS:
            raise ValueError(f"its kind is {echo(record.get('kind'))}; expected {' or '.join(_KINDS)}")
        for key, value in record.items():
            if key in _CHECKS:
                _CHECKS[key](value)
            elif key not in ("name", "kind"):
                raise ValueError(f"its key {echo(key)} is not known; known: name, kind, {', '.join(_CHECKS)}")
    except ValueError as error:
        raise ValueError(f"neuron {echo(name) if known else number}: {error}") from error


def _check_origin(origin: object) -> None:
    about = _object(origin, "origin")
    for key in ("parent", "operation"):
        if key in about and not isinstance(about[key], str):
            raise ValueError(f"its origin's {key} is {echo(about[key])}; expected a text")
    gain = about.get("gain", 1.0)
    if not is_number(gain) or not _SMALLEST <= gain <= _LARGEST:
        raise ValueError(f"its origin's gain is {echo(gain)}; expected a number above 0 that float32 holds")
    if about.get("statistics") == "inherited" and "parent" not in about:
        raise ValueError("its statistics are inherited, but its origin has no parent")


def _check_behaviour(behaviour: object) -> None:
    if behaviour is not None:
        PiecewiseLinear.from_dict(_object(behaviour, "behaviour"))


def _check_statistics(statistics: object) -> None:
    for key, value in _object(statistics, "statistics").items():
        if not is_number(value):
            raise ValueError(f"its statistic {echo(key)} is {echo(value)}; expected a number")


def _check_response(response: object) -> None:
    if response is None or response == {}:
        return
    curves = _object(response, "response")
    for key in ("input", "mean", *(key for key in _OPTIONAL_CURVES if key in curves)):
        values = curves.get(key)
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            raise ValueError(f"its response's {key} is {echo(values)}; expected a list of numbers")
        if len(values) != len(curves["input"]):
            raise ValueError(f"its response has {len(curves['input'])} inputs, but {len(values)} numbers in {key}")
    if unknown := curves.keys() - {"input", "mean", *_OPTIONAL_CURVES}:
        raise ValueError(f"its response's key {echo(min(unknown))} is not known")
    if any(after <= before for before, after in pairwise(curves["input"])):
        raise ValueError("its response's inputs do not ascend")


def _check_fired(fired: object) -> None:
    if not isinstance(fired, list):
        raise ValueError(f"its fired is {echo(fired)}; expected a list")
    for item in fired:
        moment = _object(item, "moment in fired")
        for key, fits, expected in _MOMENT:
            if (key in moment or key in _OF_A_MOMENT) and not fits(moment.get(key)):
                raise ValueError(f"its moment in fired has the {key} {echo(moment.get(key))}; expected {expected}")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is {echo(value)}; expected an object")
    return value


_MOMENT: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("token", lambda value: isinstance(value, str), "a text"),
    ("text", lambda value: isinstance(value, str), "a text"),
    ("value", is_number, "a number"),
    ("start", is_integer, "an integer"),
    ("end", is_integer, "an integer"),
    ("document", lambda value: isinstance(value, str), "a text"),
)
_CHECKS: dict[str, Callable[[object], None]] = {
    "origin": _check_origin,
    "behaviour": _check_behaviour,
    "statistics": _check_statistics,
    "response": _check_response,
    "fired": _check_fired,
}
