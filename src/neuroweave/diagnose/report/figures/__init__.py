"""The report's figures, one file a theme. A figure is drawn only where there are numbers for it. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuroweave.diagnose.report.figures import generation, gradient, neurons, prediction, signal, speed, tasks, weights
from neuroweave.diagnose.report.figures.drawing import (
    STYLE,
    Drawing,
    Picture,
    colour_number,
    save_drawing,
    to_picture,
)
from neuroweave.diagnose.results.comparison import Comparison

THEMES = (neurons, signal, gradient, prediction, generation, weights, tasks, speed)

__all__ = ["Picture", "colour_number", "draw_figures", "save_figures"]


def draw_figures(comparison: Comparison) -> list[Picture]:
    """All figures that the comparison has numbers for, as inline SVG."""
    with house_style():
        return [to_picture(drawing) for drawing in drawings(comparison)]


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write each figure to `folder` as SVG and PNG, in colours for a white page; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with house_style():
        return [file for drawing in drawings(comparison) for file in save_drawing(drawing, folder)]


def drawings(comparison: Comparison) -> Iterator[Drawing]:
    """One at a time: a drawing keeps its figure in memory."""
    for theme in THEMES:
        yield from (drawing for drawing in theme.draw(comparison) if drawing is not None)


@contextmanager
def house_style() -> Iterator[None]:
    """The style while figures are drawn. Letters that matplotlib's own font lacks are only measured with it."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
