"""Providers over real sockets: what they send, what they make of answers, failures in words, keys that stay secret."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from ddgs.exceptions import DDGSException, RatelimitException, TimeoutException
from pydantic import SecretStr
from search_server import Answer, WebServer, html_page, searxng_json, searxng_result, serving

from neuroweave.chat.search import SearchError, Source, provider_of
from neuroweave.chat.search.addresses import AddressPolicy
from neuroweave.chat.search.brave import Brave
from neuroweave.chat.search.cache import SourceCache
from neuroweave.chat.search.careful import CarefulProvider, Pace
from neuroweave.chat.search.discreet import DiscreetProvider
from neuroweave.chat.search.duckduckgo import DuckDuckGo
from neuroweave.chat.search.searxng import Searxng
from neuroweave.chat.search.sources import TransientError
from neuroweave.chat.search.tavily import Tavily
from neuroweave.chat.search.web import Limits, WebClient

LIMITS = Limits(connect=2.0, read=2.0, total=4.0, body=200_000)
RESULTS = [
    searxng_result("https://a.example/tea", "  Tea \n times ", "Tea is served at four.", publishedDate="2026-05-12T09"),
    searxng_result("https://b.example/", "", None, score=0.5),
    searxng_result("http://www.a.example/tea/?utm_source=x", "Tea again", "The same page."),
]  # fmt: skip


class Clock:
    """Time that passes only when something sleeps."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def careful(
    ask: Callable[[str, int], list[Source]], clock: Clock, *, interval: float = 0.0, cache: SourceCache | None = None
) -> CarefulProvider:
    pace = Pace(clock=clock, sleep=clock.sleep)
    return CarefulProvider("it", ask, interval=interval, cache=cache, pace=pace, sleep=clock.sleep, chance=lambda: 0.0)


def searxng(server: WebServer, clock: Clock | None = None, limits: Limits = LIMITS) -> CarefulProvider:
    return careful(Searxng(server.address, limits=limits).ask, clock or Clock())


# --- SearXNG ---


def test_searxng_results_become_sources() -> None:
    with serving(Answer(body=searxng_json(RESULTS))) as server:
        found = searxng(server).search("  when is\ntea? ", count=5)
        assert found == [
            Source("Tea times", "https://a.example/tea", "Tea is served at four.", date(2026, 5, 12), 1.0),
            Source("https://b.example/", "https://b.example/", "", None, 0.5),
        ]
        assert server.seen[0].path == "/search"
        assert server.seen[0].query == {"q": ["when is tea?"], "format": ["json"]}
        assert len(searxng(server).search("tea", count=1)) == 1


def test_searxng_finds_nothing() -> None:
    with serving(Answer(body=searxng_json([]))) as server:
        assert searxng(server).search("qzqz", count=5) == []
        assert searxng(server).search("", count=5) == []
        assert len(server.seen) == 1
        server.answers = [Answer(body=searxng_json([], unresponsive=[["google", "CAPTCHA"], ["bing", "timeout"]]))]
        with pytest.raises(SearchError, match=r"no answer from its engines \(google: CAPTCHA, bing: timeout\)"):
            searxng(server).search("tea", count=5)


def test_searxng_without_json_says_what_to_set() -> None:
    with serving(Answer(403, html_page("403 Forbidden", "no"), kind="text/html")) as server:
        with pytest.raises(SearchError, match=r"answers 403.*add json to search\.formats in its settings\.yml"):
            searxng(server).search("tea", count=5)
        assert len(server.seen) == 1


def test_too_many_requests_are_waited_for_and_failures_tried_again() -> None:
    clock, good = Clock(), Answer(body=searxng_json(RESULTS))
    with serving(Answer(429, headers={"Retry-After": "3"}), Answer(500), good) as server:
        assert len(searxng(server, clock).search("tea", count=5)) == 2
        assert len(server.seen) == 3
        assert clock.slept == [3.0, 1.0]


