"""Which weights changed, and by how much: a map of layers and projections for every other model."""

from __future__ import annotations

import bisect
import math
from typing import Any

from neuroweave.diagnose.report.figures.axes import label_rows, new_axes, plain
from neuroweave.diagnose.report.figures.drawing import HEAT, WIDTH, Drawing, shortened
from neuroweave.diagnose.results.comparison import Comparison, Other
from neuroweave.diagnose.results.weights import TensorChange, Weights

SECTION = "Weights"
STEPS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # between the colours; the same in every report
MOST_FAMILIES = 30
ROW, MARGIN = 0.2, 0.3  # inches: of one family; of the axis


def draw(comparison: Comparison) -> list[Drawing | None]:
    shown = [
        (index, other, other.difference.weights)
        for index, other in enumerate(comparison.others, 1)
        if other.difference.weights and other.difference.weights.parameters
    ]
    maps = [(index, other, weights) for index, other, weights in shown if any(map(level_of, weights.tensors))]
    alone = len(maps) == 1
    return [
        shared([(other, weights) for _, other, weights in shown]),
        *(
            change_map(other, weights, key="weight-change" if alone else f"weight-change-{index}")
            for index, other, weights in maps
        ),
    ]


def shared(shown: list[tuple[Other, Weights]]) -> Drawing | None:
    if not shown:
        return None
    figure, axes = new_axes(rows=len(shown))
    for row, (_, weights) in enumerate(shown):
        equal = 100 * weights.equal_bytes / weights.parameters
        values = 100 * weights.equal_values / weights.parameters
        axes.barh(row, 100, height=0.5, color=HEAT[0])
        axes.barh(row, max(equal, values), height=0.5, color=HEAT[3])
        axes.barh(row, equal, height=0.5, color=HEAT[6])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the base's numbers")
    label_rows(axes, [other.model.name for other, _ in shown])
    caption = (
        "Strong: in tensors that are equal to the byte; medium: equal in value only, number by number; faint: changed, "
        "or in no tensor of the same name and shape."
    )
    return Drawing("weights-shared", SECTION, "Weights shared with the base", caption, figure, [])


def change_map(other: Other, weights: Weights, *, key: str) -> Drawing:
    """Layers from left to right, projections from top to bottom; the colours' scale below."""
    from matplotlib.figure import Figure

    families = families_of(weights)
    height = MARGIN + ROW * len(families)
    figure = Figure(figsize=(WIDTH, height + 0.55), layout="constrained")
    panel, scale = figure.subplots(2, 1, height_ratios=[height, 0.16])
    draw_map(panel, weights, families)
    panel.set_xlabel("layer (a full row: a tensor outside of the layers)")
    draw_scale(scale)
    hidden = len({tensor.family for tensor in weights.tensors}) - len(families)
    caption = (
        f"{other.model.name}: norm of the difference over the norm of the base's tensor. Empty: no tensor of that name "
        "and shape in both." + (f" {hidden} families with the fewest numbers are not shown." if hidden else "")
    )
    name = shortened(other.model.name, 40)
    return Drawing(key, SECTION, f"Where the weights of {name} changed", caption, figure, [])


def families_of(weights: Weights) -> list[str]:
    """In the order of the model's tensors, those outside of the layers last; the largest where there are too many."""
    numbers: dict[str, int] = {}
    outside = set()
    for tensor in weights.tensors:
        numbers[tensor.family] = numbers.get(tensor.family, 0) + math.prod(tensor.shape)
        if tensor.layer is None:
            outside.add(tensor.family)
    largest = set(sorted(numbers, key=lambda family: -numbers[family])[:MOST_FAMILIES])
    return sorted((family for family in numbers if family in largest), key=outside.__contains__)


def level_of(tensor: TensorChange) -> int | None:
    """The colour: 0 for equal values, then by relative change; None where it is not defined."""
    if tensor.equal_values:
        return 0
    if tensor.relative_change is None or math.isnan(tensor.relative_change):
        return None
    return 1 + bisect.bisect_right(STEPS, tensor.relative_change)


def draw_map(axes: Any, weights: Weights, families: list[str]) -> None:
    """All cells of one colour in one path, which keeps the page small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.ticker import MaxNLocator

    layers = 1 + max((tensor.layer or 0 for tensor in weights.tensors), default=0)
    cells: dict[int, list[Path]] = {}
    for tensor in weights.tensors:
        level = level_of(tensor)
        if level is None or tensor.family not in families:
            continue
        row = families.index(tensor.family)
        left, right = (0, layers) if tensor.layer is None else (tensor.layer, tensor.layer + 1)
        gap = 0.04
        corners = [(left - 0.5 + gap, row - 0.44), (right - 0.5 - gap, row - 0.44)]
        corners += [(right - 0.5 - gap, row + 0.44), (left - 0.5 + gap, row + 0.44), (0, 0)]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
        cells.setdefault(level, []).append(Path(corners, codes))
    for level, paths in cells.items():
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=HEAT[level], edgecolor="none"))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    label_rows(axes, [family.removesuffix(".weight") for family in families], length=26)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.grid(visible=False)


def draw_scale(axes: Any) -> None:
    """The colours with the steps between them."""
    for level, colour in enumerate(HEAT):
        axes.barh(0, 0.94, left=level + 0.03, height=1, color=colour)
    axes.set_xlim(0, len(HEAT))
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.set_xticks([0.5, *range(2, len(HEAT))], ["equal", *(plain(step) for step in STEPS)])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=7)
    axes.set_xlabel("relative change")
