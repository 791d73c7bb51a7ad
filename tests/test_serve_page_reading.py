"""The server's page for every reader: small screens, dark rooms, keyboards, screen readers; and its parts alone. Needs
Chromium (Debian package `chromium`)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import BINARY, NAMES, Chromium
from served_page import (
    BEGUN,
    HOSTILE,
    READY,
    StandIn,
    ask,
    begin,
    compared,
    opened,
    setting,
    texts,
)
from serving import ENDLESS, Running, running, served

from neuroweave.chat.grounding import Grounding
from neuroweave.chat.search.sources import Source
from neuroweave.chat.server import PAGE
from neuroweave.diagnose.report.figures.drawing import COLOURS

pytestmark = pytest.mark.skipif(BINARY is None, reason=f"no browser found: none of {', '.join(NAMES)} is on the path")

LONG = "an" + "-unbroken" * 12 + " " + "x" * 200
# A phone; 1280 x 900 at 200 %; 1280 x 1024 at 400 % (WCAG 2.2, 1.4.10).
SCREENS = [(360, 740), (640, 450), (320, 256)]
# Of every element with text of its own: the text, and its contrast to what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """(() => {
  const parse = colour => { const n = colour.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
  const linear = c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = e => { const c = parse(getComputedStyle(e).backgroundColor);
    return c[3] === 1 ? c : ground(e.parentElement); };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const all = [...document.querySelectorAll('body *:not(.unseen, .skip, option, :disabled)')];
  return all.filter(e => e.checkVisibility() && own(e)).map(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    return [e.textContent.trim().slice(0, 40), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
  });
})()"""
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('pre, .unseen')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
# Whether what has the focus, or the box around it, is seen to have it, and is not hidden by what sticks.
SEEN = """(e => { const outlined = e => e && getComputedStyle(e).outlineStyle !== 'none';
  const b = e.getBoundingClientRect(), top = document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2);
  return e === document.body || (outlined(e) || outlined(e.closest('.card'))) && (e.contains(top) || top?.contains(e));
})(document.activeElement)"""


@pytest.fixture(scope="module")
def full() -> Iterator[Running]:
    """A server with a search and two models."""
    sources = [
        Source(f"Tides {LONG}", f"https://{'long-' * 9}name.example/{LONG}", f"Tides of the Moon. {LONG} " * 4),
        Source(f"Tides {HOSTILE}", f"notes/{LONG}.md", "The tides of the sea come twice a day; see the Moon."),
    ]
    models = [served("model", seed=1), served("original", seed=2, role="original")]
    with running(models, grounding=Grounding(StandIn(sources), 3)) as found:
        yield found


def filled(browser: Chromium, server: Running, reciting: Any, view: str) -> None:
    """The page with all that it can show: prose, code, sources, a notice and an error; or a comparison."""
    reciting(f"Tides [1] [9] {LONG}\n\n```\n{LONG}\n```\n\n1. {LONG}\n\n# {LONG}")
    if view == "compare":
        ask(compared(browser, server), LONG)
        return
    opened(browser, server)
    browser.evaluate("document.querySelector('#settings').open = true")
    browser.evaluate("document.querySelector('[name=search]').checked = true")
    ask(browser, f"What are tides of the Moon? {LONG}")
    reciting("He went ", then=ValueError(LONG))
    ask(browser, "Hello")


@pytest.mark.parametrize("view", ["chat", "compare"])
def test_a_page_with_everything_on_it(browser: Chromium, full: Running, reciting: Any, view: str) -> None:
    filled(browser, full, reciting, view)
    everything_has_a_name(browser)
    for pressed in ("prose", "tokens") if view == "chat" else ("tokens",):
        if view == "chat" and pressed == "tokens":
            browser.evaluate("document.querySelector('.actions [aria-pressed]').click()")
        everything_can_be_read(browser, "light", "rgb(246, 247, 249)")
        everything_can_be_read(browser, "dark", "rgb(20, 23, 28)")
        for width, height in SCREENS:
            no_sideways_scrolling(browser, width, height)


def everything_has_a_name(browser: Chromium) -> None:
    roles: dict[str, list[str]] = {}
    for node in browser.call("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    named = {"button", "link", "textbox", "spinbutton", "checkbox", "combobox", "article", "region", "form"}
    assert {role: names for role, names in roles.items() if role in named and "" in names} == {}
    assert {"banner", "main", "navigation", "form", "article", "textbox", "status"} <= set(roles)
    assert set(roles["RootWebArea"]) == {"model · Neuroweave"}
    assert {"Message", "API key"} >= set(roles["textbox"]) - {"System message"}
    if "spinbutton" in roles:
        assert roles["spinbutton"] == ["Temperature", "New tokens, at most", "Seed"]


def everything_can_be_read(browser: Chromium, scheme: str, ground: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    found = browser.evaluate(CONTRASTS)
    assert len(found) > 30
    assert [each for each in found if each[1] < 4.5] == []


def no_sideways_scrolling(browser: Chromium, width: int, height: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)
    assert browser.evaluate("innerWidth") == width  # a page that is too wide makes a phone zoom out
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(TOO_WIDE) == []
    share, sticks = browser.evaluate(
        "(e => [e.offsetHeight / innerHeight, getComputedStyle(e).position])(document.querySelector('#composer'))"
    )
    assert sticks == "static" or share < 0.75, (width, height)


@pytest.mark.parametrize("view", ["chat", "compare"])
def test_keys(browser: Chromium, full: Running, reciting: Any, view: str) -> None:
    reciting("Yes.")
    opened(browser, full)
    assert browser.evaluate("document.activeElement.id") == "message"
    if view == "compare":
        compared(browser, full)
        browser.evaluate("document.querySelector('#message').focus()")
    browser.write("one")
    browser.press("Enter", shift=True)
    browser.write("two")
    assert texts(browser, ".message") == []
    browser.press("Enter")
    browser.wait(f"{READY} && document.querySelector('.actions')")
    assert texts(browser, ".message.user p") == ["one\ntwo"]
    browser.press("Enter")  # nothing is written
    assert len(texts(browser, ".turn")) == 1
    setting(browser, "temperature", "7")
    begin(browser, "three")  # a setting that cannot be: it is shown, and nothing is sent
    assert browser.evaluate("document.activeElement.name") == "temperature"
    assert len(texts(browser, ".turn")) == 1
    setting(browser, "temperature", "")
    browser.evaluate("document.querySelector('#settings').open = false")
    reciting("Well. \n\n" * 8)
    for _ in range(3):  # more than fits on the screen
        ask(browser, "On")
    been = set()
    for _ in range(40):
        browser.press("Tab")
        assert browser.evaluate(SEEN), browser.evaluate("document.activeElement.outerHTML")
        been.add(browser.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
    assert len(been) > 10


def test_nothing_moves_for_those_who_want_it_still(browser: Chromium, full: Running, dawdling: Any) -> None:
    dawdling()
    opened(browser, full)
    setting(browser, "max_tokens", ENDLESS)
    begin(browser, "Hello")
    browser.wait(BEGUN)
    assert browser.evaluate("document.getAnimations().length") > 0
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert browser.evaluate("document.getAnimations().length") == 0
    browser.press("Escape")
    browser.wait(READY)


def test_the_colours_are_those_of_the_report() -> None:
    text = (PAGE / "style.css").read_text(encoding="utf-8")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in ("ink", "grid", "series-0", "series-1", "series-2", "series-7"):
        assert f"--{name}: {COLOURS[name][0]};" in light
        assert f"--{name}: {COLOURS[name][1]};" in dark


# --------------------------------------------------------------------------------------------------- the small parts


def imported(browser: Chromium, server: Running, module: str, expression: str) -> Any:
    """The value of an expression in which `page` is one of the page's modules."""
    if browser.evaluate("location.href") != f"{server.address}/":
        opened(browser, server)
    return browser.evaluate(f"import('/static/{module}.js').then(page => {expression})")


