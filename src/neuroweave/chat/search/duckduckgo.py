"""DuckDuckGo, through the package ddgs, without a key.

Its engine is asked directly: `DDGS().text` answers a refusal and an empty result with the same exception, and asks
other engines than the one that the user named unless told.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from neuroweave.chat.search.sources import SearchError, Source, TransientError

SECONDS = 10


@runtime_checkable
class Engine(Protocol):
    def search(self, query: str) -> list[Any] | None: ...


class DuckDuckGo:
    """`engine`: made anew by ddgs for each attempt unless given: it goes about as another browser each time."""

    def __init__(self, *, engine: Engine | None = None, proxy: str | None = None) -> None:
        self._engine = engine
        self._proxy = proxy

    def ask(self, query: str, count: int) -> list[Source]:
        """One attempt."""
        from ddgs.exceptions import DDGSException, RatelimitException, TimeoutException

        engine = self._engine if self._engine is not None else made_engine(self._proxy)
        try:
            results = engine.search(query)
        except RatelimitException:
            raise TransientError("DuckDuckGo refuses: too many requests; ask less often") from None
        except TimeoutException:
            raise TransientError(f"DuckDuckGo does not answer within {SECONDS} s") from None
        except DDGSException as error:
            raise TransientError(f"DuckDuckGo cannot be reached ({str(error).partition(':')[0][:60]})") from None
        except Exception as error:  # of the parser, on a page of another kind
            raise SearchError(f"DuckDuckGo sent a page that cannot be read ({type(error).__name__})") from None
        if results is None:
            raise TransientError("DuckDuckGo refuses: it takes this machine for a robot; wait, or use another provider")
        found = [
            Source(title=result.title or result.href, address=result.href, text=result.body or "")
            for result in results
            if result.href
        ]
        return found[:count]


def made_engine(proxy: str | None) -> Engine:
    from ddgs.engines import ENGINES

    engine: Engine = ENGINES["text"]["duckduckgo"](proxy=proxy, timeout=SECONDS)
    return engine
