"""Requests and pages over real sockets: what is refused, limited and survived, and what address is dialled."""

from __future__ import annotations

import gzip
import socket
import ssl
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from search_server import Answer, WebServer, free_port, html_page, serving

from neuroweave.chat.search import Fetcher, SearchError, Source, with_page_text
from neuroweave.chat.search.addresses import AddressPolicy
from neuroweave.chat.search.cache import SourceCache
from neuroweave.chat.search.careful import Pace
from neuroweave.chat.search.sources import TransientError
from neuroweave.chat.search.web import Limits, WebClient, retry_seconds

TLS = Path(__file__).parent / "data" / "search" / "example.test.pem"
LIMITS = Limits(connect=2.0, read=2.0, total=4.0, body=100_000)
HURRIED = Limits(connect=0.5, read=0.5, total=0.6, body=100_000)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with serving(Answer(body=b"{}")) as running:
        yield running


def client(server: WebServer, limits: Limits = LIMITS) -> WebClient:
    return WebClient(AddressPolicy(frozenset([server.host])), limits=limits)


def fetcher(*servers: WebServer, limits: Limits = LIMITS, cache: SourceCache | None = None) -> Fetcher:
    return Fetcher(allow_hosts=[each.host for each in servers], limits=limits, cache=cache, pace=Pace(sleep=no_sleep))


def no_sleep(seconds: float) -> None:
    pass


def page(text: str, title: str = "A page", **more: str) -> Answer:
    return Answer(body=html_page(title, text), kind="text/html; charset=utf-8", headers=more)


def redirect(to: str, status: int = 302) -> Answer:
    return Answer(status, b"", headers={"Location": to})


# --- addresses are judged where they are dialled ---


def test_this_machine_is_not_reached(server: WebServer) -> None:
    for address in (server.address, f"http://localhost:{server.port}/", f"http://[::1]:{server.port}/"):
        with pytest.raises(SearchError, match="not fetched"):
            WebClient(AddressPolicy(any_port=True)).send(address)
    assert not server.seen


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_private_places_are_refused(server: WebServer, status: int) -> None:
    with serving(page("secret")) as private:
        for target in (
            private.address,
            f"http://localhost:{private.port}/",
            "http://169.254.169.254/latest/meta-data/",
            "http://2130706433/",
            f"//127.0.0.1:{private.port}/",
            "file:///etc/passwd",
            "http://user:secret@example.com/",
        ):
            server.answers = [redirect(target, status)]
            with pytest.raises(SearchError, match="not fetched") as caught:
                client(server).send(server.address)
            assert "secret" not in str(caught.value)
        assert not private.seen


def test_a_name_that_leads_home_is_refused(server: WebServer) -> None:
    """Every address that a name has is judged; the public ones among them are what is dialled."""
    for addresses in (["127.0.0.1"], ["10.0.0.1", "::1"], ["::ffff:127.0.0.1"], ["fe80::1%lo"]):
        cautious = WebClient(AddressPolicy(any_port=True), resolve=lambda host, port, found=addresses: found)
        with pytest.raises(SearchError, match=r"site\.test: not fetched: its address is"):
            cautious.send(f"http://site.test:{server.port}/")
    assert not server.seen


def test_a_resolver_that_changes_its_mind_gains_nothing(server: WebServer) -> None:
    """The public address of the first answer is dialled, in vain; the second answer is never asked for."""
    answers = [["192.0.0.9"], ["127.0.0.1"], ["127.0.0.1"]]  # the first is global, and nobody is there
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    rebinding = WebClient(AddressPolicy(any_port=True), limits=Limits(connect=0.3, total=0.5), resolve=resolve)
    with pytest.raises(TransientError):
        rebinding.send(f"http://site.test:{server.port}/")
    assert asked == ["site.test"]
    assert not server.seen


def test_the_judged_address_is_dialled_under_the_name(server: WebServer) -> None:
    named = WebClient(AddressPolicy(frozenset([f"site.test:{server.port}"])), resolve=lambda host, port: ["127.0.0.1"])
    assert named.send(f"http://site.test:{server.port}/a?b=c").status == 200
    assert server.seen[0].headers["Host"] == f"site.test:{server.port}"
    assert (server.seen[0].path, server.seen[0].query) == ("/a", {"b": ["c"]})


def test_tls_keeps_the_name_and_checks_it() -> None:
    trust = ssl.create_default_context(cafile=str(TLS))
    with serving(Answer(body=b"[]"), tls=str(TLS)) as server:
        for name, fits in (("example.test", True), ("other.test", False)):
            policy = AddressPolicy(frozenset([f"{name}:{server.port}"]))
            secure = WebClient(policy, limits=LIMITS, resolve=lambda host, port: ["127.0.0.1"], trust=trust)
            if fits:
                assert secure.send(f"https://{name}:{server.port}/").json("it") == []
            else:
                with pytest.raises(TransientError, match="cannot be reached"):
                    secure.send(f"https://{name}:{server.port}/")
        assert server.names == ["example.test", "other.test"]


