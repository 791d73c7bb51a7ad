"""Tavily's search API (docs.tavily.com, POST /search). The key comes from the environment and goes into a header."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from neuroweave.chat.search.dates import parse_date
from neuroweave.chat.search.sources import SearchError, Source, score_of
from neuroweave.chat.search.web import WebClient, raise_for_status

ADDRESS = "https://api.tavily.com/search"
KEY = "TAVILY_API_KEY"
MOST = 20
SPENT = (432, 433)  # statuses for a plan that is used up


class Tavily:
    def __init__(self, key: SecretStr, *, client: WebClient, address: str = ADDRESS) -> None:
        self._key = key
        self._client = client
        self._address = address

    def ask(self, query: str, count: int) -> list[Source]:
        """One attempt."""
        reply = self._client.send(
            self._address,
            method="POST",
            headers={"Authorization": f"Bearer {self._key.get_secret_value()}"},
            content={"query": query, "max_results": min(count, MOST), "search_depth": "basic"},
            follow=False,
        )
        if reply.status in SPENT:
            raise SearchError(f"Tavily answers {reply.status}: the plan of the key in {KEY} is used up")
        raise_for_status(reply, "Tavily", key=KEY)
        results = listed(reply.json("Tavily"), "results")
        return [source for source in map(source_from, results) if source.address]


def source_from(result: dict[str, Any]) -> Source:
    address = str(result.get("url") or "")
    return Source(
        title=" ".join(str(result.get("title") or "").split()) or address,
        address=address,
        text=str(result.get("content") or "").strip(),
        date=parse_date(str(result.get("published_date") or "")),
        score=score_of(result.get("score")),
    )


def listed(data: Any, *path: str) -> list[dict[str, Any]]:
    """The objects in a list inside JSON; none where there is no such list."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
