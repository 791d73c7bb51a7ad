"""The report: one file that fetches nothing, shows every figure, and claims nothing that its intervals do not carry."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_llama import QUICK, changed, subject, texts, tiny_model

from neuroweave.diagnose import Comparison, Estimate, compare, require_report_extra, verdict, write_report
from neuroweave.diagnose.report import render_report, visible

FIGURES = {
    "perplexity",
    "perplexity-ratio",
    "kl-histogram",
    "kl-by-position",
    "hidden-cosine",
    "confidence",
    "speed",
}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Every tag with its attributes, the ids, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    base = tiny_model()
    others = [subject("the same", base), subject("<b>noisy & loud</b>", changed(base, 0.5))]
    return compare(subject("base", base), others, texts(), plan=QUICK)


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return render_report(comparison)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_fetched(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
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
    figures = {a["id"].removeprefix("figure-") for tag, a in page.tags if tag == "figure"}
    assert figures == FIGURES
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a[name][1:] for _, a in page.tags for name in ("href", "xlink:href") if a.get(name, "").startswith("#")}
    assert used <= set(ids)


def test_drawn_colours_follow_the_theme(html: str) -> None:
    assert "#a000" not in html
    for name in re.findall(r"var\((--[a-z0-9-]+)\)", html):
        assert f"{name}: " in html, f"{name} is used and never set"
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_names_are_text_and_not_markup(html: str, page: Page) -> None:
    assert "<b>noisy" not in html
    assert "<b>noisy & loud</b> against base" in page.text


def test_size_stays_small(html: str) -> None:
    assert len(html) < 1_000_000


def test_equal_models_are_called_equal(comparison: Comparison) -> None:
    same = comparison.others[0]
    said = " ".join(verdict.sentences(comparison, same))
    assert "the same as base: every prediction is equal" in said
    assert "worse" not in said
    readings = [row.reading for row in verdict.rows(comparison.base, same)]
    assert readings[:6] == ["identical"] * 6


@pytest.mark.parametrize(
    ("ratio", "words", "reading"),
    [
        (Estimate(value=1.02, low=1.01, high=1.03), "worse than base", "higher"),
        (Estimate(value=0.98, low=0.97, high=0.99), "better than base", "lower"),
        (Estimate(value=0.98, low=0.95, high=1.01), "does not differ beyond noise", "within noise"),
        (Estimate(value=0.98), "cannot be told from one unit of text", "no interval"),
    ],
)
def test_a_direction_is_named_only_with_an_interval_that_carries_it(
    comparison: Comparison, ratio: Estimate, words: str, reading: str
) -> None:
    noisy = comparison.others[1]
    other = noisy.model_copy(update={"difference": noisy.difference.model_copy(update={"perplexity_ratio": ratio})})
    said = " ".join(verdict.sentences(comparison, other))
    assert words in said
    assert sum(word in said for word in ("worse than", "better than")) == (reading in ("higher", "lower"))
    assert verdict.rows(comparison.base, other)[0].reading == reading
    changed_report = comparison.model_copy(update={"others": [other], "generated": []})
    assert words in Page(render_report(changed_report)).text


def test_speed_is_claimed_only_with_an_interval(comparison: Comparison) -> None:
    noisy = comparison.others[1]
    for ratio, words in [
        (Estimate(value=0.9, low=0.8, high=0.95), "writes (decode) slower than base"),
        (Estimate(value=1.1, low=1.05, high=1.2), "writes (decode) faster than base"),
        (Estimate(value=1.1, low=0.9, high=1.2), "writes (decode): no difference beyond noise"),
        (Estimate(value=1.1), "writes (decode): too few runs to tell"),
    ]:
        other = noisy.model_copy(update={"difference": noisy.difference.model_copy(update={"decode_ratio": ratio})})
        assert words in " ".join(verdict.sentences(comparison, other))


def test_summary_has_a_column_per_model_and_speed_where_measured(comparison: Comparison) -> None:
    header, table = verdict.summary(comparison)
    assert header == ["", "base", "the same", "<b>noisy & loud</b>"]
    assert all(len(row) == 4 for row in table)
    assert [row[0] for row in table[5:]] == [
        "prefill, tokens/s",
        "ratio to the base's",
        "decode, tokens/s",
        "ratio to the base's",
    ]
    assert table[1][1:3] == ["", "1 [1, 1]"]


def test_recipe_is_shown(comparison: Comparison) -> None:
    noisy = comparison.others[1]
    recipe = {"recipe": {"name": "silu-tanh-mlp"}, "version": 1}
    other = noisy.model_copy(update={"model": noisy.model.model_copy(update={"recipe": recipe})})
    page = Page(render_report(comparison.model_copy(update={"others": [other], "generated": []})))
    assert "Changed by the recipe “silu-tanh-mlp”." in page.text
    assert "name: silu-tanh-mlp" in page.text


def test_a_report_without_speed_and_prompts(comparison: Comparison) -> None:
    base = tiny_model()
    plan = QUICK.model_copy(update={"speed": None, "prompts": ()})
    page = Page(render_report(compare(subject("a", base), [subject("b", base)], texts(1), plan=plan)))
    assert not [a for _, a in page.tags if a.get("id") == "figure-speed"]
    assert "continued" not in page.text


def test_stored_comparison_reads_back(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    comparison.write(path)
    assert Comparison.read(path) == comparison
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ValueError, match="not a comparison of schema version 1: schema_version"):
        Comparison.read(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.99999, "1.0000"),
        (0.10294, "0.1029"),
        (17.666, "17.67"),
        (4.806e6, "4,806,000"),
        (1.2e-7, "1.2e-07"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert verdict.number(value) == text


def test_line_ends_of_generated_text_show() -> None:
    assert visible("a\n\nb" + "\n" * 40) == "a↵↵\nb↵ (40 times)\n"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, comparison: Comparison, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    with pytest.raises(ImportError, match=r'a report needs matplotlib: pip install "neuroweave\[report\]"'):
        require_report_extra()
    with pytest.raises(ImportError, match="neuroweave"):
        write_report(comparison, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_room_imports_without_the_extra() -> None:
    code = "import sys; sys.modules.update(jinja2=None, matplotlib=None); import neuroweave.diagnose"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
