"""Which activation won: the share of neurons that run each, layer by layer, for every model with mixtures."""

from __future__ import annotations

from typing import Any

from neuroweave.diagnose.report.figures.axes import plain_ticks, stacked
from neuroweave.diagnose.report.figures.drawing import SERIES, Drawing, shortened
from neuroweave.diagnose.results.comparison import Comparison, Measured
from neuroweave.diagnose.results.neurons import MixtureChoices

SECTION = "Neurons"
PANEL, LINE = 1.7, 0.8  # inches
MOST_PANELS = 8


def draw(comparison: Comparison) -> list[Drawing | None]:
    mixed = [(index, model) for index, model in enumerate(comparison.models) if model.choices]
    alone = len(mixed) == 1
    return [choices_of(model, "neuron-choices" if alone else f"neuron-choices-{index}") for index, model in mixed]


def choices_of(model: Measured, key: str) -> Drawing:
    """A panel for each family of mixtures: bars over layers; below them how undecided its neurons are."""
    families: dict[str, list[MixtureChoices]] = {}
    for choices in model.choices:
        families.setdefault(choices.family, []).append(choices)
    shown = list(families.items())[:MOST_PANELS]
    learned = any(each.entropy is not None for each in model.choices)
    activations = list(dict.fromkeys(name for _, rows in shown for each in rows for name in each.neurons))
    figure, panels = stacked([PANEL] * len(shown) + [LINE] * learned)
    for axes, (family, rows) in zip(panels, shown, strict=False):
        draw_shares(axes, rows, activations)
        axes.set_ylabel("% of neurons" if len(shown) == 1 else f"{shortened(family, 16)}, %")
    if learned:
        for _, rows in shown:
            of = [(each.layer or 0, each.entropy) for each in rows if each.entropy is not None]
            panels[-1].plot(*zip(*of, strict=True), color=SERIES[0], marker=".")
        panels[-1].margins(y=0.12)
        panels[-1].set_ylim(bottom=0)
        panels[-1].set_ylabel("entropy, nats")
    panels[-1].set_xlabel("layer")
    caption = "The share of a layer's neurons that run each activation" + (
        ", or give it most weight; below, the mean entropy of a neuron's weights (0: decided)." if learned else "."
    )
    left_out = len(families) - len(shown)
    caption += f" {left_out} more kinds of places are not shown." if left_out else ""
    legend = [(colour(activations, name), name) for name in activations]
    return Drawing(key, SECTION, f"Which activation won in {shortened(model.name, 40)}", caption, figure, legend)


def draw_shares(axes: Any, rows: list[MixtureChoices], activations: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = [each.layer or 0 for each in rows]
    below = [0.0] * len(rows)
    for name in activations:
        shares = [100 * each.neurons.get(name, 0) / max(1, sum(each.neurons.values())) for each in rows]
        axes.bar(layers, shares, 0.86, bottom=below, color=SERIES[colour(activations, name)])
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set_ylim(0, 100)
    plain_ticks(axes.yaxis, ticks=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def colour(activations: list[str], name: str) -> int:
    """A colour's number: an activation's place in the list, from the second colour on (the first is the base's)."""
    return 1 + activations.index(name) % (len(SERIES) - 1)
