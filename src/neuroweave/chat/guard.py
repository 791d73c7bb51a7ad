"""What stands before the server's endpoints: who may ask, how much, how long it may take to say it."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

SPILL = 4 << 20  # bytes beyond the limit that are read all the same: who is still sending hears no answer
OPEN_PATHS = ("/", "/health", "/static/")  # the page has to load before it can ask for a key


HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # an upgrade brings another page
)


@dataclass(frozen=True)
class Limits:
    """`body_bytes`, `body_seconds`: of a request's body. `requests`: answered or waiting at once. `new_tokens`: of one
    answer, also where a request names none. `texts`: of one request."""

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    requests: int = 64
    new_tokens: int = 4096
    texts: int = 256


class ServerError(Exception):
    """An answer that is an error, in the form that OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class Guard:
    """An ASGI application around another: reads a body whole, within limits, before the other sees the request.

    `hosts`: the names under which a server on loopback may be called, so that no page of the web can reach it through
    a name of its own; None: any.
    """

    def __init__(
        self, app: Any, *, limits: Limits, api_key: str | None, hosts: frozenset[str] | None,
        end: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.app, self.limits, self.api_key, self.hosts, self.end = app, limits, api_key, hosts, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
        except ServerError as error:
            return await refuse(send, error)
        sent = False

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        async def replay() -> Any:
            nonlocal sent
            if sent:
                return await receive()  # that the client has gone
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, sending)

    def _check(self, scope: Any, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host[: host.rindex(":")] if ":" in host and not host.endswith("]") else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise ServerError(403, f"host {host!r} is not this server; call it as {', '.join(sorted(self.hosts))}")
        if self.api_key is None or any(
            scope["path"] == path or (path.endswith("/") and path != "/" and scope["path"].startswith(path))
            for path in OPEN_PATHS
        ):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise ServerError(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Any, headers: dict[str, str], receive: Any) -> bytes:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ServerError(415, "the body has to be JSON; send Content-Type: application/json")
        most = self.limits.body_bytes
        too_much = ServerError(413, f"the body is longer than {most:,} bytes")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > most + SPILL:
            raise too_much
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ServerError(400, "the client went away")
                    body += message.get("body", b"")
                    ended = not message.get("more_body")
                    if len(body) > most and (ended or len(body) > most + SPILL):
                        raise too_much
                    if ended:
                        return bytes(body)
        except TimeoutError as error:
            raise ServerError(408, f"the body did not come within {self.limits.body_seconds:g} s") from error


async def refuse(send: Any, error: ServerError) -> None:
    content = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(b"connection", b"close")]  # what is left of the body is not read
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
