"""Axes and the marks that more than one figure draws: lines over layers with their bands, and rows of intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from neuroweave.diagnose.report.figures.drawing import HEIGHT, INK, MUTED, SERIES, WIDTH, shortened
from neuroweave.diagnose.results.records import Estimate

WIDE = 20  # a range of more than this factor gets a logarithmic scale
LEAST_SPAN = 2e-3  # of an axis of ratios or similarities, so that rounding does not look like a mountain
NAN = float("nan")


def new_axes(*, rows: int = 0) -> tuple[Any, Any]:
    """An empty figure and its axes; `rows` makes it high enough for as many labelled rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.75 + 0.32 * rows if rows else HEIGHT), layout="constrained")
    return figure, figure.subplots()


def stacked(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure of axes one below the other with a common x axis, `heights` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(grid[:, 0])


def small_multiples(count: int, *, height: float = 1.55, sharey: bool = False) -> tuple[Any, list[Any]]:
    """A figure of `count` axes in two columns."""
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 0.25 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[count:]:
        unused.remove()
    if count % columns:  # the panel above the empty place shows the x axis
        panels[count - columns].xaxis.set_tick_params(labelbottom=True)
    return figure, panels[:count]


def finite(value: float) -> float:
    """NaN, which leaves a gap in a line, for what cannot be drawn."""
    return value if math.isfinite(value) else NAN


def drawable(estimates: Iterable[Estimate]) -> bool:
    """Whether there is anything finite to draw."""
    return any(math.isfinite(estimate.value) for estimate in estimates)


def plain(value: float, _: object = None) -> str:
    """A tick label without powers of ten in superscript: 0.01, 1,000, 1e-6."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.4g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.10g}"


def plain_ticks(axis: Any, *, ticks: int = 5) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(plain))


def logarithmic(axes: Any, which: str, values: Sequence[float], *, ticks: int = 5) -> None:
    """A logarithmic scale with plain tick labels; with some between the tens where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(max(values) / min(values))
    between = (1,) if decades > 2 else (1, 3) if ticks < 5 else (1, 2, 5)
    axis.set_major_locator(LogLocator(base=10, subs=between, numticks=7))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def fit_scale(axes: Any, which: str, values: Iterable[float], *, from_zero: bool = False, ticks: int = 5) -> None:
    """Logarithmic for a wide range of positive values, else linear; `from_zero`: a linear axis begins at 0."""
    known = [value for value in values if math.isfinite(value)]
    if known and min(known) > 0 and max(known) / min(known) > WIDE:
        logarithmic(axes, which, known, ticks=ticks)
        return
    plain_ticks(axes.xaxis if which == "x" else axes.yaxis, ticks=ticks)
    if from_zero:
        axes.set_xlim(left=0) if which == "x" else axes.set_ylim(bottom=0)


def at_least(axes: Any, span: float = LEAST_SPAN) -> None:
    """Widen a y axis that shows less than `span`."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def layer_axis(axes: Any, label: str = "layer", *, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlim(-0.5, max(count - 0.5, 0.5))
    axes.set_xlabel(label)


def draw_line(axes: Any, x: Sequence[int], estimates: Sequence[Estimate], colour: str, *, band: bool = True) -> None:
    """A dot per value, joined; `band`: the 95 % intervals."""
    values = [finite(estimate.value) for estimate in estimates]
    size = 4.5 if len(x) < 3 else 2.6 if len(x) <= 40 else 1.6
    axes.plot(x, values, color=colour, marker="o", markersize=size, markeredgewidth=0)
    if band and any(estimate.low is not None for estimate in estimates):
        lows = [value if e.low is None else finite(e.low) for e, value in zip(estimates, values, strict=True)]
        highs = [value if e.high is None else finite(e.high) for e, value in zip(estimates, values, strict=True)]
        if len(x) == 1:
            axes.plot([x[0], x[0]], [lows[0], highs[0]], color=colour)
        else:
            axes.fill_between(x, lows, highs, color=colour, alpha=0.18, linewidth=0)


def no_difference(axes: Any, value: float, *, vertical: bool = False) -> None:
    """The dashed line of "no difference"."""
    (axes.axvline if vertical else axes.axhline)(value, color=SERIES[0], linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def draw_rows(axes: Any, rows: Sequence[tuple[int, str, Estimate]], *, reference: float | None = None) -> None:
    """A dot with its interval per (colour, name, estimate); `reference`: the dashed line."""
    values = []
    for row, (colour, _, estimate) in enumerate(rows):
        if not math.isfinite(estimate.value):
            axes.text(0.01, row, "infinite", transform=axes.get_yaxis_transform(), va="center", color=MUTED)
            continue
        values.append(estimate.value)
        if estimate.low is not None:
            axes.plot([estimate.low, estimate.high], [row, row], color=SERIES[colour], linewidth=2.2)
        axes.plot(estimate.value, row, "o", color=SERIES[colour], markersize=6, markeredgewidth=0)
    if reference is not None:
        no_difference(axes, reference, vertical=True)
        values.append(reference)
    fit_scale(axes, "x", values)
    label_rows(axes, [name for _, name, _ in rows])


def label_rows(axes: Any, names: Sequence[str], *, length: int = 22) -> None:
    """One row a name, the first on top."""
    axes.set_yticks(range(len(names)), [shortened(name, length) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
