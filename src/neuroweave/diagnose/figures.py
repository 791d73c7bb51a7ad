"""The report's figures as inline SVG. Needs matplotlib (the `report` extra).

Colours are drawn as stand-ins and then replaced by CSS variables, so that one drawing serves light and dark; text stays
text, in the page's font. No figure has a legend of its own: the page prints one that wraps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuroweave.diagnose.comparison import Comparison, Estimate, Measured, Other, Rate

INK, MUTED, GRID = "#a000f0", "#a000f1", "#a000f2"
SERIES = tuple(f"#a0000{number}" for number in range(8))  # the base, then the others; from the eighth on they repeat
STAND_INS = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
WIDTH, HEIGHT = 5.0, 3.2  # inches of 72 units: legible at the width of a phone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neuroweave",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Picture:
    """A figure with the words that go under it; `models` are the (colour number, name) pairs that it shows."""

    key: str
    title: str
    caption: str
    svg: str
    models: list[tuple[int, str]]


def draw_figures(comparison: Comparison) -> list[Picture]:
    """All figures that the comparison has numbers for."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        drawn = [
            perplexity(comparison),
            perplexity_ratio(comparison),
            kl_histogram(comparison),
            kl_by_position(comparison),
            hidden_cosine(comparison),
            confidence(comparison),
            speed(comparison),
        ]
    return [picture for picture in drawn if picture is not None]


def colour_number(index: int) -> int:
    """Of the `index`-th model, the base being 0."""
    return index if index == 0 else 1 + (index - 1) % (len(SERIES) - 1)


def new_axes(rows: int = 0) -> tuple[Any, Any]:
    """An empty figure and its axes; `rows` makes it high enough for as many labelled rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * rows if rows else HEIGHT), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Any, key: str, label: str) -> str:
    """An <svg> element without fixed size, outside references or ids that could clash with another figure's."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for colour, variable in STAND_INS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def legend(comparison: Comparison, *, base: bool = True) -> list[tuple[int, str]]:
    named = [(colour_number(index), model.name) for index, model in enumerate(comparison.models)]
    return named if base else named[1:]


