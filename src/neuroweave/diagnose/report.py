"""report.html: one file that opens offline, in light and dark, on a phone. It needs the `report` extra."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from neuroweave.diagnose import verdict
from neuroweave.diagnose.comparison import Comparison

TEMPLATE = "report.html.jinja"


def require_report_extra() -> None:
    """Raise ImportError, saying what to install, unless the packages that draw a report are there."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'a report needs {" and ".join(missing)}: pip install "neuroweave[report]"')


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of `comparison` to the file `path`. Raises ImportError without the `report` extra."""
    path.write_text(render_report(comparison), encoding="utf-8")


def render_report(comparison: Comparison) -> str:
    """The report as a self-contained HTML page: no script, no address that a browser would fetch."""
    require_report_extra()
    import jinja2

    from neuroweave.diagnose.figures import colour_number, draw_figures

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["yaml"] = as_yaml
    environment.filters["visible"] = visible
    environment.filters["number"] = verdict.number
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        pictures=draw_figures(comparison),
        verdicts=[
            (colour_number(index), other.model.name, verdict.sentences(comparison, other))
            for index, other in enumerate(comparison.others, start=1)
        ],
        tables=[(other.model.name, verdict.rows(comparison.base, other)) for other in comparison.others],
        colours={model.name: colour_number(index) for index, model in enumerate(comparison.models)},
    )


def as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).strip()


def visible(text: str) -> str:
    """Generated text with its line ends marked; a long run of them, as broken models write, is only counted."""
    return re.sub(
        r"\n+", lambda run: "↵" * len(run[0]) + "\n" if len(run[0]) < 4 else f"↵ ({len(run[0])} times)\n", text
    )
