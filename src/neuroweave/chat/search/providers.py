"""What a user writes after `--search`, made into a provider."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from pydantic import SecretStr

from neuroweave.chat.search.cache import SourceCache
from neuroweave.chat.search.sources import Provider

PAGES = 3
SPECS = "local:DIR, searxng:URL, duckduckgo, tavily or brave"
# Seconds between two requests. Brave's smallest plan allows one a second; DuckDuckGo is not ours to hurry.
INTERVALS = {"searxng": 0.0, "duckduckgo": 2.0, "tavily": 0.6, "brave": 1.1}
NEEDED = {
    "local": ("resiliparse", "pypdf"), "duckduckgo": ("ddgs", "tenacity", "resiliparse", "pypdf"),
    **dict.fromkeys(("searxng", "tavily", "brave"), ("httpx2", "tenacity", "resiliparse", "pypdf")),
}  # fmt: skip


def provider_of(
    spec: str,
    *,
    pages: int = PAGES,
    allow_hosts: Sequence[str] = (),
    cache: SourceCache | None = None,
    use_cache: bool = True,
    proxy: str | None = None,
) -> Provider:
    """The provider that `spec` names: `local:DIR`, `searxng:URL`, `duckduckgo`, `tavily` or `brave`.

    The keys of the last two are taken from TAVILY_API_KEY and BRAVE_API_KEY. `pages`: of so many results on the web
    the page is read, in place of the snippet; 0 for none. `allow_hosts`: hosts on the local network whose pages may be
    read, too: `wiki.lan`, `localhost:8080`. `cache`: where answers from the web are kept; the user's by default.
    `proxy`: to go through, http or https. Raises ValueError for what is no provider or proxy, a folder that does not
    exist, a missing key or a missing package. Nothing is asked, and no folder read, before the first search.
    """
    kind, colon, value = spec.strip().partition(":")
    if kind not in MAKERS:
        raise ValueError(f"{spec_shown(spec)!r}: not a search provider; give {SPECS}")
    if bool(colon) != (kind in ("local", "searxng")) or (colon and not value):
        raise ValueError(f"{spec_shown(spec)!r}: not how {kind} is given; give {SPECS}")
    require_search_extra(kind)
    check_proxy(proxy)
    kept = (cache or SourceCache()) if use_cache else None
    provider = MAKERS[kind](value, kept, proxy)
    if kind == "local" or pages < 1:
        return provider
    from neuroweave.chat.search.fetching import Fetcher, PageProvider

    return PageProvider(provider, Fetcher(allow_hosts=allow_hosts, cache=kept, proxy=proxy), pages=pages)


def check_proxy(address: str | None) -> None:
    """Raises ValueError for what is no proxy's address; it is not repeated, since it may hold a password."""
    try:
        parts = urlsplit(address or "http://none")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port
        good = False
    if not good:
        raise ValueError("the proxy's address is not http://host:port, nor https://; give one of these")


def require_search_extra(kind: str) -> None:
    """Raise ValueError, with what to install, unless the packages are there that a kind of provider needs."""
    if missing := [name for name in NEEDED[kind] if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{kind} search needs {', '.join(missing)}; pip install 'neuroweave[chat]'")


def local(value: str, cache: SourceCache | None, proxy: str | None) -> Provider:
    from neuroweave.chat.search.local import LocalFolder

    return LocalFolder(value)


def searxng(value: str, cache: SourceCache | None, proxy: str | None) -> Provider:
    from neuroweave.chat.search.careful import CarefulProvider
    from neuroweave.chat.search.searxng import Searxng

    instance = Searxng(value, proxy=proxy)
    name = f"searxng:{instance.address}"
    return CarefulProvider(name, instance.ask, interval=INTERVALS["searxng"], cache=cache)


def duckduckgo(value: str, cache: SourceCache | None, proxy: str | None) -> Provider:
    from neuroweave.chat.search.careful import CarefulProvider
    from neuroweave.chat.search.duckduckgo import DuckDuckGo

    return CarefulProvider("duckduckgo", DuckDuckGo(proxy=proxy).ask, interval=INTERVALS["duckduckgo"], cache=cache)


def tavily(value: str, cache: SourceCache | None, proxy: str | None) -> Provider:
    from neuroweave.chat.search.careful import CarefulProvider
    from neuroweave.chat.search.tavily import KEY, Tavily
    from neuroweave.chat.search.web import WebClient

    service = Tavily(key_from(KEY, "tavily"), client=WebClient(proxy=proxy))
    return CarefulProvider("tavily", service.ask, interval=INTERVALS["tavily"], cache=cache)


def brave(value: str, cache: SourceCache | None, proxy: str | None) -> Provider:
    from neuroweave.chat.search.brave import KEY, Brave
    from neuroweave.chat.search.careful import CarefulProvider
    from neuroweave.chat.search.web import WebClient

    service = Brave(key_from(KEY, "brave"), client=WebClient(proxy=proxy))
    return CarefulProvider("brave", service.ask, interval=INTERVALS["brave"], cache=cache)


MAKERS: dict[str, Callable[[str, SourceCache | None, str | None], Provider]] = {
    "local": local,
    "searxng": searxng,
    "duckduckgo": duckduckgo,
    "tavily": tavily,
    "brave": brave,
}


def key_from(variable: str, kind: str) -> SecretStr:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{kind} needs a key; set the environment variable {variable}")
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise ValueError(f"{variable} does not hold a key: it has spaces or letters in it that no key has")
    return SecretStr(key)


def spec_shown(spec: str) -> str:
    """A spec without what may be a password in it."""
    return spec if "@" not in spec else f"{spec.partition(':')[0]}:..."
