"""How well the models predict, how far their predictions lie apart, and how far their confidence can be believed."""

from __future__ import annotations

import math

from neuroweave.diagnose.report.figures.axes import (
    draw_rows,
    drawable,
    fit_scale,
    logarithmic,
    new_axes,
    plain_ticks,
    stacked,
)
from neuroweave.diagnose.report.figures.drawing import Drawing, colour_number, colour_of, named, shortened
from neuroweave.diagnose.report.numbers import with_interval
from neuroweave.diagnose.results.comparison import Comparison

SECTION = "Prediction"


def draw(comparison: Comparison) -> list[Drawing | None]:
    return [
        perplexity(comparison),
        perplexity_ratio(comparison),
        kl_histogram(comparison),
        kl_by_position(comparison),
        calibration(comparison),
    ]


def perplexity(comparison: Comparison) -> Drawing | None:
    models = comparison.models
    if not drawable(model.perplexity for model in models):
        return None
    figure, axes = new_axes(rows=len(models))
    draw_rows(axes, [(colour_number(i), model.name, model.perplexity) for i, model in enumerate(models)])
    axes.set_xlabel("perplexity")
    caption = (
        "Of each model by itself, with 95 % intervals. The intervals are wide because texts differ in difficulty; "
        "whether two models differ is for the next figure."
    )
    return Drawing("perplexity", SECTION, "Perplexity", caption, figure, [])


def perplexity_ratio(comparison: Comparison) -> Drawing | None:
    others = comparison.others
    if not drawable(other.difference.perplexity_ratio for other in others):
        return None
    figure, axes = new_axes(rows=len(others))
    rows = [
        (colour_number(i), other.model.name, other.difference.perplexity_ratio) for i, other in enumerate(others, 1)
    ]
    draw_rows(axes, rows, reference=1.0)
    axes.set_xlabel(f"perplexity / perplexity of {shortened(comparison.base.name)}")
    caption = "The same texts, paired. An interval that crosses the dashed line (1) is within noise."
    return Drawing("perplexity-ratio", SECTION, "Perplexity against the base", caption, figure, [])


def kl_histogram(comparison: Comparison) -> Drawing | None:
    shown = [
        (index, other)
        for index, other in enumerate(comparison.others, 1)
        if any(other.difference.kl_histogram.counts) or other.difference.kl_histogram.above
    ]
    if not any(any(other.difference.kl_histogram.counts) for _, other in shown):
        return None
    figure, axes = new_axes()
    edges: list[float] = []
    for index, other in shown:
        histogram = other.difference.kl_histogram
        total = max(1, sum(histogram.counts) + histogram.below + histogram.above)
        share = [100 * count / total for count in histogram.counts]
        axes.stairs(share, histogram.edges, color=colour_of(index), linewidth=1.6)
        axes.stairs(share, histogram.edges, color=colour_of(index), fill=True, alpha=0.1, linewidth=0)
        filled = [at for at, count in enumerate(histogram.counts) if count]
        edges += [histogram.edges[at + side] for at in filled for side in (0, 1)]
    logarithmic(axes, "x", [edge for edge in edges if edge > 0])
    axes.set_xlim(min(edges), max(edges))
    fit_scale(axes, "y", [], from_zero=True)
    axes.set_title("% of predictions")
    axes.set_xlabel("KL(base || other), nats per token")
    outside = [
        f"{other.model.name}: {histogram.below:,} below and {histogram.above:,} above the bins"
        for _, other in shown
        if (histogram := other.difference.kl_histogram).below or histogram.above
    ]
    caption = "Distribution of the KL divergence over predictions, on a logarithmic axis." + (
        f" Not shown: {'; '.join(outside)}." if outside else ""
    )
    models = named(comparison, [index for index, _ in shown])
    return Drawing("kl-histogram", SECTION, "How far single predictions moved", caption, figure, models)


def kl_by_position(comparison: Comparison) -> Drawing | None:
    shown = [
        (index, [part for part in other.difference.kl_by_position if math.isfinite(part.mean)])
        for index, other in enumerate(comparison.others, 1)
    ]
    shown = [(index, bins) for index, bins in shown if any(part.mean for part in bins)]
    if not shown:
        return None
    figure, axes = new_axes()
    for index, bins in shown:
        middles = [(part.first + part.last) / 2 for part in bins]
        axes.plot(middles, [part.mean for part in bins], color=colour_of(index), marker="o", markersize=2.6)
    fit_scale(axes, "y", [part.mean for _, bins in shown for part in bins], from_zero=True)
    plain_ticks(axes.xaxis, ticks=8)
    axes.set_title("mean KL, nats per token")
    axes.set_xlabel("position in the window, tokens")
    caption = "Whether predictions move with little context (left) or with much (right)."
    models = named(comparison, [index for index, _ in shown])
    return Drawing("kl-by-position", SECTION, "KL by position", caption, figure, models)


def calibration(comparison: Comparison) -> Drawing | None:
    shown = [
        (index, model)
        for index, model in enumerate(comparison.models)
        if any(part.predictions for part in model.calibration)
    ]
    if not shown:
        return None
    figure, (axes, counts) = stacked([2.5, 0.8])
    axes.plot([0, 1], [0, 1], color=colour_of(0), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for index, model in shown:
        bins = [part for part in model.calibration if part.predictions]
        axes.plot(
            [part.confidence for part in bins],
            [part.accuracy for part in bins],
            color=colour_of(index),
            marker="o",
            markersize=3.2,
            markeredgewidth=0,
        )
        total = sum(part.predictions for part in bins)
        edges = [number / len(model.calibration) for number in range(len(model.calibration) + 1)]
        counts.stairs([100 * part.predictions / total for part in model.calibration], edges, color=colour_of(index))
    axes.set_ylim(0, 1)
    counts.set_xlim(0, 1)
    counts.set_ylim(bottom=0)
    plain_ticks(counts.yaxis, ticks=3)
    plain_ticks(counts.xaxis, ticks=6)
    axes.set_title("share that is right")
    counts.set_title("% of predictions")
    counts.set_xlabel("probability of the top token")
    errors = "; ".join(f"{model.name} {with_interval(model.calibration_error)}" for _, model in shown)
    caption = (
        "On the dashed line a model is right as often as it says; below it, it is too sure of itself. "
        f"Expected calibration error: {errors}."
    )
    models = named(comparison, [index for index, _ in shown])
    return Drawing("calibration", SECTION, "Calibration and top-1 confidence", caption, figure, models)