def test_events_however_they_are_cut(browser: Chromium, full: Running) -> None:
    stream = ': ping\r\n\r\ndata: {"é雪"}\n\ndata:a\ndata: b\r\revent: x\ndata:\n\n'
    stream += ": late\n\ndata: p\r\ndata: q\r\n\r\ndata: cut off"
    found = imported(
        browser, full, "events",
        f"""(async () => {{
          const bytes = new TextEncoder().encode({json.dumps(stream)});
          const read = async parts => {{
            const body = new ReadableStream({{ start(c) {{ parts.forEach(part => c.enqueue(part)); c.close(); }} }});
            return JSON.stringify(await Array.fromAsync(page.eventsOf(body)));
          }};
          const all = [await read([...bytes].map((_, at) => bytes.slice(at, at + 1)))];
          for (let at = 0; at <= bytes.length; at += 1) all.push(await read([bytes.slice(0, at), bytes.slice(at)]));
          return [...new Set(all)];
        }})()""",
    )  # fmt: skip
    assert [json.loads(each) for each in found] == [['{"é雪"}', "a\nb", "", "p\nq"]]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a < b & c\nd", '<p dir="auto">a &lt; b &amp; c\nd</p>'),
        ("**a *b* c** d", '<p dir="auto"><strong>a <em>b</em> c</strong> d</p>'),
        ("2 * 3 * 4, a*b*c, **a", '<p dir="auto">2 * 3 * 4, a*b*c, **a</p>'),
        ("`**a**` and ``b`", '<p dir="auto"><code dir="ltr">**a**</code> and ``b`</p>'),
        ("[1] [2] `[1]`", '<p dir="auto"><i>1</i> [2] <code dir="ltr">[1]</code></p>'),
        ("# a\nb", '<h4 dir="auto">a</h4><p dir="auto">b</p>'),
        ("3. a\n   b\n4. c", '<ol dir="auto" start="3"><li>a\nb</li><li>c</li></ol>'),
        ("- a\n  - b\n- c", '<ul dir="auto"><li>a<ul dir="auto"><li>b</li></ul></li><li>c</li></ul>'),
        ("    - deep first", '<ul dir="auto"><li>deep first</li></ul>'),
        ("```js\n<b>", '<pre role="region" aria-label="Code, js" tabindex="0" dir="ltr"><code>&lt;b&gt;</code></pre>'),
        ("<script>x</script>", '<p dir="auto">&lt;script&gt;x&lt;/script&gt;</p>'),
        ("", ""),
    ],
)  # fmt: skip
def test_prose(browser: Chromium, full: Running, text: str, html: str) -> None:
    shown = imported(
        browser, full, "prose",
        f"""(() => {{ const place = document.createElement('div');
          const cite = n => n === 1 ? Object.assign(document.createElement('i'), {{ textContent: n }}) : null;
          page.drawProse(place, {json.dumps(text)}, {{ cite }}); return place.innerHTML; }})()""",
    )  # fmt: skip
    assert shown == html