def test_proxies_of_the_environment_are_not_used(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(page("through the proxy")) as proxy:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.address)
        client(server).send(server.address)
        assert (len(server.seen), len(proxy.seen)) == (1, 0)
        told = WebClient(limits=LIMITS, proxy=proxy.address)
        assert b"through the proxy" in told.send("http://example.com/a").body
        assert len(proxy.seen) == 1
        with pytest.raises(SearchError, match="not fetched"):
            told.send("http://127.0.0.1/")


# --- limits ---


def test_redirects_end() -> None:
    with serving(redirect("/again")) as server:
        with pytest.raises(SearchError, match="more than 5 redirects"):
            client(server).send(server.address)
        assert len(server.seen) == 6


def test_secrets_go_to_the_first_host_only(server: WebServer) -> None:
    with serving(Answer(body=b"{}")) as other:
        server.answers = [redirect("/here"), redirect(f"{other.address}/there")]
        both = WebClient(AddressPolicy(frozenset([server.host, other.host])), limits=LIMITS)
        both.send(server.address, method="POST", headers={"Authorization": "secret"}, content={"a": 1})
        assert [seen.headers.get("Authorization") for seen in server.seen] == ["secret", "secret"]
        assert [seen.method for seen in server.seen] == ["POST", "GET"]
        assert "secret" not in str(vars(other.seen[0]))
        server.answers = [redirect(f"{other.address}/there")]
        assert both.send(server.address, follow=False).status == 302
        assert len(other.seen) == 1


@pytest.mark.parametrize("claimed", [None, 5, 10**12])
def test_huge_bodies_are_cut_off(server: WebServer, claimed: int | None) -> None:
    server.answers = [Answer(body=b"x" * 3_000_000, length=claimed, kind="text/plain")]
    if claimed == 5:  # what is beyond the claim is never read
        assert client(server).send(server.address).body == b"xxxxx"
        return
    with pytest.raises(SearchError, match=r"sent more than 0\.1 MB"):
        client(server).send(server.address)


def test_bombs_do_not_go_off(server: WebServer) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < LIMITS.body
    server.answers = [Answer(body=bomb, headers={"Content-Encoding": "gzip"})]
    with pytest.raises(SearchError, match="sent more than"):
        client(server).send(server.address)
    server.answers = [Answer(body=gzip.compress(bomb), headers={"Content-Encoding": "gzip, gzip"})]
    with pytest.raises(SearchError, match="compressed more than once"):
        client(server).send(server.address)
    server.answers = [Answer(body=gzip.compress(b'{"a": 1}'), headers={"Content-Encoding": "gzip"})]
    assert client(server).send(server.address).json("it") == {"a": 1}
    server.answers = [Answer(body=b"this is not gzip", headers={"Content-Encoding": "gzip"})]
    with pytest.raises(SearchError, match="not HTTP"):
        client(server).send(server.address)


def test_slow_drips_end_at_the_deadline(server: WebServer) -> None:
    """Each byte comes well within the read timeout; all of them never would."""
    server.answers = [Answer(body=b"[", drip=0.02)]
    start = time.monotonic()
    with pytest.raises(TransientError, match=r"took longer than 0\.6 s"):
        client(server, HURRIED).send(server.address)
    assert time.monotonic() - start < 30


def test_slow_headers_and_silence_end_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        waiting = WebClient(AddressPolicy(frozenset([f"127.0.0.1:{port}"])), limits=HURRIED)
        with pytest.raises(TransientError, match=r"does not answer in time|took longer"):
            waiting.send(f"http://127.0.0.1:{port}/")


def test_a_slow_resolver_is_left_behind() -> None:
    def resolve(host: str, port: int) -> list[str]:
        time.sleep(3)
        return ["127.0.0.1"]

    with pytest.raises(TransientError, match="looking up its address"):
        WebClient(limits=HURRIED, resolve=resolve).send("http://site.test/")


def test_broken_answers_are_said_to_be_broken(server: WebServer) -> None:
    nobody = free_port()
    with pytest.raises(TransientError, match="cannot be reached"):
        WebClient(AddressPolicy(frozenset([f"127.0.0.1:{nobody}"]))).send(f"http://127.0.0.1:{nobody}/")
    server.answers = [Answer(body=b"short", length=500)]
    with pytest.raises(SearchError, match="not HTTP"):
        client(server).send(server.address)
    server.answers = [Answer(body=b'{"a": "caf\xe9 \xff"}')]
    assert client(server).send(server.address).json("it") == {"a": "caf\ufffd \ufffd"}
    for body in (b"{", b"", b"<html>", b"[" * 100_000):
        server.answers = [Answer(body=body, kind="text/html")]
        with pytest.raises(SearchError, match="it sent no JSON that can be read, but text/html of"):
            client(server).send(server.address).json("it")


def test_waits_that_are_asked_for() -> None:
    assert retry_seconds("7") == 7
    assert retry_seconds("Sun, 06 Nov 1994 08:49:37 GMT", now=784111772.0) == 5
    assert retry_seconds("Sun, 06 Nov 1994 08:49:37 GMT", now=784111782.0) == 0
    assert [retry_seconds(value) for value in (None, "", "soon", "-1", "1.5", "\u00b2")] == [None] * 6


