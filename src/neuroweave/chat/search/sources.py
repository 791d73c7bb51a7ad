"""What a search gives, what a provider is, and which of its results say the same."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlencode, urlsplit

from neuroweave.text.plain import without_controls

SHINGLE = 5  # words
TITLE_CHARACTERS = 300
ADDRESS_CHARACTERS = 4_000
LARGEST_SCORE = 1e300
ALIKE = 0.8  # of the shorter text's shingles
FEWEST_WORDS = 20  # below this, texts are alike only when they are equal
COMPARED = 20_000  # characters of a text
# Parameters that say how a reader came to a page, not which page it is.
TRACKING = re.compile(r"utm_.*|gclid|fbclid|msclkid|mc_[ce]id|igshid|yclid|srsltid", re.IGNORECASE)


class SearchError(ValueError):
    """A search, or one page, failed; the message says why and what to do. Finding nothing is no error."""

    def __init__(self, message: str) -> None:
        super().__init__(without_controls(message))  # parts of it may come from outside


class TransientError(SearchError):
    """A failure that may be gone on the next try. `retry_after`: seconds that the other side asks to wait."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Source:
    """One result. `address`: a URL, or a path inside the searched folder. `text`: its best passages, a page or a
    snippet. `score`: higher is better, comparable within one answer of one provider only. What a terminal would obey is
    taken out."""

    title: str
    address: str
    text: str
    date: datetime.date | None = None
    score: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("title", self.title), ("address", self.address)):
            object.__setattr__(self, name, " ".join(without_controls(value[:ADDRESS_CHARACTERS]).split()))
        object.__setattr__(self, "title", self.title[:TITLE_CHARACTERS])
        object.__setattr__(self, "text", without_controls(self.text))


@runtime_checkable
class Provider(Protocol):
    """Something that can be asked."""

    @property
    def name(self) -> str:
        """For people; holds no secret."""
        ...

    def search(self, query: str, *, count: int) -> list[Source]:
        """At most `count` sources, the best first; none where nothing was found. Raises SearchError."""
        ...


def score_of(value: Any) -> float:
    """A score as a service wrote it; 0 for what is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST_SCORE else 0.0


def normalized(address: str) -> str:
    """An address such that two spellings of one page are equal: no scheme, `www.`, fragment, trailing slash, tracking
    parameters or order of parameters. For comparing, not for fetching."""
    try:
        parts = urlsplit(address.strip())
        host, port = (parts.hostname or "").rstrip(".").removeprefix("www."), parts.port
    except ValueError:
        return address.strip()
    if port and (parts.scheme, port) not in (("http", 80), ("https", 443)):
        host = f"{host}:{port}"
    query = sorted(
        (name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if not TRACKING.fullmatch(name)
    )
    path = re.sub(r"/(index\.html?)?$", "", parts.path)
    return f"{host}{path}" + (f"?{urlencode(query)}" if query else "")


def deduplicated(sources: Sequence[Source]) -> list[Source]:
    """The sources in their order without those whose page, or nearly whose text, came before."""
    kept: list[Source] = []
    addresses: set[str] = set()
    texts: list[frozenset[str]] = []
    for source in sources:
        address, text = normalized(source.address), shingles(source.text)
        if address in addresses or any(alike(text, other) for other in texts):
            continue
        addresses.add(address)
        texts.append(text)
        kept.append(source)
    return kept


def shingles(text: str) -> frozenset[str]:
    """All runs of a few words; a short text is one run, an empty one none."""
    words = re.findall(r"\w+", text[:COMPARED].casefold())
    if len(words) < FEWEST_WORDS:
        return frozenset([" ".join(words)] if words else [])
    return frozenset(" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1))


def alike(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether the shorter text is nearly all in the other."""
    smaller = min(len(first), len(second))
    return smaller > 0 and len(first & second) >= ALIKE * smaller