def plain(value: float, _: object = None) -> str:
    """A tick label without powers of ten in superscript: 0.01, 1,000, 1e-6."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.12g}"


def log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, numticks=8))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def draw_estimates(axes: Any, estimates: Sequence[tuple[int, str, Estimate]]) -> None:
    """A dot with its interval per row; wide ranges get a logarithmic scale."""
    for row, (colour, _, estimate) in enumerate(estimates):
        axes.plot(estimate.value, row, "o", color=SERIES[colour], markersize=6)
        if estimate.low is not None:
            axes.plot([estimate.low, estimate.high], [row, row], color=SERIES[colour], linewidth=2.2)
    values = [estimate.value for _, _, estimate in estimates]
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    axes.set_yticks(range(len(estimates)), [shortened(name) for _, name, _ in estimates])
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def shortened(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def perplexity(comparison: Comparison) -> Picture:
    models = comparison.models
    figure, axes = new_axes(len(models))
    draw_estimates(axes, [(colour_number(i), model.name, model.perplexity) for i, model in enumerate(models)])
    axes.set_xlabel("perplexity")
    return Picture(
        "perplexity",
        "Perplexity",
        "Of each model by itself, with 95 % intervals. The intervals are wide because texts differ in difficulty; "
        "whether two models differ is for the next figure.",
        to_svg(figure, "perplexity", "Perplexity of each model"),
        [],
    )


def perplexity_ratio(comparison: Comparison) -> Picture:
    others = comparison.others
    figure, axes = new_axes(len(others))
    draw_estimates(
        axes,
        [(colour_number(i), other.model.name, other.difference.perplexity_ratio) for i, other in enumerate(others, 1)],
    )
    axes.axvline(1, color=SERIES[0], linewidth=1.2, linestyle="--")
    axes.set_xlabel(f"perplexity / perplexity of {shortened(comparison.base.name)}")
    return Picture(
        "perplexity-ratio",
        "Perplexity against the base",
        "The same texts, paired. An interval that crosses the dashed line (1) is within noise.",
        to_svg(figure, "perplexity-ratio", "Perplexity ratio to the base"),
        [],
    )


def kl_histogram(comparison: Comparison) -> Picture:
    figure, axes = new_axes()
    for index, other in enumerate(comparison.others, 1):
        histogram = other.difference.kl_histogram
        total = max(1, sum(histogram.counts) + histogram.below + histogram.above)
        share = [100 * count / total for count in histogram.counts]
        axes.stairs(share, histogram.edges, color=SERIES[colour_number(index)], linewidth=1.6)
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL(base || other), nats per token")
    axes.set_ylabel("% of predictions")
    outside = [
        f"{other.model.name}: {histogram.below:,} below and {histogram.above:,} above the axis"
        for other in comparison.others
        if (histogram := other.difference.kl_histogram).below or histogram.above
    ]
    return Picture(
        "kl-histogram",
        "How far single predictions moved",
        "Distribution of the KL divergence over predictions, on a logarithmic axis."
        + (f" Not shown: {'; '.join(outside)}." if outside else ""),
        to_svg(figure, "kl-histogram", "Histogram of KL per token"),
        legend(comparison, base=False),
    )


def kl_by_position(comparison: Comparison) -> Picture:
    figure, axes = new_axes()
    least, most = float("inf"), 0.0
    for index, other in enumerate(comparison.others, 1):
        bins = other.difference.kl_by_position
        means = [part.mean for part in bins]
        middles = [(part.first + part.last) / 2 for part in bins]
        axes.plot(middles, means, color=SERIES[colour_number(index)], marker="o", markersize=2.5)
        least, most = min([least, *(mean for mean in means if mean > 0)]), max([most, *means])
    if most > 20 * least:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the window, tokens")
    axes.set_ylabel("mean KL, nats")
    return Picture(
        "kl-by-position",
        "KL by position",
        "Whether the change hurts with little context (left) or with much (right).",
        to_svg(figure, "kl-by-position", "Mean KL by position in the window"),
        legend(comparison, base=False),
    )


def hidden_cosine(comparison: Comparison) -> Picture | None:
    shown = [
        (index, other) for index, other in enumerate(comparison.others, 1) if len(other.difference.hidden_cosine) > 1
    ]
    if not shown:
        return None
    figure, axes = new_axes()
    for index, other in shown:
        draw_depth(axes, other, SERIES[colour_number(index)])
    axes.axhline(1, color=SERIES[0], linewidth=1.2, linestyle="--")
    axes.set_xlabel("layers passed (0: input of the first layer)")
    axes.set_ylabel("cosine similarity")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Picture(
        "hidden-cosine",
        "Hidden states by depth",
        "Mean cosine similarity with the base's hidden state of the same token; the band is the 95 % interval. "
        "The last value is after the final norm.",
        to_svg(figure, "hidden-cosine", "Cosine similarity of hidden states by layer"),
        [(colour_number(index), other.model.name) for index, other in shown],
    )


def draw_depth(axes: Any, other: Other, colour: str) -> None:
    estimates = other.difference.hidden_cosine
    depth = range(len(estimates))
    axes.plot(depth, [estimate.value for estimate in estimates], color=colour, marker="o", markersize=2.5)
    lows = [estimate.value if estimate.low is None else estimate.low for estimate in estimates]
    highs = [estimate.value if estimate.high is None else estimate.high for estimate in estimates]
    axes.fill_between(depth, lows, highs, color=colour, alpha=0.18, linewidth=0)


def confidence(comparison: Comparison) -> Picture:
    figure, axes = new_axes()
    for index, model in enumerate(comparison.models):
        colour = SERIES[colour_number(index)]
        total = max(1, sum(model.confidence_counts))
        bins = len(model.confidence_counts)
        axes.stairs(
            [100 * count / total for count in model.confidence_counts],
            [number / bins for number in range(bins + 1)],
            color=colour,
            linewidth=1.6,
        )
        axes.axvline(model.confidence.value, color=colour, linewidth=1, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("probability of the top token")
    axes.set_ylabel("% of predictions")
    return Picture(
        "confidence",
        "Top-1 confidence",
        "How sure each model is of the token it puts first, right or wrong; dotted: the mean.",
        to_svg(figure, "confidence", "Distribution of top-1 confidence"),
        legend(comparison),
    )


def speed(comparison: Comparison) -> Picture | None:
    timed = [(index, model) for index, model in enumerate(comparison.models) if model.speed is not None]
    if not timed:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(timed)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("prefill", "decode"), strict=True):
        for row, (index, model) in enumerate(timed):
            draw_runs(axes, row, rate_of(model, name), SERIES[colour_number(index)])
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{name}, tokens/s")
        axes.set_yticks(range(len(timed)), [shortened(model.name, 16) for _, model in timed])
        axes.set_ylim(len(timed) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
    plan = comparison.plan.speed
    settings = (
        f" Batch {plan.batch}, {plan.prompt_tokens} prompt tokens, {plan.new_tokens} new tokens, {plan.repeats} runs "
        "in turns with the other models, KV cache on, greedy."
        if plan
        else ""
    )
    return Picture(
        "speed",
        "Speed",
        f"Each dot is a run, the bar is the median.{settings}",
        to_svg(figure, "speed", "Tokens per second of each model"),
        [],
    )


def rate_of(model: Measured, name: str) -> Rate:
    assert model.speed is not None
    return model.speed.prefill if name == "prefill" else model.speed.decode


def draw_runs(axes: Any, row: int, rate: Rate, colour: str) -> None:
    axes.barh(row, rate.median, height=0.5, color=colour, alpha=0.35)
    axes.plot(rate.runs, [row] * len(rate.runs), "o", color=colour, markersize=3)
