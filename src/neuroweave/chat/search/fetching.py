"""Pages of results, fetched safely: only from checked addresses, within limits, and read in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from neuroweave.chat.search.addresses import AddressPolicy, checked_url, shown
from neuroweave.chat.search.cache import SourceCache
from neuroweave.chat.search.careful import PACE, Pace
from neuroweave.chat.search.dialling import Deadline, Resolve, system_addresses
from neuroweave.chat.search.reading_process import ReadingProcess
from neuroweave.chat.search.sources import Provider, SearchError, Source
from neuroweave.chat.search.web import Limits, Reply, WebClient, raise_for_status

LIMITS = Limits(total=15.0, body=8 << 20)
INTERVAL = 0.3  # seconds between two pages of one host
READING = 8.0  # seconds to read one
CHARACTERS = 100_000  # of a page
AT_ONCE = 6
MOST = 3
ALL_PAGES = 12.0  # seconds for all of them
MEDIA_TYPES = {
    "text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "text/markdown": "markdown",
    "application/pdf": "pdf",
}  # fmt: skip


class Fetcher:
    """Reads web pages. Threads may share it.

    `allow_hosts`: hosts that may be private (`localhost:8888`, `wiki.lan`). `any_port`: public hosts on any port.
    `proxy`: to go through; none is taken from the environment.
    """

    def __init__(
        self,
        *,
        allow_hosts: Iterable[str] = (),
        any_port: bool = False,
        limits: Limits = LIMITS,
        cache: SourceCache | None = None,
        proxy: str | None = None,
        pace: Pace = PACE,
        resolve: Resolve = system_addresses,
    ) -> None:
        self._policy = AddressPolicy(frozenset(allow_hosts), any_port)
        self._limits = limits
        self._cache = cache
        self._proxy = proxy
        self._pace = pace
        self._resolve = resolve

    def fetch(self, address: str, *, seconds: float | None = None) -> Source:
        """The page at an address: its title, text and date; `address` is where it was in the end.

        `seconds`: a shorter time than the limits have. Raises SearchError, with the reason.
        """
        if self._cache is not None and (kept := self._cache.get("page", address)):
            return kept[0]
        host = checked_url(address, self._policy).host
        deadline = Deadline(self._limits.total if seconds is None else min(self._limits.total, seconds))
        self._pace.wait(host, INTERVAL)
        limits = replace(self._limits, total=deadline.left())
        client = WebClient(self._policy, limits=limits, proxy=self._proxy, resolve=self._resolve)
        with ReadingProcess() as reader:  # one for each page: none can hold up another
            reader.warm()
            reply = client.send(address)
            raise_for_status(reply, shown(address))
            page = read_page(reply, reader, min(READING, deadline.left()))
        if self._cache is not None:
            self._cache.put([page], "page", address)
        return page


def read_page(reply: Reply, reader: ReadingProcess, seconds: float) -> Source:
    """Raises SearchError for a page that is none, or empty."""
    where = shown(reply.address)
    try:
        document = reader.read(
            reply.body, kind=page_kind(reply), name=where, charset=reply.charset, seconds=seconds
        )  # fmt: skip
    except ValueError as error:
        raise SearchError(f"{where}: {error}") from None
    text = document.text[:CHARACTERS]
    if not text.strip():
        raise SearchError(f"{where}: no text in it")
    return Source(document.title, reply.address, text, document.date)


def page_kind(reply: Reply) -> str:
    """Raises ValueError for what is no page of text."""
    start = reply.body[:512].lstrip().lower()
    if reply.body.startswith(b"%PDF-"):
        return "pdf"
    if not reply.media_type and start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if reply.media_type not in MEDIA_TYPES:
        kind = reply.media_type[:60] or "of no type"
        raise ValueError(f"is {kind}; only HTML, plain text, Markdown and PDF are read")
    return MEDIA_TYPES[reply.media_type]


def with_page_text(
    sources: Sequence[Source], *, fetcher: Fetcher | None = None, most: int = MOST, seconds: float = ALL_PAGES
) -> list[Source]:
    """The sources, the first `most` with the text of their page in place of the snippet.

    All pages are fetched at once and within `seconds`; a source whose page fails, or says less, keeps its snippet.
    """
    fetcher = fetcher or Fetcher()
    chosen = [at for at, source in enumerate(sources) if source.address.startswith(("http://", "https://"))][:most]
    if not chosen:
        return list(sources)
    found = list(sources)
    deadline = Deadline(seconds)
    executor = ThreadPoolExecutor(max_workers=min(AT_ONCE, len(chosen)), thread_name_prefix="pages")
    try:
        futures: dict[Future[Source], int] = {
            executor.submit(fetch_within, fetcher, sources[at].address, deadline): at for at in chosen
        }
        done, _ = wait(futures, timeout=seconds)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # what still runs ends at the deadline, too
    for future in done:
        if future.exception() is None:
            at = futures[future]
            found[at] = filled(sources[at], future.result())
        elif not isinstance(future.exception(), SearchError):
            future.result()  # a defect of ours
    return found


def fetch_within(fetcher: Fetcher, address: str, deadline: Deadline) -> Source:
    return fetcher.fetch(address, seconds=deadline.left())


def filled(source: Source, page: Source) -> Source:
    if len(page.text) <= len(source.text):
        return source
    return replace(source, title=source.title or page.title, text=page.text, date=source.date or page.date)


class PageProvider:
    """A provider whose first `pages` results come with the text of their page."""

    def __init__(self, provider: Provider, fetcher: Fetcher, *, pages: int = MOST) -> None:
        self._provider = provider
        self._fetcher = fetcher
        self._pages = pages

    @property
    def name(self) -> str:
        return self._provider.name

    def __repr__(self) -> str:
        return f"PageProvider({self.name!r})"

    def search(self, query: str, *, count: int) -> list[Source]:
        """As `Provider.search`."""
        return with_page_text(self._provider.search(query, count=count), fetcher=self._fetcher, most=self._pages)
