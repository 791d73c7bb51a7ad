"""Brave's web search API (api.search.brave.com). The key comes from the environment and goes into a header."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from neuroweave.chat.search.dates import parse_date
from neuroweave.chat.search.sources import Source
from neuroweave.chat.search.tavily import listed
from neuroweave.chat.search.web import WebClient, raise_for_status

ADDRESS = "https://api.search.brave.com/res/v1/web/search"
KEY = "BRAVE_API_KEY"
MOST = 20
MOST_WORDS = 50


class Brave:
    def __init__(self, key: SecretStr, *, client: WebClient, address: str = ADDRESS) -> None:
        self._key = key
        self._client = client
        self._address = address

    def ask(self, query: str, count: int) -> list[Source]:
        """One attempt."""
        parameters = {
            "q": " ".join(query.split()[:MOST_WORDS]),
            "count": str(min(count, MOST)),
            "text_decorations": "false",
        }
        headers = {"Accept": "application/json", "X-Subscription-Token": self._key.get_secret_value()}
        reply = self._client.send(self._address, parameters=parameters, headers=headers, follow=False)
        raise_for_status(reply, "Brave", key=KEY)
        results = listed(reply.json("Brave"), "web", "results")
        return [source for source in map(source_from, results) if source.address]


def source_from(result: dict[str, Any]) -> Source:
    address = str(result.get("url") or "")
    more = result.get("extra_snippets")
    snippets = [result.get("description"), *(more if isinstance(more, list) else [])]
    return Source(
        title=" ".join(str(result.get("title") or "").split()) or address,
        address=address,
        text="\n".join(" ".join(str(each).split()) for each in snippets if each),
        date=parse_date(str(result.get("page_age") or "")),
    )