def test_prose_that_grows_is_the_prose_of_the_whole(browser: Chromium, full: Running) -> None:
    """Any text, letter by letter; no word is lost, and none becomes an element that prose does not have."""
    draw = random.Random(0)
    pieces = ["a ", "b", "*", "**", "`", "```", "\n", "\n\n", "- ", "  ", "1. ", "# ", "<i>", "[1]", "~~~", "é", "\t"]
    some = ["".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(150)]
    wrong = imported(
        browser, full, "prose",
        f"""{json.dumps(some)}.filter(text => {{
          const [grown, whole] = [document.createElement('div'), document.createElement('div')];
          for (let end = 0; end <= text.length; end += 1) page.drawProse(grown, text.slice(0, end));
          page.drawProse(whole, text);
          const [odd, same] = [whole.querySelector('i, script'), grown.innerHTML === whole.innerHTML];
          for (const code of whole.querySelectorAll('pre')) code.prepend(code.ariaLabel.slice(6));
          const letters = text => text.replace(/[^abié]/g, '');
          return odd || !same || letters(text) !== letters(whole.textContent);
        }})""",
    )  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "tokens", "parts"),
    [
        ("It was", ["It", " was"], ["It", " was"]),
        ("It was", [" It", " was", ""], ["It", " was"]),  # a decoder that takes the first space away
        ("a雪b", ["a", "\ufffd", "", "\ufffd", "b"], ["a", "雪", "b"]),
        ("a雪", ["a", "\ufffd", "", "\ufffd"], ["a", "雪"]),
        ("So [1]. Or", ["So", ".", " Or", "<end>"], ["So", " [1].", " Or"]),  # a citation that was put in
        ("Hello", ["Hello", "<end>"], ["Hello"]),
        ("", ["<end>"], []),
    ],
)
def test_parts_of_a_text(browser: Chromium, full: Running, text: str, tokens: list[str], parts: list[str]) -> None:
    """All at once, and as they come: a token before its text."""
    at_once, grown = imported(
        browser, full, "tokens",
        f"""(() => {{
          const [text, tokens] = [{json.dumps(text)}, {json.dumps(tokens)}.map(token => ({{ token }}))];
          const [whole, slow] = [new page.Parts(), new page.Parts()];
          whole.put(text, tokens, true);
          tokens.forEach((_, n) => slow.put(text.slice(0, n), tokens.slice(0, n + 1), false));
          slow.put(text, tokens, true);
          return [whole, slow].map(each => each.parts.map(part => part.text));
        }})()""",
    )  # fmt: skip
    assert at_once == parts
    assert "".join(grown) == text


