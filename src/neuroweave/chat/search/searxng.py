"""A SearXNG (or searx) instance, asked through its JSON API.

Schema: searx/webutils.py, `get_json_response`, and docs.searxng.org/dev/search_api.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import httpx2
from pydantic import SecretStr

from neuroweave.chat.search.addresses import PORTS, AddressPolicy, checked_url
from neuroweave.chat.search.dates import parse_date
from neuroweave.chat.search.sources import SearchError, Source, score_of
from neuroweave.chat.search.web import Limits, WebClient, raise_for_status

LIMITS = Limits(total=30.0)  # it waits for other engines itself


class Searxng:
    """`address`: of the instance, `http://localhost:8888` or with a path. Its host may be a local one: the user named
    it. A user name and password in the address are sent as basic authentication and shown nowhere."""

    def __init__(self, address: str, *, proxy: str | None = None, limits: Limits = LIMITS) -> None:
        try:
            url = httpx2.URL(address)
            port = url.port or PORTS[url.scheme]
        except (httpx2.InvalidURL, KeyError, ValueError, TypeError):
            url = httpx2.URL("")
        if not url.host or url.query or url.fragment:
            raise ValueError("searxng: takes an address such as searxng:http://localhost:8888")
        self._login = SecretStr(f"{url.username}:{url.password}") if url.userinfo else None
        path = re.sub(r"/(search)?/*$", "", url.path)
        self.address = str(url.copy_with(userinfo=b"", path=path or "/")).rstrip("/")
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        policy = AddressPolicy(allow_hosts=frozenset([f"{host}:{port}", f"{host}:443"]))  # it may lead to https
        try:
            checked_url(self.address, policy)
        except SearchError as error:
            raise ValueError(f"searxng: {error}") from None
        self._client = WebClient(policy, limits=limits, proxy=proxy)

    def ask(self, query: str, count: int) -> list[Source]:
        """One attempt; `count` is not limited by the API, a page has some twenty results."""
        who = f"SearXNG at {self.address}"
        headers = {"Accept": "application/json"}
        if self._login is not None:
            login = base64.b64encode(self._login.get_secret_value().encode()).decode()
            headers |= {"Authorization": f"Basic {login}"}
        parameters = {"q": query, "format": "json"}
        reply = self._client.send(f"{self.address}/search", parameters=parameters, headers=headers)
        if reply.status == 403:
            raise SearchError(
                f"{who} answers 403: its JSON format is off, or its limiter refuses; add json to search.formats in "
                f"its settings.yml, and restart it"
            )
        raise_for_status(reply, who)
        return sources_from(reply.json(who), who)


def sources_from(data: Any, who: str) -> list[Source]:
    """Raises SearchError where the data has another schema, or no engine of the instance has answered."""
    results = data.get("results") if isinstance(data, dict) else None
    if not isinstance(results, list):
        error = data.get("error") if isinstance(data, dict) else None
        raise SearchError(f"{who} sent no results: {str(error)[:160]}" if error else f"{who} sent no list of results")
    found = []
    for result in results:
        if not isinstance(result, dict) or not isinstance(address := result.get("url"), str):
            continue
        date = parse_date(str(result.get("publishedDate") or result.get("pubdate") or ""))
        found.append(
            Source(
                title=one_line(result.get("title")) or address,
                address=address,
                text=one_line(result.get("content")),
                date=date,
                score=score_of(result.get("score")),
            )
        )
    unresponsive = data.get("unresponsive_engines")
    if not found and isinstance(unresponsive, list) and unresponsive:
        names = ", ".join(engine_failure(each) for each in unresponsive[:5])
        raise SearchError(f"{who} got no answer from its engines ({names})")
    return found


def engine_failure(entry: Any) -> str:
    return ": ".join(one_line(each)[:60] for each in entry[:2]) if isinstance(entry, list | tuple) else one_line(entry)


def one_line(value: Any) -> str:
    return " ".join(str(value or "").split())
