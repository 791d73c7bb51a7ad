"""What all figures share: the colours, the style, and how a drawing becomes SVG or a file. Needs matplotlib.

Figures are drawn in the light theme's colours. For the page every one of them is replaced by a CSS variable, so that
one drawing serves light and dark; text stays text, in the page's font. On the page no figure has a legend of its own:
the page prints one that wraps.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroweave.diagnose.results.comparison import Comparison

# name: (light, dark). No two light colours may be equal: a drawing's colours are found again by value.
COLOURS = {
    "ink": ("#1a1f27", "#e4e8ee"),
    "muted": ("#69717d", "#98a2b0"),
    "grid": ("#e1e5ea", "#333b46"),
    # The base, then the others; from the eighth other on they repeat.
    "series-0": ("#4a5361", "#b4bdca"),
    "series-1": ("#0067b3", "#58b0f5"),
    "series-2": ("#c2500a", "#ff9557"),
    "series-3": ("#00805e", "#3fcfa2"),
    "series-4": ("#a83d86", "#f08fd0"),
    "series-5": ("#7a6a00", "#d9c84a"),
    "series-6": ("#6a51c7", "#ac9bff"),
    "series-7": ("#b3303a", "#ff8088"),
    # Heat maps: exactly equal, then from little to much.
    "heat-0": ("#eceff3", "#272e38"),
    "heat-1": ("#dae9f6", "#1b3a56"),
    "heat-2": ("#bcd8ed", "#1e5079"),
    "heat-3": ("#92c0e0", "#23689e"),
    "heat-4": ("#62a4d1", "#3181c0"),
    "heat-5": ("#3a86bf", "#529cd8"),
    "heat-6": ("#1c68a7", "#7db9ea"),
    "heat-7": ("#0b4b86", "#abd5f6"),
    "heat-8": ("#072f61", "#dbeffd"),
}
INK, MUTED, GRID = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
SERIES = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("series"))
HEAT = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("heat"))
DOTS = 200  # per inch, of PNG files
WIDTH, HEIGHT = 5.0, 2.9  # inches of 72 units: legible at the width of a phone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neuroweave",
    "text.parse_math": False,  # a name such as $x$ is a name
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.titlecolor": MUTED,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "figure.dpi": 72,  # of SVG: letters are measured at the size at which they are written
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.06,  # browsers draw small letters up to 2 % wider than they are measured here
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
Legend = list[tuple[int, str]]


@dataclass(frozen=True)
class Drawing:
    """A figure before it is written; `models` are the (colour number, name) pairs that it shows."""

    key: str
    section: str
    title: str
    caption: str
    figure: Any
    models: Legend


@dataclass(frozen=True)
class Picture:
    """A figure for the page with its words; `drawn` is the id of all that `svg` shows, `view` its viewBox."""

    key: str
    section: str
    title: str
    caption: str
    svg: str
    models: Legend
    drawn: str
    view: str

    @property
    def tall(self) -> bool:
        """Whether it would be too small if all of it had to fit on a wide screen."""
        _, _, width, height = map(float, self.view.split())
        return height > 1.1 * width


def colour_number(index: int) -> int:
    """Of the `index`-th model, the base being 0."""
    return index if index == 0 else 1 + (index - 1) % (len(SERIES) - 1)


def colour_of(index: int) -> str:
    return SERIES[colour_number(index)]


def legend(comparison: Comparison, *, base: bool = True) -> Legend:
    named = [(colour_number(index), model.name) for index, model in enumerate(comparison.models)]
    return named if base else named[1:]


def named(comparison: Comparison, indices: list[int]) -> Legend:
    """The legend of some of the models, by their number."""
    return [(colour_number(index), comparison.models[index].name) for index in sorted(set(indices))]


def shortened(name: str, length: int = 22, *, start: bool = False) -> str:
    """On one line, cut in the middle, since names of variants often differ at their end only; `start`: at the end."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    if start:
        return f"{name[: length - 1]}…"
    return f"{name[: (length - 1) // 2]}…{name[-(length // 2) :]}"


def to_picture(drawing: Drawing) -> Picture:
    """Without fixed size, outside references, or ids that could clash with another figure's."""
    text = io.StringIO()
    lay_out(drawing.figure)
    drawing.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?|<style.*?</style>\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', with_fewer_decimals, svg)
    drawn = f"{drawing.key}-figure_1"
    svg = with_own_ids(svg, drawing.key, keep=drawn)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    svg = re.sub(r"\n\s*", " ", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)  # the button around it carries the name
    return Picture(
        drawing.key, drawing.section, drawing.title, drawing.caption, svg, drawing.models, drawn, view.group(1)
    )


def lay_out(figure: Any) -> None:
    """Place everything now and once; saving would draw the figure an extra time to do it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def with_fewer_decimals(found: re.Match[str]) -> str:
    """An attribute's numbers to a hundredth of a unit, which is less than a pixel at any zoom that fits a screen."""
    return re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), found[0])


def with_own_ids(svg: str, key: str, *, keep: str) -> str:
    """Ids with the figure's key in front; those that nothing refers to are dropped."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    used = {keep, *re.findall(r'href="#([^"]+)"', svg), *re.findall(r"url\(#([^)]+)\)", svg)}
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)


def save_drawing(drawing: Drawing, folder: Path) -> list[Path]:
    """`<key>.svg` and `<key>.png` in `folder`, with title and legend, on white. Changes the drawing's figure."""
    from matplotlib.lines import Line2D

    figure = drawing.figure
    if drawing.models:
        rows = -(-len(drawing.models) // 3)
        figure.set_figheight(figure.get_figheight() + 0.22 * rows)
        handles = [Line2D([], [], color=SERIES[number], linewidth=4) for number, _ in drawing.models]
        names = [shortened(name) for _, name in drawing.models]
        figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handlelength=0.8)
    figure.set_figheight(figure.get_figheight() + 0.3)
    figure.suptitle(drawing.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.set_dpi(DOTS)
    lay_out(figure)
    files = [folder / f"{drawing.key}.{kind}" for kind in ("svg", "png")]
    figure.savefig(files[0], facecolor="white", metadata={"Date": None})
    figure.savefig(files[1], facecolor="white", dpi=DOTS)
    return files
