"""Where answers are looked up: `provider_of("local:docs").search("how do I ...", count=5)` gives ranked `Source`s.

Providers: a folder of documents with an index beside it, a SearXNG instance, DuckDuckGo, Tavily, Brave. Everything that
comes from outside is data of unknown origin: fetched from checked addresses only, within limits, and read in a process
of its own. Needs `pip install "neuroweave[chat]"`; see `docs/search.md`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from neuroweave.chat.search.sources import Provider, SearchError, Source

if TYPE_CHECKING:
    from neuroweave.chat.search.fetching import Fetcher, with_page_text
    from neuroweave.chat.search.local import LocalFolder
    from neuroweave.chat.search.providers import SPECS, provider_of, require_search_extra

__all__ = [
    "SPECS",
    "Fetcher",
    "LocalFolder",
    "Provider",
    "SearchError",
    "Source",
    "provider_of",
    "require_search_extra",
    "with_page_text",
]

# Imported on first use: each provider needs only what it needs.
_PLACES = {
    "fetching": ("Fetcher", "with_page_text"),
    "local": ("LocalFolder",),
    "providers": ("SPECS", "provider_of", "require_search_extra"),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"neuroweave.chat.search.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
