"""The report in a real browser: nothing is fetched, nothing complains, every figure can be seen and enlarged, in light
and dark and on a phone. Needs Chromium (Debian package `chromium`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chromium import BINARY, NAMES, Chromium
from made_comparison import made_comparison

from neuroweave.diagnose.report.page import render_report

pytestmark = pytest.mark.skipif(BINARY is None, reason=f"no browser found: none of {', '.join(NAMES)} is on the path")

PHONE = {"width": 390, "height": 844}
NAMED = ("smollm2-135m-instruct", "relu <b>&</b>", "an-unbroken-name-that-is-longer-than-a-phone-is-wide-v2", "fused")
# Of every label its box, and of its figure the box; what a reader does not see is left out.
LABELS = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  return [svg.closest('figure').id, box(svg), [...svg.querySelectorAll('text')].map(t => [t.textContent, box(t)])];
})"""
SIZES = """[...document.querySelectorAll('figure')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  return [figure.id, box.width, box.height, figure.querySelectorAll('svg path').length];
})"""
TOO_WIDE = """[...document.querySelectorAll('main *')]
  .filter(e => e.getBoundingClientRect().right > 391 && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"""
OPEN = "[...document.querySelectorAll('.zoom:popover-open')].map(e => e.id)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models of 32 layers."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render_report(made_comparison(NAMED, layers=32)), encoding="utf-8")
    return file


def test_four_models_of_32_layers_stay_small(page: Path) -> None:
    assert page.stat().st_size < 1_500_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaint_and_no_request_but_the_page(browser: Chromium, page: Path, scheme: str) -> None:
    browser.open(page, scheme=scheme)
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_a_request_and_a_complaint_would_be_seen(browser: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><img src='http://127.0.0.1:9/a.png'><script>console.error('no')</script>")
    browser.open(bad)
    assert "http://127.0.0.1:9/a.png" in browser.requests()
    assert any("no" in complaint for complaint in browser.complaints())


def test_the_policy_refuses_what_a_name_might_smuggle_in(browser: Chromium, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(text.replace("<main>", "<main><img src='http://127.0.0.1:9/a.png'><script>x=1</script>", 1))
    browser.open(smuggled)
    assert browser.evaluate("typeof x") == "undefined"
    assert sum("Content Security Policy" in complaint for complaint in browser.complaints()) == 2


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_every_figure_is_seen(browser: Chromium, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    shown = browser.evaluate(SIZES)
    assert {key for key, *_ in shown} == set(re.findall(r'<figure class="card" id="([^"]+)"', page.read_text()))
    assert len(shown) == 23
    for key, wide, high, paths in shown:
        assert wide > 300, key
        assert high > 60, key
        assert paths > 3, key


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_stay_in_their_figure_and_off_each_other(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page, width=width)
    for key, (left, top, right, bottom), labels in browser.evaluate(LABELS):
        assert labels, key
        for at, (text, box) in enumerate(labels):
            assert left - 1 <= box[0] <= box[2] <= right + 1, f"{key}: {text!r} leaves the figure"
            assert top - 1 <= box[1] <= box[3] <= bottom + 1, f"{key}: {text!r} leaves the figure"
            for other, theirs in labels[:at]:
                across = min(box[2], theirs[2]) - max(box[0], theirs[0])
                down = min(box[3], theirs[3]) - max(box[1], theirs[1])
                # Boxes of letters are higher than what is drawn of them.
                assert across < 1 or down < 4, f"{key}: {text!r} lies on {other!r}"


def test_a_phone_needs_no_sideways_scrolling(browser: Chromium, page: Path) -> None:
    browser.open(page, **PHONE)
    assert browser.evaluate("window.innerWidth") == 390  # a page that is too wide makes a phone zoom out
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate(TOO_WIDE) == []


def test_the_dark_scheme_is_dark(browser: Chromium, page: Path) -> None:
    def brightness(selector: str, what: str) -> float:
        colour = browser.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{what}")
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 765

    for scheme, ground, letters in (("light", (0.9, 1), (0, 0.3)), ("dark", (0, 0.2), (0.8, 1))):
        browser.open(page, scheme=scheme)
        for selector in ("body", "figure.card", ".tile"):
            assert ground[0] <= brightness(selector, "backgroundColor") <= ground[1], (scheme, selector)
        assert letters[0] <= brightness("body", "color") <= letters[1], scheme
        assert letters[0] <= brightness("#figure-tasks svg text", "fill") <= letters[1], scheme


def test_a_figure_is_enlarged_and_closed_again(browser: Chromium, page: Path) -> None:
    browser.open(page)
    size = "document.querySelector({!r}).getBoundingClientRect().width"
    small = browser.evaluate(size.format("#figure-kl-by-position svg"))
    assert browser.evaluate(OPEN) == []
    browser.click("#figure-kl-by-position .picture")
    assert browser.evaluate(OPEN) == ["zoom-kl-by-position"]
    assert browser.evaluate(size.format("#zoom-kl-by-position use")) > 1.5 * small
    browser.press("Escape")
    assert browser.evaluate(OPEN) == []
    browser.click("#figure-weight-change-2 .picture")
    assert browser.evaluate(OPEN) == ["zoom-weight-change-2"]
    browser.click("#zoom-weight-change-2 .close")
    assert browser.evaluate(OPEN) == []
    assert browser.complaints() == []


def test_an_enlarged_figure_can_be_moved_on_a_phone(browser: Chromium, page: Path) -> None:
    browser.open(page, **PHONE)
    browser.click("#figure-norms .picture")
    assert browser.evaluate(OPEN) == ["zoom-norms"]
    box = browser.evaluate(
        "(e => [e.getBoundingClientRect().right, e.clientWidth, e.scrollWidth])"
        "(document.querySelector('#zoom-norms .scroll'))"
    )
    assert box[0] <= 390
    assert box[2] > 1.8 * box[1]
