"""Tokens per second, and how the models' compare turn by turn."""

from __future__ import annotations

from typing import Any

from neuroweave.diagnose.report.differences import speeds
from neuroweave.diagnose.report.figures.axes import draw_rows, label_rows, plain_ticks
from neuroweave.diagnose.report.figures.drawing import WIDTH, Drawing, colour_number, colour_of
from neuroweave.diagnose.results.comparison import Comparison, Measured, Rate
from neuroweave.diagnose.results.records import Estimate

SECTION = "Speed"


def draw(comparison: Comparison) -> list[Drawing | None]:
    timed = [(index, model) for index, model in enumerate(comparison.models) if model.speed is not None]
    ratios = [
        (index, other.model.name, {name: ratio for name, _, ratio in parts})
        for index, other in enumerate(comparison.others, 1)
        if (parts := speeds(comparison.base, other.model, other.difference))
    ]
    return [rates(comparison, timed) if timed else None, paired(ratios) if ratios else None]


def side_by_side(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.75 + 0.32 * rows), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def rates(comparison: Comparison, timed: list[tuple[int, Measured]]) -> Drawing:
    figure, panels = side_by_side(len(timed))
    for axes, name in zip(panels, ("prefill", "decode"), strict=True):
        for row, (index, model) in enumerate(timed):
            draw_runs(axes, row, rate_of(model, name), colour_of(index))
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{name}, tokens/s")
        plain_ticks(axes.xaxis, ticks=4)
        label_rows(axes, [model.name for _, model in timed], length=16)
    plan = comparison.plan.speed
    settings = (
        f" Batch {plan.batch}, {plan.prompt_tokens} prompt tokens, {plan.new_tokens} new tokens, {plan.repeats} runs "
        f"in turns with the other models, KV cache on, greedy, {timed[0][1].dtype}, "
        f"{comparison.environment.threads} thread{'s' if comparison.environment.threads > 1 else ''}."
        if plan
        else ""
    )
    return Drawing("speed", SECTION, "Speed", f"Each dot is a run, the bar is the median.{settings}", figure, [])


def paired(ratios: list[tuple[int, str, dict[str, Estimate]]]) -> Drawing:
    figure, panels = side_by_side(len(ratios))
    for axes, name in zip(panels, ("prefill", "decode"), strict=True):
        draw_rows(axes, [(colour_number(index), label, parts[name]) for index, label, parts in ratios], reference=1.0)
        axes.set_xlabel(f"{name}, ratio to the base")
        plain_ticks(axes.xaxis, ticks=4)
        label_rows(axes, [label for _, label, _ in ratios], length=16)
    caption = (
        "Median of the ratios within turns, with 95 % intervals: a slow moment of the machine meets both models of a "
        "turn. An interval that crosses the dashed line (1) is within noise."
    )
    return Drawing("speed-ratio", SECTION, "Speed against the base", caption, figure, [])


def rate_of(model: Measured, name: str) -> Rate:
    assert model.speed is not None
    return model.speed.prefill if name == "prefill" else model.speed.decode


def draw_runs(axes: Any, row: int, rate: Rate, colour: str) -> None:
    axes.barh(row, rate.median, height=0.5, color=colour, alpha=0.3)
    axes.plot(rate.runs, [row] * len(rate.runs), "o", color=colour, markersize=3, markeredgewidth=0)
