"""The server's page in a real browser, against a real server: what is typed reaches a model, what comes is shown, and
nothing that was written can run. Needs Chromium (Debian package `chromium`)."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from chromium import BINARY, NAMES, Chromium
from served_page import (
    BEGUN,
    HOSTILE,
    OVER,
    READY,
    TURN,
    StandIn,
    ask,
    begin,
    compared,
    faults,
    only_here,
    opened,
    sent,
    setting,
    texts,
)
from serving import ENDLESS, Running, running, served, within

from neuroweave.chat.grounding import Grounding
from neuroweave.chat.guard import Limits
from neuroweave.chat.search.sources import SearchError, Source

pytestmark = pytest.mark.skipif(BINARY is None, reason=f"no browser found: none of {', '.join(NAMES)} is on the path")

# Every length that the answer has had on the page, and everything that was said to those who do not see it.
WATCH = """(() => {
  const watch = (selector, see) => new MutationObserver(see).observe(
    document.querySelector(selector), { subtree: true, childList: true, characterData: true });
  [window.lengths, window.said] = [new Set(), []];
  watch('#chat', () => lengths.add(document.querySelector('.reply .prose')?.textContent.length));
  watch('#announcer', () => said.push(document.querySelector('#announcer').textContent));
})()"""


@pytest.fixture(scope="module")
def both() -> Iterator[Running]:
    with running([served("model", seed=1), served("original", seed=2, role="original")]) as found:
        yield found


# ---------------------------------------------------------------------------------------------------------- the chat


def test_an_answer_is_streamed(browser: Chromium, both: Running) -> None:
    opened(browser, both)
    setting(browser, "max_tokens", 300)
    browser.evaluate(WATCH)
    begin(browser, "Hello")
    browser.wait(BEGUN)
    assert browser.evaluate("document.querySelector('.reply').getAttribute('aria-busy')") == "true"
    browser.wait(OVER)
    assert browser.evaluate("document.querySelector('.reply').getAttribute('aria-busy')") is None
    assert texts(browser, ".message.user") == ["Hello"]
    assert len(browser.evaluate("[...lengths]")) > 3
    [facts] = texts(browser, ".facts")
    assert facts.startswith("300 tokens · ")
    assert " tokens/s · first text after " in facts
    assert facts.endswith("ended by the limit of new tokens")
    [said] = browser.evaluate("said")  # once, and not token by token
    assert said.startswith("model: ")
    assert browser.complaints() == []
    assert only_here(browser, both)


def test_what_is_sent_and_what_is_remembered(browser: Chromium, both: Running, reciting: Any) -> None:
    reciting("It is **so**:\n\n- one\n\n```python\nx = 1 < 2\n```\n\n\u05e9\u05dc\u05d5\u05dd 雪 é, said he")
    opened(browser, both)
    ask(browser, "First")
    assert browser.evaluate("[...document.querySelector('.prose').children].map(e => e.outerHTML)") == [
        '<p dir="auto">It is <strong>so</strong>:</p>',
        '<ul dir="auto"><li>one</li></ul>',
        '<pre role="region" aria-label="Code, python" tabindex="0" dir="ltr"><code>x = 1 &lt; 2</code></pre>',
        '<p dir="auto">\u05e9\u05dc\u05d5\u05dd 雪 é, said he</p>',
    ]
    assert browser.evaluate("getComputedStyle(document.querySelector('.prose > :last-child')).direction") == "rtl"
    for name, value in (("system", "Be kind"), ("temperature", 0.5), ("seed", 7), ("model", "original")):
        setting(browser, name, value)
    ask(browser, "Second")
    asked = sent(browser)[-1]
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"]
    assert asked["messages"][2]["content"].startswith("It is **so**")
    assert {name: value for name, value in asked.items() if name != "messages"} == {
        "model": "original", "temperature": 0.5, "seed": 7, "max_tokens": 512,
        "stream": True, "logprobs": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert texts(browser, ".reply .who") == ["model", "original"]
    assert len(texts(browser, ".again")) == 1  # of the last answer alone
    browser.click(f"{TURN} .again")
    browser.wait(OVER)
    assert len(texts(browser, ".reply")) == 2
    browser.click("#new")
    assert texts(browser, ".message") == []
    assert browser.complaints() == []


@pytest.mark.parametrize("how", ["button", "Escape", "new chat", "reload"])
def test_stop_ends_the_request(browser: Chromium, both: Running, how: str, dawdling: Any) -> None:
    opened(browser, both)
    dawdling()
    setting(browser, "max_tokens", ENDLESS)
    begin(browser, "Hello")
    browser.wait(BEGUN)
    assert health(both)["models"]["model"]["writing"] == 1
    [job] = both.served[0].batcher.batch.jobs
    if how == "Escape":
        browser.press("Escape")
    elif how == "reload":
        opened(browser, both)
    else:
        browser.click({"button": "[name=stop]", "new chat": "#new"}[how])
    assert both.settled()
    assert health(both)["models"]["model"] == {"writing": 0, "waiting": 0}
    assert 0 < job.written < ENDLESS
    browser.wait(READY)
    if how in ("button", "Escape"):
        assert texts(browser, ".facts")[0].endswith("stopped")
        assert browser.evaluate("document.activeElement.id") == "message"
        setting(browser, "max_tokens", 5)
        ask(browser, "And on")
        assert len(texts(browser, ".reply:not(:has(.problem))")) == 2
    else:
        assert texts(browser, ".message") == []
    assert browser.complaints() == []


def health(server: Running) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.address}/health") as answer:
        return dict(json.load(answer))


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_error_is_shown_and_the_chat_goes_on(browser: Chromium, both: Running, reciting: Any) -> None:
    opened(browser, both)
    ask(browser, "word " * 5000)
    [problem] = texts(browser, ".problem[role=alert]")
    assert problem.startswith("The server cannot answer this:")
    assert "model has 4096 positions" in problem
    reciting("He went ", then=ValueError("a pipe <b>broke</b>"))
    ask(browser, "Hello")
    assert texts(browser, f"{TURN} .prose") == ["He went "]
    assert texts(browser, f"{TURN} .problem span") == ["a pipe <b>broke</b>"]
    reciting("Well then.")
    browser.click(f"{TURN} .problem .again")
    browser.wait(f"{OVER} && !document.querySelector('{TURN} .problem')")
    assert texts(browser, f"{TURN} .prose") == ["Well then."]
    ask(browser, "Hi")
    assert [message["content"] for message in sent(browser)[-1]["messages"]] == ["Hello", "Well then.", "Hi"]
    assert faults(browser) == []


def test_a_server_that_is_busy_and_one_that_is_gone(browser: Chromium, reciting: Any, dawdling: Any) -> None:
    with running([served()], limits=Limits(requests=1, new_tokens=99)) as server:
        opened(browser, server)
        assert browser.evaluate("document.querySelector('[name=max_tokens]').value") == "99"  # not what is refused
        dawdling(seconds=0.2)
        other = http.client.HTTPConnection(server.address.removeprefix("http://"))
        content = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True})
        other.request("POST", "/v1/chat/completions", content, {"content-type": "application/json"})
        held = other.getresponse()
        held.read(1)
        reciting("Here I am.")
        ask(browser, "Hello")
        assert texts(browser, ".problem b") == ["The server is busy:"]
        held.close()
        other.close()
        assert within(20, lambda: server.requests() == 0)
        browser.click(".problem .again")
        browser.wait(f"{OVER} && !document.querySelector('.problem')")
        assert texts(browser, ".prose") == ["Here I am."]
    ask(browser, "Still there?")
    assert texts(browser, ".problem b") == ["The server cannot be reached."]
    assert texts(browser, ".prose")[0] == "Here I am."


def test_a_server_that_ends_in_the_middle(browser: Chromium, dawdling: Any) -> None:
    dawdling()
    with running([served()]) as server:
        opened(browser, server)
        setting(browser, "max_tokens", ENDLESS)
        begin(browser, "Hello")
        browser.wait(BEGUN)
    browser.wait(f"{OVER} && document.querySelector('.problem')")
    assert len(texts(browser, ".prose")[0]) > 0


def test_the_key_is_asked_for(browser: Chromium, reciting: Any) -> None:
    reciting("Come in.")
    with running([served()], api_key="open-sesame") as server:
        browser.open(f"{server.address}/")
        browser.wait("document.querySelector('#key').open")
        assert browser.evaluate("document.activeElement.type") == "password"
        browser.write("wrong")
        browser.press("Enter")
        browser.wait("document.querySelector('#key').open && !document.querySelector('#key-refused').hidden")
        browser.press("Escape")
        browser.wait("document.querySelector('.problem')")
        assert texts(browser, ".problem b") == ["The server wants its API key:"]
        browser.click(".problem .again")
        browser.wait("document.querySelector('#key').open")
        browser.write("open-sesame")
        browser.press("Enter")
        browser.wait(READY)
        ask(browser, "Hello")
        assert texts(browser, ".prose") == ["Come in."]
        assert browser.evaluate("Object.values({ ...sessionStorage })") == ["open-sesame"]
        elsewhere = "[localStorage.length, document.cookie, document.documentElement.outerHTML.includes('sesame')]"
        assert browser.evaluate(elsewhere) == [0, "", False]
        assert browser.evaluate("document.querySelector('#key input').value") == ""
        opened(browser, server)  # this tab knows it
        assert not browser.evaluate("document.querySelector('#key').open")
        assert faults(browser) == []
        assert only_here(browser, server)


# ----------------------------------------------------------------------------------------------------------- sources


def test_sources_and_citations(browser: Chromium, reciting: Any, dawdling: Any) -> None:
    moon = f"Tides are made by the Moon. {HOSTILE} " + "More. " * 90
    sources = [
        Source(f"Tides {HOSTILE}", "https://example.org/a?b=1", moon, date(2024, 5, 1)),
        Source("Tides twice", "notes/tides.md", "The tides of the sea come twice a day, and the Moon goes round."),
        Source("Tides ran", "javascript:window.ran=1", "Tides, tides and tides: the Moon again."),
    ]
    provider = StandIn(sources)
    reciting("Tides are made by the Moon [1].\n\nIt is so [9].")
    with running([served()], grounding=Grounding(provider, 3)) as server:
        opened(browser, server)
        assert texts(browser, "#searching") == ["Search local:<b>docs"]
        browser.click("#searching")
        ask(browser, "What are tides of the Moon?")
        assert sent(browser)[-1]["web_search_options"] == {}
        first, *others = texts(browser, ".source")
        assert first.startswith("1")
        shown = " ".join([first, *others])
        for text in (HOSTILE, "example.org · 2024-05-01", "notes/tides.md", "javascript:window.ran=1"):
            assert text in shown
        links = browser.evaluate("[...document.querySelectorAll('.source a')].map(a => [a.href, a.rel])")
        assert links == [["https://example.org/a?b=1", "noopener noreferrer"]]
        assert texts(browser, ".prose p") == ["Tides are made by the Moon [1].", "It is so."]
        assert texts(browser, ".prose a.citation") == ["[1]"]
        assert texts(browser, ".source.uncited .mark") == ["not cited", "not cited"]
        assert texts(browser, "main .notice") == ["Taken out, since it points to no source: [9]"]
        browser.click(".prose a.citation")
        assert browser.evaluate("document.activeElement.matches('.source:first-child')")
        browser.click(".source:has(a) .plain")
        assert browser.evaluate("document.querySelector('.source:has(a) .plain').ariaExpanded") == "true"
        assert browser.evaluate("[typeof window.ran, location.hash]") == ["undefined", ""]
        assert texts(browser, "main :is(script, img)") == []
        setting(browser, "max_tokens", ENDLESS)
        reciting("tides and " * 300)
        dawdling()
        begin(browser, "Tides of the Moon, again?")
        browser.wait(BEGUN)
        browser.click("[name=stop]")
        browser.wait(READY)
        assert len(texts(browser, f"{TURN} .source")) == 3  # what it was given to read is known before its end
        assert texts(browser, f"{TURN} .facts")[0].endswith("stopped")
        setting(browser, "max_tokens", 5)
        provider.error = SearchError(f"the index is away {HOSTILE}")
        reciting("I do not know.")
        ask(browser, "And tides of the Moon?")
        notice = f"the index is away {HOSTILE}; the answer is the model's own"
        assert texts(browser, f"{TURN} .notice") == [notice]
        remembered = sent(browser)[-1]["messages"][1]["content"]
        assert remembered == "Tides are made by the Moon.\n\nIt is so."
        assert browser.complaints() == []
        assert only_here(browser, server)


def test_no_search_is_offered_where_there_is_none(browser: Chromium, both: Running) -> None:
    opened(browser, both)
    assert not browser.evaluate("document.querySelector('#searching').checkVisibility()")


# ----------------------------------------------------------------------------------------------------------- compare

SAID = {"original": "It was the best of times, said she.", "model": "It was the worst of days and 雪."}


def test_two_models_side_by_side(browser: Chromium, both: Running, reciting: Any) -> None:
    reciting(SAID)
    compared(browser, both)
    ask(browser, "Hello")
    assert texts(browser, ".column h3") == ["original original", "model model"]
    assert texts(browser, ".column .tokens") == list(SAID.values())
    for name, said in SAID.items():
        column = f".column.{name}"
        speed, first, count, apart = texts(browser, f"{column} .tile b")
        assert float(speed) > 0
        assert float(first) > 0
        measured = divergence(both, said)
        assert int(count) == len(measured["tokens"]) + 1  # the end token
        assert float(apart) == pytest.approx(measured["mean_kl"], rel=0.01)
        spans = browser.evaluate(
            f"[...document.querySelectorAll('{column} .token')]"
            ".map(e => [e.textContent, e.title, +e.dataset.doubt, +e.dataset.apart])"
        )
        assert "".join(text for text, *_ in spans) == said
        for (text, title, doubt, level), token in zip(spans[:6], measured["tokens"], strict=False):
            assert text == token["token"]
            kl = float(title.split("KL ")[1].split(" nats")[0])
            assert kl == pytest.approx(token["kl"], rel=0.01)
            assert level == sum(token["kl"] >= limit for limit in (0.01, 0.1, 0.5, 2))
            told = title.split("probability ")[1].split(" in model")[0]
            chance = 0.0 if told == "< 0.1 %" else float(told.removesuffix(" %"))
            assert chance == pytest.approx(100 * 2.718281828 ** token["logprob"], abs=0.51 if chance >= 10 else 0.11)
            own = token["logprob"] if name == "model" else token["logprob_against"]
            assert doubt == sum(2.718281828**own < limit for limit in (0.9, 0.5, 0.2, 0.05))
    tokens = [[token["token"] for token in divergence(both, said)["tokens"]] for said in SAID.values()]
    same = next(place for place, (one, other) in enumerate(zip(*tokens, strict=False)) if one != other)
    parted = [each[same] for each in tokens]
    assert texts(browser, ".columns .differs") == parted
    one, other = (text.strip() for text in parted)
    assert texts(browser, ".parting") == [
        f"The first {same} tokens are the same; then the answers part: “{one}” and “{other}”."
    ]
    assert browser.complaints() == []
    assert only_here(browser, both)


def divergence(server: Running, answer: str) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "model": "model", "against": "original"}
    content = json.dumps({**asked, "answer": answer}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/neuroweave/divergence", content, headers)
    with urllib.request.urlopen(request) as found:
        return dict(json.load(found))


def test_both_are_asked_with_one_seed_at_the_same_time(browser: Chromium, both: Running) -> None:
    compared(browser, both)
    setting(browser, "max_tokens", 20)
    ask(browser, "Hello")
    one, other = [asked for asked in sent(browser) if asked.get("stream")]
    assert one["seed"] == other["seed"]
    assert {one.pop("model"), other.pop("model")} == {"original", "model"}
    assert one == other


def test_shading_can_be_switched_and_read(browser: Chromium, both: Running, reciting: Any) -> None:
    reciting(SAID)
    compared(browser, both)
    ask(browser, "Hello")
    style = "getComputedStyle(document.querySelector('.column [data-{}]:not([data-{}=\"0\"])')).{}"
    ground, line = style.format("doubt", "doubt", "backgroundColor"), style.format("apart", "apart", "backgroundImage")
    assert browser.evaluate(ground) != "rgba(0, 0, 0, 0)"
    assert "gradient" in browser.evaluate(line)
    browser.click("#show-confidence")
    assert browser.evaluate(ground) == "rgba(0, 0, 0, 0)"
    assert "gradient" in browser.evaluate(line)
    browser.click("#show-divergence")
    assert browser.evaluate(line) == "none"
    browser.evaluate("document.querySelector('.column .tokens').focus()")
    titles = browser.evaluate("[...document.querySelectorAll('.column:first-child .token')].map(e => e.title)")
    for title in titles[:3]:
        browser.press("ArrowRight")
        assert texts(browser, ".column:first-child .readout") == [title]


def test_models_that_agree(browser: Chromium, both: Running, reciting: Any) -> None:
    reciting("Yes, 雪 it is.")
    compared(browser, both)
    ask(browser, "Hello")
    assert texts(browser, ".column .tokens") == ["Yes, 雪 it is."] * 2
    assert texts(browser, ".parting") == ["Both answers are the same, token by token."]
    assert texts(browser, ".column .differs") == []
    [title] = browser.evaluate("[...document.querySelectorAll('.column.model .token')].map(e => e.title)"
                               ".filter(title => title.includes('雪'))")  # fmt: skip
    assert title.endswith("; 3 tokens")


def test_a_comparison_is_stopped(browser: Chromium, both: Running, dawdling: Any) -> None:
    dawdling()
    compared(browser, both)
    setting(browser, "max_tokens", ENDLESS)
    begin(browser, "Hello")
    browser.wait("[...document.querySelectorAll('.column .tokens')].filter(e => e.textContent).length == 2")
    jobs = [each.batcher.batch.jobs[0] for each in both.served]
    browser.press("Escape")
    assert both.settled()
    assert all(0 < job.written < ENDLESS for job in jobs)
    browser.wait(OVER)
    assert texts(browser, ".column .tile:nth-child(3) small:last-child") == ["stopped", "stopped"]
    setting(browser, "max_tokens", 5)
    browser.click(f"{TURN} .again")
    browser.wait(f"{OVER} && document.querySelector('.column')")
    assert texts(browser, ".column .tile:nth-child(3) b") == ["5", "5"]
    assert browser.complaints() == []


def test_one_model_has_nothing_to_be_compared_with(browser: Chromium) -> None:
    with running([served()]) as server:
        browser.open(f"{server.address}/#compare")
        browser.wait(READY)
        assert not browser.evaluate("document.querySelector('nav').checkVisibility()")
        assert browser.evaluate("document.querySelector('#chat').checkVisibility()")
