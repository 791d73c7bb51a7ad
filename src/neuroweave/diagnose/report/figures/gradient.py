"""The norm of the loss gradient, weight family by weight family."""

from __future__ import annotations

from neuroweave.diagnose.report.figures.axes import (
    at_least,
    draw_line,
    draw_rows,
    drawable,
    fit_scale,
    layer_axis,
    new_axes,
    no_difference,
    small_multiples,
    stacked,
)
from neuroweave.diagnose.report.figures.drawing import Drawing, colour_number, colour_of, named, shortened
from neuroweave.diagnose.report.numbers import with_interval
from neuroweave.diagnose.results.comparison import Comparison
from neuroweave.diagnose.results.gradient import FamilyGradient, Gradient
from neuroweave.diagnose.results.records import Estimate

SECTION = "Gradients"
MOST_FAMILIES = 16
MOST_ROWS = 24
Measured = list[tuple[int, Gradient]]


def draw(comparison: Comparison) -> list[Drawing | None]:
    gradients = [(index, model.gradient) for index, model in enumerate(comparison.models) if model.gradient]
    names = list(
        dict.fromkeys(family.family for _, gradient in gradients for family in gradient.families if by_layer(family))
    )
    return [
        first_family(comparison, gradients, names[0]) if names else None,
        outside(comparison, gradients),
        further_families(comparison, gradients, names[1:]),
    ]


def by_layer(family: FamilyGradient) -> bool:
    return any(layer is not None for layer in family.layers) and drawable(family.norm)


def find(gradient: Gradient, name: str) -> FamilyGradient | None:
    return next((family for family in gradient.families if family.family == name and by_layer(family)), None)


def first_family(comparison: Comparison, gradients: Measured, name: str) -> Drawing:
    found = [(index, family) for index, gradient in gradients if (family := find(gradient, name))]
    ratios = [
        (index, ratio)
        for index, other in enumerate(comparison.others, 1)
        if other.difference.gradient
        for ratio in other.difference.gradient.families
        if ratio.family == name and drawable(ratio.ratio)
    ]
    figure, panels = stacked([2.3, 1.2] if ratios else [2.7])
    for index, family in found:
        draw_line(panels[0], [layer or 0 for layer in family.layers], family.norm, colour_of(index))
    fit_scale(panels[0], "y", [e.value for _, family in found for e in family.norm], from_zero=True)
    panels[0].set_title("norm of the gradient")
    for index, ratio in ratios:
        draw_line(panels[1], [layer or 0 for layer in ratio.layers], ratio.ratio, colour_of(index))
    if ratios:
        no_difference(panels[1], 1.0)
        fit_scale(panels[1], "y", [e.value for _, ratio in ratios for e in ratio.ratio], ticks=4)
        at_least(panels[1])
        panels[1].set_title("ratio to the base's")
    layer_axis(panels[-1], count=1 + max(layer or 0 for _, family in found for layer in family.layers))
    windows = max(gradient.windows for _, gradient in gradients)
    totals = "; ".join(f"{comparison.models[i].name} {with_interval(gradient.total)}" for i, gradient in gradients)
    caption = (
        f"Of the loss (nats per token), mean over {windows} windows of text, with 95 % intervals"
        + ("; the ratio is paired over the windows, dashed: no difference" if ratios else "")
        + f". Norm over all parameters: {totals}."
    )
    models = named(comparison, [index for index, _ in found])
    return Drawing("gradient", SECTION, f"Gradient of {name}", caption, figure, models)


def further_families(comparison: Comparison, gradients: Measured, names: list[str]) -> Drawing | None:
    if not names:
        return None
    figure, panels = small_multiples(min(len(names), MOST_FAMILIES), height=1.4)
    indices: list[int] = []
    count = 1
    for axes, name in zip(panels, names, strict=False):
        values: list[float] = []
        for index, gradient in gradients:
            family = find(gradient, name)
            if family is None:
                continue
            draw_line(axes, [layer or 0 for layer in family.layers], family.norm, colour_of(index))
            values += [estimate.value for estimate in family.norm]
            count = max(count, 1 + max(layer or 0 for layer in family.layers))
            indices.append(index)
        fit_scale(axes, "y", values, from_zero=True, ticks=4)
        axes.set_title(shortened(name, 34))
    for axes in panels:
        layer_axis(axes, "", count=count)
    figure.supxlabel("layer", fontsize=9, color=panels[0].xaxis.label.get_color())
    rest = len(names) - len(panels)
    caption = "The same for every other weight family; each panel has its own scale." + (
        f" {rest} families are not shown." if rest else ""
    )
    return Drawing("gradient-families", SECTION, "Gradients by family", caption, figure, named(comparison, indices))


def outside(comparison: Comparison, gradients: Measured) -> Drawing | None:
    """Parameters outside of the layers: a row for each model."""
    names = list(
        dict.fromkeys(
            family.family
            for _, gradient in gradients
            for family in gradient.families
            if not by_layer(family) and drawable(family.norm)
        )
    )
    rows: list[tuple[int, str, Estimate]] = []
    indices: list[int] = []
    for name in names:
        for index, gradient in gradients:
            family = next((family for family in gradient.families if family.family == name), None)
            if family is not None and drawable(family.norm):
                label = "" if name in {row[1] for row in rows} else name
                rows.append((colour_number(index), label, family.norm[0]))
                indices.append(index)
    if not rows:
        return None
    rows = rows[:MOST_ROWS]
    figure, axes = new_axes(rows=len(rows))
    draw_rows(axes, rows)
    axes.set_xlabel("norm of the gradient")
    caption = "Parameters that belong to no layer, with 95 % intervals."
    return Drawing(
        "gradient-outside", SECTION, "Gradients outside of the layers", caption, figure, named(comparison, indices)
    )
