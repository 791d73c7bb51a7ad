"""The server's page as a test sees it: what is typed, what was sent, what can be read, and models that say what they
are told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from chromium import Chromium
from serving import Running
from test_generate_cli import byte_tokenizer

from neuroweave.chat import served as served_module
from neuroweave.chat.search.sources import SearchError, Source

READY = "!document.querySelector('[name=send]').disabled && !document.querySelector('[name=send]').hidden"
TURN = "main section:not([hidden]) .turn:last-child"
OVER = f"{READY} && document.querySelector('{TURN} .actions')"
BEGUN = f"document.querySelector('{TURN} :is(.prose, .tokens)')?.textContent.length > 0"
# Markup that says so when it is taken for markup.
HOSTILE = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"


class StandIn:
    """A search that always finds the same, or fails."""

    name = "local:<b>docs"

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.error: SearchError | None = None

    def search(self, query: str, *, count: int) -> list[Source]:
        if self.error:
            raise self.error
        return self.sources[:count]


def recite(
    monkeypatch: pytest.MonkeyPatch, text: str | Mapping[str, str], *, then: Exception | None = None
) -> None:  # fmt: skip
    """Every model, or each by its name, writes this and ends, or comes to this error. Probabilities stay its own."""
    tokenizer = byte_tokenizer()

    def chooser(_: Any, name: str, **__: Any) -> Callable[..., int]:
        ids = tokenizer(text if isinstance(text, str) else text[name])["input_ids"]
        coming = iter([*ids, *([] if then else [tokenizer.eos_token_id])])

        def choose(*_: Any) -> int:
            token = next(coming, None)
            if token is None:
                assert then is not None
                raise then
            return int(token)

        return choose

    monkeypatch.setattr(served_module, "chooser", chooser)


def opened(browser: Chromium, server: Running, **options: Any) -> Chromium:
    browser.open(f"{server.address}/", **options)
    browser.wait("!document.querySelector('[name=send]').disabled")
    return browser


def compared(browser: Chromium, server: Running, **options: Any) -> Chromium:
    """The same, with two models side by side."""
    opened(browser, server, **options)
    browser.click("nav a[href='#compare']")
    browser.wait("!document.querySelector('#compare').hidden")
    return browser


def setting(browser: Chromium, name: str, value: object) -> None:
    browser.evaluate(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")


def begin(browser: Chromium, text: str) -> None:
    browser.evaluate("document.querySelector('#message').focus()")
    browser.write(text)
    browser.press("Enter")


def ask(browser: Chromium, text: str) -> None:
    """Send it, and wait until whatever came of it is over."""
    begin(browser, text)
    browser.wait(OVER)


def texts(browser: Chromium, selector: str) -> list[str]:
    return list(browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"))


def sent(browser: Chromium) -> list[dict[str, Any]]:
    """The bodies of the requests that had one."""
    asked = [event["params"]["request"] for event in browser.events if "request" in event.get("params", {})]
    return [json.loads(request["postData"]) for request in asked if "postData" in request]


def only_here(browser: Chromium, server: Running) -> bool:
    return all(address.startswith(f"{server.address}/") for address in browser.requests())


def faults(browser: Chromium) -> list[str]:
    """Complaints but for the browser's own note of a request that was refused."""
    return [each for each in browser.complaints() if "Failed to load resource" not in each]