# --- pages ---


def test_a_page_comes_with_title_text_and_date(server: WebServer) -> None:
    body = (
        "<html><head><title>Tea - A site</title><meta property='article:published_time' content='2026-03-04T10:00:00Z'>"
        "</head><body><nav><a href='/'>Home</a> <a href='/b'>About us</a></nav><main><h1>Tea</h1>"
        "<p>Tea is served at <b>four</b>.</p></main><footer>Imprint</footer></body></html>"
    )
    server.by_path = {"/new": Answer(body=body.encode(), kind="text/html")}
    server.answers = [redirect("/new", 301)]
    found = fetcher(server).fetch(f"{server.address}/old")
    assert (found.title, found.address) == ("Tea", f"{server.address}/new")
    assert found.text == "Tea\n\nTea is served at four."
    assert str(found.date) == "2026-03-04"


def test_kinds_of_pages(server: WebServer) -> None:
    read = fetcher(server)
    server.by_path = {
        "/text": Answer(body="gr\u00fcn".encode("latin-1"), kind="text/plain; charset=latin-1"),
        "/untyped": Answer(body=html_page("T", "hello"), kind=None),
        "/image": Answer(body=b"\x89PNG", kind="image/png"),
        "/nothing": Answer(body=b"abc", kind=None),
        "/binary": Answer(body=b"\0\1\2\3", kind="text/plain"),
        "/empty": Answer(body=b"", kind="text/html"),
        "/gone": Answer(404, html_page("T", "not here"), kind="text/html"),
        "/pdf": Answer(body=b"%PDF-1.7 broken", kind="application/octet-stream"),
    }
    assert read.fetch(f"{server.address}/text").text == "gr\u00fcn"
    assert read.fetch(f"{server.address}/untyped").text == "T\n\nhello"
    for path, reason in {
        "/image": "is image/png; only HTML, plain text, Markdown and PDF are read",
        "/nothing": "is of no type",
        "/binary": "a binary file",
        "/empty": "no text in it",
        "/gone": "answers 404",
        "/pdf": "a broken PDF",
    }.items():
        with pytest.raises(SearchError, match=reason):
            read.fetch(f"{server.address}{path}")


def test_pages_take_the_place_of_snippets_and_failures_keep_them(server: WebServer) -> None:
    text = "A long text of the page that says much more than the snippet did. " * 3
    server.by_path = {
        "/good": page(text),
        "/short": page("x", title="s"),
        "/slow": Answer(body=b"<html>", kind="text/html", drip=0.05),
        "/broken": Answer(500, b""),
        "/jump": redirect("http://169.254.169.254/"),
    }
    sources = [
        Source("Good", f"{server.address}/good", "snippet", score=2.0),
        Source("Slow", f"{server.address}/slow", "slow snippet"),
        Source("Broken", f"{server.address}/broken", "broken snippet"),
        Source("Local", "a/file.txt", "local text"),
        Source("Jump", f"{server.address}/jump", "jump snippet"),
        Source("Private", "http://127.0.0.1:1/", "private snippet"),
        Source("Short", f"{server.address}/short", "this snippet says more than the page"),
        Source("Beyond", f"{server.address}/good?2", "beyond the most"),
    ]
    start = time.monotonic()
    found = with_page_text(sources, fetcher=fetcher(server), most=6, seconds=2.5)
    assert time.monotonic() - start < 30
    assert [source.text for source in found[1:]] == [source.text for source in sources[1:]]
    assert found[0].text == f"A page\n\n{text.strip()}"
    assert (found[0].title, found[0].score) == ("Good", 2.0)
    assert with_page_text([], fetcher=fetcher(server)) == []


def test_a_page_that_no_parser_ends_on_costs_its_time_and_no_more(server: WebServer) -> None:
    """Nesting takes resiliparse quadratic time; the other pages come all the same."""
    deep = b"<html><body>" + b"<div>x" * 300_000
    server.by_path = {"/deep": Answer(body=deep, kind="text/html"), "/good": page("good text " * 20)}
    sources = [Source("Deep", f"{server.address}/deep", "deep snippet"), Source("Good", f"{server.address}/good", "s")]
    limits = Limits(connect=2.0, read=2.0, total=4.0, body=3_000_000)
    found = with_page_text(sources, fetcher=fetcher(server, limits=limits), seconds=2.5)
    assert found[0].text == "deep snippet"
    assert found[1].text.startswith("A page\n\ngood text")


def test_pages_are_kept(server: WebServer, tmp_path: Path) -> None:
    server.answers = [page("first")]
    read = fetcher(server, cache=SourceCache(tmp_path / "cache.sqlite"))
    first = read.fetch(server.address)
    server.answers = [page("second")]
    assert read.fetch(server.address) == first
    assert len(server.seen) == 1


def test_zlib_bodies_too(server: WebServer) -> None:
    server.answers = [Answer(body=zlib.compress(b"[1]"), headers={"Content-Encoding": "deflate"})]
    assert client(server).send(server.address).json("it") == [1]
