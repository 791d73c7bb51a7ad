"""Scores on benchmarks, and their paired differences."""

from __future__ import annotations

from typing import Any

from neuroweave.diagnose.report.figures.axes import label_rows, no_difference, plain_ticks
from neuroweave.diagnose.report.figures.drawing import WIDTH, Drawing, colour_of, legend
from neuroweave.diagnose.results.comparison import Comparison
from neuroweave.diagnose.results.records import Estimate

SECTION = "Benchmarks"
MOST_TASKS = 20


def draw(comparison: Comparison) -> list[Drawing | None]:
    keys = [(score.task, score.metric) for model in comparison.models for score in model.tasks]
    kinds = list(dict.fromkeys(keys))
    return [tasks(comparison, kinds)] if kinds else []


def tasks(comparison: Comparison, kinds: list[tuple[str, str]]) -> Drawing:
    """Scores above, differences below; one row a score, the models side by side in it."""
    from matplotlib.figure import Figure

    shown = kinds[:MOST_TASKS]
    scores = [
        (index, row, Estimate(value=score.value), score.standard_error or 0.0)
        for index, model in enumerate(comparison.models)
        for score in model.tasks
        for row in rows_of(shown, score.task, score.metric)
    ]
    differences = [
        (index, row, task.difference)
        for index, other in enumerate(comparison.others, 1)
        for task in other.difference.tasks
        for row in rows_of(shown, task.task, task.metric)
    ]
    height = 0.6 + len(shown) * (0.24 + 0.1 * len(comparison.models))
    panels = 2 if differences else 1
    figure = Figure(figsize=(WIDTH, panels * height), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for index, row, estimate, error in scores:
        ends = Estimate(value=estimate.value, low=estimate.value - error, high=estimate.value + error)
        draw_dot(axes[0], ends, row + offset(index, len(comparison.models)), colour_of(index))
    axes[0].set_xlabel("score, ± one standard error")
    for index, row, estimate in differences:
        draw_dot(axes[1], estimate, row + offset(index, len(comparison.models)), colour_of(index))
    if differences:
        no_difference(axes[1], 0.0, vertical=True)
        axes[1].set_xlabel("paired difference to the base, 95 % interval")
    for panel in axes:
        label_rows(panel, [f"{task}, {metric}" for task, metric in shown], length=24)
        plain_ticks(panel.xaxis)
    rest = len(kinds) - len(shown)
    caption = (
        "Measured by lm-evaluation-harness on the same questions for every model; a difference whose interval crosses "
        "the dashed line is within noise." + (f" {rest} scores are not shown." if rest else "")
    )
    return Drawing("tasks", SECTION, "Benchmarks", caption, figure, legend(comparison))


def rows_of(shown: list[tuple[str, str]], task: str, metric: str) -> list[int]:
    return [shown.index((task, metric))] if (task, metric) in shown else []


def offset(index: int, models: int) -> float:
    """Of a model within its row, from -0.3 to 0.3."""
    return 0.6 * (index / (models - 1) - 0.5) if models > 1 else 0.0


def draw_dot(axes: Any, estimate: Estimate, row: float, colour: str) -> None:
    if estimate.low is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=1.8)
    axes.plot(estimate.value, row, "o", color=colour, markersize=4.5, markeredgewidth=0)
