"""The report: one file that fetches nothing, shows every figure, and claims nothing that its intervals do not carry."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_comparison import PREDICTIONS, made_comparison

from neuroweave.diagnose.report import figures
from neuroweave.diagnose.report.figures.drawing import COLOURS, HEAT, Drawing, Picture, shortened
from neuroweave.diagnose.report.figures.weights import STEPS, level_of
from neuroweave.diagnose.report.page import render_report, require_report_extra, save_figures, visible, write_report
from neuroweave.diagnose.results.comparison import Comparison, Failure
from neuroweave.diagnose.results.records import Estimate

FIGURES = {
    "norms",
    "growth",
    "norm-inputs",
    "hidden-cosine",
    "hidden-cka",
    "sparsity",
    "gradient",
    "gradient-families",
    "gradient-outside",
    "perplexity",
    "perplexity-ratio",
    "kl-histogram",
    "kl-by-position",
    "calibration",
    "confidence-traces",
    "state-cosine",
    "weights-shared",
    "weight-change",
    "tasks",
    "speed",
    "speed-ratio",
}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
EXTRAS = ("signal", "gradient", "speed", "weights", "tasks")
CLAIMS = r"\b(higher|lower|worse|better|faster|slower|improv\w*|degrad\w*)\b"
NOISY = "<b>noisy & loud</b>"


class Page(HTMLParser):
    """Every tag with its attributes, the ids, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html.replace(html[html.index("<style>") : html.index("</style>")], "<style>"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        self.text += "\n"  # so that the words of two cells do not run into one

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def figures(self) -> set[str]:
        return {attributes["id"].removeprefix("figure-") for tag, attributes in self.tags if tag == "figure"}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison(("base", NOISY))


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return render_report(comparison)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with all words and no drawn figures, which take most of the time."""

    def words_only(drawing: Drawing) -> Picture:
        return Picture(
            drawing.key, drawing.section, drawing.title, drawing.caption, "<svg/>", drawing.models, "x", "0 0 1 1"
        )

    monkeypatch.setattr(figures, "to_picture", words_only)


def drawn(comparison: Comparison) -> dict[str, Drawing]:
    with figures.house_style():
        return {drawing.key: drawing for drawing in figures.drawings(comparison)}


def lines(axes: Any) -> list[list[float]]:
    """The y values of all lines of more than one point but the dashed ones."""
    shown = [line for line in axes.lines if not line.is_dashed() and line.get_linestyle() != "None"]
    return [[float(value) for value in line.get_ydata()] for line in shown]


def test_nothing_is_fetched(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in FETCHING & attributes.keys():
            assert attributes[name].startswith(("#", "data:,")), f"<{tag} {name}={attributes[name]!r}>"
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "<!DOCTYPE svg" not in html
    assert "<metadata" not in html
    left = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]+"', "", html)  # names, which no browser asks for
    assert not re.findall(r"https?://\S*", left)
    assert "default-src 'none'" in html  # the browser enforces it as well


def test_every_figure_is_there_and_ids_do_not_clash(page: Page) -> None:
    assert page.figures == FIGURES
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 * len(FIGURES)  # each once more, to be enlarged
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a[name][1:] for _, a in page.tags for name in ("href", "xlink:href") if a.get(name, "").startswith("#")}
    used |= {a["popovertarget"] for _, a in page.tags if "popovertarget" in a}
    assert used <= set(ids)


def test_drawn_colours_follow_the_theme(html: str) -> None:
    body = html[html.index("</style>") :]
    assert not re.findall(r"(?:fill|stroke): ?#\w+", body)
    for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", body)):
        assert name == "--colour" or f"{name}: " in html, f"{name} is used and never set"
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_text_and_lines_stand_out_in_both_themes() -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for what is drawn."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
        )

    for theme, card in enumerate(("#ffffff", "#1c2128")):
        for name, colours in COLOURS.items():
            light, dark = sorted((luminance(colours[theme]), luminance(card)), reverse=True)
            needed = 4.5 if name in ("ink", "muted") else 3 if name.startswith("series") else 1.0
            assert (light + 0.05) / (dark + 0.05) >= needed, (name, theme)
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_names_are_text_and_not_markup(html: str, page: Page) -> None:
    assert "<b>noisy" not in html
    assert f"{NOISY} against base" in page.text
    assert "about <water> & fire are" in page.text
    assert "silu → relu <&>" in page.text


@pytest.mark.usefixtures("undrawn")
def test_without_carrying_intervals_the_page_makes_no_claim() -> None:
    text = Page(render_report(made_comparison(intervals=False))).text
    assert not re.findall(CLAIMS, text, flags=re.IGNORECASE)
    claimed = Page(render_report(made_comparison())).text
    assert {word.lower() for word in re.findall(CLAIMS, claimed, flags=re.IGNORECASE)} == {
        "higher",
        "lower",
        "worse",
        "slower",
    }


def test_the_page_speaks_of_a_stored_file_only_if_there_is_one(html: str, tmp_path: Path) -> None:
    assert "comparison.json" not in html
    write_report(made_comparison(("base",), without=EXTRAS, prompts=()), tmp_path / "report.html", stored=True)
    assert "in comparison.json beside this page" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_recipe_and_failures_are_shown() -> None:
    comparison = made_comparison(("base", NOISY), without=EXTRAS, prompts=())
    failures = [
        Failure(model=NOISY, part="gradient", message="out of <memory>"),
        Failure(model="lost", part="prediction", message="NaN logits, first in layer 3"),
    ]
    page = Page(render_report(comparison.model_copy(update={"failures": failures})))
    assert "Changed by the recipe “recipe-of-0.3”." in page.text
    assert "name: recipe-of-0.3" in page.text
    assert "Not measured (gradient): out of <memory>" in page.text
    assert "lost: Not measured (prediction): NaN logits, first in layer 3" in page.text


def test_what_was_not_measured_has_no_figure() -> None:
    bare = made_comparison(without=EXTRAS, prompts=())
    page = Page(render_report(bare))
    assert page.figures == {
        "perplexity",
        "perplexity-ratio",
        "kl-histogram",
        "kl-by-position",
        "calibration",
        "hidden-cosine",
        "hidden-cka",
    }
    assert "continued" not in page.text


def test_a_model_against_itself_has_no_empty_axes() -> None:
    keys = drawn(made_comparison(("base", "same"), amounts=(0,))).keys()
    assert FIGURES - keys == {"kl-histogram", "kl-by-position", "weight-change"}


def test_a_model_alone() -> None:
    page = Page(render_report(made_comparison(("base",), without=("gradient", "tasks", "speed"), prompts=())))
    assert page.figures == {"norms", "growth", "norm-inputs", "sparsity", "perplexity", "calibration"}


def test_one_layer_seven_others_and_infinities() -> None:
    """Nothing that cannot be drawn gets into a path, and no colour is used twice."""
    names = ["base", *(f"$m_{n}$ {'long ' * 9}" for n in range(7))]
    made = made_comparison(names, layers=1, prompts=("x",), without=("gradient",))
    broken = made.others[0]
    infinite = Estimate(value=math.inf)
    bins = [part.model_copy(update={"mean": math.inf}) for part in broken.difference.kl_by_position]
    parts = {"kl": infinite, "perplexity_ratio": infinite, "kl_by_position": bins, "hidden_cosine": [infinite] * 2}
    assert broken.model.signal is not None
    norms = [place.model_copy(update={"mean": infinite, "first": math.inf}) for place in broken.model.signal.inputs]
    signal = broken.model.signal.model_copy(update={"inputs": [norms[0], broken.model.signal.inputs[1]]})
    other = broken.model_copy(
        update={
            "difference": broken.difference.model_copy(update=parts),
            "model": broken.model.model_copy(update={"perplexity": infinite, "signal": signal}),
        }
    )
    html = render_report(made.model_copy(update={"others": [other, *made.others[1:]]}))
    assert not re.findall(r"\b(nan|inf)\b", html[html.index("</style>") :], flags=re.IGNORECASE)
    assert "infinite" in Page(html).text
    assert re.search(r"<text[^>]*>\$m_0\$ long", html), "a name is no formula"
    shown = {key for key in FIGURES if not key.startswith(("gradient", "weight-change"))}
    assert Page(html).figures == shown | {f"weight-change-{n}" for n in range(1, 8)}
    assert len({f"var(--series-{n})" for n in range(8) if f"stroke: var(--series-{n})" in html}) == 8


def test_figures_show_the_numbers_of_the_comparison(comparison: Comparison) -> None:
    shown = drawn(comparison)
    base, other, difference = comparison.base, comparison.others[0].model, comparison.others[0].difference
    assert base.signal
    assert other.signal
    assert difference.signal
    axes = {key: drawing.figure.axes for key, drawing in shown.items()}
    assert lines(axes["norms"][0]) == [[place.mean.value for place in m.inputs] for m in (base.signal, other.signal)]
    assert lines(axes["norms"][1]) == [[estimate.value for estimate in difference.signal.input_ratio]]
    assert lines(axes["growth"][0]) == [[e.value for e in m.growth] for m in (base.signal, other.signal)]
    assert lines(axes["hidden-cosine"][0]) == [[estimate.value for estimate in difference.hidden_cosine]]
    assert lines(axes["hidden-cka"][0]) == [[estimate.value for estimate in difference.hidden_cka]]
    assert lines(axes["kl-by-position"][0]) == [[part.mean for part in difference.kl_by_position]]
    zeros = [[100 * layer.zero.value for layer in m.activations] for m in (base.signal, other.signal)]
    assert lines(axes["sparsity"][0]) == zeros
    dead = [[100 * layer.dead / layer.neurons for layer in m.activations] for m in (base.signal, other.signal)]
    assert lines(axes["sparsity"][2]) == dead
    assert base.gradient
    assert other.gradient
    assert difference.gradient
    down = [[e.value for e in m.families[0].norm] for m in (base.gradient, other.gradient)]
    assert base.gradient.families[0].family == "mlp.down_proj.weight"
    assert lines(axes["gradient"][0]) == down
    assert lines(axes["gradient"][1]) == [[e.value for e in difference.gradient.families[0].ratio]]
    bins = [part for part in base.calibration if part.predictions]
    assert lines(axes["calibration"][0])[0] == [part.accuracy for part in bins]
    stairs = axes["kl-histogram"][0].patches[0].get_data()
    assert stairs.values.sum() == pytest.approx(100 * (PREDICTIONS - 30) / PREDICTIONS)
    assert list(stairs.edges) == difference.kl_histogram.edges
    written = [part.confidence for part in comparison.generated[0].continuations]
    assert lines(axes["confidence-traces"][0]) == written
    first = axes["state-cosine"][0].lines[0]
    assert (first.get_xdata()[0], first.get_xdata()[-1]) == (2, 12)  # a cosine looks back to the token before


@pytest.mark.parametrize("change", [0.0, 1e-9, 3e-4, 2.9e-3, 0.05, 0.3, 7.0])
def test_the_map_is_coloured_by_relative_change(comparison: Comparison, change: float) -> None:
    weights = comparison.others[0].difference.weights
    assert weights is not None
    tensor = weights.tensors[0].model_copy(update={"relative_change": change, "equal_values": change == 0})
    expected = 0 if change == 0 else 1 + int(np.searchsorted(STEPS, change, side="right"))
    assert level_of(tensor) == expected
    assert len(HEAT) == len(STEPS) + 2


def test_a_map_cell_lies_at_its_layer_and_projection() -> None:
    made = made_comparison(("base", "other"), amounts=(0,))
    weights = made.others[0].difference.weights
    assert weights is not None
    at = next(
        n for n, tensor in enumerate(weights.tensors) if (tensor.layer, tensor.family) == (2, "self_attn.k_proj.weight")
    )
    tensors = list(weights.tensors)
    tensors[at] = tensors[at].model_copy(update={"relative_change": 0.2, "equal_values": False})
    moved = made.others[0].difference.model_copy(update={"weights": weights.model_copy(update={"tensors": tensors})})
    other = made.others[0].model_copy(update={"difference": moved})
    axes = drawn(made.model_copy(update={"others": [other]}))["weight-change"].figure.axes[0]
    (cell,) = (patch for patch in axes.patches if patch.get_facecolor()[:3] == pytest.approx(rgb(HEAT[7]), abs=1e-6))
    box = cell.get_path().get_extents()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert ((box.x0 + box.x1) / 2, labels[round((box.y0 + box.y1) / 2)]) == (pytest.approx(2), "self_attn.k_proj")


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))


def test_figures_as_files(tmp_path: Path) -> None:
    from matplotlib import image

    made = made_comparison(without=("signal", "gradient", "tasks", "speed"), prompts=("x",))
    files = save_figures(made, tmp_path / "figures")
    keys = drawn(made).keys()
    assert {file.name for file in files} == {f"{key}.{kind}" for key in keys for kind in ("svg", "png")}
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    for file in files:
        if file.suffix == ".png":
            pixels = image.imread(file)
            assert pixels.shape[1] == 1000
            assert (pixels[:, [0, 1, -2, -1]] == 1).all(), f"{file.name}: something leaves the picture"
            assert (pixels[[0, -1]] == 1).all(), f"{file.name}: something leaves the picture"
        else:
            text = "".join(ElementTree.parse(file).getroot().itertext())
            assert "var(" not in file.read_text(encoding="utf-8")
            assert file.stem == "weight-change" or "other" in text, "each file says which model is which"


def test_the_same_comparison_gives_the_same_bytes() -> None:
    made = made_comparison(("base",), without=EXTRAS, prompts=())
    assert render_report(made) == render_report(made)


def test_stored_comparison_reads_back(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    comparison.write(path)
    assert Comparison.read(path) == comparison
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(ValueError, match="not a comparison of schema version 2: schema_version"):
        Comparison.read(path)


def test_line_ends_of_generated_text_show() -> None:
    assert visible("a\n\nb" + "\n" * 40) == "a↵↵\nb↵ (40 times)\n"


def test_long_names_keep_both_ends() -> None:
    assert shortened("a\nb") == "a b"
    assert shortened("model-of-many-words-v2", 22) == "model-of-many-words-v2"
    assert shortened("smollm2-relu-mlp-all-layers-v2", 15) == "smollm2…yers-v2"
    assert shortened("Once upon a time", 9, start=True) == "Once upo…"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, comparison: Comparison, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    with pytest.raises(ImportError, match=r'a report needs matplotlib: pip install "neuroweave\[report\]"'):
        require_report_extra()
    with pytest.raises(ImportError, match="neuroweave"):
        write_report(comparison, tmp_path / "report.html")
    with pytest.raises(ImportError, match="neuroweave"):
        save_figures(comparison, tmp_path / "figures")
    assert not list(tmp_path.iterdir())


def test_the_room_imports_without_the_extra() -> None:
    code = (
        "import sys; sys.modules.update(jinja2=None, matplotlib=None); import neuroweave.diagnose; "
        "import neuroweave.diagnose.report.page; import neuroweave.diagnose.report.verdict"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_measured_comparison_is_shown() -> None:
    from tiny_llama import QUICK, changed, subject, texts, tiny_model

    from neuroweave.diagnose import compare

    base = tiny_model()
    others = [subject("the same", base), subject(NOISY, changed(base, 0.5))]
    measured = compare(subject("base", base), others, texts(), plan=QUICK)
    page = Page(render_report(measured))
    assert {"perplexity", "kl-histogram", "hidden-cosine", "calibration"} <= page.figures
    assert "the same as base: every prediction is equal" in page.text