def test_tries_end() -> None:
    clock = Clock()
    with serving(Answer(503)) as server:
        with pytest.raises(SearchError, match="answers 503, a failure on its side"):
            searxng(server, clock).search("tea", count=5)
        assert (len(server.seen), clock.slept) == (3, [0.5, 1.0])
        server.answers = [Answer(429, headers={"Retry-After": "3600"})]
        with pytest.raises(SearchError, match="too many requests; ask less often and asks to wait 3600 s"):
            searxng(server, clock).search("tea", count=5)
        assert (len(server.seen), len(clock.slept)) == (4, 2)
        server.answers = [Answer(404)]
        with pytest.raises(SearchError, match="answers 404"):
            searxng(server, clock).search("tea", count=5)
        assert len(server.seen) == 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(body=b"{"), "sent no JSON that can be read"),
        (Answer(body=html_page("Hello", "x"), kind="text/html"), "sent no JSON that can be read, but text/html"),
        (Answer(body=b'["results"]'), "sent no list of results"),
        (Answer(body=b'{"results": {}}'), "sent no list of results"),
        (Answer(body=b'{"error": "No query"}'), "sent no results: No query"),
        (Answer(body=b" " * 1_000_000), "sent more than"),
        (Answer(302, headers={"Location": "http://169.254.169.254/"}), "not fetched"),
        (Answer(302, headers={"Location": "http://127.0.0.1:1/"}), "not fetched"),
    ],
    ids=range(8),
)
def test_searxng_answers_that_are_none(answer: Answer, reason: str) -> None:
    with serving(answer) as server:
        with pytest.raises(SearchError, match=reason):
            searxng(server).search("tea", count=5)
        assert len(server.seen) == 1


def test_searxng_that_drips_or_is_down() -> None:
    with serving(Answer(body=b"{", drip=0.02)) as server:
        hurried = Limits(connect=0.5, read=0.5, total=0.3)
        with pytest.raises(SearchError, match=r"took longer than 0\.3 s"):
            searxng(server, limits=hurried).search("tea", count=5)
        assert len(server.seen) == 3
        address = server.address
    down = careful(Searxng(address, limits=LIMITS).ask, Clock())
    with pytest.raises(SearchError, match="cannot be reached"):
        down.search("tea", count=5)


def test_searxng_results_of_any_form_are_survived() -> None:
    odd = [None, 7, "text", {}, {"url": None}, {"url": 7}, {"url": "https://c.example/", "title": 7, "content": ["x"],
           "publishedDate": {}, "score": "high"},
           {"url": "https://d.example/\u202e", "title": "\x1b]0;Red\ud800\n\u202eone\x9b", "content": "a\x08b",
            "publishedDate": "Mon, 01 Jan 99999999999999999999 00:00:00 +0000", "score": 10**400},
           {"url": "javascript:alert(1)"}, {"url": "file:///etc/passwd"}]  # fmt: skip
    body = searxng_json([*odd, *RESULTS]).replace(b"four", b"f\xffour")
    with serving(Answer(body=body)) as server:
        found = searxng(server).search("tea", count=9)
    first, *rest = [source.address for source in found]
    assert first == "https://c.example/"
    assert rest == ["https://d.example/", "https://a.example/tea", "https://b.example/"]
    assert (found[1].title, found[1].text, found[1].score, found[1].date) == ("]0;Red one", "ab", 0.0, None)
    assert found[2].text == "Tea is served at f\ufffdour."


def test_of_very_many_results_the_first_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    monkeypatch.setattr("neuroweave.chat.search.sources.alike", lambda *texts: bool(compared.append(texts)))
    many = [Source(str(at), f"https://example.com/{at}", f"text number {at}") for at in range(5_000)]
    assert careful(lambda query, count: many, Clock()).search("tea", count=5) == many[:5]
    assert len(compared) < 500


