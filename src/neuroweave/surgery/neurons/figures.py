"""A page of small pictures, one per neuron: its response curve and how often each input occurred. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave.surgery.neurons.bank import Neuron, check_no_source
from neuroweave.surgery.neurons.curves import DEFINED, Curve, curve_of, fires_on

INK, MUTED, GRID, LINE, OTHER_LINE = "#1c2430", "#6b7482", "#dfe3e8", "#1f6fb2", "#b2541f"
SUFFIXES = (".png", ".svg")
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 4, 2.7, 1.9  # inches
HEADER, LINE_HEIGHT = 0.5, 0.14
LETTERS = 17  # of the explanation, in an inch
FEW = 5  # observations in a bin, below which its mean says little
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neuroweave",
    "font.size": 8,
    "font.family": "sans-serif",
    "text.color": INK,
    "text.parse_math": False,  # a token may be a dollar sign
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


def check_figure(path: str | Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> Path:
    """The path of a figure that may be drawn. Raises ValueError or ImportError, saying why, when it may not."""
    path = check_no_source(path, sources)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a figure is a {' or '.join(SUFFIXES)} file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name, or add --overwrite")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('a figure needs matplotlib: pip install "neuroweave[report]"')
    return path


def draw_bank(neurons: Sequence[Neuron], path: Path, *, title: str) -> None:
    """Draw the curves of `neurons` on one page. Raises ValueError when none of them has a curve."""
    import matplotlib

    drawn = [(neuron, curve) for neuron in neurons if (curve := curve_of(neuron)) is not None]
    if not drawn:
        raise ValueError(
            "none of these neurons has a curve to draw: neither measured on text nor defined by a function"
        )
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # tokens of any script; what the font lacks becomes a box
        figure = page(drawn, title)
        metadata = {"Date": None, "Creator": None} if path.suffix.lower() == ".svg" else {"Software": None}
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix.lower().removeprefix("."), metadata=metadata)
    path.write_bytes(picture.getvalue())


def page(drawn: Sequence[tuple[Neuron, Curve]], title: str) -> Any:
    """The figure: a title, the panels, and under them what they show."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    width = max(columns, 2) * PANEL_WIDTH
    words = explanation([curve for _, curve in drawn], int(width * LETTERS))
    footer = 0.22 + LINE_HEIGHT * len(words)
    height = rows * PANEL_HEIGHT + HEADER + footer
    area = (0.005, footer / height, 0.99, 1 - (HEADER + footer) / height)
    layout = ConstrainedLayoutEngine(rect=area, hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(width, height), layout=layout)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (neuron, curve) in zip(panels, drawn, strict=False):
        draw_panel(axes, neuron, curve)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    figure.text(0.012, 1 - 0.13 / height, title, size=12, weight="bold", va="top")
    figure.text(0.012, 0.1 / height, "\n".join(words), color=MUTED, size=8, va="bottom")
    return figure


def explanation(curves: Sequence[Curve], letters: int) -> list[str]:
    """What the panels show, in lines of so many letters."""
    said = ["One panel is one neuron. Across: gate·x, its input; upwards: what it multiplies its output direction by."]
    if any(curve.kind != DEFINED for curve in curves):
        said.append(
            "Blue: act(gate·x)·(up·x) measured on text, mean and one standard deviation around it, dotted where fewer "
            f"than {FEW} were seen; grey bars: how often that input occurred (square root). Under the name: the tokens "
            "of its strongest moments."
        )
    if any(curve.kind == DEFINED for curve in curves):
        said.append("Orange: the function that a defined neuron stands for.")
    return [line for sentence in said for line in textwrap.wrap(sentence, letters)]


def draw_panel(axes: Any, neuron: Neuron, curve: Curve) -> None:
    """One neuron: its curve over the bars of how often each input occurred."""
    axes.axhline(0, color=GRID, linewidth=0.8, zorder=0)
    if curve.input[0] < 0 < curve.input[-1]:
        axes.axvline(0, color=GRID, linewidth=0.8, zorder=0)
    colour = OTHER_LINE if curve.kind == DEFINED else LINE
    if curve.deviation is not None:
        low, high = curve.output - curve.deviation, curve.output + curve.deviation
        axes.fill_between(curve.input, low, high, color=colour, alpha=0.2, linewidth=0)
    if curve.count is None:
        axes.plot(curve.input, curve.output, color=colour)
    else:
        axes.plot(curve.input, curve.output, ":", color=colour, linewidth=1)
        axes.plot(curve.input, np.where(curve.count >= FEW, curve.output, np.nan), color=colour)
        bars = axes.inset_axes([0, 0, 1, 0.22], sharex=axes, zorder=-1)
        gaps = np.diff(curve.input)
        width = float(np.median(gaps)) if len(gaps) else 1.0
        bars.bar(curve.input, np.sqrt(curve.count), width=0.9 * width, color=MUTED, alpha=0.35, linewidth=0)
        bars.set_axis_off()
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(nbins=4)
    axes.tick_params(length=2, width=0.6)
    axes.set_title(neuron.name, loc="left", size=9, weight="bold", pad=14)
    axes.text(0, 1.03, fires_on(neuron, length=34, between=", "), transform=axes.transAxes, color=MUTED, size=8)
