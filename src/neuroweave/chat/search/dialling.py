"""Connections to checked addresses only, each within one deadline.

A name is resolved once, every address that comes is judged, and the judged address itself is dialled: a resolver that
changes its answer in between gains nothing. TLS and the Host header keep the name.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2
import httpx2

from neuroweave.chat.search.addresses import AddressPolicy, refused
from neuroweave.chat.search.sources import SearchError, TransientError

TRIED = 4  # addresses of one host

Resolve = Callable[[str, int], list[str]]


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system's resolver gives them."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Deadline:
    """The one moment when all of a request must be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    def left(self, wanted: float | None = None) -> float:
        """Seconds left, at most `wanted`. Raises TransientError after the end."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TransientError(f"took longer than {self.seconds:.3g} s")
        return left if wanted is None else min(left, wanted)


class TimedStream(httpcore2.NetworkStream):
    """A stream whose every wait ends at the deadline, however slowly bytes drip."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class CheckedBackend(httpcore2.NetworkBackend):
    """Dials what `policy` permits. Without a policy, anything: for a proxy, which does the judging then."""

    def __init__(self, policy: AddressPolicy | None, deadline: Deadline, *, resolve: Resolve) -> None:
        self._policy = policy
        self._deadline = deadline
        self._resolve = resolve
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        error: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses(host, port, timeout)[:TRIED]:
            try:
                stream = self._backend.connect_tcp(
                    address, port, self._deadline.left(timeout), local_address, socket_options
                )
                return TimedStream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failed:
                error = failed
        raise error

    def _addresses(self, host: str, port: int, timeout: float | None) -> list[str]:
        found = self._resolved(host, port, self._deadline.left(timeout))
        if self._policy is None or self._policy.allows(host.lower().rstrip("."), port):
            return found
        reasons = {address: refused(ipaddress.ip_address(address)) for address in found}
        public = [address for address, reason in reasons.items() if not reason]
        if found and not public:
            raise SearchError(f"{host}: not fetched: its address is {reasons[found[0]]}")
        return public

    def _resolved(self, host: str, port: int, seconds: float) -> list[str]:
        """Resolve in a thread that is left behind when it takes too long: nothing else ends getaddrinfo."""
        answers: queue.Queue[list[str] | Exception] = queue.Queue()

        def ask() -> None:
            try:
                answers.put(list(dict.fromkeys(self._resolve(host, port))))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise TransientError(f"{host}: looking up its address took longer than {seconds:.0f} s") from None
        if isinstance(answer, Exception):
            raise TransientError(f"{host}: its address cannot be found; is the name right, and is there a network?")
        return answer


class PoolTransport(httpx2.BaseTransport):
    """What httpx2 sends its requests through: a pool of httpcore2's, which takes a network backend, as httpx2's own
    transport does not."""

    def __init__(self, pool: httpcore2.ConnectionPool) -> None:
        self._pool = pool

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        url = request.url
        reply = self._pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(
            status_code=reply.status, headers=reply.headers, stream=PoolStream(reply), extensions=reply.extensions
        )

    def close(self) -> None:
        self._pool.close()


class PoolStream(httpx2.SyncByteStream):
    def __init__(self, reply: httpcore2.Response) -> None:
        self._reply = reply

    def __iter__(self) -> Any:
        return iter(self._reply.iter_stream())

    def close(self) -> None:
        self._reply.close()