def test_a_service_may_send_anything() -> None:
    def ask(query: str, count: int) -> list[Source]:
        raise OverflowError("too \x1b[31mlarge")

    with pytest.raises(SearchError, match=r"^it sent what cannot be read \(OverflowError: too \[31mlarge\)$"):
        careful(ask, Clock()).search("tea", count=5)


def test_searxng_follows_a_redirect_of_its_own() -> None:
    with serving(by_path={
        "/search": Answer(301, headers={"Location": "/other?q=tea&format=json"}),
        "/other": Answer(body=searxng_json(RESULTS)),
    }) as server:  # fmt: skip
        assert len(searxng(server).search("tea", count=5)) == 2


@pytest.mark.parametrize(
    "address", ["", "localhost", "ftp://x", "http://", "http://x/?q=", "http://x/#a", "http://[", "http://x:y"]
)
def test_searxng_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="searxng"):
        provider_of(f"searxng:{address}")


def test_searxng_behind_a_path_and_a_password() -> None:
    with serving(Answer(body=searxng_json(RESULTS))) as server:
        address = f"http://me:pass%20word@{server.host}/searx/search"
        provider = provider_of(f"searxng:{address}", use_cache=False, pages=0)
        assert len(provider.search("tea", count=5)) == 2
        assert server.seen[0].path == "/searx/search"
        assert server.seen[0].headers["Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
        assert provider.name == f"searxng:{server.address}/searx"
        server.answers = [Answer(404)]
        with pytest.raises(SearchError) as caught:
            provider.search("other", count=5)
        assert_secret("pass", provider, caught.value)


# --- care ---


def test_answers_are_kept_for_a_while(tmp_path: Path) -> None:
    clock, asked = Clock(), []

    def ask(query: str, count: int) -> list[Source]:
        asked.append(query)
        return [Source(f"answer {len(asked)}", "https://a.example/", "text", date(2026, 5, 12), 1.5)]

    cache = SourceCache(tmp_path / "deep" / "cache.sqlite", expiry=60.0, clock=clock)
    provider = careful(ask, clock, cache=cache)
    first = provider.search("tea", count=3)
    assert provider.search(" tea ", count=3) == first
    assert asked == ["tea"]
    clock.now += 59.0
    assert provider.search("tea", count=3) == first
    clock.now += 2.0
    assert provider.search("tea", count=3)[0].title == "answer 2"
    assert provider.search("tea", count=4)[0].title == "answer 3"
    assert provider.search("Tea", count=3)[0].title == "answer 4"
    clock.now -= 1_000.0  # a clock that was set back does not keep an answer for ever
    assert provider.search("tea", count=3)[0].title == "answer 5"
    assert stat.S_IMODE(cache.file.stat().st_mode) == 0o600


def test_a_cache_that_cannot_be_used_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "broken.sqlite").write_bytes(b"no database" * 100)
    source = Source("a", "https://a.example/", "text")
    for file in (tmp_path / "a file" / "cache.sqlite", tmp_path / "broken.sqlite", tmp_path):
        cache = SourceCache(file)
        assert cache.get("x") is None
        cache.put([source], "x")
    assert SourceCache(tmp_path / "broken.sqlite").get("x") == [source]


def test_empty_answers_and_failures_are_not_kept(tmp_path: Path) -> None:
    answers: list[Any] = [[], SearchError("no"), [Source("a", "https://a.example/", "text")]]

    def ask(query: str, count: int) -> list[Source]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    provider = careful(ask, Clock(), cache=SourceCache(tmp_path / "cache.sqlite"))
    assert provider.search("tea", count=3) == []
    with pytest.raises(SearchError, match="no"):
        provider.search("tea", count=3)
    assert len(provider.search("tea", count=3)) == 1


