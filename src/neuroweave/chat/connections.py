"""Connections of the server that nobody can hold without asking for something."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for the head of a request
MOST = 512  # at once; more are closed at once


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits for the head of a first request as long as it likes."""

    clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.abort()
        else:
            self._start_or_stop_clock()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._start_or_stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.clock is not None:
            self.clock.cancel()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_or_stop_clock(self) -> None:
        if self._answering():
            if self.clock is not None:
                self.clock.cancel()
            self.clock = None
        elif self.clock is None:
            self.clock = self.loop.call_later(HEAD_SECONDS, self._late)

    def _late(self) -> None:
        self.clock = None
        if not self._answering():
            self.transport.close()
