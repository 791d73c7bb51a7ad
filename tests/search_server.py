"""A web server that answers as a test says, over real sockets: broken, slow, huge and hostile answers included.

`searxng_json` writes what SearXNG's JSON API writes (searx/webutils.py, `get_json_response`; searx 1.1 sends the same
fields without `priority`, `img_src` and `thumbnail`).
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Answer:
    """`drip`: seconds between single bytes of the body, without end. `length`: what is claimed of the body."""

    status: int = 200
    body: bytes = b""
    kind: str | None = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    drip: float = 0.0
    length: int | None = None


@dataclass
class Seen:
    """A request that came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class WebServer(ThreadingHTTPServer):
    """Gives `answers` one after the other, the last again and again. `by_path` goes before."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *answers: Answer, by_path: Mapping[str, Answer] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.by_path = dict(by_path or {})
        self.seen: list[Seen] = []
        self.names: list[str | None] = []  # that TLS clients asked for
        self.ended = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    def next_answer(self, path: str) -> Answer:
        if path in self.by_path:
            return self.by_path[path]
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        parts = urlsplit(self.path)
        body = self.rfile.read(length)
        self.server.seen.append(Seen(self.command, parts.path, parse_qs(parts.query), dict(self.headers), body))
        answer = self.server.next_answer(parts.path)
        self.send_response(answer.status)
        if answer.kind is not None:
            self.send_header("Content-Type", answer.kind)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if not answer.drip:
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
        self.send_header("Connection", "close")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(answer.body)
            while answer.drip and not self.server.ended.is_set():
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(answer.drip)
        self.close_connection = True

    do_POST = do_GET  # noqa: N815  the base class looks for this name

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(*answers: Answer, by_path: Mapping[str, Answer] | None = None, tls: str = "") -> Iterator[WebServer]:
    """A running server; `tls`: the file with its key and certificate."""
    server = WebServer(*answers, by_path=by_path)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
        context.sni_callback = lambda _socket, name, _context: server.names.append(name)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def searxng_result(address: str, title: str, content: str | None, **more: Any) -> dict[str, Any]:
    parts = urlsplit(address)
    return {
        "url": address, "title": title, "content": content, "engine": "docs", "template": "default.html",
        "parsed_url": [parts.scheme, parts.netloc, parts.path, "", parts.query, parts.fragment], "img_src": "",
        "thumbnail": None, "priority": "", "engines": ["docs"], "positions": [1], "score": 1.0, "category": "general",
        "publishedDate": None, **more,
    }  # fmt: skip


def searxng_json(results: Sequence[dict[str, Any]], *, unresponsive: Sequence[Sequence[str]] = ()) -> bytes:
    data = {
        "query": "q", "number_of_results": len(results), "results": list(results), "answers": [], "corrections": [],
        "infoboxes": [], "suggestions": ["other words"], "unresponsive_engines": [list(each) for each in unresponsive],
    }  # fmt: skip
    return json.dumps(data).encode()


def html_page(title: str, text: str) -> bytes:
    head = f"<html><head><title>{title}</title></head>"
    return f"{head}<body><main><h1>{title}</h1><p>{text}</p></main></body></html>".encode()
