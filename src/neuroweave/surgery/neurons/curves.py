"""A neuron's curve, measured or defined, and how it and the tokens that it fires on are shown in characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from neuroweave.surgery.neurons.bank import Neuron
from neuroweave.surgery.neurons.pair_fit import PiecewiseLinear

MEASURED, DEFINED = "measured", "defined"
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """What a neuron gives (`output`) at `input = gate.x`, in ascending order; `kind` says how it is known.

    Of a measured curve `deviation` is the standard deviation of the outputs in a bin, `count` how many there were.
    """

    kind: str
    input: Float64[np.ndarray, " bins"]
    output: Float64[np.ndarray, " bins"]
    deviation: Float64[np.ndarray, " bins"] | None = None
    count: Float64[np.ndarray, " bins"] | None = None

    def at(self, points: int) -> Float64[np.ndarray, " points"]:
        """The output at so many equally distant inputs, straight lines between what is known."""
        return np.interp(np.linspace(self.input[0], self.input[-1], points), self.input, self.output)


def curve_of(neuron: Neuron) -> Curve | None:
    """The measured response of a neuron, else the function that it was defined by, else None."""
    if neuron.response:
        numbers = {name: np.asarray(values, dtype=np.float64) for name, values in neuron.response.items()}
        return Curve(MEASURED, numbers["input"], numbers["mean"], numbers.get("deviation"), numbers.get("count"))
    if neuron.behaviour:
        return defined_curve(neuron.behaviour)
    return None


def defined_curve(behaviour: dict[str, Any]) -> Curve:
    """The odd function that a defined neuron stands for, on the range where it is realised."""
    function = PiecewiseLinear.from_dict(behaviour)
    corners = [knot for knot in function.knots if 0 < knot < function.range]
    s = np.array(sorted({0.0, *(sign * at for sign in (-1, 1) for at in (*corners, function.range))}))
    return Curve(DEFINED, s, function(s))


def sparkline(curve: Curve, width: int = 16) -> str:
    """The curve in one line, from its lowest value or 0 (▁) to its highest or 0 (█)."""
    values = curve.at(width)
    low, high = min(0.0, values.min()), max(0.0, values.max())
    if high == low:
        return BLOCKS[0] * width
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def text_plot(curve: Curve, *, width: int = 64, height: int = 13) -> list[str]:
    """Lines of a plot with axes: ● the curve, ░ one deviation around it, ─ where the output is 0."""
    values, spread = curve.at(width), np.zeros(width)
    if curve.deviation is not None:
        spread = np.interp(np.linspace(curve.input[0], curve.input[-1], width), curve.input, curve.deviation)
    low = min(0.0, (values - spread).min())
    high = max(0.0, (values + spread).max())
    scale = (height - 1) / (high - low or 1.0)

    def row(value: float) -> int:
        return height - 1 - round((value - low) * scale)

    grid = [[" "] * width for _ in range(height)]
    grid[row(0.0)] = ["─"] * width
    for column, (value, around) in enumerate(zip(values.tolist(), spread.tolist(), strict=True)):
        for place in range(row(value + around), row(value - around) + 1):
            if around:
                grid[place][column] = "░"
        grid[row(value)][column] = "●"
    labels = {row(0.0): "0"}
    labels |= {place: f"{value:.3g}" for place, value in ((0, high), (height - 1, low)) if place not in labels}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(place, ''):>{margin}} ┤{''.join(cells)}" for place, cells in enumerate(grid)]
    left, right = f"{curve.input[0]:.3g}", f"{curve.input[-1]:.3g}"
    gap = " " * (width - len(left) - len(right))
    return [*lines, f"{'':>{margin}} └{'─' * width}", f"{'':>{margin}}  {left}{gap}{right}  gate·x"]


def fires_on(neuron: Neuron, *, length: int, between: str = " ") -> str:
    """The different tokens of a neuron's strongest moments, strongest first, as far as `length` characters go."""
    words: list[str] = []
    for moment in neuron.fired:
        word = visible(str(moment["token"])).strip() or "␣"
        if word not in words and len(between.join([*words, word])) <= length:
            words.append(word)
    return between.join(words)


def visible(text: str) -> str:
    """A text in one line: line ends become ↵, tabs a space, other unprintable characters a dot."""
    text = text.replace("\n", "↵").replace("\t", " ")
    return "".join(letter if letter.isprintable() else "·" for letter in text)
