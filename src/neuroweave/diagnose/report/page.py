"""report.html: one file that opens offline, in light and dark, on a phone. It needs the `report` extra."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from neuroweave.diagnose.report import figures, verdict
from neuroweave.diagnose.report.differences import UNMARKED, rows
from neuroweave.diagnose.report.figures.drawing import COLOURS, Picture, colour_number
from neuroweave.diagnose.report.numbers import number
from neuroweave.diagnose.results.comparison import Comparison, Other
from neuroweave.diagnose.results.weights import TensorChange

TEMPLATE = "report.html.jinja"
MOST_TENSORS = 12


def require_report_extra() -> None:
    """Raise ImportError, saying what to install, unless the packages that draw a report are there."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'a report needs {" and ".join(missing)}: pip install "neuroweave[report]"')


def write_report(comparison: Comparison, path: Path, *, stored: bool = False) -> None:
    """Write the report of `comparison` to the file `path`. Raises ImportError without the `report` extra.

    `stored`: the comparison is in comparison.json beside it, and the page may say so.
    """
    path.write_text(render_report(comparison, stored=stored), encoding="utf-8")


def draw_figures(comparison: Comparison) -> list[Picture]:
    """All figures that the comparison has numbers for. Raises ImportError without the `report` extra."""
    require_report_extra()
    return figures.draw_figures(comparison)


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the report's figures to `folder` as `<key>.svg` and `<key>.png`; returns the files.

    Raises ImportError without the `report` extra.
    """
    require_report_extra()
    return figures.save_figures(comparison, folder)


def render_report(comparison: Comparison, *, stored: bool = False) -> str:
    """The report as a self-contained HTML page: no script, no address that a browser would fetch."""
    require_report_extra()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"yaml": as_yaml, "visible": visible, "number": number}
    pictures = draw_figures(comparison)
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        stored=stored,
        palette=COLOURS,
        sections=[(name, list(of)) for name, of in itertools.groupby(pictures, key=lambda picture: picture.section)],
        others=[describe(comparison, index, other) for index, other in enumerate(comparison.others, start=1)],
        unmeasured=verdict.unmeasured(comparison),
        colours={model.name: colour_number(index) for index, model in enumerate(comparison.models)},
        unmarked=UNMARKED,
    )


def describe(comparison: Comparison, index: int, other: Other) -> dict[str, Any]:
    """What the page prints about one model."""
    weights = other.difference.weights
    return {
        "colour": colour_number(index),
        "name": other.model.name,
        "sentences": verdict.sentences(comparison, other),
        "tiles": verdict.tiles(comparison.base, other),
        "rows": rows(comparison.base, other),
        "weights": weights,
        "most_changed": most_changed(weights.tensors) if weights else [],
        "settings": other.difference.changed_settings,
    }


def most_changed(tensors: list[TensorChange]) -> list[TensorChange]:
    """The tensors with the largest relative change."""
    changed = [tensor for tensor in tensors if tensor.relative_change and not tensor.equal_values]
    return sorted(changed, key=lambda tensor: -(tensor.relative_change or 0))[:MOST_TENSORS]


def as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).strip()


def visible(text: str) -> str:
    """Generated text with its line ends marked; a long run of them, as broken models write, is only counted."""
    return re.sub(
        r"\n+", lambda run: "↵" * len(run[0]) + "\n" if len(run[0]) < 4 else f"↵ ({len(run[0])} times)\n", text
    )
