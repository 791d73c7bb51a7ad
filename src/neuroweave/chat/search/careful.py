"""A provider that takes care: answers from the cache, not too often, again after a failure that may pass, each once."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from neuroweave.chat.search.cache import SourceCache
from neuroweave.chat.search.sources import SearchError, Source, TransientError, deduplicated

TRIES = 3
FIRST_WAIT = 0.5  # seconds; doubled each time, and up to as much again by chance
PATIENCE = 15.0  # who asks to wait longer is not asked again
LONGEST_QUERY = 400  # characters; Brave refuses more
SPARE = 5  # results asked for beyond those wanted: some are doubles

COMPARED = 3  # times as many results are looked at as are wanted
WEB = re.compile(r"https?://", re.IGNORECASE)  # of no other kind is a source that anybody could follow

Ask = Callable[[str, int], list[Source]]


class Pace:
    """At most one call per `interval` seconds for each name. Threads share it."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()
        self._next: dict[str, float] = {}

    def wait(self, name: str, interval: float) -> None:
        with self._turn:
            now = self._clock()
            at = max(now, self._next.get(name, now))
            self._next[name] = at + interval
        if at > now:
            self._sleep(at - now)


PACE = Pace()


class CarefulProvider:
    """Asks `ask` (query, count), which makes one attempt. `name` tells all that answers depend on, and no secret."""

    def __init__(
        self,
        name: str,
        ask: Ask,
        *,
        interval: float = 0.0,
        cache: SourceCache | None = None,
        pace: Pace = PACE,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self._ask = ask
        self._interval = interval
        self._cache = cache
        self._pace = pace
        self._sleep = sleep
        self._chance = chance

    def __repr__(self) -> str:
        return f"CarefulProvider({self.name!r})"

    def search(self, query: str, *, count: int) -> list[Source]:
        """As `Provider.search`."""
        query = " ".join(query.split())[:LONGEST_QUERY].strip()
        if not query or count < 1:
            return []
        if self._cache is not None and (kept := self._cache.get(self.name, query, count)):
            return kept
        results = [each for each in self._tried(query, count + SPARE) if WEB.match(each.address)]
        found = deduplicated(results[: COMPARED * (count + SPARE)])[:count]
        if self._cache is not None and found:
            self._cache.put(found, self.name, query, count)
        return found

    def _tried(self, query: str, count: int) -> list[Source]:
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=lambda state: (
                stop_after_attempt(TRIES)(state)
                or asked_wait(state) > PATIENCE
                or (state.seconds_since_start or 0) > PATIENCE
            ),
            wait=self._pause,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(self._attempt, query, count)

    def _attempt(self, query: str, count: int) -> list[Source]:
        self._pace.wait(self.name, self._interval)
        try:
            return self._ask(query, count)
        except SearchError:
            raise
        except Exception as error:  # whatever a service sends, the chat goes on
            raise SearchError(f"{self.name} sent what cannot be read ({type(error).__name__}: {error})") from error

    def _pause(self, state: RetryCallState) -> float:
        backoff = FIRST_WAIT * 2 ** (state.attempt_number - 1) * (1 + self._chance())
        return max(backoff, asked_wait(state))


def asked_wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or 0.0) if isinstance(error, TransientError) else 0.0
