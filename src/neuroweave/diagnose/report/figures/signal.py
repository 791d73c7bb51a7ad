"""The signal on its way through the layers: how large, how similar to the base's, how sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from neuroweave.diagnose.report.figures.axes import (
    at_least,
    draw_line,
    drawable,
    finite,
    fit_scale,
    layer_axis,
    new_axes,
    no_difference,
    small_multiples,
    stacked,
)
from neuroweave.diagnose.report.figures.drawing import Drawing, colour_of, named
from neuroweave.diagnose.report.numbers import number
from neuroweave.diagnose.results.comparison import Comparison, Difference
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.signal import Activations, Norms, Signal

SECTION = "Signal"
MOST_PLACES = 8
INPUTS = "before layer (the last: after all layers)"
Measured = list[tuple[int, Signal]]


def draw(comparison: Comparison) -> list[Drawing | None]:
    signals = [(index, model.signal) for index, model in enumerate(comparison.models) if model.signal]
    return [
        norms(comparison, signals),
        growth(comparison, signals),
        norm_inputs(comparison, signals),
        similarity(comparison, "hidden-cosine", "Hidden states by depth", lambda d: d.hidden_cosine),
        similarity(comparison, "hidden-cka", "Kernel alignment by depth", lambda d: d.hidden_cka),
        sparsity(comparison, signals),
    ]


def norms(comparison: Comparison, signals: Measured) -> Drawing | None:
    shown = [(index, signal.inputs) for index, signal in signals if drawable(place.mean for place in signal.inputs)]
    if not shown:
        return None
    ratios = [
        (index, other.difference.signal.input_ratio)
        for index, other in enumerate(comparison.others, 1)
        if other.difference.signal and drawable(other.difference.signal.input_ratio)
    ]
    figure, panels = stacked([2.5, 1.2] if ratios else [2.7])
    for index, places in shown:
        draw_norms(panels[0], range(len(places)), places, colour_of(index))
    fit_norms(panels[0], [place for _, places in shown for place in places])
    panels[0].set_title("Euclidean norm")
    for index, ratio in ratios:
        draw_line(panels[1], range(len(ratio)), ratio, colour_of(index))
    if ratios:
        no_difference(panels[1], 1.0)
        fit_scale(panels[1], "y", [estimate.value for _, ratio in ratios for estimate in ratio], ticks=4)
        at_least(panels[1])
        panels[1].set_title("mean, ratio to the base's")
    layer_axis(panels[-1], INPUTS, count=max(len(places) for _, places in shown))
    caption = (
        "Line: mean over tokens; band: one standard deviation to either side; faint dots: first positions of a window, "
        "where many models park a norm of their own."
        + (" Second panel: paired, with 95 % intervals; dashed: no difference." if ratios else "")
    )
    models = named(comparison, [index for index, _ in shown])
    return Drawing("norms", SECTION, "Norm of every layer's input", caption, figure, models)


def draw_norms(axes: Any, x: Sequence[int], places: Sequence[Norms], colour: str) -> None:
    """Mean and standard deviation over tokens, and the first position apart."""
    draw_line(axes, x, [place.mean for place in places], colour, band=False)
    means = [finite(place.mean.value) for place in places]
    spread = [finite(place.deviation) for place in places]
    # On a logarithmic axis a band must not reach 0.
    lows = [max(mean - width, mean / 20) for mean, width in zip(means, spread, strict=True)]
    highs = [mean + width for mean, width in zip(means, spread, strict=True)]
    axes.fill_between(x, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        x, [finite(place.first) or float("nan") for place in places], "o", color=colour, alpha=0.4, markersize=2.2
    )


def fit_norms(axes: Any, places: Sequence[Norms], *, ticks: int = 5) -> None:
    values = [value for place in places for value in (place.mean.value, place.first) if value]
    fit_scale(axes, "y", values, from_zero=True, ticks=ticks)


def growth(comparison: Comparison, signals: Measured) -> Drawing | None:
    shown = [(index, signal.growth) for index, signal in signals if drawable(signal.growth)]
    if not shown:
        return None
    figure, axes = new_axes()
    for index, estimates in shown:
        draw_line(axes, range(len(estimates)), estimates, colour_of(index))
    no_difference(axes, 1.0)
    fit_scale(axes, "y", [estimate.value for _, estimates in shown for estimate in estimates])
    at_least(axes)
    layer_axis(axes, count=max(len(estimates) for _, estimates in shown))
    axes.set_title("mean norm after / before the layer")
    caption = "How much each layer adds to the residual stream, with 95 % intervals; dashed: the norm stays."
    return Drawing("growth", SECTION, "Residual growth", caption, figure, named(comparison, [i for i, _ in shown]))


def norm_inputs(comparison: Comparison, signals: Measured) -> Drawing | None:
    """Small multiples, one for each kind of norm module."""
    kinds = list(
        dict.fromkeys(place.place for _, signal in signals for place in signal.norms if place.layer is not None)
    )
    if not kinds:
        return None
    figure, panels = small_multiples(min(len(kinds), MOST_PLACES))
    count = 1 + max(place.layer or 0 for _, signal in signals for place in signal.norms)
    for axes, kind in zip(panels, kinds, strict=False):
        drawn = []
        for index, signal in signals:
            places = [place for place in signal.norms if place.place == kind and place.layer is not None]
            draw_norms(axes, [place.layer or 0 for place in places], places, colour_of(index))
            drawn += places
        fit_norms(axes, drawn, ticks=4)
        layer_axis(axes, "", count=count)
        axes.set_title(kind)
    figure.supxlabel("layer", fontsize=9, color=panels[0].xaxis.label.get_color())
    last = [
        f"{comparison.models[index].name} {number(place.mean.value)} ± {number(place.deviation)}"
        for index, signal in signals
        for place in signal.norms
        if place.layer is None
    ]
    caption = (
        "What each norm is given, drawn as above."
        + (f" Before the final norm: {'; '.join(last)}." if last else "")
        + (f" {len(kinds) - MOST_PLACES} kinds of norms are not shown." if len(kinds) > MOST_PLACES else "")
    )
    models = named(comparison, [index for index, _ in signals])
    return Drawing("norm-inputs", SECTION, "Signal before each norm", caption, figure, models)


def similarity(
    comparison: Comparison, key: str, title: str, part: Callable[[Difference], list[Estimate]]
) -> Drawing | None:
    shown = [
        (index, part(other.difference))
        for index, other in enumerate(comparison.others, 1)
        if len(part(other.difference)) > 1 and drawable(part(other.difference))
    ]
    if not shown:
        return None
    figure, axes = new_axes()
    for index, estimates in shown:
        draw_line(axes, range(len(estimates)), estimates, colour_of(index))
    no_difference(axes, 1.0)
    fit_scale(axes, "y", [])
    at_least(axes)
    layer_axis(axes, "layers passed (0: input of the first layer)", count=max(len(e) for _, e in shown))
    axes.set_title("cosine similarity" if key == "hidden-cosine" else "linear centred kernel alignment")
    what = (
        "Mean cosine similarity with the base's hidden state of the same token"
        if key == "hidden-cosine"
        else "How alike the tokens' hidden states lie to each other in both models, whatever the rotation and scale"
    )
    caption = f"{what}; the band is the 95 % interval. The last value is after the final norm."
    return Drawing(key, SECTION, title, caption, figure, named(comparison, [index for index, _ in shown]))


def sparsity(comparison: Comparison, signals: Measured) -> Drawing | None:
    shown = [(index, signal.activations) for index, signal in signals if signal.activations]
    parts: list[tuple[str, Callable[[Activations], Estimate]]] = [
        ("% exact zeros", lambda layer: scaled(layer.zero)),
        ("% near zero", lambda layer: scaled(layer.near_zero)),
        ("% dead neurons", lambda layer: Estimate(value=100 * layer.dead / max(1, layer.neurons))),
        ("% nearly dead neurons", lambda layer: Estimate(value=100 * layer.nearly_dead / max(1, layer.neurons))),
    ]
    drawn = [(title, of) for title, of in parts if any(of(layer).value for _, layers in shown for layer in layers)]
    if not drawn:
        return None
    figure, panels = small_multiples(len(drawn))
    count = 1 + max(layer.layer for _, layers in shown for layer in layers)
    for axes, (title, of) in zip(panels, drawn, strict=True):
        for index, layers in shown:
            draw_line(axes, [layer.layer for layer in layers], [of(layer) for layer in layers], colour_of(index))
        fit_scale(axes, "y", [], from_zero=True, ticks=4)
        layer_axis(axes, "", count=count)
        axes.set_title(title)
    figure.supxlabel("layer", fontsize=9, color=panels[0].xaxis.label.get_color())
    empty = [title.removeprefix("% ") for title, _ in parts if title not in {title for title, _ in drawn}]
    caption = (
        "What each MLP's down projection is given. Near zero: under 1 % of the root mean square of the same token's "
        "neurons. Dead: exactly zero at every token; nearly dead: never above 1 % of the layer's root mean square."
        + (f" Nowhere: {', '.join(empty)}." if empty else "")
    )
    models = named(comparison, [index for index, _ in shown])
    return Drawing("sparsity", SECTION, "Sparsity of the MLPs", caption, figure, models)


def scaled(estimate: Estimate) -> Estimate:
    """A share in percent."""
    low, high = estimate.low, estimate.high
    return Estimate(
        value=100 * estimate.value,
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
    )
