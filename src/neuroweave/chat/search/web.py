"""Requests to the web: checked addresses, limits on time and size, errors that say what to do."""

from __future__ import annotations

import functools
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore2
import httpx2

from neuroweave import __version__
from neuroweave.chat.search.addresses import AddressPolicy, checked_url, shown
from neuroweave.chat.search.dialling import CheckedBackend, Deadline, PoolTransport, Resolve, system_addresses
from neuroweave.chat.search.sources import SearchError, TransientError

AGENT = f"Mozilla/5.0 (compatible; neuroweave/{__version__})"
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another one in a while


@dataclass(frozen=True)
class Limits:
    """`connect`, `read`, `total`: seconds, the last for all of a request with its redirects. `body`: bytes, also after
    decompression."""

    connect: float = 5.0
    read: float = 10.0
    total: float = 20.0
    body: int = 4 << 20
    redirects: int = 5


PUBLIC = AddressPolicy()
LIMITS = Limits()


@dataclass(frozen=True)
class Reply:
    """`address`: where it came from in the end."""

    address: str
    status: int
    media_type: str
    charset: str | None
    body: bytes = field(repr=False)
    retry_after: float | None = None

    def json(self, who: str) -> Any:
        """Raises SearchError where the body is no JSON. Broken UTF-8 in it is replaced."""
        try:
            return json.loads(self.body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            kind = self.media_type or "something unnamed"
            raise SearchError(f"{who} sent no JSON that can be read, but {kind} of {len(self.body)} bytes") from None


class WebClient:
    """Sends requests, each on a connection of its own. Threads may share it.

    `proxy`: the address of one to go through; nothing is read from the environment. It resolves the names, so that of
    the address rules only those for names and literals hold.
    """

    def __init__(
        self,
        policy: AddressPolicy = PUBLIC,
        *,
        limits: Limits = LIMITS,
        proxy: str | None = None,
        resolve: Resolve = system_addresses,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.policy = policy
        self.limits = limits
        self._proxy = httpx2.Proxy(proxy) if proxy else None
        self._resolve = resolve
        self._given_trust = trust

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        return self._given_trust or httpx2.create_ssl_context()

    def send(
        self,
        address: str,
        *,
        method: str = "GET",
        parameters: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: Mapping[str, Any] | None = None,
        follow: bool = True,
    ) -> Reply:
        """The reply to one request, whatever its status. `content`: sent as JSON.

        Redirects are followed with every address checked, unless `follow` is off; headers go to the first host only.
        Raises SearchError, and TransientError for what may pass.
        """
        url = checked_url(address, self.policy)
        if parameters:
            url = url.copy_merge_params(dict(parameters))
        deadline = Deadline(self.limits.total)
        first, own = url, dict(headers or {})
        for _ in range(self.limits.redirects + 1):
            reply, location = self._once(method, url, own if same_owner(first, url) else {}, content, deadline)
            if location is None or not follow:
                return reply
            try:
                target = str(url.join(location))
            except (httpx2.InvalidURL, ValueError):
                raise SearchError(f"{shown(address)} leads to {shown(location)!r}, which is no address") from None
            url = checked_url(target, self.policy)
            if reply.status in (301, 302, 303):
                method, content = "GET", None
        raise SearchError(f"{shown(address)}: more than {self.limits.redirects} redirects")

    def _once(
        self,
        method: str,
        url: httpx2.URL,
        headers: dict[str, str],
        content: Mapping[str, Any] | None,
        deadline: Deadline,
    ) -> tuple[Reply, str | None]:
        where = shown(str(url))
        waits = httpx2.Timeout(self.limits.read, connect=self.limits.connect)
        try:
            with (
                httpx2.Client(transport=PoolTransport(self._pool(deadline)), trust_env=False, timeout=waits) as client,
                client.stream(
                    method, url, json=content,
                    headers={"User-Agent": AGENT, "Accept-Encoding": "gzip, deflate", **headers},
                ) as response,
            ):  # fmt: skip
                location = response.headers.get("location") if response.status_code in REDIRECTS else None
                body = b"" if location else self._body(response, where)
                return self._reply(url, response, body), location
        except TransientError as error:
            message = str(error) if str(error).startswith(url.host) else f"{where} {error}"
            raise TransientError(message) from None
        except (httpcore2.TimeoutException, httpx2.TimeoutException):
            late = f"took longer than {deadline.seconds:.3g} s" if deadline.over else "does not answer in time"
            raise TransientError(f"{where} {late}") from None
        except (httpcore2.NetworkError, httpx2.NetworkError, httpcore2.ProxyError, httpx2.ProxyError) as error:
            raise TransientError(f"{where} cannot be reached ({reason_of(error)})") from None
        except (httpcore2.ProtocolError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise SearchError(f"{where} sent what is not HTTP ({reason_of(error)})") from None

    def _pool(self, deadline: Deadline) -> httpcore2.ConnectionPool:
        if self._proxy is None:
            backend = CheckedBackend(self.policy, deadline, resolve=self._resolve)
            return httpcore2.ConnectionPool(ssl_context=self._trust, max_connections=1, network_backend=backend)
        proxy = self._proxy.url
        return httpcore2.HTTPProxy(
            proxy_url=httpcore2.URL(
                scheme=proxy.raw_scheme, host=proxy.raw_host, port=proxy.port, target=proxy.raw_path
            ),
            proxy_auth=self._proxy.raw_auth,
            ssl_context=self._trust,
            network_backend=CheckedBackend(None, deadline, resolve=self._resolve),
        )

    def _body(self, response: httpx2.Response, where: str) -> bytes:
        most = self.limits.body
        if "," in response.headers.get("content-encoding", ""):
            raise SearchError(f"{where} sent a body that is compressed more than once")
        parts, size = [], 0
        for part in response.iter_bytes():  # decompressed in pieces of bounded size
            size += len(part)
            if max(size, response.num_bytes_downloaded) > most:
                raise SearchError(f"{where} sent more than {most / 1e6:.1f} MB")
            parts.append(part)
        return b"".join(parts)

    def _reply(self, url: httpx2.URL, response: httpx2.Response, body: bytes) -> Reply:
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        charset = response.charset_encoding
        asked = retry_seconds(response.headers.get("retry-after"))
        return Reply(str(url), response.status_code, media_type, charset, body, asked)


def same_owner(first: httpx2.URL, url: httpx2.URL) -> bool:
    """Whether what was meant for `first` may go to `url`: the same host and port, or its TLS port."""
    if url.host != first.host:
        return False
    return (url.scheme, url.port) == (first.scheme, first.port) or (url.scheme == "https" and url.port is None)


def reason_of(error: Exception) -> str:
    """An error in a few words; what came over the wire does not get into messages unbounded."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def retry_seconds(value: str | None, *, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as a date."""
    if not value:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip())
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError, OverflowError):
        return None


def raise_for_status(reply: Reply, who: str, *, key: str | None = None) -> None:
    """Raise SearchError for what is no answer. `key`: the environment variable of the key that was sent."""
    status = reply.status
    if status in PASSING:
        asked = f" and asks to wait {reply.retry_after:.0f} s" if reply.retry_after else ""
        why = "too many requests; ask less often" if status == 429 else "a failure on its side"
        raise TransientError(f"{who} answers {status}, {why}{asked}", retry_after=reply.retry_after)
    if key and status in (401, 403, 422):
        raise SearchError(f"{who} answers {status}; is the key in {key} right?")
    if status in REDIRECTS:
        raise SearchError(f"{who} answers {status}, a redirect, which is not followed; give the address it has now")
    if not 200 <= status < 300:
        raise SearchError(f"{who} answers {status}")