def test_levels_of_shade_and_underline(browser: Chromium, full: Running) -> None:
    chances = {0.91: 0, 0.89: 1, 0.51: 1, 0.49: 2, 0.21: 2, 0.19: 3, 0.051: 3, 0.049: 4}
    apart = {0.0: 0, 0.0099: 0, 0.01: 1, 0.099: 1, 0.1: 2, 0.49: 2, 0.5: 3, 1.99: 3, 2.0: 4}
    shown = imported(
        browser, full, "tokens",
        f"""(() => {{
          const [chances, apart] = [{json.dumps([*chances, 1.0])}, {json.dumps([*apart])}];
          const text = new page.TokenText("x");
          const token = [..."abcdefghi"];
          text.put("abcdefghi", token.map((token, at) => ({{ token, logprob: Math.log(chances[at]) }})), true);
          const found = (token, at) => ({{ token, kl: apart[at], logprob: -1, logprob_against: -2 }});
          text.diverge({{ model: "m", against: "o", tokens: token.map(found) }});
          return [...text.element.children].map(span => [+span.dataset.doubt, +span.dataset.apart]);
        }})()""",
    )  # fmt: skip
    assert shown == [list(pair) for pair in zip([*chances.values(), 0], apart.values(), strict=True)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("data: {}\n\ndata: [DONE]\n\n", None),
        ("data: {}\n\n", "the connection ended before the answer did"),
        ("data: {}\n\ndata: [DO", "the connection ended before the answer did"),
        ('data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n', "no"),
    ],
)
def test_an_answer_is_whole_or_refused(browser: Chromium, full: Running, body: str, message: str | None) -> None:
    found = imported(
        browser, full, "server",
        f"""(async () => {{
          const server = new page.Server(null);
          server.send = async () => new Response({json.dumps(body)});
          return Array.fromAsync(server.stream("", {{}})).then(() => null, error => error.message);
        }})()""",
    )  # fmt: skip
    assert found == message


def test_a_number_without_a_source_is_no_link(browser: Chromium, full: Running) -> None:
    grounded = {"sources": [{"number": 1, "title": "a"}]}
    links = f"[1, 2].map(number => page.citations({json.dumps(grounded)}, 'x')(number)?.hash ?? null)"
    assert imported(browser, full, "sources", links) == ["#x-source-1", None]


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("https://example.org:8080/a", "example.org:8080"),
        ("HTTP://EXAMPLE.org", "example.org"),
        ("https://bank.example@evil.example/", "evil.example"),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ("file:///etc/passwd", None),
        ("notes/a.md", None),
        ("//evil.example/a", None),
        ("", None),
    ],
)
def test_what_can_be_followed(browser: Chromium, full: Running, address: str, host: str | None) -> None:
    assert imported(browser, full, "sources", f"page.webAddress({json.dumps(address)})?.host ?? null") == host