def test_requests_keep_their_distance() -> None:
    clock = Clock()
    provider = careful(lambda query, count: [], clock, interval=2.0)
    for query in "abc":
        provider.search(query, count=1)
    clock.now += 10.0
    provider.search("d", count=1)
    assert clock.slept == [2.0, 2.0]


def test_threads_keep_their_distance_together() -> None:
    pace, times = Pace(), []

    def ask(query: str, count: int) -> list[Source]:
        times.append(time.monotonic())
        return []

    provider = CarefulProvider("it", ask, interval=0.05, pace=pace)
    threads = [threading.Thread(target=provider.search, args=(f"q{at}",), kwargs={"count": 1}) for at in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 5
    assert max(times) - min(times) >= 4 * 0.05 - 0.02


def test_only_what_may_pass_is_tried_again() -> None:
    clock, calls = Clock(), []

    def ask(query: str, count: int) -> list[Source]:
        calls.append(query)
        raise (TransientError("busy") if query == "busy" else SearchError("wrong"))

    provider = careful(ask, clock)
    for query, tries in (("busy", 3), ("wrong", 1)):
        calls.clear()
        with pytest.raises(SearchError, match=query):
            provider.search(query, count=1)
        assert len(calls) == tries


# --- services with a key ---

KEY = "tvly-0123456789-do-not-show"


def service(make: Callable[..., Any], server: WebServer, *others: WebServer) -> CarefulProvider:
    policy = AddressPolicy(frozenset(each.host for each in (server, *others)))
    client = WebClient(policy, limits=LIMITS)
    return careful(make(SecretStr(KEY), client=client, address=f"{server.address}/api").ask, Clock())


def assert_secret(secret: str, *shown: object) -> None:
    """Not in what is shown, nor in the errors that an error came from."""
    for each in shown:
        texts, error = [repr(each), str(each)], each
        while isinstance(error, BaseException):
            texts += [repr(error), *traceback.format_exception_only(error)]
            error = error.__cause__ or error.__context__
        assert not any(secret in text for text in texts)


TAVILY = {
    "query": "tea", "answer": None, "images": [], "response_time": 1.0,
    "results": [
        {"title": "Tea", "url": "https://a.example/", "content": "At four.", "score": 0.9, "raw_content": None},
        {"title": None, "url": "https://b.example/", "content": "At five.", "score": 0.5,
         "published_date": "Tue, 12 May 2026 09:00:00 GMT"},
        {"title": "no address"}, 7,
    ],
}  # fmt: skip
BRAVE = {
    "type": "search",
    "web": {"type": "search", "results": [
        {"title": "Tea", "url": "https://a.example/", "description": "At four.", "page_age": "2026-05-12T09:00:00",
         "extra_snippets": ["In the kitchen."]},
        {"title": "", "url": "https://b.example/", "description": None}, {"title": "no address"}, None,
    ]},
}  # fmt: skip


def test_tavily() -> None:
    with serving(Answer(body=json.dumps(TAVILY).encode())) as server:
        found = service(Tavily, server).search("tea", count=5)
        assert found == [
            Source("Tea", "https://a.example/", "At four.", None, 0.9),
            Source("https://b.example/", "https://b.example/", "At five.", date(2026, 5, 12), 0.5),
        ]
        seen = server.seen[0]
        assert (seen.method, seen.path, seen.headers["Authorization"]) == ("POST", "/api", f"Bearer {KEY}")
        assert json.loads(seen.body) == {"query": "tea", "max_results": 10, "search_depth": "basic"}


def test_brave() -> None:
    with serving(Answer(body=json.dumps(BRAVE).encode())) as server:
        found = service(Brave, server).search("tea " * 90, count=50)
        assert found == [
            Source("Tea", "https://a.example/", "At four.\nIn the kitchen.", date(2026, 5, 12)),
            Source("https://b.example/", "https://b.example/", ""),
        ]
        seen = server.seen[0]
        assert (seen.method, seen.headers["X-Subscription-Token"]) == ("GET", KEY)
        assert (seen.query["count"], len(seen.query["q"][0].split())) == (["20"], 50)
        server.answers = [Answer(body=b'{"type": "search"}')]
        assert service(Brave, server).search("qzqz", count=5) == []


@pytest.mark.parametrize(("make", "variable"), [(Tavily, "TAVILY_API_KEY"), (Brave, "BRAVE_API_KEY")])
def test_keys_are_shown_nowhere(
    make: Callable[..., Any], variable: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(Answer(401, b'{"detail": {"error": "bad key"}}')) as server, serving(Answer(body=b"{}")) as other:
        with pytest.raises(SearchError, match=f"answers 401; is the key in {variable} right") as caught:
            service(make, server).search("tea", count=5)
        assert_secret(KEY, caught.value, service(make, server))
        for answer in (Answer(500), Answer(302, headers={"Location": other.address}), Answer(body=b"{"), Answer(432)):
            server.answers = [answer]
            with pytest.raises(SearchError) as caught:
                service(make, server, other).search("tea", count=5)
            assert_secret(KEY, caught.value)
        assert not other.seen  # a redirect is not followed with a key
        server.answers = [Answer(body=json.dumps(TAVILY | BRAVE).encode())]
        client = WebClient(AddressPolicy(frozenset([server.host])), limits=LIMITS)
        asked = make(SecretStr(KEY), client=client, address=server.address)
        provider = careful(asked.ask, Clock(), cache=SourceCache(tmp_path / "cache.sqlite"))
        assert len(provider.search("tea", count=5)) == 2
        assert KEY.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert_secret(KEY, asked, vars(asked), provider, vars(provider))
    with pytest.raises(SearchError) as caught:  # nobody is there any more
        service(make, server).search("tea", count=5)
    assert_secret(KEY, caught.value, caplog.text)


def test_keys_come_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, variable in (("tavily", "TAVILY_API_KEY"), ("brave", "BRAVE_API_KEY")):
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(ValueError, match=f"{kind} needs a key; set the environment variable {variable}"):
            provider_of(kind)
        for bad in ("two words", "caf\u00e9"):
            monkeypatch.setenv(variable, bad)
            with pytest.raises(ValueError, match=f"{variable} does not hold a key") as caught:
                provider_of(kind)
            assert_secret(bad, caught.value)
        monkeypatch.setenv(variable, f" {KEY}\n")
        provider = provider_of(kind)
        assert provider.name == kind
        assert_secret(KEY, provider)
        with pytest.raises(ValueError, match="not how"):
            provider_of(f"{kind}:{KEY}")


# --- DuckDuckGo ---


@dataclass
class Engine:
    """What ddgs's engine does, without its network."""

    answer: Any

    def search(self, query: str) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Result:
    title: str
    href: str
    body: str


def test_duckduckgo_tells_nothing_found_from_refused() -> None:
    results = [
        Result("Tea", "https://a.example/", "At four."),
        Result("", "https://b.example/", ""),
        Result("x", "", ""),
    ]
    assert DuckDuckGo(engine=Engine(results)).ask("tea", 5) == [
        Source("Tea", "https://a.example/", "At four."),
        Source("https://b.example/", "https://b.example/", ""),
    ]
    assert DuckDuckGo(engine=Engine([])).ask("tea", 5) == []
    for answer, reason in (
        (None, "it takes this machine for a robot"),
        (RatelimitException("202"), "too many requests"),
        (TimeoutException("slow"), "does not answer within 10 s"),
        (DDGSException("no route"), r"cannot be reached \(no route\)"),
    ):
        with pytest.raises(TransientError, match=reason):
            DuckDuckGo(engine=Engine(answer)).ask("tea", 5)
    with pytest.raises(SearchError, match="a page that cannot be read"):
        DuckDuckGo(engine=Engine(IndexError("list"))).ask("tea", 5)


def test_the_engine_of_ddgs_is_what_is_expected_of_it() -> None:
    """Its page read over a socket: results, nothing, and a refusal, which it tells apart by None."""
    page = (
        "<html><body><div class='result__body'><h2><a>Tea</a></h2><a href='https://a.example/'>At four.</a></div>"
        "</body></html>"
    )
    from neuroweave.chat.search.duckduckgo import made_engine

    answers = (
        Answer(body=page.encode(), kind="text/html"),
        Answer(body=b"<html><body></body></html>", kind="text/html"),
        Answer(202),
    )
    with serving(*answers) as server:
        engine: Any = made_engine(None)
        engine.search_url = server.address
        provider = DuckDuckGo(engine=engine)
        assert [source.address for source in provider.ask("tea", 5)] == ["https://a.example/"]
        assert provider.ask("tea", 5) == []
        with pytest.raises(TransientError, match="robot"):
            provider.ask("tea", 5)


# --- what a user writes ---


@pytest.mark.parametrize(
    "spec",
    ["", "google", "local", "local:", "searxng", "searxng:", "duckduckgo:x", "LOCAL:x", "http://localhost:8888", ":"],
)
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(ValueError, match="give local:DIR, searxng:URL, duckduckgo, tavily or brave"):
        provider_of(spec)


@pytest.mark.parametrize("proxy", ["nonsense", "ftp://host:1", "http://", "http://u:secret@host:99999", "socks5://h:1"])
def test_proxies_that_are_none(proxy: str) -> None:
    for spec in ("duckduckgo", "searxng:http://localhost:9"):
        with pytest.raises(ValueError, match="give one of these") as caught:
            provider_of(spec, proxy=proxy)
        assert "secret" not in str(caught.value)
    provider_of("searxng:http://localhost:9", proxy="http://user:secret@proxy.lan:3128")


def test_a_password_in_a_wrong_spec_is_not_shown() -> None:
    with pytest.raises(ValueError, match="not a search provider") as caught:
        provider_of("searx:http://me:secret@localhost/")
    assert_secret("secret", caught.value)


def test_specs(tmp_path: Path) -> None:
    assert provider_of(f"local:{tmp_path}").name == f"local:{tmp_path}"
    assert provider_of("searxng:http://localhost:8888/").name == "searxng:http://localhost:8888"
    assert provider_of(" duckduckgo ").name == "duckduckgo"


def test_who_may_not_know_a_folder_is_told_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "notes")
    for spec in ("local:.", f"local:{tmp_path}/notes", "local:../notes"):
        discreet = DiscreetProvider(provider_of(spec))
        assert discreet.name == "local:notes"
        with pytest.raises(SearchError, match=r"^notes: nothing to search; neuroweave index tells why$"):
            discreet.search("tea", count=1)


def test_pages_of_results_are_read_and_only_where_allowed(tmp_path: Path) -> None:
    text = "The page says much more about tea than its snippet. " * 4
    with serving(Answer(body=html_page("Tea", text), kind="text/html")) as site:
        results = searxng_json([searxng_result(f"{site.address}/tea", "Tea", "snippet")])
        with serving(Answer(body=results)) as server:
            spec, cache = f"searxng:{server.address}", SourceCache(tmp_path / "cache.sqlite")
            closed = provider_of(spec, use_cache=False)
            assert closed.search("tea", count=3)[0].text == "snippet"
            assert not site.seen
            opened = provider_of(spec, allow_hosts=[site.host], cache=cache)
            assert opened.search("tea", count=3)[0].text.startswith("Tea\n\nThe page says much more")
            assert opened.search("tea", count=3)[0].text.startswith("Tea\n\nThe page says much more")
            assert len(site.seen) == 1
            assert opened.name == spec


def test_nothing_is_written_before_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path / "cache"))
    provider_of("searxng:http://localhost:8888")
    provider_of(f"local:{tmp_path}")
    assert os.listdir(tmp_path) == []
