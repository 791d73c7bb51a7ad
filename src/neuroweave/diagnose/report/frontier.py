"""Figures of many changes of one model: the frontiers of a sweep, and how sensitive each layer is. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroweave.diagnose.report.figures import house_style
from neuroweave.diagnose.report.figures.axes import fit_scale, layer_axis, new_axes, no_difference
from neuroweave.diagnose.report.figures.drawing import INK, MUTED, SERIES, Drawing, save_drawing, shortened
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.sweep import BASE, Outcome, Point, RankedLayer

SECTION = "Sweep"
MOST_NAMED = 24  # with more points only those of the frontier are numbered and named
ROW = 0.17  # inches of a row of names


def save_frontiers(
    points: Sequence[Point], fronts: Mapping[str, Sequence[str]], folder: Path, *, stem: str
) -> list[Path]:
    """Write `<stem>-perplexity` and, where sparsity was counted, `<stem>-sparsity` to `folder` as SVG and PNG.

    `fronts`: key of a point -> the frontiers that it is on. Returns the files.
    """
    with house_style():
        drawn = [perplexity(points, fronts, stem), sparsity(points, fronts, stem)]
        return [file for drawing in drawn if drawing for file in save_drawing(drawing, folder)]


def save_sensitivity(ranking: Sequence[RankedLayer], folder: Path, *, stem: str, label: str) -> list[Path]:
    """Write `<stem>` to `folder` as SVG and PNG; `label`: what was changed, in words. Returns the files."""
    with house_style():
        drawing = sensitivity(ranking, stem, label)
        return save_drawing(drawing, folder) if drawing else []


def perplexity(points: Sequence[Point], fronts: Mapping[str, Sequence[str]], stem: str) -> Drawing | None:
    return draw_frontier(
        points,
        {key for key, names in fronts.items() if "perplexity" in names},
        lambda outcome: outcome.perplexity_ratio,
        key=f"{stem}-perplexity",
        title="KL against perplexity",
        label="perplexity / unchanged model's",
    )


def sparsity(points: Sequence[Point], fronts: Mapping[str, Sequence[str]], stem: str) -> Drawing | None:
    return draw_frontier(
        points,
        {key for key, names in fronts.items() if "sparsity" in names},
        lambda outcome: outcome.near_zero,
        key=f"{stem}-sparsity",
        title="KL against sparsity",
        label="share of near-zero MLP activations",
    )


def draw_frontier(
    points: Sequence[Point], front: set[str], value: Callable[[Outcome], Estimate | None], *, key: str, title: str,
    label: str,
) -> Drawing | None:  # fmt: skip
    """KL to the right, `value` upwards, both with intervals; the points of `front` are filled and joined. The unchanged
    model, whose KL is 0, is the dashed line. None where nothing can be drawn."""
    values = {point.key: found for point in points if point.outcome and (found := value(point.outcome))}
    kls = {point.key: point.outcome.kl for point in points if point.outcome}
    shown = [
        point
        for point in points
        if point.key in values and point.key != BASE and drawable(kls[point.key], values[point.key])
    ]
    if not shown:
        return None
    figure, axes = new_axes()
    for point in shown:
        x, y = kls[point.key], values[point.key]
        colour = SERIES[1] if point.key in front else MUTED
        draw_interval(axes, x, y, colour)
        face = colour if point.key in front else "white"
        order = 4 if point.key in front else 3
        axes.plot(x.value, y.value, "o", color=colour, markerfacecolor=face, markersize=5, zorder=order)
    best = sorted((kls[point.key].value, values[point.key].value) for point in shown if point.key in front)
    axes.plot([x for x, _ in best], [y for _, y in best], color=SERIES[1], linewidth=1, zorder=2)
    heights = [values[point.key].value for point in shown]
    if BASE in values:
        no_difference(axes, values[BASE].value)
        heights.append(values[BASE].value)
    fit_scale(axes, "x", [kls[point.key].value for point in shown])
    fit_scale(axes, "y", heights)
    axes.set_xlabel("KL(unchanged || changed), nats per token")
    axes.set_title(label)
    numbers = numbered(points)
    named = [point for point in shown if len(shown) <= MOST_NAMED or point.key in front]
    place_numbers(axes, [(kls[point.key].value, values[point.key].value, numbers[point.key]) for point in named])
    list_names(figure, {numbers[point.key]: point for point in named})
    left_out = [point.name for point in points if point.key != BASE and point not in shown]
    caption = (
        "Each dot is a change, with 95 % intervals; filled: no other is better in both. Dashed: the unchanged model."
    )
    caption += f" Not drawn: {', '.join(left_out)}." if left_out else ""
    return Drawing(key, SECTION, title, caption, figure, [])


def drawable(*estimates: Estimate) -> bool:
    return all(math.isfinite(estimate.value) for estimate in estimates)


def draw_interval(axes: Any, x: Estimate, y: Estimate, colour: str) -> None:
    if x.low is not None and y.low is not None:
        axes.plot([x.low, x.high], [y.value, y.value], color=colour, linewidth=1.1, alpha=0.6)
        axes.plot([x.value, x.value], [y.low, y.high], color=colour, linewidth=1.1, alpha=0.6)


def numbered(points: Sequence[Point]) -> dict[str, int]:
    """Key -> number: the changes by KL, the least first, as in the table."""
    known = sorted((point.outcome.kl.value, point.key) for point in points if point.outcome and point.key != BASE)
    return {key: number for number, (_, key) in enumerate(known, start=1)}


def place_numbers(axes: Any, places: Iterable[tuple[float, float, int]]) -> None:
    """A number above each (x, y), and above the numbers that stand there already."""
    figure = axes.figure
    axes.margins(0.06, 0.14)
    figure.draw_without_rendering()
    boxes: list[Any] = []
    for x, y, number in sorted(places, key=lambda place: place[1]):
        text = axes.annotate(
            str(number), (x, y), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
        while below := [box for box in boxes if box.overlaps(text.get_window_extent())]:
            lift = max(box.y1 for box in below) - text.get_window_extent().y0
            text.set_position((0, text.get_position()[1] + lift * 72 / figure.dpi + 0.5))
        boxes.append(text.get_window_extent())


def list_names(figure: Any, named: Mapping[int, Point]) -> None:
    """What the numbers mean, in two columns below; one key that all points vary is told once."""
    from matplotlib.lines import Line2D

    keys = {tuple(point.settings) for point in named.values()}
    one = next(iter(keys)) if len(keys) == 1 else ()
    key = one[0] if len(one) == 1 else None
    names = [
        f"{number}  {shortened(str(point.settings[key]) if key else point.name, 38)}"
        for number, point in sorted(named.items())
    ]
    figure.set_figheight(figure.get_figheight() + ROW * (-(-len(names) // 2) + (key is not None)))
    figure.legend(
        [Line2D([], [], linestyle="none") for _ in names], names, loc="outside lower left", ncols=2, frameon=False,
        fontsize=8, handlelength=0, handletextpad=0, title=key, title_fontsize=8, alignment="left",
    )  # fmt: skip


def sensitivity(ranking: Sequence[RankedLayer], stem: str, label: str) -> Drawing | None:
    """KL of changing each layer alone, in the order of the layers."""
    shown = sorted((layer for layer in ranking if drawable(layer.kl)), key=lambda layer: layer.layer)
    if not shown:
        return None
    figure, axes = new_axes()
    for layer in shown:
        low, high = (layer.kl.value if end is None else end for end in (layer.kl.low, layer.kl.high))
        axes.plot([layer.layer, layer.layer], [low, high], color=SERIES[1], linewidth=2.2)
    axes.plot([layer.layer for layer in shown], [layer.kl.value for layer in shown], "o", color=SERIES[1], markersize=4)
    axes.margins(y=0.12)
    fit_scale(axes, "y", [layer.kl.value for layer in shown], from_zero=True)
    for layer in sorted(shown, key=lambda layer: layer.rank)[:3]:
        high = layer.kl.value if layer.kl.high is None else layer.kl.high
        axes.annotate(
            str(layer.layer),
            (layer.layer, high),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    layer_axis(axes, "the one layer that is changed", count=max(layer.layer for layer in shown) + 1)
    axes.set_title("KL(unchanged || changed), nats per token, with 95 % intervals")
    caption = "Each layer is changed alone; the three most sensitive are named."
    return Drawing(stem, SECTION, f"Sensitivity of each layer: {label}", caption, figure, [])
