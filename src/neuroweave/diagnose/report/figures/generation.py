"""Confidence and hidden states token by token while the models write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuroweave.diagnose.report.figures.axes import finite, plain_ticks, small_multiples
from neuroweave.diagnose.report.figures.drawing import Drawing, colour_of, legend, shortened
from neuroweave.diagnose.results.comparison import Comparison
from neuroweave.diagnose.results.generation import Continuation

SECTION = "Generation"
MOST_PANELS = 12


def draw(comparison: Comparison) -> list[Drawing | None]:
    return [
        traces(
            comparison,
            "confidence-traces",
            "Confidence while writing",
            "Probability of the top token at every new token. After the first token that differs, each model goes on "
            "from its own text.",
            lambda written: written.confidence,
        ),
        traces(
            comparison,
            "state-cosine",
            "Consecutive token states",
            "Cosine similarity of the last hidden state with that of the token before: close to 1 where a model "
            "repeats itself.",
            lambda written: written.state_cosine,
        ),
    ]


def traces(
    comparison: Comparison, key: str, title: str, caption: str, of: Callable[[Continuation], Sequence[float]]
) -> Drawing | None:
    """One panel for every prompt and mode, all models in each."""
    shown = [generated for generated in comparison.generated if any(of(part) for part in generated.continuations)]
    if not shown:
        return None
    figure, panels = small_multiples(min(len(shown), MOST_PANELS), height=1.4, sharey=True)
    numbers = {model.name: index for index, model in enumerate(comparison.models)}
    lowest = 0.0
    for axes, generated in zip(panels, shown, strict=False):
        for continuation in generated.continuations:
            values = [finite(value) for value in of(continuation)]
            # The cosine at a token looks back to the one before, so it starts at the second.
            start = 1 + len(continuation.tokens) - len(values)
            size = 4.0 if len(values) < 2 else 1.8
            colour = colour_of(numbers.get(continuation.model, 0))
            axes.plot(
                range(start, start + len(values)), values, color=colour, linewidth=1.1, marker="o", markersize=size
            )
            lowest = min([lowest, *(value for value in values if value == value)])
        axes.set_title(f"{generated.mode}: {shortened(generated.prompt, 20, start=True)}")
        plain_ticks(axes.xaxis, ticks=6)
        plain_ticks(axes.yaxis, ticks=4)
    panels[0].set_ylim(min(0.0, 1.05 * lowest), 1.04)
    figure.supxlabel("new token", fontsize=9, color=panels[0].xaxis.label.get_color())
    rest = len(shown) - len(panels)
    return Drawing(
        key, SECTION, title, caption + (f" {rest} texts are not shown." if rest else ""), figure, legend(comparison)
    )
